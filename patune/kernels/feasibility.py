"""Which knobs can work at all: the one statement of it, used by space, gate, launch path and dispatcher alike. Pure arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.kernels.knobs import CdnaKnobs, HopperKnobs

if TYPE_CHECKING:
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.target import Target

HOPPER_MIN_ROWS = 8  # narrowest row side of wgmma
WARPGROUP = 4  # warps that issue one wgmma
CDNA_MIN_WARP_TOKENS = 32  # 4 lane groups x 8 elements: Triton 3.6 computes garbage below it
CDNA_MAX_STAGES = 3
SIMDS = 4  # of a CDNA compute unit
DIRECT_TO_LDS = ("gfx950",)
CDNA_FP8 = {
    "gfx942": "fp8_e4m3fnuz",
    "gfx950": "fp8_e4m3fn",
}  # what the matrix instructions multiply
PAGE_SLOTS = 16  # of the ring of page numbers; hopper_copy.py
REDUCE_VECTOR = 4  # float32 channels per lane of the reduce kernel


def padded_rows(problem: Problem, knobs: Knobs) -> int:
    """Query rows of a program's matrix-unit tile: the next power of two, at least what the instruction has."""
    rows: int = 1 << (problem.rows - 1).bit_length()
    if isinstance(knobs, CdnaKnobs):
        return knobs.program_rows or max(knobs.mfma_rows, rows)
    return max(HOPPER_MIN_ROWS, rows)


def programs_per_walk(problem: Problem, knobs: Knobs) -> int:
    """Programs that share the query rows of a walk."""
    return -(-problem.rows // padded_rows(problem, knobs))


def hopper_shared_b(knobs: HopperKnobs, problem: Problem) -> int:
    """Shared memory of the Hopper kernel: the K and V rings, scales, page numbers, probabilities, query, and the cross-warp scratch."""
    rows = padded_rows(problem, knobs)
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
    return _fp8_flavour(problem, target, "fp8_e4m3fn") or _mixed_types(problem)


def _unsupported_by_cdna(problem: Problem, target: Target) -> str | None:
    return _fp8_flavour(problem, target, CDNA_FP8[target.arch]) or _mixed_types(problem)


def _fp8_flavour(problem: Problem, target: Target, has: str) -> str | None:
    for dtype in (problem.query_dtype, problem.kv_dtype):
        if dtype.startswith("fp8") and dtype != has:
            return f"{target.arch} has {has} only; seen query_dtype={problem.query_dtype}, kv_dtype={problem.kv_dtype}"
    return None


def _mixed_types(problem: Problem) -> str | None:
    if problem.query_dtype != problem.kv_dtype and problem.kv_itemsize == 2:
        return f"a {problem.kv_dtype} cache takes a query of its own type; seen query_dtype={problem.query_dtype}, kv_dtype={problem.kv_dtype}"
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
    return _cdna(knobs, problem, target)


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
    if not knobs.probs_k_major and padded_rows(problem, knobs) == HOPPER_MIN_ROWS:
        return "probs_k_major=False with 8 rows gives wrong results in Triton 3.6 (80 % error, varies by run)"
    needed = hopper_shared_b(knobs, problem)
    limit = target.limits.shared_limit_b
    if needed > limit:
        return f"num_stages={knobs.num_stages} needs {needed} B shared memory, {target.arch} has {limit} B"
    return None


def _cdna(knobs: CdnaKnobs, problem: Problem, target: Target) -> str | None:
    if knobs.partition_tokens // knobs.num_warps < CDNA_MIN_WARP_TOKENS:
        return (
            f"partition_tokens={knobs.partition_tokens} over num_warps={knobs.num_warps} leaves a warp fewer than "
            f"{CDNA_MIN_WARP_TOKENS} tokens, the contraction of its operand layout"
        )
    if knobs.lds_ring:
        if reason := _ring(knobs, problem, target):
            return reason
    elif knobs.num_stages > CDNA_MAX_STAGES:
        return f"num_stages={knobs.num_stages}: without lds_ring at most the next key and value tile are loaded ahead, num_stages=3"
    per_simd = max(1, knobs.num_warps // SIMDS)
    if knobs.waves_per_eu % per_simd:
        return (
            f"waves_per_eu={knobs.waves_per_eu}: a workgroup of num_warps={knobs.num_warps} puts {per_simd} waves on each SIMD, "
            f"so there are 0 (the compiler's choice) or a multiple of {per_simd}"
        )
    rows = padded_rows(problem, knobs)
    if knobs.program_rows and problem.rows <= rows:
        return f"program_rows={rows}: the problem has {problem.rows} query rows, which program_rows=0 keeps together"
    if rows < knobs.mfma_rows or (knobs.mfma_rows > 16 and problem.rows <= 16):
        return f"mfma_rows={knobs.mfma_rows}: a program's {min(rows, problem.rows)} query rows fill no more than the 16 of the smaller instruction"
    return None


def _ring(knobs: CdnaKnobs, problem: Problem, target: Target) -> str | None:
    """Direct-to-LDS copies move 16 bytes per lane (or 4: too many instructions), of one page per tile."""
    if target.arch not in DIRECT_TO_LDS:
        return f"lds_ring=True: {target.arch} copies 4 bytes per lane to LDS; 16 on {', '.join(DIRECT_TO_LDS)}"
    if knobs.num_stages < 2:
        return f"lds_ring=True: num_stages={knobs.num_stages} leaves no slot to copy into while another is read"
    if problem.block_size < knobs.partition_tokens:
        return (
            f"lds_ring=True: partition_tokens={knobs.partition_tokens} on pages of block_size={problem.block_size}; "
            "looking up several pages per tile would wait for the copies under way"
        )
    lane_tokens = knobs.partition_tokens // knobs.num_warps * knobs.mfma_rows // target.limits.lanes
    lane_channels = problem.head_dim // knobs.mfma_rows
    along = lane_tokens if problem.kv_layout.startswith("aiter") else lane_channels
    if along < problem.kv_vector:
        return f"lds_ring=True: a lane has {along} neighbouring elements of a value tile, its 16-byte copies need {problem.kv_vector}"
    needed = 2 * knobs.num_stages * knobs.partition_tokens * problem.head_dim * problem.kv_itemsize
    limit = target.limits.shared_limit_b
    if needed > limit:
        return f"num_stages={knobs.num_stages} needs {needed} B LDS for the ring, {target.arch} has {limit} B"
    workgroups = max(1, knobs.waves_per_eu * SIMDS // knobs.num_warps)
    if workgroups * needed > limit:
        return (
            f"waves_per_eu={knobs.waves_per_eu} is {workgroups} workgroups per compute unit, "
            f"whose rings of {needed} B do not fit the {limit} B LDS of {target.arch}"
        )
    return None
