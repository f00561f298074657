"""Static facts: occupancy against LLVM's own figure, limits, instruction mix, refusals."""

from __future__ import annotations

import json
import re

import pytest
from asm_snippets import kernel_text
from gluon_kernels import compile_decode

from patune.emulator import Program, StaticFacts, static_facts
from patune.emulator.facts import instruction_mix, occupancy
from patune.errors import EmulatorError, InvalidValueError


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("waves_per_eu", [0, 2])
def test_facts_of_a_real_build(arch: str, waves_per_eu: int) -> None:
    build = compile_decode(arch, "fp16", 64, 64, waves_per_eu=waves_per_eu)
    asm = build.asm["amdgcn"]
    facts = static_facts(asm, build.metadata.shared, 4)
    assert facts.arch == arch
    assert facts.shared_b == build.metadata.shared > 0
    assert facts.total_vgpr == int(re.search(r"next_free_vgpr (\d+)", asm)[1])  # type: ignore[index]
    assert facts.mix["all"] == len(Program(asm, facts.shared_b).lines)
    assert facts.mix["mfma"] == len(re.findall(r"\n\tv_mfma", asm))
    assert facts.mix["barriers"] == len(re.findall(r"\n\ts_barrier", asm))
    llvm = int(re.search(r"; Occupancy: (\d+)", asm)[1])  # type: ignore[index]
    assert (
        static_facts(asm, 0, 4).waves_per_simd == llvm
    )  # LLVM does not know the dynamic shared memory
    document = json.loads(json.dumps(facts.to_dict()))
    assert StaticFacts.from_dict(document) == facts


@pytest.mark.parametrize(
    ("arch", "vgprs", "sgprs", "shared_b", "num_warps", "expected"),
    [
        ("gfx942", 64, 60, 0, 4, (8, "waves")),
        ("gfx942", 65, 60, 0, 4, (7, "vgpr")),  # granule 8: 72 registers
        ("gfx942", 129, 60, 0, 4, (3, "vgpr")),
        ("gfx942", 257, 60, 0, 4, (1, "vgpr")),
        ("gfx942", 257, 60, 0, 8, (0, "vgpr")),  # eight waves on four SIMDs do not fit at one each
        ("gfx942", 64, 102, 0, 4, (7, "sgpr")),
        ("gfx942", 64, 60, 16384, 4, (4, "lds")),
        ("gfx942", 64, 60, 16385, 4, (3, "lds")),
        ("gfx942", 64, 60, 65536, 8, (2, "lds")),
        ("gfx942", 64, 60, 65537, 4, (0, "lds")),
        ("gfx950", 64, 60, 65537, 4, (2, "lds")),
        ("gfx950", 64, 60, 163840, 1, (0.25, "lds")),
        ("gfx950", 128, 60, 1280, 1, (4, "vgpr")),
    ],
)  # fmt: skip
def test_occupancy(
    arch: str, vgprs: int, sgprs: int, shared_b: int, num_warps: int, expected: tuple[float, str]
) -> None:
    assert occupancy(arch, vgprs, sgprs, shared_b, num_warps) == expected


def test_instruction_mix() -> None:
    lines = ["v_exp_f32_e32 v0, v0", ".LLOOP:", "v_mov_b32_dpp v0, v1 row_shr:1", "ds_bpermute_b32 v0, v1, v2", "buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "global_store_dword v0, v1, s[0:1]", "s_cbranch_scc1 .LLOOP", "s_mov_b32 s0, 0", "s_endpgm"]  # fmt: skip
    assert instruction_mix(lines) == {
        "transcendental": 1, "cross_lane": 2, "global_load": 1, "global_load_16b": 1, "global_store": 1, "branches": 1, "valu": 2, "salu": 1, "all": 8,
    }  # fmt: skip


def test_other_texts_are_refused() -> None:
    text = kernel_text("s_nop 0", ["ptr"])
    assert static_facts(text, 0, 1).total_vgpr == 96
    with pytest.raises(EmulatorError, match="gfx90a is not emulated; allowed: gfx942, gfx950"):
        static_facts(text.replace("gfx942", "gfx90a"), 0, 1)
    with pytest.raises(EmulatorError, match="not the assembly text of an AMD kernel"):
        Program("ld.global.f32", 0)
    with pytest.raises(EmulatorError, match="next_free_vgpr is missing"):
        Program(text.replace("amdhsa_next_free_vgpr", "amdhsa_other"), 0)
    with pytest.raises(InvalidValueError, match="num_warps"):
        static_facts(text, 0, 0)
