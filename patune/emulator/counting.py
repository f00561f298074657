"""Counted work: issue slots of executed instructions, and how they spread over compute units and their SIMDs.

A rule for ranking builds that ran in the emulator. It is never a time: docs/emulation.md says what it leaves out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from patune.errors import reject
from patune.record import check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

# A SIMD starts one instruction of a wave per 4 cycles (64 lanes, 16 wide): that is one slot.
SIMDS = 4  # of a CDNA compute unit
TRANSCENDENTAL_SLOTS = 4  # quarter rate: WriteTrans32 in LLVM's SISchedule.td
_TRANSCENDENTAL = re.compile(r"^v_(?:exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f(?:16|32)(?:_|$)")
_MFMA = re.compile(r"^v_mfma_\w+?_(16x16|32x32)x(\d+)_?(\w*)$")
# Passes of 4 cycles per matrix instruction. LLVM's SISchedule.td, SIDPGFX940FullSpeedModel: 16x16x{16,32} take 4 passes and
# 32x32x{8,16} take 8. gfx950's doubled-K half and bfloat16 shapes take the same (rocm-libraries, origami, instruction cycles
# 16 and 32), its 8-bit 16x16x128 and 32x32x64 twice as many. K alone does not decide: 16x16x16 half and 16x16x32 8-bit are equal.
MFMA_SLOTS = {"16x16": 4, "32x32": 8}
WIDE_MFMA_SLOTS = {("16x16", 128): 8, ("32x32", 64): 16}


def issue_slots(mnemonic: str) -> int:
    """Slots that one execution of an instruction by one wave counts as."""
    if match := _MFMA.match(mnemonic):
        shape, depth = match[1], int(match[2])
        return WIDE_MFMA_SLOTS.get((shape, depth), MFMA_SLOTS[shape])
    return TRANSCENDENTAL_SLOTS if _TRANSCENDENTAL.match(mnemonic) else 1


def busiest_simd_slots(
    slots_per_workgroup: Sequence[int] | npt.NDArray[np.int64],
    *,
    workgroups_total: int,
    num_warps: int,
    compute_units: int,
) -> float:
    """Slots of the SIMD that gets the most.

    Workgroups are dealt round-robin to compute units in launch order, and the waves of a compute unit, each with an equal share of its
    workgroup's slots, round-robin to its SIMDs. The emulated pattern repeats until all workgroups are dealt, so that one walk over a
    context stands for batch x KV heads equal ones.

    Args:
        slots_per_workgroup: of the emulated workgroups, in launch order.
        workgroups_total: workgroups of the whole launch.
        num_warps: waves of a workgroup.
        compute_units: of the device.

    Raises:
        InvalidValueError: nothing to deal, or nobody to deal to.
    """
    check_int("workgroups_total", workgroups_total, low=1)
    check_int("num_warps", num_warps, low=1)
    check_int("compute_units", compute_units, low=1)
    pattern = np.asarray(slots_per_workgroup, dtype=np.float64).reshape(-1)
    if not len(pattern):
        raise reject("slots_per_workgroup", list(pattern), "at least one emulated workgroup")
    workgroup = np.arange(workgroups_total)
    unit, turn = workgroup % compute_units, workgroup // compute_units
    share = pattern[workgroup % len(pattern)] / num_warps
    slots = np.zeros(compute_units * SIMDS)
    for wave in range(num_warps):
        simd = unit * SIMDS + (turn * num_warps + wave) % SIMDS
        slots += np.bincount(simd, weights=share, minlength=len(slots))
    return float(slots.max())
