"""Knobs for a key that nothing is stored for: a heuristic, which is trial 0 of every sweep, and what is left when even that does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.kernels.knobs import MAX_SPLITS, REDUCE_CHUNKS, CdnaKnobs, HopperKnobs

if TYPE_CHECKING:
    from patune.problem import Problem, Workload
    from patune.target import Target

# Accumulators (query rows x channels) that 4 warps hold: 64 x 128 spill 40 B and 32 x 256 24 B, 8 warps are clean (bf16; static, Triton 3.9).
MOST_PER_WARPGROUP = 4096
MOST_PER_PROGRAM = 4096  # the same for a CDNA program: 64 x 128 spill 3 to 88 registers (Triton 3.6, gfx942, static)
LEAST_TILES_PER_SPLIT = 4  # of a window; 16 splits of 4 tiles are best at batch 1 x 4096


def tiles_of(workload: Workload, partition_tokens: int) -> int:
    """Tiles of a full-length context: more splits than that would leave some with nothing to do."""
    return -(-workload.context // partition_tokens)


def default_splits(
    workload: Workload, target: Target, partition_tokens: int, per_unit: int = 1
) -> int:
    """About ``per_unit`` workgroups per compute unit.

    128 workgroups on 132 SMs matched or beat 264 on every bf16 shape (H200, 2026-11-22), so rounding down is right.
    """
    return max(
        1,
        min(
            per_unit * target.compute_units // workload.walks,
            tiles_of(workload, partition_tokens),
            MAX_SPLITS,
        ),
    )


def _reduce_chunk(num_splits: int) -> int:
    """The smallest chunk that takes all splits in one step, up to 32: 32 splits took 2.7 us at 16 and 2.05 us at 32 (H200)."""
    return next((c for c in REDUCE_CHUNKS if c >= num_splits and c >= 16), 32)


def default_knobs(problem: Problem, workload: Workload, target: Target) -> HopperKnobs | CdnaKnobs:
    """Knobs that are feasible for every supported problem, and close to the best of the measured grids on sm_90."""
    rows = 1 << (problem.rows - 1).bit_length()
    if target.limits.family == "hopper_wgmma":
        return _hopper_knobs(problem, workload, target, rows)
    return _cdna_knobs(problem, workload, target, rows)


def _cdna_knobs(problem: Problem, workload: Workload, target: Target, rows: int) -> CdnaKnobs:
    # 32 tokens per warp is the shortest contraction and takes the fewest registers; two warps with many rows leave each 512 of them.
    tile, warps = (128, 4) if rows <= 16 and problem.head_dim <= 128 else (64, 2)
    splits = default_splits(workload, target, tile)
    # accumulators of more than 32 rows x 128 channels do not fit beside the operands: several programs share the rows
    most = max(16, MOST_PER_PROGRAM // problem.head_dim)
    return CdnaKnobs(
        partition_tokens=tile,
        num_splits=splits,
        num_stages=1,
        num_warps=warps,
        reduce_chunk=_reduce_chunk(splits),
        program_rows=most if rows > most else 0,
    )


def _hopper_knobs(problem: Problem, workload: Workload, target: Target, rows: int) -> HopperKnobs:
    # A ring of three tiles of 64 is within 1.3 % of the best on page 16 HND. Large pages want tiles of 128 where a workgroup walks a whole
    # context, 485.9 against 497.0 us at batch 128, and of 64 where splits share it, 8.3 against 9.8 us at batch 1 of 4096 tokens (H200, 2026-11-22).
    alone = default_splits(workload, target, 128) == 1
    tile = 128 if problem.block_size >= 1024 and rows <= 16 and alone else 64
    stages, warps, per_unit = 3, 4, 1
    if problem.kv_itemsize == 1:
        # half the bytes per tile: two workgroups fit an SM. Batch 1 of 32768 tokens: 22.1 us with 32 splits, 25.2 with 16 (H200, 2026-11-22).
        tile, per_unit = (128 if rows <= 16 else 64), 2
    if problem.windowed:
        # a window has a tile or two: a deep ring only costs workgroups per SM. Window 128, batch 128, page 64: 21.1 us, 24.0 with three stages
        tile, stages = 64, 2
    if problem.head_dim >= 256:
        tile, stages = 64, 2  # 128 KB of K and V in flight already
    if rows * problem.head_dim > MOST_PER_WARPGROUP:
        tile, stages, warps = 128, 2 if problem.head_dim * problem.kv_itemsize <= 256 else 1, 8
    splits = default_splits(workload, target, tile, per_unit)
    if (
        problem.windowed
    ):  # window 128, batch 16: 10.2 us with two splits, 5.5 with one (H200, 2026-11-22)
        splits = min(splits, max(1, tiles_of(workload, tile) // LEAST_TILES_PER_SPLIT))
    return HopperKnobs(
        partition_tokens=tile,
        num_splits=splits,
        num_stages=stages,
        num_warps=warps,
        reduce_chunk=_reduce_chunk(splits),
    )


def safe_knobs(problem: Problem, target: Target) -> HopperKnobs | CdnaKnobs:
    """The knobs of last resort: the fewest resources that compute the problem, whatever its size.

    One split: one kernel, no workspace, nothing to reduce. One tile of the shortest length in flight, and no launch that overlaps another.
    They take as long as one workgroup for a whole walk: 10.1 times the best at batch 1 of 4096 tokens, 1.4 times at batch 16, 1.02 times at
    batch 128 (pages of 1024, H200, 2026-11-22; benchmarks/miss_gain.py).
    """
    rows = 1 << (problem.rows - 1).bit_length()
    if target.limits.family == "hopper_wgmma":
        wide = rows * problem.head_dim > MOST_PER_WARPGROUP
        return HopperKnobs(
            partition_tokens=128 if wide else 64,
            num_splits=1,
            num_stages=1,
            num_warps=8 if wide else 4,
            overlap_launch=False,
        )
    return CdnaKnobs(
        partition_tokens=64,
        num_splits=1,
        num_stages=1,
        num_warps=2,
        program_rows=16 if problem.rows > 16 else 0,
    )
