"""Waves in lockstep and memory: bounds, waits, traffic and races of each workgroup, and compiled kernels in batches of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from asm_snippets import LANE, kernel_text, run
from gluon_kernels import compile_async_sum, compile_decode, compile_softmax
from lockstep_waves import HEAD, WAVES, WORKGROUPS, dump, launch

from patune.emulator import Execution, Program, Traffic
from patune.errors import EmulatorError

# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_first_offending_wave_is_named() -> None:
    body = """
    s_cmp_ge_u32 s21, 7
    s_cselect_b32 s5, 0x1000, 0
    v_add_u32_e32 v3, s5, v1
    global_load_dword v4, v3, s[22:23]
    """
    with pytest.raises(EmulatorError, match=r"argument0\[4096\.\.4100\] of 256 bytes") as error:
        launch(body, [np.zeros(64, np.uint32), np.zeros(1)])
    assert "workgroup (1, 0, 0), wave 3, pc 12: global_load_dword v4" in str(error.value)


def test_shared_memory_ends_where_the_workgroup_s_own_ends() -> None:
    with pytest.raises(EmulatorError, match="bytes up to 260 of 256") as error:
        launch("s_lshl_b32 s5, s21, 2\ns_sub_u32 s5, s5, 8\ns_max_i32 s5, s5, 0\nv_add_u32_e32 v3, s5, v1\nds_read_b32 v4, v3", [np.zeros(1)] * 2, shared_b=256, watched=False)  # fmt: skip
    assert "workgroup (0, 0, 0), wave 3" in str(error.value)


DIRECT = """
s_load_dword s5, s[22:23], s26
s_waitcnt lgkmcnt(0)
s_add_u32 s28, s22, 0x100
s_addc_u32 s29, s23, 0
s_mov_b32 s30, 256
s_mov_b32 s31, 0x27000
s_lshl_b32 s34, s20, 8
s_mov_b32 m0, s34
v_add_u32_e32 v12, s34, v1
{before}
buffer_load_dword v1, s[28:31], 0 offen lds
s_cmp_lg_u32 s5, 1
s_cbranch_scc1 .LSKIP
s_waitcnt vmcnt(0)
.LSKIP:
ds_read_b32 v4, v12
s_waitcnt lgkmcnt(0)
s_lshl_b32 s35, s21, 8
v_add_u32_e32 v5, s35, v1
global_store_dword v5, v4, s[24:25]
s_waitcnt vmcnt(0)
"""


@pytest.mark.parametrize("partial", [False, True])
def test_a_wait_lands_only_the_loads_of_its_own_wave(partial: bool, both: Any) -> None:
    n = WAVES * WORKGROUPS
    waits = np.random.default_rng(2).integers(0, 2, n).astype(np.uint32)
    source = np.zeros(128, np.uint32)
    source[:n], source[64:] = waits, LANE + 1000
    out = np.zeros((n, 64), np.uint32)
    before = "s_mov_b64 exec, 0xfff" if partial else ""
    body = DIRECT.format(before=before).replace("ds_read", "s_mov_b64 exec, -1\nds_read")
    execution = both(lambda: launch(body, [source, out], shared_b=1024, watched=False))
    landed = waits[:, None].astype(bool) & ((12 if partial else 64) > LANE)
    np.testing.assert_array_equal(out, np.where(landed, source[64:], 0xA5A5_A5A5))
    moved = 4 * n * (12 if partial else 64)
    assert execution.lds_traffic == Traffic(load_b=4 * n * 64, store_b=moved)


def test_traffic_of_shared_memory_counts_active_lanes() -> None:
    body = "v_lshlrev_b32_e32 v2, 4, v0\nv_and_b32_e32 v2, 0x3ff, v2\nds_write_b64 v2, v[4:5]\ns_mov_b64 exec, 7\nds_read2_b32 v[6:7], v2 offset1:1\nds_write_b8 v2, v4"
    execution = run(body, [np.zeros(1)], waves=2, grid=(3, 1, 1), shared_b=1024)
    assert execution.lds_traffic == Traffic(load_b=6 * 3 * 8, store_b=6 * (64 * 8 + 3))
    program = Program(kernel_text(body, ["ptr"]), 1024)
    assert program.launch((1, 1, 1), 1, [np.zeros(1)], count=False).lds_traffic == Traffic()


def test_spills_with_offsets_that_differ_between_waves(both: Any) -> None:
    body = f"""
    s_lshl_b32 s5, s20, 2
    v_mov_b32_e32 v3, s21
    v_mov_b32_e32 v2, 9
    scratch_store_dword off, v2, off offset:8
    scratch_store_dword off, v3, s5
    scratch_load_dword v4, off, off offset:8
    s_waitcnt vmcnt(0)
    v_mov_b32_e32 v20, s26
    {dump(["v4"])}
    """
    n = WAVES * WORKGROUPS
    out = np.zeros(n, np.uint32)
    program = Program(kernel_text(HEAD + body, ["ptr", "ptr"], scratch_b=4 * WAVES), 0)
    execution = both(lambda: program.launch((WORKGROUPS, 1, 1), WAVES, [out, out]))
    np.testing.assert_array_equal(out, np.where(np.arange(n) % WAVES == 2, np.arange(n), 9))
    assert execution.spill_bytes == 3 * n * 256


# ---- races ----------------------------------------------------------------------------------------------------------

SAME_PLACE = "v_mov_b32_e32 v2, {}\nds_write_b32 v1, v2"


def test_different_values_in_one_instruction_are_a_race(both: Any) -> None:
    assert both(lambda: launch(SAME_PLACE.format("s2"), [np.zeros(1)] * 2)).races == ()
    found = both(lambda: launch(SAME_PLACE.format("s20"), [np.zeros(1)] * 2)).races
    assert [(r.workgroup, r.wave, r.other, r.byte, r.access) for r in found] == [
        (g, 3, other, 0, "write") for g in range(WORKGROUPS) for other in (0, 1, 2)
    ]
    # One wave of four differs, and it is not the last one.
    body = "s_cmp_eq_u32 s20, 1\ns_cselect_b32 s5, 9, 8\n" + SAME_PLACE.format("s5")
    found = both(lambda: launch(body, [np.zeros(1)] * 2)).races
    assert [(r.wave, r.other) for r in found] == [(3, 1)] * WORKGROUPS


def test_one_broken_workgroup_among_many(both: Any) -> None:
    body = "s_cmp_eq_u32 s2, 3\ns_cselect_b32 s5, s20, 8\n" + SAME_PLACE.format("s5")
    found = both(lambda: launch(body, [np.zeros(1)] * 2)).races
    assert {r.workgroup for r in found} == {3}


# ---- real kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_batches_of_any_size_agree_on_compiled_kernels(arch: str, both: Any) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((5, 1000), dtype=np.float32)
    build = compile_softmax(arch)
    softmax = Program(build.asm["amdgcn"], build.metadata.shared)
    outputs: list[np.ndarray] = []

    def run_softmax() -> Execution:
        outputs.append(np.full_like(x, np.nan))
        return softmax.launch((5, 1, 1), 4, [x, outputs[-1], 1000, 1000])

    assert both(run_softmax).races == ()
    np.testing.assert_array_equal(*outputs[-2:])

    build = compile_decode(arch, "bf16", 64, 64)
    decode = Program(build.asm["amdgcn"], build.metadata.shared)
    q, k, v = (
        (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for shape in ((16, 64), (4, 128, 64), (4, 128, 64))
    )
    table = np.array([2, 0, 3], np.int32)

    def run_decode() -> Execution:
        outputs.append(np.full((16, 64), np.nan, np.float32))
        arguments = [q, k, v, table, outputs[-1], 0.18, 300]
        return decode.launch((3, 1, 1), 4, arguments)

    execution = both(run_decode)
    assert execution.races == ()
    assert execution.lds_traffic.load_b > 0
    np.testing.assert_array_equal(*outputs[-2:])


def test_batches_of_any_size_agree_on_direct_to_lds_loads(both: Any) -> None:
    x = np.random.default_rng(0).integers(-8, 8, (5, 1024)).astype(np.float32)
    build = compile_async_sum()
    program = Program(build.asm["amdgcn"], build.metadata.shared)
    outputs: list[np.ndarray] = []

    def call() -> Execution:
        outputs.append(np.full(1024, np.nan, np.float32))
        return program.launch((3, 1, 1), 4, [x, outputs[-1], 5])

    execution = both(call)
    np.testing.assert_array_equal(outputs[-1], x.sum(0))
    np.testing.assert_array_equal(outputs[-2], x.sum(0))
    assert execution.lds_traffic == Traffic(load_b=3 * x.nbytes, store_b=3 * x.nbytes)
