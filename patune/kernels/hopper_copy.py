"""Copies of cache tiles into the shared-memory ring of the Hopper kernel, by cp.async.

A tile is TILE tokens of one walk: one page or a part of it (BLOCK_SIZE >= TILE, a scalar page), or several pages (a page per token).
Page numbers go through a ring in shared memory too, tiles ahead of their use: a look-up in the table that misses the L1 waits behind all
copies that are under way, and with tiles dealt in turn each one may miss. Carried in registers one or eight tiles ahead it still stalled
the loop (45 us, against 36 us with tiles in runs; batch 1 of 32768 tokens, page 64, tile 64, 16 splits, H200, 2026-11-22).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from patune.kernels.gluon_compat import cp_async
from patune.kernels.hopper_layouts import vector_length
from patune.kernels.tiles import table_entry

PAGE_SLOTS = gl.constexpr(16)  # tiles whose pages the ring holds
PAGES_AHEAD = gl.constexpr(8)  # tiles from the copy of a page number into the ring to its use


@gluon.constexpr_function
def pages_per_tile(BLOCK_SIZE, TILE):
    """Pages that a tile lies on."""
    return max(1, TILE // BLOCK_SIZE)


@gluon.jit
def look_up_pages(table_ptr, t0, first, mapped_end, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, TOKENS: gl.constexpr):
    """Page of each token of the tile at t0, [TILE] in layout TOKENS, from the block table. Entries outside of [first, mapped_end) are not read."""
    if BLOCK_SIZE >= TILE:
        return gl.full([TILE], gl.load(table_ptr + t0 // BLOCK_SIZE, mask=t0 < mapped_end, other=0), gl.int32, TOKENS)
    else:
        index, mapped = table_entry(t0 + gl.arange(0, TILE, layout=TOKENS), first, mapped_end, BLOCK_SIZE)
        # page 0 is always mapped; a vector load hides that a page repeats, and the 16-byte copies need to know
        return gl.max_constancy(gl.load(table_ptr + index, mask=mapped, other=0), [BLOCK_SIZE])


@gluon.jit
def copy_pages(
    table_ptr, ring_smem, slot, t0, first, context,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr,
):
    """Start the copy of the page numbers of the tile at t0 into a slot of the ring."""
    PAGES: gl.constexpr = pages_per_tile(BLOCK_SIZE, TILE)
    index = t0 // BLOCK_SIZE + gl.arange(0, PAGES, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    mapped = (index >= first // BLOCK_SIZE) & (index * BLOCK_SIZE < context)
    cp_async(ring_smem.index(slot), table_ptr + index, mask=mapped)


@gluon.jit
def fill_page_ring(
    table_ptr, ring_smem, t0, step, first, context,
    STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr,
):
    """Start the copies of the page numbers that come after the first STAGES tiles; the first tile is at t0, the next one step tokens on."""
    for tile in gl.static_range(STAGES, STAGES + PAGES_AHEAD):
        copy_pages(table_ptr, ring_smem, tile % PAGE_SLOTS, t0 + tile * step, first, context, BLOCK_SIZE, TILE, WARPS)


@gluon.jit
def pages_of_tile(ring_smem, slot, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, TOKENS: gl.constexpr):
    """Page of each token of a tile, [TILE] in layout TOKENS, from the ring."""
    PAGES: gl.constexpr = pages_per_tile(BLOCK_SIZE, TILE)
    pages = ring_smem.index(slot)
    if PAGES == 1:
        pages, _ = gl.broadcast(pages.load(TOKENS), gl.arange(0, TILE, layout=TOKENS))
    else:
        like = gl.arange(0, TILE, layout=TOKENS).reshape([PAGES, TILE // PAGES])
        pages, _ = gl.broadcast(pages.reshape([PAGES, 1]).load(like.type.layout), like)
        pages = gl.convert_layout(pages.reshape([TILE]), TOKENS, assert_trivial=True)
    return gl.max_constancy(pages, [min(BLOCK_SIZE, TILE)])


@gluon.jit
def _in_page(t0, token, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr):
    """Slot of each token in its page, `((t0 // TILE) % n) * TILE`: `t0 % BLOCK_SIZE` would lose the alignment that 16-byte copies need."""
    if BLOCK_SIZE >= TILE:
        return ((t0 // TILE) % (BLOCK_SIZE // TILE)) * TILE + token
    else:
        return token % BLOCK_SIZE


@gluon.jit
def copy_token_rows(
    cache_ptr, tile_smem, pages, t0, first, context,
    stride_page, stride_token,
    AITER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Start the copy of a [TILE, HEAD_DIM] tile: an AITER key, or a key or value by strides. Masked tokens become zeros."""
    VECTOR: gl.constexpr = vector_length(cache_ptr.dtype.element_ty)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    slot = _in_page(t0, token, BLOCK_SIZE, TILE)
    if AITER:  # the token stride is x = VECTOR by definition: 16 bytes, which a run-time stride would not prove
        token_offset = slot * VECTOR
        channel_offset = (channel // VECTOR) * (BLOCK_SIZE * VECTOR) + channel % VECTOR
    else:
        token_offset = slot * stride_token
        channel_offset = channel
    base = cache_ptr + pages.to(gl.int64) * stride_page + token_offset
    kept = (t0 + token >= first) & (t0 + token < context)
    cp_async(tile_smem, base[:, None] + channel_offset[None, :], mask=kept[:, None])


@gluon.jit
def copy_channel_rows(
    cache_ptr, tile_smem, pages, t0, first, context, stride_page,
    SHUFFLED: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Start the copy of an AITER value tile [HEAD_DIM, TILE], 4-D or (SHUFFLED) 5-D.

    A mask along the vector axis would break 16-byte copies, so whole vectors are kept: those with any token of [first, context). What else
    they hold is the caller's to zero.
    """
    VECTOR: gl.constexpr = vector_length(cache_ptr.dtype.element_ty)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(0, LAYOUT))
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, LAYOUT))
    if SHUFFLED:  # counted in vectors: of a slot's remainder Triton would not see that it runs along the vector
        vector_in_page = _in_page(t0 // VECTOR, token // VECTOR, BLOCK_SIZE // VECTOR, TILE // VECTOR)
        token_offset = vector_in_page * (HEAD_DIM * VECTOR) + token % VECTOR
        channel_offset = channel * VECTOR
    else:
        token_offset = _in_page(t0, token, BLOCK_SIZE, TILE)
        channel_offset = channel * BLOCK_SIZE
    base = cache_ptr + pages.to(gl.int64) * stride_page + token_offset
    vector = (t0 + token) // VECTOR
    kept = (vector >= first // VECTOR) & (vector * VECTOR < context)
    cp_async(tile_smem, base[None, :] + channel_offset[:, None], mask=kept[None, :])


@gluon.jit
def copy_scales(
    scale_ptr, row_smem, pages, t0, first, context, stride_page,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, TOKENS: gl.constexpr,
):
    """Start the copy of the TILE tokens' scales. Masked tokens get scale 0: an unused slot's may be NaN."""
    token = gl.arange(0, TILE, layout=TOKENS)
    kept = (t0 + token >= first) & (t0 + token < context)
    pointers = scale_ptr + pages.to(gl.int64) * stride_page + _in_page(t0, token, BLOCK_SIZE, TILE)
    cp_async(row_smem, pointers, mask=kept)


@gluon.jit
def zero_unseen_values(value_smem, t0, first, context, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Zero the tokens of an AITER value tile outside [first, context): 0 * NaN of an unused slot would poison the sum."""
    token = t0 + gl.arange(0, TILE, layout=gl.SliceLayout(0, LAYOUT))
    values = value_smem.load(LAYOUT)
    kept = ((token >= first) & (token < context))[None, :]
    value_smem.store(gl.where(kept, values.to(gl.float32), 0.0).to(values.dtype))
