"""Which knobs can work at all: the one statement of it, used by space, gate, launch path and dispatcher alike. Pure arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.kernels.knobs import CdnaKnobs, HopperKnobs

if TYPE_CHECKING:
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.target import Target

MIN_ROWS = {"hopper_wgmma": 8, "cdna_mfma": 16}  # narrowest row side of the matrix instruction
WARPGROUP = 4  # warps that issue one wgmma
CDNA_MIN_WARP_TOKENS = 32  # 4 lane groups x 8 elements: Triton 3.6 computes garbage below it
CDNA_MAX_STAGES = 2
REDUCE_VECTOR = 4  # float32 channels per lane of the reduce kernel
MATH_DTYPES = ("bf16", "fp16")


def padded_rows(problem: Problem, family: str) -> int:
    """Rows of the matrix-unit tile: the next power of two, at least what the instruction has."""
    rows: int = 1 << (problem.rows - 1).bit_length()
    return max(MIN_ROWS[family], rows)


def hopper_shared_b(knobs: HopperKnobs, problem: Problem) -> int:
    """Shared memory of the Hopper kernel: the K and V rings, probabilities, query, and the cross-warp scratch."""
    rows = padded_rows(problem, knobs.family)
    ring = 2 * knobs.num_stages * knobs.partition_tokens * problem.head_dim * problem.kv_itemsize
    operands = rows * (knobs.partition_tokens + problem.head_dim) * 2
    return ring + operands + rows * knobs.num_warps * 4


def unsupported(problem: Problem, target: Target) -> str | None:
    """Why no knobs of the target's kernel family compute this problem, or None."""
    if problem.kv_dtype not in MATH_DTYPES or problem.query_dtype != problem.kv_dtype:
        return (
            f"the {target.arch} kernel computes query and cache of one type, bf16 or fp16; "
            f"seen query_dtype={problem.query_dtype}, kv_dtype={problem.kv_dtype}"
        )
    if target.limits.family == "cdna_mfma" and problem.kv_layout != "aiter":
        return f"the {target.arch} kernel reads kv_layout=aiter; seen kv_layout={problem.kv_layout}"
    return None


def is_feasible(knobs: Knobs, problem: Problem, target: Target) -> str | None:
    """Why these knobs cannot compute the problem on the target, or None when they can."""
    if knobs.family != target.limits.family:
        return f"knobs of family {knobs.family} do not drive {target.arch}, which takes {target.limits.family}"
    if reason := unsupported(problem, target) or _reduce(knobs, problem, target):
        return reason
    if isinstance(knobs, HopperKnobs):
        return _hopper(knobs, problem, target)
    assert isinstance(knobs, CdnaKnobs)
    return _cdna(knobs, target)


def _reduce(knobs: Knobs, problem: Problem, target: Target) -> str | None:
    """The reduce kernel's layout must not hold a split twice.

    Two warps that sum the same splits in another order race for the last bit (found by the emulator's race detector, 2026-11-22).
    """
    held = knobs.reduce_warps * max(1, target.limits.lanes * REDUCE_VECTOR // problem.head_dim)
    if not knobs.one_shot and knobs.reduce_chunk < held:
        return f"reduce_chunk={knobs.reduce_chunk}: reduce_warps={knobs.reduce_warps} hold {held} splits at a time"
    return None


def _hopper(knobs: HopperKnobs, problem: Problem, target: Target) -> str | None:
    if knobs.num_warps % WARPGROUP:
        return f"num_warps={knobs.num_warps}: wgmma is issued by {WARPGROUP} warps at a time"
    side = 16 * knobs.num_warps
    if knobs.partition_tokens < side or problem.head_dim < side:
        return (
            f"num_warps={knobs.num_warps} covers {side} rows of the products; "
            f"partition_tokens={knobs.partition_tokens} or head_dim={problem.head_dim} has fewer"
        )
    if not knobs.probs_k_major and padded_rows(problem, knobs.family) == MIN_ROWS[knobs.family]:
        return "probs_k_major=False with 8 rows gives wrong results in Triton 3.6 (80 % error, varies by run)"
    needed = hopper_shared_b(knobs, problem)
    limit = target.limits.shared_limit_b
    if needed > limit:
        return f"num_stages={knobs.num_stages} needs {needed} B shared memory, {target.arch} has {limit} B"
    return None


def _cdna(knobs: CdnaKnobs, target: Target) -> str | None:
    if knobs.partition_tokens // knobs.num_warps < CDNA_MIN_WARP_TOKENS:
        return (
            f"partition_tokens={knobs.partition_tokens} over num_warps={knobs.num_warps} leaves a warp fewer than "
            f"{CDNA_MIN_WARP_TOKENS} tokens, the contraction of its operand layout"
        )
    if knobs.num_stages > CDNA_MAX_STAGES:
        return f"num_stages={knobs.num_stages}: the {target.arch} kernel loads at most {CDNA_MAX_STAGES} tiles at a time"
    return None
