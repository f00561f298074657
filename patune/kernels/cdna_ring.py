"""CDNA4's own way from memory to registers: a ring of tiles in LDS that the memory fills without passing through registers.

Every lane copies the very 16-byte vectors that it will multiply and reads them back from its own places: vector v of lane l of warp w lies
at 16 * (64 * (W * v + w) + l). So LDS is a queue of tiles behind the registers; no lane reads what another one copied, and both directions
are free of bank conflicts. gfx942 cannot copy 16 bytes per lane this way.

A tile beyond the end is copied under a mask of zeros: the copies of a round are counted, and a round that has none would shorten every wait.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd.cdna4 import async_copy

from patune.kernels.cdna_layouts import channels_in_lanes, column_token
from patune.kernels.cdna_loads import tile_offset

PAGES_HELD = gl.constexpr(32)  # tiles whose pages are looked up at a time, which empties the ring


@gluon.constexpr_function
def ring_layout(WARPS, VECTOR):
    """Layout of a tile as [vectors of a lane, WARPS * 64 * VECTOR]."""
    return gl.BlockedLayout([1, VECTOR], [1, 64], [1, WARPS], [1, 0])


@gluon.constexpr_function
def ring_shared():
    """Plain rows."""
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@gluon.jit
def _places(VECTORS: gl.constexpr, WARPS: gl.constexpr, VECTOR: gl.constexpr):
    """(vector [VECTORS, 1], warp, lane, element in the vector [1, n]) of each place of a tile."""
    LAYOUT: gl.constexpr = ring_layout(WARPS, VECTOR)
    vector = gl.arange(0, VECTORS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, WARPS * 64 * VECTOR, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return vector, column // (64 * VECTOR), (column // VECTOR) % 64, column % VECTOR


@gluon.jit
def key_offsets(
    stride_token, AITER: gl.constexpr, BLOCK_SIZE: gl.constexpr, WARPS: gl.constexpr, WARP_TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr, VECTOR: gl.constexpr, RUN: gl.constexpr, MFMA_ROWS: gl.constexpr,
):
    """Element offset from a tile's first token to what each place holds: the right operand of the first product.

    Vectors are counted, not divided out of channels: of a quotient Triton would not see that it is one for a whole vector.
    """
    vector, warp, lane, element = _places(WARP_TOKENS * HEAD_DIM // (64 * VECTOR), WARPS, VECTOR)
    GROUPS: gl.constexpr = 64 // MFMA_ROWS
    PANELS: gl.constexpr = HEAD_DIM // (GROUPS * VECTOR)
    column = (vector // PANELS) * MFMA_ROWS + lane % MFMA_ROWS
    token = warp * WARP_TOKENS + column_token(column, RUN, MFMA_ROWS)
    channels = (vector % PANELS) * GROUPS + lane // MFMA_ROWS
    if AITER:
        return token * VECTOR + channels * (BLOCK_SIZE * VECTOR) + element
    else:
        return token * stride_token + channels * VECTOR + element


@gluon.jit
def value_offsets(
    stride_token, AITER: gl.constexpr, SHUFFLED: gl.constexpr, BLOCK_SIZE: gl.constexpr, WARPS: gl.constexpr,
    WARP_TOKENS: gl.constexpr, HEAD_DIM: gl.constexpr, VECTOR: gl.constexpr, RUN: gl.constexpr, MFMA_ROWS: gl.constexpr,
):
    """The same for values: the right operand of the second product, or `value_rows`."""
    vector, warp, lane, element = _places(WARP_TOKENS * HEAD_DIM // (64 * VECTOR), WARPS, VECTOR)
    GROUPS: gl.constexpr = 64 // MFMA_ROWS
    CHANNELS: gl.constexpr = HEAD_DIM // MFMA_ROWS  # of a lane
    group = lane // MFMA_ROWS
    if AITER:
        tokens = warp * (WARP_TOKENS // VECTOR) + (vector // CHANNELS) * GROUPS + group
        channel = (vector % CHANNELS) * MFMA_ROWS + lane % MFMA_ROWS
        if SHUFFLED:
            return tokens * (HEAD_DIM * VECTOR) + channel * VECTOR + element
        else:
            return tokens * VECTOR + channel * BLOCK_SIZE + element
    else:
        SPANS: gl.constexpr = CHANNELS // VECTOR
        row = vector // SPANS
        token = warp * WARP_TOKENS + (row // RUN) * (GROUPS * RUN) + group * RUN + row % RUN
        return (
            token * stride_token
            + (lane % MFMA_ROWS) * CHANNELS
            + (vector % SPANS) * VECTOR
            + element
        )


@gluon.constexpr_function
def page_lanes(WARPS):
    """Layout of PAGES_HELD page numbers: one per lane, each half of a warp has all."""
    return gl.BlockedLayout([1], [64], [WARPS], [0])


@gluon.jit
def look_up_pages(table_ptr, tile, num_splits, context, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr):
    """Pages of the split's PAGES_HELD tiles from ``tile`` on. One look-up per tile would wait for every copy that is under way before it."""
    t0 = (tile + gl.arange(0, PAGES_HELD, layout=page_lanes(WARPS)) * num_splits) * TILE
    pages = gl.load(table_ptr + t0 // BLOCK_SIZE, mask=t0 < context, other=0)
    # used here and now, so that the wait for it is here too: behind the branch that refills, it would empty the ring at every tile
    return gl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v", [pages], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def held_page(pages, index, WARPS: gl.constexpr):
    """One of the page numbers, as a scalar."""
    return gl.sum(
        gl.where(gl.arange(0, PAGES_HELD, layout=page_lanes(WARPS)) == index, pages, 0), 0
    )


@gluon.jit
def copy_tile(
    ptr, smem, page, t0, live, offsets, stride_page, stride_token, SHUFFLED: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, CACHE_MODIFIER: gl.constexpr,
):
    """Start the copy of the tile at t0, which lies in one page, into a slot of the ring, as a group of its own."""
    base = (
        ptr
        + page.to(gl.int64) * stride_page
        + tile_offset(t0, stride_token, SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE)
    )
    mask = gl.full(offsets.shape, live, gl.int1, offsets.type.layout)
    async_copy.buffer_load_to_shared(smem, base, offsets, mask=mask, cache_modifier=CACHE_MODIFIER)
    async_copy.commit_group()


@gluon.jit
def ring_key(
    smem, HEAD_DIM: gl.constexpr, WARP_TOKENS: gl.constexpr, WARPS: gl.constexpr, MFMA_ROWS: gl.constexpr, OPERAND: gl.constexpr,
):
    """The key tile of a slot as the right operand [WARPS, HEAD_DIM, columns]."""
    VECTOR: gl.constexpr = 128 // smem.dtype.primitive_bitwidth
    GROUPS: gl.constexpr = 64 // MFMA_ROWS
    vectors = async_copy.load_shared_relaxed(
        smem, ring_layout(WARPS, VECTOR)
    )  # a plain load waits for all copies (3.6)
    split = vectors.reshape(
        [WARP_TOKENS // MFMA_ROWS, HEAD_DIM // (GROUPS * VECTOR), WARPS, GROUPS, MFMA_ROWS, VECTOR]
    )
    return gl.convert_layout(split.permute((2, 1, 3, 5, 0, 4)).reshape([WARPS, HEAD_DIM, WARP_TOKENS]), OPERAND, assert_trivial=True)


@gluon.jit
def ring_value(
    smem, AITER: gl.constexpr, HEAD_DIM: gl.constexpr, WARP_TOKENS: gl.constexpr, WARPS: gl.constexpr, RUN: gl.constexpr,
    MFMA_ROWS: gl.constexpr, OPERAND: gl.constexpr,
):
    """The value tile of a slot as the right operand [WARPS, tokens, columns]; by strides, columns are in the order of `position_channel`."""
    VECTOR: gl.constexpr = 128 // smem.dtype.primitive_bitwidth
    GROUPS: gl.constexpr = 64 // MFMA_ROWS
    CHANNELS: gl.constexpr = HEAD_DIM // MFMA_ROWS
    vectors = async_copy.load_shared_relaxed(
        smem, ring_layout(WARPS, VECTOR)
    )  # a plain load waits for all copies (3.6)
    if AITER:
        split = vectors.reshape(
            [WARP_TOKENS // (GROUPS * VECTOR), CHANNELS, WARPS, GROUPS, MFMA_ROWS, VECTOR]
        )
        operand = split.permute((2, 0, 3, 5, 1, 4)).reshape([WARPS, WARP_TOKENS, HEAD_DIM])
        return gl.convert_layout(operand, OPERAND, assert_trivial=True)
    else:
        split = vectors.reshape(
            [
                WARP_TOKENS // (GROUPS * RUN),
                RUN,
                CHANNELS // VECTOR,
                WARPS,
                GROUPS,
                MFMA_ROWS,
                VECTOR,
            ]
        )
        rows = split.permute((3, 0, 4, 1, 5, 2, 6)).reshape([WARPS, WARP_TOKENS, HEAD_DIM])
        return channels_in_lanes(rows, MFMA_ROWS, OPERAND)
