"""Split-KV paged decode for CDNA3 and CDNA4 (gfx942, gfx950): KV goes from memory straight into MFMA operands.

    S[W, N, TW] = Q[W, N, D] K^T[W, D, TW]      P = online softmax along TW      O[W, N, D] += P V[W, TW, D]

The leading axis is the warp: warp w owns tokens [w * TW, (w + 1) * TW) of a tile (TW = TILE / WARPS) and runs its own online softmax, so
the loop has no cross-warp work and no LDS tile; the warps are merged once at the end. AITER caches hold 16-byte vectors along the
contraction axis of both products, so one load per vector lands in operand order.

query [batch * QUERY_LENGTH, q_heads, D] bf16/fp16; key [pages, kv_heads, D/x, BLOCK_SIZE, x]; value [pages, kv_heads, D, BLOCK_SIZE];
block_tables [batch, max_pages] int32; context_lengths [batch] int32. Grid (kv_heads, num_splits, batch). With partial_out the split's
(acc, max, sum) go to the workspace, without it the output is written.

Knobs: TILE and WARPS set registers (T 128, W 4: 200 of 512 on gfx942); STAGES 2 loads the next key tile ahead; waves_per_eu N is exactly
N waves (compile option): 3 and more spill this body. Emulated and counted, not timed.
Limits: BLOCK_SIZE and TILE powers of two; D 64 or 128; TILE / WARPS >= 4 * K_WIDTH; key, value and query of one 16-bit type.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import cdna3

from patune.kernels.epilogue import store_result
from patune.kernels.tiles import (
    NEG_INF,
    first_visible,
    row_offset,
    softmax_step,
    table_entry,
    tile_range,
    visible,
)

K_WIDTH = gl.constexpr(8)  # elements per lane along the contraction: one 16-byte vector


@gluon.constexpr_function
def mfma_layout(WARPS, MFMA_VERSION):
    """MFMA result layout [warp, row, column]; version 3 is CDNA3, 4 is CDNA4 with twice the depth."""
    depth = 16 if MFMA_VERSION == 3 else 32
    return gl.amd.AMDMFMALayout(
        version=MFMA_VERSION, instr_shape=[16, 16, depth], transposed=True, warps_per_cta=[WARPS, 1, 1]
    )


@gluon.jit
def _token_in_tile(WARPS: gl.constexpr, TW: gl.constexpr, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """Token offset inside a tile, [WARPS, TW, 1] (AXIS 1) or [WARPS, 1, TW] (AXIS 2)."""
    OTHER: gl.constexpr = 3 - AXIS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    token = gl.arange(0, TW, layout=gl.SliceLayout(0, gl.SliceLayout(OTHER, LAYOUT)))
    warp = gl.expand_dims(gl.expand_dims(warp, 1), 2)
    token = gl.expand_dims(gl.expand_dims(token, 0), OTHER)
    return warp * TW + token


@gluon.jit
def _load_tile(
    cache_ptr, table_ptr, t0, first, context, stride_page,
    IS_VALUE: gl.constexpr, WARPS: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Load a key tile [WARPS, HEAD_DIM, TW] or a value tile [WARPS, TW, HEAD_DIM] in operand layout; unseen slots are not masked."""
    TW: gl.constexpr = TILE // WARPS
    TOKEN_AXIS: gl.constexpr = 1 if IS_VALUE else 2
    VECTOR: gl.constexpr = 128 // cache_ptr.dtype.element_ty.primitive_bitwidth
    token = _token_in_tile(WARPS, TW, LAYOUT, TOKEN_AXIS)
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(TOKEN_AXIS, LAYOUT)))
    channel = gl.expand_dims(gl.expand_dims(channel, 0), TOKEN_AXIS)
    if IS_VALUE:
        TOKEN_STRIDE: gl.constexpr = 1
        channel_offset = channel * BLOCK_SIZE
    else:
        TOKEN_STRIDE: gl.constexpr = VECTOR
        channel_offset = (channel // VECTOR) * (BLOCK_SIZE * VECTOR) + channel % VECTOR
    if BLOCK_SIZE >= TILE:
        # one page per tile: its 64-bit base is scalar and the buffer load's 32-bit offsets stay inside the page
        page = gl.load(table_ptr + t0 // BLOCK_SIZE, mask=t0 < context, other=0)
        in_page = ((t0 // TILE) % (BLOCK_SIZE // TILE)) * (TILE * TOKEN_STRIDE)
        base = cache_ptr + page.to(gl.int64) * stride_page + in_page
        return cdna3.buffer_load(base, token * TOKEN_STRIDE + channel_offset)
    else:
        # several pages per tile: page offsets do not fit the 32 bits of a buffer load
        SAME: gl.constexpr = min(BLOCK_SIZE, TW)
        index, mapped = table_entry(t0 + token, first, context, BLOCK_SIZE)
        page = gl.load(table_ptr + index, mask=mapped, other=0)
        page = gl.max_constancy(page, [1, SAME, 1] if IS_VALUE else [1, 1, SAME])
        offset = page.to(gl.int64) * stride_page + (token % BLOCK_SIZE) * TOKEN_STRIDE + channel_offset
        return gl.load(cache_ptr + offset)


@gluon.jit
def _merge_warps(row_max, sums, acc):
    """Combine the warps' results: max [N], sum [N], acc [N, HEAD_DIM]."""
    top = gl.max(row_max, 0)
    finite_top = gl.where(top == NEG_INF, 0.0, top)
    weight = gl.exp2(row_max - gl.expand_dims(finite_top, 0))
    total = gl.sum(gl.sum(sums, 2) * weight, 0)
    return top, total, gl.sum(acc * gl.expand_dims(weight, 2), 0)


@gluon.jit(do_not_specialize=["kv_heads", "num_splits", "window", "stride_table"])
def cdna_decode_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, context_ptr,
    out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
    stride_table, stride_query_token, stride_query_head, stride_out_token, stride_out_head,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head,
    score_scale_log2, kv_heads, num_splits, window,
    ROWS: gl.constexpr, N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, WINDOWED: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, MFMA_VERSION: gl.constexpr,
):
    """Decode one split of one walk; see the module docstring."""
    TW: gl.constexpr = TILE // WARPS
    gl.static_assert(TW >= 4 * K_WIDTH, "a shorter contraction than the operand layout computes garbage, and nothing else checks it")
    gl.static_assert(BLOCK_SIZE % TILE == 0 or TILE % BLOCK_SIZE == 0, "a tile is a part of a page or whole pages")
    gl.static_assert(N >= 16 and N >= ROWS, "MFMA's M side is 16")
    kv_head = gl.program_id(0)
    split = gl.program_id(1)
    sequence = gl.program_id(2)
    context = gl.load(context_ptr + sequence)
    first = first_visible(context, window, QUERY_LENGTH, WINDOWED)
    begin, end = tile_range(context, first, split, TILE)
    table_ptr += sequence * stride_table
    key_ptr += kv_head * stride_key_head
    value_ptr += kv_head * stride_value_head

    MMA: gl.constexpr = mfma_layout(WARPS, MFMA_VERSION)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, K_WIDTH)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, K_WIDTH)
    DTYPE: gl.constexpr = key_ptr.dtype.element_ty

    QUERY: gl.constexpr = gl.SliceLayout(0, LEFT)  # every warp holds all rows
    query_row = gl.arange(0, N, layout=gl.SliceLayout(1, QUERY))
    query_channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, QUERY))
    query_offset = row_offset(
        sequence, kv_head, query_row, stride_query_token, stride_query_head, QUERY_LENGTH, GROUP
    )
    query = gl.load(
        query_ptr + query_offset[:, None] + query_channel[None, :], mask=(query_row < ROWS)[:, None], other=0.0
    )
    query = gl.expand_dims(query, 0) + gl.zeros([WARPS, N, HEAD_DIM], DTYPE, LEFT)

    STAT: gl.constexpr = gl.SliceLayout(2, MMA)  # [WARPS, N]
    row = gl.arange(0, N, layout=gl.SliceLayout(0, STAT))
    limit = gl.where(row < ROWS, context - QUERY_LENGTH + row // GROUP, context - 1)
    limit = gl.expand_dims(gl.expand_dims(limit, 0), 2)
    token = _token_in_tile(WARPS, TW, MMA, 2)
    row_max = gl.full([WARPS, N], -float("inf"), gl.float32, STAT)
    sums = gl.zeros([WARPS, N, TW], gl.float32, MMA)
    acc = gl.zeros([WARPS, N, HEAD_DIM], gl.float32, MMA)
    no_scores = gl.zeros([WARPS, N, TW], gl.float32, MMA)

    if STAGES > 1:
        t_begin = gl.maximum(gl.minimum(begin, end - 1), 0) * TILE
        next_key = _load_tile(
            key_ptr, table_ptr, t_begin, first, context, stride_key_page,
            False, WARPS, TILE, HEAD_DIM, BLOCK_SIZE, RIGHT,
        )
    for tile in range(begin, end, num_splits):
        t0 = tile * TILE
        if STAGES > 1:
            key = next_key
        else:
            key = _load_tile(
                key_ptr, table_ptr, t0, first, context, stride_key_page,
                False, WARPS, TILE, HEAD_DIM, BLOCK_SIZE, RIGHT,
            )
        value = _load_tile(
            value_ptr, table_ptr, t0, first, context, stride_value_page,
            True, WARPS, TILE, HEAD_DIM, BLOCK_SIZE, RIGHT,
        )
        if STAGES > 1:
            next_key = _load_tile(
                key_ptr, table_ptr, gl.minimum(tile + num_splits, end - 1) * TILE, first, context, stride_key_page,
                False, WARPS, TILE, HEAD_DIM, BLOCK_SIZE, RIGHT,
            )
        scores = cdna3.mfma(query, key, no_scores)
        seen = visible(t0 + token, limit, window, WINDOWED)
        probs, rescale, row_max, sums = softmax_step(scores * score_scale_log2, seen, row_max, sums, 2)
        acc = acc * gl.expand_dims(rescale, 2)
        if (t0 + TILE > context) | (t0 < first):
            # unused slots may hold NaN, and 0 * NaN would poison the sum
            position = t0 + _token_in_tile(WARPS, TW, RIGHT, 1)
            kept = (position >= first) & (position < context)
            value = gl.where(kept, value.to(gl.float32), 0.0).to(DTYPE)
        acc = cdna3.mfma(gl.convert_layout(probs.to(DTYPE), LEFT), value, acc)

    top, total, merged = _merge_warps(row_max, sums, acc)
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    top = gl.convert_layout(top, gl.SliceLayout(1, OUT))
    total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    store_result(
        merged, top, total, end > begin,
        out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
        sequence, kv_head, split, kv_heads, num_splits, stride_out_token, stride_out_head,
        ROWS, N, QUERY_LENGTH, GROUP, HEAD_DIM, OUT, 0,
    )
