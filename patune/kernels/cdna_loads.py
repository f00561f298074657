"""How keys, values and scales of a tile get from the cache into the registers of the CDNA kernel.

A tile is TILE tokens of one walk: a part of one page (BLOCK_SIZE >= TILE), whose scalar 64-bit base leaves 32-bit offsets to buffer loads,
or several pages, with a 64-bit address per lane. Nothing is masked but the page look-ups: unused slots of a mapped page may be read.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import cdna3

from patune.kernels.tiles import table_entry

WIDENS_E4M3FN = gl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9))  # by one instruction per pair

@gluon.jit
def in_tile(position, WARP_TOKENS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """Token offset inside a tile, [WARPS, tokens, 1] (AXIS 1) or [WARPS, 1, tokens] (AXIS 2): warp w owns WARP_TOKENS tokens from w * WARP_TOKENS on.

    ``position`` is the token inside of its warp's share, in the slice of LAYOUT that :func:`along` gives.
    """
    OTHER: gl.constexpr = 3 - AXIS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    warp = gl.expand_dims(gl.expand_dims(warp, 1), 2)
    return warp * WARP_TOKENS + gl.expand_dims(gl.expand_dims(position, 0), OTHER)


@gluon.jit
def along(LENGTH: gl.constexpr, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """0 .. LENGTH - 1 along axis 1 or 2 of a three-dimensional layout."""
    OTHER: gl.constexpr = 3 - AXIS
    return gl.arange(0, LENGTH, layout=gl.SliceLayout(0, gl.SliceLayout(OTHER, LAYOUT)))


@gluon.jit
def look_up_page(
    table_ptr, t0, token, first, context, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr
):
    """Page of the tile at t0 (scalar), or of each of its tokens. Block-table entries outside of [first, context) are not read: page 0 stands in."""
    if BLOCK_SIZE >= TILE:
        return gl.load(table_ptr + t0 // BLOCK_SIZE, mask=t0 < context, other=0)
    else:
        index, mapped = table_entry(t0 + token, first, context, BLOCK_SIZE)
        return gl.load(table_ptr + index, mask=mapped, other=0)


@gluon.jit
def token_offset(
    token, stride_token, SHUFFLED: gl.constexpr, HEAD_DIM: gl.constexpr, VECTOR: gl.constexpr
):
    """Elements from the first token of a page (or of a tile, which is whole vectors) to another one."""
    if SHUFFLED:  # [BLOCK_SIZE / x, HEAD_DIM, x]
        return (token // VECTOR) * (HEAD_DIM * VECTOR) + token % VECTOR
    else:
        return token * stride_token


@gluon.jit
def tile_offset(t0, stride_token, SHUFFLED: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr):
    """Offset of a tile inside of its page. Whole vectors, so without a remainder, of which Triton 3.6 would not see that it is 0."""
    slot = ((t0 // TILE) % (BLOCK_SIZE // TILE)) * TILE
    if SHUFFLED:
        return slot * HEAD_DIM
    else:
        return slot * stride_token


@gluon.jit
def load_tile(
    ptr, page, t0, token, other_offset, stride_page, stride_token, SHUFFLED: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, RUN: gl.constexpr, CACHE_MODIFIER: gl.constexpr,
):
    """Elements at ``token`` of the tile at t0, plus ``other_offset``, which broadcasts against it.

    RUN: a page repeats for at least that many tokens in the layout's order (0: do not say).
    """
    VECTOR: gl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    if BLOCK_SIZE >= TILE:
        base = (
            ptr
            + page.to(gl.int64) * stride_page
            + tile_offset(t0, stride_token, SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE)
        )
        offset = token_offset(token, stride_token, SHUFFLED, HEAD_DIM, VECTOR) + other_offset
        return cdna3.buffer_load(base, offset, cache=CACHE_MODIFIER)
    else:
        if RUN > 0:
            page = gl.max_constancy(page, [1, RUN, 1])
        slot = token % BLOCK_SIZE
        offset = (
            page.to(gl.int64) * stride_page
            + token_offset(slot, stride_token, SHUFFLED, HEAD_DIM, VECTOR)
            + other_offset
        )
        return gl.load(ptr + offset, cache_modifier=CACHE_MODIFIER)


@gluon.jit
def load_scales(
    ptr, page, t0, token, kept, stride_page, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr
):
    """Scales of the tokens; 0 where not kept: an unused slot's may be NaN."""
    if BLOCK_SIZE >= TILE:
        slot = ((t0 // TILE) % (BLOCK_SIZE // TILE)) * TILE + token
    else:
        slot = token % BLOCK_SIZE
    return gl.load(ptr + page.to(gl.int64) * stride_page + slot, mask=kept, other=0.0)


@gluon.jit
def zero_unseen(values, position, first, context):
    """Values with zeros outside of [first, context): unused slots may hold NaN, and 0 * NaN would poison the sum."""
    BITS: gl.constexpr = gl.int8 if values.dtype.primitive_bitwidth == 8 else gl.int16
    kept = (position >= first) & (position < context)
    return gl.where(kept, values.to(BITS, bitcast=True), 0).to(values.dtype, bitcast=True)

@gluon.jit
def widen_fp8(values, DTYPE: gl.constexpr):
    """fp8 values as bf16 or fp16, exact. Triton 3.6 spends 25 instructions on an e4m3fn value for gfx950, and one by way of float32."""
    if values.dtype == gl.float8e4nv and not WIDENS_E4M3FN:
        return values.to(gl.float32).to(DTYPE)
    else:
        return values.to(DTYPE)
