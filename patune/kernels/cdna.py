"""Split-KV paged decode for CDNA3 and CDNA4 (gfx942, gfx950): K and V go from memory straight into MFMA operands.

    S[W, N, TW] = Q[W, N, D] K^T[W, D, TW]      P = online softmax along TW      O[W, N, D] += P V[W, TW, D]

The leading axis is the warp: warp w owns tokens [w * TW, (w + 1) * TW) of a tile (TW = TILE / WARPS) and runs its own online softmax, so
the loop has no cross-warp work and no LDS; the warps are merged once at the end. Every layout of the cache loads in vectors (16 bytes, or 8 where a lane's
share of a tile is that short) and nothing is exchanged between lanes but the row maximum: which column carries which token, and which channel, is chosen so that a product's
result is the next one's operand (cdna_layouts.py).

query [batch * QUERY_LENGTH, q_heads, D] bf16/fp16/fp8; key [pages, kv_heads, D/x, BLOCK_SIZE, x] with value [pages, kv_heads, D, BLOCK_SIZE]
(AITER) or [pages, kv_heads, BLOCK_SIZE/x, D, x] (SHUFFLED), or both [pages, kv_heads, BLOCK_SIZE, D] by strides, bf16/fp16/fp8 (e4m3fnuz on
gfx942, e4m3fn on gfx950); block_tables [batch, max_pages] int32; context_lengths [batch] int32.
Grid (kv_heads * ceil(ROWS / N), num_splits, batch). With partial_out the split's (acc, max, sum) go to the workspace, without
it the output is written.

fp8 caches: K and V become the query's 16-bit type in registers (exact); with FP8_MATH they are multiplied as they are, query and
probabilities in fp8 too.

Knobs: TILE, WARPS and MFMA_ROWS set registers; STAGES 2 loads the next key tile ahead, 3 the next value tile too; N
below a walk's rows shares them among programs, which trades registers against reading K and V again; waves_per_eu N is exactly N waves (compile option).
Emulated and counted, not timed: docs/amd.md.
Limits: BLOCK_SIZE and TILE powers of two; D 64, 128 or 256; TILE / WARPS >= 32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import cdna3
from triton.experimental.gluon.language.amd.cdna4 import async_copy

from patune.kernels.cdna_layouts import (
    channels_in_lanes,
    column_token,
    mfma_layout,
    position_channel,
    token_run,
    tokens_in_order,
    value_rows,
    vector_length,
)
from patune.kernels.cdna_loads import (
    along,
    in_tile,
    load_scales,
    load_tile,
    look_up_page,
    widen_fp8,
    zero_unseen,
)
from patune.kernels.cdna_ring import (
    PAGES_HELD,
    copy_tile,
    held_page,
    key_offsets,
    look_up_pages,
    ring_key,
    ring_shared,
    ring_value,
    value_offsets,
)
from patune.kernels.epilogue import store_result
from patune.kernels.gluon_compat import workgroup_barrier
from patune.kernels.query import load_query
from patune.kernels.tiles import (
    NEG_INF,
    SMALLEST_SCALE_LOG2,
    capped,
    first_visible,
    softmax_step,
    tile_range,
    visible,
)

MERGE_ELEMENTS = gl.constexpr(4096)  # float32 of all warps that are merged at a time: 16 KiB of LDS leave room for four workgroups on gfx942


@gluon.constexpr_function
def math_dtype(query, cache, FP8_MATH):
    """Type of both products' operands. fp8 is exact in either 16-bit type, and in the query's own no row has to be scaled to fit."""
    if cache.primitive_bitwidth == 16 or FP8_MATH:
        return cache
    return query if query.primitive_bitwidth == 16 else gl.bfloat16


@gluon.constexpr_function
def largest_fp8(dtype):
    """The largest finite number of an 8-bit float."""
    return 448.0 if dtype == gl.float8e4nv else 240.0


@gluon.jit
def _add_products(probs, value, acc, WIDEN: gl.constexpr, MATH: gl.constexpr):
    """Acc + probs value."""
    if WIDEN:
        value = widen_fp8(value, MATH)
    return cdna3.mfma(probs, value, acc)


@gluon.jit
def _halve(part):
    """Both halves of the last axis."""
    WARPS: gl.constexpr = part.shape[0]
    N: gl.constexpr = part.shape[1]
    COLUMNS: gl.constexpr = part.shape[2]
    return part.reshape([WARPS, N, 2, COLUMNS // 2]).permute((0, 1, 3, 2)).split()


@gluon.jit
def _in_parts(acc, LEVELS: gl.constexpr):
    """The 2 ** LEVELS parts of the last axis, in order."""
    if LEVELS == 0:
        return (acc,)
    else:
        low, high = _halve(acc)
        return _in_parts(low, LEVELS - 1) + _in_parts(high, LEVELS - 1)


@gluon.jit
def _merge_and_store(
    part, first_column, top, total, has_tiles,
    out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
    sequence, kv_head, split, first_row, kv_heads, num_splits, stride_out_token, stride_out_head,
    N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    AITER: gl.constexpr, MFMA_ROWS: gl.constexpr, WITH_STATS: gl.constexpr,
):
    """Sum the warps' weighted accumulators of some columns and store the result."""
    merged = gl.sum(part, 0)
    LAYOUT: gl.constexpr = merged.type.layout
    channel = first_column + gl.arange(0, merged.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    if not AITER:
        channel = position_channel(channel, HEAD_DIM, MFMA_ROWS)
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    store_result(
        merged, channel, gl.convert_layout(top, ROW), gl.convert_layout(total, ROW), has_tiles,
        out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
        sequence, kv_head, split, first_row, kv_heads, num_splits, stride_out_token, stride_out_head,
        N, QUERY_LENGTH, GROUP, HEAD_DIM, LAYOUT, 0, WITH_STATS,
    )


@gluon.jit(do_not_specialize=["kv_heads", "num_splits", "window", "stride_table", "query_scale_step"])
def cdna_decode_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, context_ptr, query_scale_ptr, key_scale_ptr, value_scale_ptr,
    out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
    stride_table, stride_query_token, stride_query_head, stride_out_token, stride_out_head,
    stride_key_page, stride_key_head, stride_key_token, stride_value_page, stride_value_head, stride_value_token,
    stride_key_scale_page, stride_key_scale_head, stride_value_scale_page, stride_value_scale_head, query_scale_step,
    score_scale_log2, softcap_log2, kv_heads, num_splits, window,
    ROWS: gl.constexpr, N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, AITER: gl.constexpr, SHUFFLED: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAPPED: gl.constexpr, TOKEN_SCALES: gl.constexpr, FP8_MATH: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, MFMA_ROWS: gl.constexpr, MFMA_VERSION: gl.constexpr,
    LDS_RING: gl.constexpr, CACHE_MODIFIER: gl.constexpr,
):
    """Decode one split of one walk; see the module docstring."""
    CACHE: gl.constexpr = key_ptr.dtype.element_ty
    QUANTISED: gl.constexpr = CACHE.primitive_bitwidth == 8
    MATH: gl.constexpr = math_dtype(query_ptr.dtype.element_ty, CACHE, FP8_MATH)
    WIDEN: gl.constexpr = MATH != CACHE
    TW: gl.constexpr = TILE // WARPS
    gl.static_assert(TW >= 32, "a shorter contraction than the operand layout computes garbage, and nothing else checks it")
    gl.static_assert(BLOCK_SIZE % TILE == 0 or TILE % BLOCK_SIZE == 0, "a tile is a part of a page or whole pages")
    gl.static_assert(N >= MFMA_ROWS, "the query rows of a program fill MFMA's M side")
    VECTOR: gl.constexpr = vector_length(CACHE)
    RUN: gl.constexpr = token_run(CACHE, TW, MFMA_ROWS, AITER)
    MMA: gl.constexpr = mfma_layout(MATH, WARPS, MFMA_ROWS, MFMA_VERSION)
    QUERY: gl.constexpr = gl.DotOperandLayout(0, MMA, VECTOR)
    KEY: gl.constexpr = gl.DotOperandLayout(1, MMA, VECTOR)
    PROBS: gl.constexpr = gl.DotOperandLayout(0, MMA, RUN)
    VALUE: gl.constexpr = gl.DotOperandLayout(1, MMA, RUN)
    VALUE_LOAD: gl.constexpr = VALUE if AITER else value_rows(WARPS, TW, HEAD_DIM, MFMA_ROWS, RUN)

    PARTS: gl.constexpr = (ROWS + N - 1) // N
    kv_head = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    split = gl.program_id(1)
    sequence = gl.program_id(2)
    first_row = part * N
    first_token = first_row // GROUP
    last_token = (gl.minimum(first_row + N, ROWS) - 1) // GROUP
    length = gl.load(context_ptr + sequence)
    context = length - (QUERY_LENGTH - 1 - last_token)  # what the program's last query token sees
    first = first_visible(length + first_token, window, QUERY_LENGTH, WINDOWED)
    begin, end = tile_range(context, first, split, TILE)
    table_ptr += sequence.to(gl.int64) * stride_table
    key_ptr += kv_head.to(gl.int64) * stride_key_head
    value_ptr += kv_head.to(gl.int64) * stride_value_head
    if TOKEN_SCALES:
        key_scale_ptr += kv_head.to(gl.int64) * stride_key_scale_head
        value_scale_ptr += kv_head.to(gl.int64) * stride_value_scale_head

    QUERY_2D: gl.constexpr = gl.SliceLayout(0, QUERY)  # every warp holds all rows
    query, factor = load_query(
        query_ptr, query_scale_ptr, gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, QUERY_2D)), sequence, kv_head, first_row,
        stride_query_token, stride_query_head, query_scale_step, kv_heads,
        MATH, N, QUERY_LENGTH, GROUP, QUERY_2D,
    )
    query, _ = gl.broadcast(gl.expand_dims(query, 0), gl.full([WARPS, N, HEAD_DIM], 0, gl.int32, QUERY))
    STAT: gl.constexpr = gl.SliceLayout(2, MMA)  # [WARPS, N]
    score_scale = score_scale_log2
    out_scale = 1.0
    if QUANTISED:
        if key_scale_ptr is not None and not TOKEN_SCALES:
            score_scale *= gl.load(key_scale_ptr)
            out_scale *= gl.load(value_scale_ptr)
        row_scale = gl.convert_layout(factor * score_scale, gl.SliceLayout(0, STAT))
        row_scale = gl.expand_dims(gl.expand_dims(row_scale, 0), 2)
    if FP8_MATH:
        out_scale *= 1.0 / largest_fp8(CACHE)

    row = first_row + gl.arange(0, N, layout=gl.SliceLayout(0, STAT))
    limit = gl.where(row < ROWS, length - QUERY_LENGTH + row // GROUP, context - 1)
    limit = gl.expand_dims(gl.expand_dims(limit, 0), 2)
    score_token = in_tile(column_token(along(TW, MMA, 2), RUN, MFMA_ROWS), TW, WARPS, MMA, 2)
    value_token = in_tile(along(TW, VALUE, 1), TW, WARPS, VALUE, 1)
    if LDS_RING:
        key_offset = key_offsets(stride_key_token, AITER, BLOCK_SIZE, WARPS, TW, HEAD_DIM, VECTOR, RUN, MFMA_ROWS)
        value_offset = value_offsets(stride_value_token, AITER, SHUFFLED, BLOCK_SIZE, WARPS, TW, HEAD_DIM, VECTOR, RUN, MFMA_ROWS)
    else:
        key_token = in_tile(column_token(along(TW, KEY, 2), RUN, MFMA_ROWS), TW, WARPS, KEY, 2)
        load_token = in_tile(along(TW, VALUE_LOAD, 1), TW, WARPS, VALUE_LOAD, 1)
        key_channel = gl.expand_dims(gl.expand_dims(along(HEAD_DIM, KEY, 1), 0), 2)
        value_channel = gl.expand_dims(gl.expand_dims(along(HEAD_DIM, VALUE_LOAD, 2), 0), 1)
        if AITER:
            key_offset = (key_channel // VECTOR) * (BLOCK_SIZE * VECTOR) + key_channel % VECTOR
            value_offset = value_channel * (VECTOR if SHUFFLED else BLOCK_SIZE)
        else:
            key_offset = key_channel
            value_offset = value_channel
    if AITER:
        key_stride: gl.constexpr = VECTOR
        value_stride: gl.constexpr = 1
    else:
        key_stride = stride_key_token
        value_stride = stride_value_token
    PAGE_RUN: gl.constexpr = min(BLOCK_SIZE, TW)  # tokens in memory order that share a page

    row_max = gl.full([WARPS, N], -float("inf"), gl.float32, STAT)
    sums = gl.zeros([WARPS, N, TW], gl.float32, MMA)
    acc = gl.zeros([WARPS, N, HEAD_DIM], gl.float32, MMA)
    no_scores = gl.zeros([WARPS, N, TW], gl.float32, MMA)

    # pages are looked up a tile before their loads, which would wait for them
    t0 = begin * TILE
    step = num_splits * TILE
    AHEAD: gl.constexpr = STAGES - 1 if LDS_RING else 1  # tiles that the ring holds besides the one that is computed on
    AHEAD_K: gl.constexpr = AHEAD if STAGES > 1 else 0
    AHEAD_V: gl.constexpr = AHEAD if LDS_RING or STAGES > 2 else 0
    if LDS_RING:
        VECTORS: gl.constexpr = TW * HEAD_DIM // (64 * VECTOR)
        key_smem = gl.allocate_shared_memory(CACHE, [STAGES, VECTORS, WARPS * 64 * VECTOR], ring_shared())
        value_smem = gl.allocate_shared_memory(CACHE, [STAGES, VECTORS, WARPS * 64 * VECTOR], ring_shared())
        pages = look_up_pages(table_ptr, begin, num_splits, context, BLOCK_SIZE, TILE, WARPS)
        for ahead in gl.static_range(AHEAD):
            page = held_page(pages, ahead, WARPS)
            live = begin + ahead * num_splits < end
            copy_tile(
                key_ptr, key_smem.index(ahead), page, t0 + ahead * step, live, key_offset, stride_key_page, key_stride,
                False, HEAD_DIM, BLOCK_SIZE, TILE, CACHE_MODIFIER,
            )
            copy_tile(
                value_ptr, value_smem.index(ahead), page, t0 + ahead * step, live, value_offset, stride_value_page, value_stride,
                SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE, CACHE_MODIFIER,
            )
        held = AHEAD
        slot = 0
    else:
        key_page = look_up_page(table_ptr, t0, key_token, first, context, BLOCK_SIZE, TILE)
        value_page = look_up_page(table_ptr, t0, load_token, first, context, BLOCK_SIZE, TILE)
        if STAGES > 1:
            next_key = load_tile(
                key_ptr, key_page, t0, key_token, key_offset, stride_key_page, key_stride,
                False, HEAD_DIM, BLOCK_SIZE, TILE, 0, CACHE_MODIFIER,
            )
            key_page = look_up_page(table_ptr, t0 + step, key_token, first, context, BLOCK_SIZE, TILE)
        if STAGES > 2:
            next_value = load_tile(
                value_ptr, value_page, t0, load_token, value_offset, stride_value_page, value_stride,
                SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE, PAGE_RUN, CACHE_MODIFIER,
            )
            value_page = look_up_page(table_ptr, t0 + step, load_token, first, context, BLOCK_SIZE, TILE)
    for tile in range(begin, end, num_splits):
        t0 = tile * TILE
        if LDS_RING:
            async_copy.wait_group(2 * AHEAD - 1)  # K of this tile: all but what came after it
            into = gl.where(slot == 0, AHEAD, slot - 1)
            live = tile + AHEAD * num_splits < end
            if held == PAGES_HELD:
                pages = look_up_pages(table_ptr, tile + AHEAD * num_splits, num_splits, context, BLOCK_SIZE, TILE, WARPS)
                held = 0
            page = held_page(pages, held, WARPS)
            held += 1
            key = ring_key(key_smem.index(slot), HEAD_DIM, TW, WARPS, MFMA_ROWS, KEY)
            copy_tile(
                key_ptr, key_smem.index(into), page, t0 + AHEAD * step, live, key_offset, stride_key_page, key_stride,
                False, HEAD_DIM, BLOCK_SIZE, TILE, CACHE_MODIFIER,
            )
            copy_tile(
                value_ptr, value_smem.index(into), page, t0 + AHEAD * step, live, value_offset, stride_value_page, value_stride,
                SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE, CACHE_MODIFIER,
            )
        else:
            loaded_key = load_tile(
                key_ptr, key_page, t0 + AHEAD_K * step, key_token, key_offset, stride_key_page, key_stride,
                False, HEAD_DIM, BLOCK_SIZE, TILE, 0, CACHE_MODIFIER,
            )
            loaded_value = load_tile(
                value_ptr, value_page, t0 + AHEAD_V * step, load_token, value_offset, stride_value_page, value_stride,
                SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE, PAGE_RUN, CACHE_MODIFIER,
            )
            key_page = look_up_page(table_ptr, t0 + (1 + AHEAD_K) * step, key_token, first, context, BLOCK_SIZE, TILE)
            value_page = look_up_page(table_ptr, t0 + (1 + AHEAD_V) * step, load_token, first, context, BLOCK_SIZE, TILE)
            if STAGES > 1:
                key = next_key
                next_key = loaded_key
            else:
                key = loaded_key
            if STAGES > 2:
                value = next_value
                next_value = loaded_value
            else:
                value = loaded_value
        if WIDEN:
            key = widen_fp8(key, MATH)
        scores = cdna3.mfma(query, key, no_scores)
        scores = scores * row_scale if QUANTISED else scores * score_scale
        value_scale_log2 = None
        if TOKEN_SCALES:
            position = t0 + score_token
            kept = (position >= first) & (position < context)
            scale_page = look_up_page(table_ptr, t0, score_token, first, context, BLOCK_SIZE, TILE)
            scores = scores * load_scales(key_scale_ptr, scale_page, t0, score_token, kept, stride_key_scale_page, BLOCK_SIZE, TILE)
            value_scale = load_scales(value_scale_ptr, scale_page, t0, score_token, kept, stride_value_scale_page, BLOCK_SIZE, TILE)
            value_scale_log2 = gl.maximum(gl.log2(gl.abs(value_scale)), SMALLEST_SCALE_LOG2)
        if SOFTCAPPED:
            scores = capped(scores, softcap_log2)
        seen = visible(t0 + score_token, limit, window, WINDOWED)
        probs, rescale, row_max, sums = softmax_step(scores, seen, row_max, sums, 2, value_scale_log2)
        acc = acc * gl.expand_dims(rescale, 2)
        if TOKEN_SCALES:
            probs = probs * value_scale
        if FP8_MATH:
            probs = probs * largest_fp8(CACHE)
        if LDS_RING:
            async_copy.wait_group(2 * AHEAD)
            value = ring_value(value_smem.index(slot), AITER, HEAD_DIM, TW, WARPS, RUN, MFMA_ROWS, VALUE)
            slot = gl.where(slot == AHEAD, 0, slot + 1)
        elif not AITER:
            value = channels_in_lanes(value, MFMA_ROWS, VALUE)
        probs = tokens_in_order(probs.to(MATH), RUN, MFMA_ROWS, PROBS)
        if (t0 + TILE > context) | (t0 < first):
            # a product of its own: values that two paths could have made would be taken apart and packed again for every tile
            acc = _add_products(probs, zero_unseen(value, t0 + value_token, first, context), acc, WIDEN, MATH)
        else:
            acc = _add_products(probs, value, acc, WIDEN, MATH)

    if LDS_RING:
        # the merge reuses the ring's memory, which other warps may still read, and copies beyond the end may still write
        async_copy.wait_group(0)
        workgroup_barrier()
    top = gl.max(row_max, 0)
    finite_top = gl.where(top == NEG_INF, 0.0, top)
    weight = gl.exp2(row_max - gl.expand_dims(finite_top, 0))
    total = gl.sum(gl.sum(sums, 2) * weight, 0)
    LEVELS: gl.constexpr = max(0, (WARPS * N * HEAD_DIM // MERGE_ELEMENTS).bit_length() - 1)
    parts = _in_parts(acc * gl.expand_dims(weight * out_scale, 2), LEVELS)
    for i in gl.static_range(1 << LEVELS):
        _merge_and_store(
            parts[i], i * (HEAD_DIM >> LEVELS), top, total, end > begin,
            out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
            sequence, kv_head, split, first_row, kv_heads, num_splits, stride_out_token, stride_out_head,
            N, QUERY_LENGTH, GROUP, HEAD_DIM, AITER, MFMA_ROWS, i == 0,
        )
