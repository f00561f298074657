"""Register and shared-memory layouts of the Hopper kernel, as compile-time functions.

The rule that matters most: shared memory keeps the order of global memory. With AITER caches a row-major swizzled tile ran at 56 % of
the read bandwidth (page 16), the memory-order tile at 94-95 %, with the same instruction counts (H200, 2026-11-22).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LANES = 32


@gluon.constexpr_function
def vector_length(dtype):
    """Elements in 16 bytes."""
    return 128 // dtype.primitive_bitwidth


@gluon.constexpr_function
def mma_depth(dtype):
    """Contraction length of one wgmma instruction."""
    return 256 // dtype.primitive_bitwidth


@gluon.constexpr_function
def token_rows(TILE, HEAD_DIM, VECTOR, WARPS, AITER):
    """Copy layout of a [TILE, HEAD_DIM] tile whose 16-byte vectors run along HEAD_DIM."""
    if AITER:  # neighbouring lanes take neighbouring tokens, 16 bytes apart in memory
        lanes_t = min(LANES, TILE)
        warps_t = max(1, min(WARPS, TILE // lanes_t))
        return gl.BlockedLayout(
            [1, VECTOR], [lanes_t, LANES // lanes_t], [warps_t, WARPS // warps_t], [1, 0]
        )
    lanes_d = min(
        LANES, HEAD_DIM // VECTOR
    )  # neighbouring lanes take neighbouring vectors of one row
    return gl.BlockedLayout([1, VECTOR], [LANES // lanes_d, lanes_d], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def channel_rows(TILE, HEAD_DIM, VECTOR, WARPS, BLOCK_SIZE, SHUFFLED):
    """Copy layout of an AITER value tile [HEAD_DIM, TILE] whose 16-byte vectors run along the tokens of one page."""
    if SHUFFLED:  # neighbouring lanes take neighbouring channels, 16 bytes apart in memory
        warps_d = min(WARPS, HEAD_DIM // LANES)
        return gl.BlockedLayout([1, VECTOR], [LANES, 1], [warps_d, WARPS // warps_d], [1, 0])
    lanes_t = max(1, min(8, min(BLOCK_SIZE, TILE) // VECTOR))
    return gl.BlockedLayout([1, VECTOR], [LANES // lanes_t, lanes_t], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def token_scales(WARPS):
    """Copy layout of the [TILE] scales of a tile's tokens, one per lane."""
    return gl.BlockedLayout([1], [LANES], [WARPS], [0])


@gluon.constexpr_function
def _bits(extent, step, axis):
    return [[step << i, 0] if axis == 0 else [0, step << i] for i in range(extent.bit_length() - 1)]


@gluon.constexpr_function
def _core_matrices(ROWS, LENGTH, VECTOR, WIDENED):
    """Shared layout [LENGTH / VECTOR][ROWS][VECTOR] of a [ROWS, LENGTH] tile: memory order, and wgmma's core matrices.

    A tile that is widened in registers is read by lanes, four of which take different vectors of one row: their vectors' numbers are
    xored into the row, above its lowest bit, so that they hit different banks and 32-byte sectors stay whole.
    """
    rows = _bits(ROWS, 1, 0)
    vectors = _bits(LENGTH // VECTOR, VECTOR, 1)
    if WIDENED:
        first = 1 if LENGTH >= 128 else 0  # the lane's column is bits 1 and 2 of the vector's number, or bits 0 and 1
        for bit in range(2):
            if first + bit < len(vectors):
                vectors[first + bit] = [2 << bit, vectors[first + bit][1]]
    return gl.SharedLinearLayout(_bits(VECTOR, 1, 1) + rows + vectors, [], 128)


@gluon.constexpr_function
def key_shared(TILE, HEAD_DIM, VECTOR, AITER, WIDENED, dtype):
    """Shared layout of a [TILE, HEAD_DIM] key tile."""
    if not AITER:
        return gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    return _core_matrices(TILE, HEAD_DIM, VECTOR, WIDENED)


@gluon.constexpr_function
def value_shared(TILE, HEAD_DIM, VECTOR, BLOCK_SIZE, AITER, SHUFFLED, WIDENED, dtype):
    """Shared layout of a value tile, [TILE, HEAD_DIM] or (AITER) [HEAD_DIM, TILE] in panels as wide as a page's row."""
    if not AITER:
        return gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    itemsize = dtype.primitive_bitwidth // 8
    width = VECTOR if SHUFFLED else min(BLOCK_SIZE, TILE, 128 // itemsize)
    if width == VECTOR:
        return _core_matrices(HEAD_DIM, TILE, VECTOR, WIDENED)
    return gl.NVMMASharedLayout(
        swizzle_byte_width=width * itemsize, element_bitwidth=dtype.primitive_bitwidth, rank=2
    )


@gluon.constexpr_function
def paired_shared(layout):
    """The shared layout of an fp8 tile, seen as 16-bit elements."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=layout.swizzle_byte_width, element_bitwidth=16, rank=2
    )


@gluon.constexpr_function
def query_rows(HEAD_DIM, WARPS):
    """Load layout of the [ROWS_PADDED, HEAD_DIM] query tile."""
    lanes_d = min(LANES, HEAD_DIM // 8)
    return gl.BlockedLayout([1, 8], [LANES // lanes_d, lanes_d], [WARPS, 1], [1, 0])
