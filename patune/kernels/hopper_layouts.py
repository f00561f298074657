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
def channel_rows(TILE, VECTOR, WARPS, BLOCK_SIZE):
    """Copy layout of an AITER value tile [HEAD_DIM, TILE] whose 16-byte vectors run along the tokens of one page."""
    lanes_t = max(1, min(8, min(BLOCK_SIZE, TILE) // VECTOR))
    return gl.BlockedLayout([1, VECTOR], [LANES // lanes_t, lanes_t], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _bits(extent, step, axis):
    return [[step << i, 0] if axis == 0 else [0, step << i] for i in range(extent.bit_length() - 1)]


@gluon.constexpr_function
def key_shared(TILE, HEAD_DIM, VECTOR, AITER, dtype):
    """Shared layout of a [TILE, HEAD_DIM] key tile. AITER: bytes keep their order [HEAD_DIM / x][TILE][x], wgmma's core matrices."""
    if not AITER:
        return gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    bases = _bits(VECTOR, 1, 1) + _bits(TILE, 1, 0) + _bits(HEAD_DIM // VECTOR, VECTOR, 1)
    return gl.SharedLinearLayout(bases, [], 128)


@gluon.constexpr_function
def value_shared(TILE, HEAD_DIM, BLOCK_SIZE, AITER, dtype):
    """Shared layout of a value tile, [TILE, HEAD_DIM] or (AITER) [HEAD_DIM, TILE] in panels as wide as a page's row."""
    if not AITER:
        return gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    itemsize = dtype.primitive_bitwidth // 8
    width = min(BLOCK_SIZE, TILE, 128 // itemsize)
    if width * itemsize == 16:
        bases = _bits(width, 1, 1) + _bits(HEAD_DIM, 1, 0) + _bits(TILE // width, width, 1)
        return gl.SharedLinearLayout(bases, [], 128)
    return gl.NVMMASharedLayout(
        swizzle_byte_width=width * itemsize, element_bitwidth=dtype.primitive_bitwidth, rank=2
    )


@gluon.constexpr_function
def query_rows(HEAD_DIM, WARPS):
    """Load layout of the [ROWS_PADDED, HEAD_DIM] query tile."""
    return gl.BlockedLayout([1, 8], [LANES // (HEAD_DIM // 8), HEAD_DIM // 8], [WARPS, 1], [1, 0])
