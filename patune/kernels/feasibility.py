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
CDNA_HEAD_DIMS = (64, 128)
PAGE_SLOTS = 16  # of the ring of page numbers; hopper_copy.py
REDUCE_VECTOR = 4  # float32 channels per lane of the reduce kernel
MATH_DTYPES = ("bf16", "fp16")


def padded_rows(problem: Problem, family: str) -> int:
    """Rows of the matrix-unit tile: the next power of two, at least what the instruction has."""
    rows: int = 1 << (problem.rows - 1).bit_length()
    return max(MIN_ROWS[family], rows)


def hopper_shared_b(knobs: HopperKnobs, problem: Problem) -> int:
    """Shared memory of the Hopper kernel: the K and V rings, scales, page numbers, probabilities, query, and the cross-warp scratch."""
    rows = padded_rows(problem, knobs.family)
    tokens = knobs.num_stages * knobs.partition_tokens
    ring = 2 * tokens * problem.head_dim * problem.kv_itemsize
    scales = 8 * tokens if problem.kv_quant == "per_token" else 0
    pages = 4 * PAGE_SLOTS * max(1, knobs.partition_tokens // problem.block_size)
    operands = rows * (knobs.partition_tokens + problem.head_dim) * 2
    return ring + scales + pages + operands + rows * knobs.num_warps * 4


def unsupported(problem: Problem, target: Target) -> str | None:
    """Why no knobs of the target's kernel family compute this problem, or None."""
    if target.limits.family == "hopper_wgmma":
        return _unsupported_by_hopper(problem, target)
    return _unsupported_by_cdna(problem, target)


def _unsupported_by_hopper(problem: Problem, target: Target) -> str | None:
    if "fp8_e4m3fnuz" in (problem.query_dtype, problem.kv_dtype):
        return f"{target.arch} has fp8_e4m3fn only; seen query_dtype={problem.query_dtype}, kv_dtype={problem.kv_dtype}"
    if problem.query_dtype != problem.kv_dtype and problem.kv_itemsize == 2:
        return f"a {problem.kv_dtype} cache takes a query of its own type; seen query_dtype={problem.query_dtype}"
    return None


def _unsupported_by_cdna(problem: Problem, target: Target) -> str | None:
    what = f"the {target.arch} kernel"
    if problem.kv_dtype not in MATH_DTYPES or problem.query_dtype != problem.kv_dtype:
        return (
            f"{what} computes query and cache of one type, bf16 or fp16; "
            f"seen query_dtype={problem.query_dtype}, kv_dtype={problem.kv_dtype}"
        )
    if problem.kv_layout != "aiter":
        return f"{what} reads kv_layout=aiter; seen kv_layout={problem.kv_layout}"
    if problem.head_dim not in CDNA_HEAD_DIMS:
        return f"{what} has head_dim 64 and 128; seen head_dim={problem.head_dim}"
    if problem.softcap:
        return f"{what} has no logit soft-cap; seen softcap=true"
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
    if knobs.one_shot:
        return None
    held = knobs.reduce_warps * max(1, target.limits.lanes * REDUCE_VECTOR // problem.head_dim)
    if knobs.reduce_chunk < held:
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
    if not knobs.probs_k_major and problem.fp8_math and problem.kv_layout.startswith("aiter"):
        return "probs_k_major=False: fp8 products read both operands along the contraction"
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
