"""Static facts of a compiled AMD kernel, read from its assembly text: registers, spills, occupancy, instruction mix."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from patune.emulator.metadata import body_lines, parse_metadata
from patune.errors import EmulatorError
from patune.record import Record, check_int
from patune.target import ARCHS

# Per compute unit of CDNA3 and CDNA4 (LLVM AMDGPUUsage and target parser).
SIMDS = 4
WAVES_PER_SIMD_LIMIT = 8
VECTOR_REGISTERS = 512  # unified VGPRs and AGPRs per lane and SIMD
VECTOR_GRANULE = 8
SCALAR_WAVES = ((80, 8), (88, 8), (100, 8))  # scalar registers used -> waves; beyond: 7
WAVES_WITH_MANY_SGPRS = 7  # more than 100 of the 800 scalar registers of a SIMD
SHARED_GRANULE_B = {"gfx942": 512, "gfx950": 1280}

_CLASSES = (
    ("mfma", r"v_mfma|v_smfmac"),
    ("transcendental", r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("accumulator_moves", r"v_accvgpr"),
    ("cross_lane", r"ds_(?:b?permute|swizzle)|v_permlane|v_\w+_dpp"),
    ("lds_load", r"ds_read"),
    ("lds_store", r"ds_write"),
    ("global_load", r"(?:global|buffer|flat)_load"),
    ("global_load_16b", r"(?:global|buffer|flat)_load_dwordx4"),
    ("global_store", r"(?:global|buffer|flat)_store"),
    ("scratch", r"scratch_"),
    ("waits", r"s_waitcnt"),
    ("barriers", r"s_barrier"),
    ("branches", r"s_c?branch"),
    ("valu", r"v_(?!mfma|smfmac)"),
    ("salu", r"s_(?!waitcnt|barrier|c?branch|nop|load|endpgm)"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFacts(Record):
    """What a build needs of the hardware, without running it.

    Attributes:
        arch: gfx942 or gfx950.
        vgpr, agpr: registers that the code uses per lane.
        total_vgpr: vector registers that a wave gets allocated (``waves_per_eu`` may pad it).
        sgpr: scalar registers.
        vgpr_spills, sgpr_spills: registers that live in memory.
        scratch_b: private memory of one lane.
        shared_b: shared memory of one workgroup.
        code_b: size of the code.
        waves_per_simd: waves that fit on one of the four SIMDs of a compute unit; 0 when a workgroup does not fit at all.
        limiter: what the next workgroup would not fit for: ``vgpr``, ``sgpr``, ``lds`` or ``waves``.
        mix: instructions in the text by class (a class may contain another, ``valu`` has ``transcendental``).
    """

    arch: str
    vgpr: int
    agpr: int
    total_vgpr: int
    sgpr: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_b: int
    shared_b: int
    code_b: int
    waves_per_simd: float
    limiter: str
    mix: dict[str, int]


def static_facts(asm: str, shared_bytes: int, num_warps: int) -> StaticFacts:
    """Read a build's facts.

    Args:
        asm: ``asm["amdgcn"]`` of the build.
        shared_bytes: ``metadata.shared`` of the build; the text does not say it.
        num_warps: wavefronts of a workgroup.

    Raises:
        EmulatorError: the text is not that of a gfx942 or gfx950 kernel.
    """
    check_int("num_warps", num_warps, low=1, high=16)
    check_int("shared_bytes", shared_bytes, low=0)
    metadata = parse_metadata(asm)
    shared_b = max(shared_bytes, metadata.shared_b)
    sgpr = _number(asm, r"\.sgpr_count:\s+(\d+)")
    waves, limiter = occupancy(metadata.arch, metadata.vector_registers, sgpr, shared_b, num_warps)
    return StaticFacts(
        arch=metadata.arch,
        vgpr=_number(asm, r"; NumVgprs: (\d+)"),
        agpr=_number(asm, r"; NumAgprs: (\d+)"),
        total_vgpr=metadata.vector_registers,
        sgpr=sgpr,
        vgpr_spills=_number(asm, r"\.vgpr_spill_count:\s+(\d+)"),
        sgpr_spills=_number(asm, r"\.sgpr_spill_count:\s+(\d+)"),
        scratch_b=metadata.scratch_b,
        shared_b=shared_b,
        code_b=_number(asm, r"; codeLenInByte = (\d+)"),
        waves_per_simd=waves,
        limiter=limiter,
        mix=instruction_mix(body_lines(asm, metadata.name)),
    )


def occupancy(
    arch: str, vector_registers: int, sgpr: int, shared_b: int, num_warps: int
) -> tuple[float, str]:
    """(waves per SIMD, what limits them) of a kernel whose workgroups fill a compute unit."""
    allocated = max(_round_up(vector_registers, VECTOR_GRANULE), VECTOR_GRANULE)
    by_vgpr = min(WAVES_PER_SIMD_LIMIT, VECTOR_REGISTERS // allocated)
    by_sgpr = WAVES_PER_SIMD_LIMIT if sgpr <= SCALAR_WAVES[-1][0] else WAVES_WITH_MANY_SGPRS
    shared = _round_up(shared_b, SHARED_GRANULE_B[arch])
    workgroups = {
        "lds": ARCHS[arch].shared_limit_b // shared if shared else SIMDS * WAVES_PER_SIMD_LIMIT,
        "vgpr": by_vgpr * SIMDS // num_warps,
        "sgpr": by_sgpr * SIMDS // num_warps,
        "waves": WAVES_PER_SIMD_LIMIT * SIMDS // num_warps,
    }
    fewest = min(workgroups.values())
    # "waves" is the hardware's own limit: named only when nothing that the build could change is as tight.
    limiter = "waves" if workgroups["waves"] == fewest else next(k for k, v in workgroups.items() if v == fewest)  # fmt: skip
    return fewest * num_warps / SIMDS, limiter


def instruction_mix(lines: list[str]) -> dict[str, int]:
    """Instructions of a kernel's text by class; classes that do not occur are left out."""
    mnemonics = Counter(line.split(" ", 1)[0] for line in lines if not line.endswith(":"))
    mix = {
        name: sum(n for mnemonic, n in mnemonics.items() if re.match(pattern, mnemonic))
        for name, pattern in _CLASSES
    }
    return {name: n for name, n in mix.items() if n} | {"all": mnemonics.total()}


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def _number(asm: str, pattern: str) -> int:
    match = re.search(pattern, asm)
    if match is None:
        raise EmulatorError(
            f"the assembly text lacks what {pattern!r} looks for: not a Triton AMD build?"
        )
    return int(match[1])
