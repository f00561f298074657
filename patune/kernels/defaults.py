"""Knobs for a key that nothing is stored for: a heuristic, and trial 0 of every sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.kernels.feasibility import padded_rows
from patune.kernels.knobs import MAX_SPLITS, REDUCE_CHUNKS, CdnaKnobs, HopperKnobs

if TYPE_CHECKING:
    from patune.problem import Problem, Workload
    from patune.target import Target


def tiles_of(workload: Workload, partition_tokens: int) -> int:
    """Tiles of a full-length context: more splits than that would leave some with nothing to do."""
    return -(-workload.context // partition_tokens)


def default_splits(workload: Workload, target: Target, partition_tokens: int) -> int:
    """About one workgroup per compute unit.

    128 workgroups on 132 SMs matched or beat 264 on every shape (H200, 2026-11-22), so rounding down is right.
    """
    return max(
        1,
        min(
            target.compute_units // workload.walks, tiles_of(workload, partition_tokens), MAX_SPLITS
        ),
    )


def _reduce_chunk(num_splits: int) -> int:
    """The smallest chunk that takes all splits in one step, up to 32: 32 splits took 2.7 us at 16 and 2.05 us at 32 (H200)."""
    return next((c for c in REDUCE_CHUNKS if c >= num_splits and c >= 16), 32)


def default_knobs(problem: Problem, workload: Workload, target: Target) -> HopperKnobs | CdnaKnobs:
    """Knobs that are feasible for every supported problem, and close to the best of the measured grids on sm_90."""
    family = target.limits.family
    rows = padded_rows(problem, family)
    if family == "hopper_wgmma":
        # (64, 3, 4) is within 1.3 % of the best on page 16 HND, (128, 3, 4) on page 1024 AITER (H200, 2026-11-22).
        tile = 128 if problem.block_size >= 1024 and rows <= 16 else 64
        stages, warps = 3, 4
        if problem.windowed and tile == 128 and rows == 8:
            # A window has a tile or two, so a ring only costs workgroups per SM: window 128, batch 128, page 1024, 8 rows of 128:
            # 21.9 us with one stage, 30.0 us with three (H200, 2026-11-22). With 16 rows one stage spills 8 B (Triton 3.9).
            stages = 1
        if (
            rows > 32 and problem.head_dim >= 128
        ):  # 64 rows at 4 warps spill 40 B, 8 warps are clean
            tile, stages, warps = 128, 2, 8
        splits = default_splits(workload, target, tile)
        return HopperKnobs(
            partition_tokens=tile,
            num_splits=splits,
            num_stages=stages,
            num_warps=warps,
            reduce_chunk=_reduce_chunk(splits),
        )
    # 32 tokens per warp is the shortest contraction and takes the fewest registers: no spills up to 64 rows (triton 3.6 and 3.9, static).
    # Two warps keep the merge of 64 rows x 128 channels within gfx942's 64 KiB of LDS.
    tile, warps = (128, 4) if rows <= 16 else (64, 2)
    splits = default_splits(workload, target, tile)
    return CdnaKnobs(
        partition_tokens=tile,
        num_splits=splits,
        num_stages=1,
        num_warps=warps,
        reduce_chunk=_reduce_chunk(splits),
    )
