"""Split-KV paged decode for Hopper (sm_90), swapped wgmma.

    S^T[TILE, N] = K[TILE, D] Q^T[D, N]      P = online softmax along TILE      O^T[D, N] += V^T[D, TILE] P^T[TILE, N]

The KV tokens, then the head channels, are the M = 64 side of wgmma and the query rows are its N side (8, 16, 32 or 64): the tensor core
reads K and V straight from shared memory and nothing is spent on padding 8 rows to 64. K and V arrive by cp.async in a ring of STAGES tiles.

query [batch * QUERY_LENGTH, q_heads, D] bf16/fp16/fp8; key [pages, kv_heads, D/x, BLOCK_SIZE, x] with value [pages, kv_heads, D, BLOCK_SIZE]
(AITER) or [pages, kv_heads, BLOCK_SIZE/x, D, x] (SHUFFLED), or both [pages, kv_heads, BLOCK_SIZE, D] by strides, bf16/fp16/fp8;
block_tables [batch, max_pages] int32; context_lengths [batch] int32. Grid (kv_heads, num_splits, batch). With partial_out the split's
(acc, max, sum) go to the workspace, without it the output is written.

fp8 caches: K and V become fp16 in registers, wgmma's left operand (exact); with FP8_MATH they are multiplied as they are, the query and the
probabilities in fp8 too (V by strides has no fp8 form that wgmma could read: it stays fp16). A 16-bit query of an fp8 product, and a bf16
query of an fp16 product, is scaled row by row with a power of two, so that it fits.

Knobs (H200, 2026-11-22, facts in docs/tuning.md): num_splits is the strongest; TILE x STAGES has a cliff where shared memory leaves one
workgroup per SM (+14 % at page 16); WARPS 4 or 8 within 4 %; maxnreg within 2 %, 64 never good.
Limits: BLOCK_SIZE and TILE powers of two; D 64, 128 or 256.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from patune.kernels.epilogue import store_result
from patune.kernels.gluon_compat import workgroup_barrier
from patune.kernels.hopper_copy import (
    PAGE_SLOTS,
    PAGES_AHEAD,
    copy_channel_rows,
    copy_pages,
    copy_scales,
    copy_token_rows,
    fill_page_ring,
    look_up_pages,
    pages_of_tile,
    pages_per_tile,
    zero_unseen_values,
)
from patune.kernels.hopper_layouts import (
    channel_rows,
    key_shared,
    mma_depth,
    paired_shared,
    query_rows,
    token_rows,
    token_scales,
    value_shared,
    vector_length,
)
from patune.kernels.hopper_operands import (
    contraction_order,
    ordered_channel,
    paired_channel,
    widen_contraction,
    widen_pairs,
)
from patune.kernels.overlap import start_after_previous_kernel
from patune.kernels.query import load_query
from patune.kernels.tiles import (
    SMALLEST_SCALE_LOG2,
    capped,
    first_visible,
    softmax_step,
    tile_range,
    visible,
)

FP8_MAX = gl.constexpr(448.0)  # e4m3fn


@gluon.jit
def _copy_tile(
    key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, key_smem, value_smem, key_scale_smem, value_scale_smem,
    table_ptr, key_pages, value_pages, t0, first, context, live,
    stride_key_page, stride_key_token, stride_value_page, stride_value_token, stride_key_scale_page, stride_value_scale_page,
    AITER: gl.constexpr, SHUFFLED: gl.constexpr, TOKEN_SCALES: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr,
    KEY_COPY: gl.constexpr, VALUE_COPY: gl.constexpr,
):
    """Start the copies of one (K, V) tile: K as a commit group of its own, V in the group that the caller closes. Groups may be empty."""
    SCALE_COPY: gl.constexpr = token_scales(WARPS)
    if live:
        copy_token_rows(
            key_ptr, key_smem, key_pages, t0, first, context,
            stride_key_page, stride_key_token,
            AITER, HEAD_DIM, BLOCK_SIZE, TILE, KEY_COPY,
        )
        if TOKEN_SCALES:
            pages = look_up_pages(table_ptr, t0, first, context, BLOCK_SIZE, TILE, SCALE_COPY)
            copy_scales(key_scale_ptr, key_scale_smem, pages, t0, first, context, stride_key_scale_page, BLOCK_SIZE, TILE, SCALE_COPY)
            copy_scales(value_scale_ptr, value_scale_smem, pages, t0, first, context, stride_value_scale_page, BLOCK_SIZE, TILE, SCALE_COPY)
    async_copy.commit_group()
    if live:
        if AITER:
            copy_channel_rows(
                value_ptr, value_smem, value_pages, t0, first, context, stride_value_page,
                SHUFFLED, HEAD_DIM, BLOCK_SIZE, TILE, VALUE_COPY,
            )
        else:
            copy_token_rows(
                value_ptr, value_smem, value_pages, t0, first, context,
                stride_value_page, stride_value_token,
                False, HEAD_DIM, BLOCK_SIZE, TILE, VALUE_COPY,
            )


@gluon.jit(do_not_specialize=["kv_heads", "num_splits", "window", "stride_table", "table_width", "query_scale_step"])
def hopper_decode_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, context_ptr, query_scale_ptr, key_scale_ptr, value_scale_ptr,
    out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
    stride_table, table_width, stride_query_token, stride_query_head, stride_out_token, stride_out_head,
    stride_key_page, stride_key_head, stride_key_token, stride_value_page, stride_value_head, stride_value_token,
    stride_key_scale_page, stride_key_scale_head, stride_value_scale_page, stride_value_scale_head, query_scale_step,
    score_scale_log2, softcap_log2, kv_heads, num_splits, window,
    ROWS: gl.constexpr, N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, AITER: gl.constexpr, SHUFFLED: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAPPED: gl.constexpr,
    TOKEN_SCALES: gl.constexpr, FP8_MATH: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, PROBS_K_MAJOR: gl.constexpr, OVERLAP: gl.constexpr,
):
    """Decode one split of one walk; see the module docstring."""
    CACHE: gl.constexpr = key_ptr.dtype.element_ty
    QUANTISED: gl.constexpr = CACHE.primitive_bitwidth == 8
    WIDEN_KEY: gl.constexpr = QUANTISED and not FP8_MATH
    WIDEN_VALUE: gl.constexpr = QUANTISED and not (FP8_MATH and AITER)
    KEY_MATH: gl.constexpr = gl.float16 if WIDEN_KEY else CACHE
    VALUE_MATH: gl.constexpr = gl.float16 if WIDEN_VALUE else CACHE
    PAIRED: gl.constexpr = WIDEN_VALUE and not AITER
    gl.static_assert(TILE % 64 == 0 and HEAD_DIM % 64 == 0, "wgmma's M side is 64")
    gl.static_assert(N >= 8 and N >= ROWS, "wgmma's N side is at least 8 (a smaller one aborts the compiler process)")
    gl.static_assert(BLOCK_SIZE % TILE == 0 or TILE % BLOCK_SIZE == 0, "a tile is a part of a page or whole pages")
    gl.static_assert(PROBS_K_MAJOR or N > 8, "N = 8 with N-major probabilities gives wrong results in Triton 3.6")
    VECTOR: gl.constexpr = vector_length(CACHE)
    KEY_COPY: gl.constexpr = token_rows(TILE, HEAD_DIM, VECTOR, WARPS, AITER)
    VALUE_COPY: gl.constexpr = channel_rows(TILE, HEAD_DIM, VECTOR, WARPS, BLOCK_SIZE, SHUFFLED) if AITER else KEY_COPY
    KEY_TOKENS: gl.constexpr = gl.SliceLayout(1, KEY_COPY)
    VALUE_TOKENS: gl.constexpr = gl.SliceLayout(0, VALUE_COPY) if AITER else KEY_TOKENS

    start_after_previous_kernel(OVERLAP)
    kv_head = gl.program_id(0).to(gl.int64)  # a head's stride may be most of a cache
    split = gl.program_id(1)
    sequence = gl.program_id(2)
    table_ptr += sequence.to(gl.int64) * stride_table
    context = gl.load(context_ptr + sequence)
    first = first_visible(context, window, QUERY_LENGTH, WINDOWED)
    begin, end = tile_range(context, first, split, TILE)
    # without a window the first tile does not depend on the context, so its page is looked up while the context is on its way
    mapped_end = context if WINDOWED else table_width * BLOCK_SIZE
    AHEAD: gl.constexpr = STAGES - 1  # tiles in flight besides the one that is computed on
    step = num_splits * TILE
    key_pages = ()
    value_pages = ()
    for tile in gl.static_range(STAGES):
        t0 = begin * TILE + tile * step
        key_pages = key_pages + (look_up_pages(table_ptr, t0, first, mapped_end, BLOCK_SIZE, TILE, KEY_TOKENS),)
        value_pages = value_pages + (look_up_pages(table_ptr, t0, first, mapped_end, BLOCK_SIZE, TILE, VALUE_TOKENS),)
    n_tiles = (end - begin + num_splits - 1) // num_splits
    key_ptr += kv_head * stride_key_head
    value_ptr += kv_head * stride_value_head

    KEY_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, mma_depth(KEY_MATH)])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, mma_depth(VALUE_MATH)])
    VALUE_SHAPE: gl.constexpr = [HEAD_DIM, TILE] if AITER else [TILE, HEAD_DIM]
    PROBS_SHAPE: gl.constexpr = [N, TILE] if PROBS_K_MAJOR else [TILE, N]
    VALUE_SHARED: gl.constexpr = value_shared(TILE, HEAD_DIM, VECTOR, BLOCK_SIZE, AITER, SHUFFLED, WIDEN_VALUE, CACHE)
    key_smem = gl.allocate_shared_memory(
        CACHE, [STAGES, TILE, HEAD_DIM], key_shared(TILE, HEAD_DIM, VECTOR, AITER, WIDEN_KEY, CACHE)
    )
    value_smem = gl.allocate_shared_memory(CACHE, [STAGES] + VALUE_SHAPE, VALUE_SHARED)
    probs_smem = gl.allocate_shared_memory(
        VALUE_MATH, PROBS_SHAPE, gl.NVMMASharedLayout.get_default_for(PROBS_SHAPE, VALUE_MATH)
    )
    if TOKEN_SCALES:
        SCALE_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        key_scale_ptr += kv_head * stride_key_scale_head
        value_scale_ptr += kv_head * stride_value_scale_head
        key_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], SCALE_SHARED)
        value_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], SCALE_SHARED)
    else:
        key_scale_smem = key_smem
        value_scale_smem = value_smem

    page_smem = gl.allocate_shared_memory(
        gl.int32, [PAGE_SLOTS, pages_per_tile(BLOCK_SIZE, TILE)], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    if STAGES == 1:
        fill_page_ring(table_ptr, page_smem, begin * TILE, step, first, context, STAGES, BLOCK_SIZE, TILE, WARPS)
    for tile in gl.static_range(AHEAD):
        _copy_tile(
            key_ptr, value_ptr, key_scale_ptr, value_scale_ptr,
            key_smem.index(tile), value_smem.index(tile), key_scale_smem.index(tile), value_scale_smem.index(tile),
            table_ptr, key_pages[tile], value_pages[tile], begin * TILE + tile * step, first, context, tile < n_tiles,
            stride_key_page, stride_key_token, stride_value_page, stride_value_token, stride_key_scale_page, stride_value_scale_page,
            AITER, SHUFFLED, TOKEN_SCALES, HEAD_DIM, BLOCK_SIZE, TILE, WARPS, KEY_COPY, VALUE_COPY,
        )
        if tile == 0:  # behind the first tile, which everything waits for
            fill_page_ring(table_ptr, page_smem, begin * TILE, step, first, context, STAGES, BLOCK_SIZE, TILE, WARPS)
        async_copy.commit_group()

    QUERY: gl.constexpr = query_rows(HEAD_DIM, WARPS)
    query_channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, QUERY))
    if WIDEN_KEY:
        query_channel = ordered_channel(query_channel, HEAD_DIM)
    query, factor = load_query(
        query_ptr, query_scale_ptr, query_channel, sequence, kv_head, 0,
        stride_query_token, stride_query_head, query_scale_step, kv_heads,
        KEY_MATH, N, QUERY_LENGTH, GROUP, QUERY,
    )
    query_smem = gl.allocate_shared_memory(
        KEY_MATH, [N, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([N, HEAD_DIM], KEY_MATH), query
    )
    fence_async_shared()
    out_scale = 1.0
    score_scale = score_scale_log2
    if QUANTISED:
        if key_scale_ptr is not None and not TOKEN_SCALES:
            score_scale *= gl.load(key_scale_ptr)
            out_scale *= gl.load(value_scale_ptr)
        row_scale = gl.convert_layout(factor, gl.SliceLayout(0, KEY_MMA)) * score_scale
    if VALUE_MATH.primitive_bitwidth == 8:
        out_scale *= 1.0 / FP8_MAX

    row = gl.arange(0, N, layout=gl.SliceLayout(0, KEY_MMA))
    limit = gl.where(row < ROWS, context - QUERY_LENGTH + row // GROUP, context - 1)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, KEY_MMA))
    row_max = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, KEY_MMA))
    sums = gl.zeros([TILE, N], gl.float32, KEY_MMA)
    acc = gl.zeros([HEAD_DIM, N], gl.float32, MMA)
    no_scores = gl.zeros([TILE, N], gl.float32, KEY_MMA)

    next_key_pages = key_pages[AHEAD]
    next_value_pages = value_pages[AHEAD]
    for i in range(n_tiles):
        slot = i % STAGES
        t0 = begin * TILE + i * step
        # K(i) has landed once all but the newest 2 * STAGES - 3 groups have; the barrier in the wait also frees the slot of tile i - 1
        if STAGES > 1:
            async_copy.wait_group(2 * STAGES - 3)
        else:
            workgroup_barrier()
        ahead = i + AHEAD
        into = ahead % STAGES
        _copy_tile(
            key_ptr, value_ptr, key_scale_ptr, value_scale_ptr,
            key_smem.index(into), value_smem.index(into), key_scale_smem.index(into), value_scale_smem.index(into),
            table_ptr, next_key_pages, next_value_pages, t0 + AHEAD * step, first, context, ahead < n_tiles,
            stride_key_page, stride_key_token, stride_value_page, stride_value_token, stride_key_scale_page, stride_value_scale_page,
            AITER, SHUFFLED, TOKEN_SCALES, HEAD_DIM, BLOCK_SIZE, TILE, WARPS, KEY_COPY, VALUE_COPY,
        )
        copy_pages(
            table_ptr, page_smem, (ahead + 1 + PAGES_AHEAD) % PAGE_SLOTS, t0 + (STAGES + PAGES_AHEAD) * step, first, context,
            BLOCK_SIZE, TILE, WARPS,
        )
        async_copy.commit_group()
        if STAGES == 1:
            async_copy.wait_group(1)
        fence_async_shared()
        if WIDEN_KEY:
            key = widen_contraction(key_smem.index(slot), TILE, HEAD_DIM, KEY_MMA, WARPS)
        else:
            key = key_smem.index(slot)
        scores = warpgroup_mma(key, query_smem.permute((1, 0)), no_scores, use_acc=False)
        scores = scores * row_scale[None, :] if QUANTISED else scores * score_scale
        value_scale_log2 = None
        if TOKEN_SCALES:
            scores = scores * key_scale_smem.index(slot).load(gl.SliceLayout(1, KEY_MMA))[:, None]
            value_scale = value_scale_smem.index(slot).load(gl.SliceLayout(1, KEY_MMA))[:, None]
            value_scale_log2 = gl.maximum(gl.log2(gl.abs(value_scale)), SMALLEST_SCALE_LOG2)
        if SOFTCAPPED:
            scores = capped(scores, softcap_log2)
        seen = visible((t0 + token)[:, None], limit[None, :], window, WINDOWED)
        probs, rescale, row_max, sums = softmax_step(scores, seen, row_max, sums, 0, value_scale_log2)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(0, MMA))[None, :]
        if TOKEN_SCALES:
            probs = probs * value_scale
        if VALUE_MATH.primitive_bitwidth == 8:
            probs = probs * FP8_MAX
        probs = probs.to(VALUE_MATH)
        if WIDEN_VALUE and AITER:
            probs = gl.permute(contraction_order(gl.permute(probs, (1, 0)), TILE), (1, 0))
        probs_t = probs_smem.permute((1, 0)) if PROBS_K_MAJOR else probs_smem
        probs_t.store(probs)
        async_copy.wait_group(2 * STAGES - 2)  # V(i)
        next_key_pages = pages_of_tile(page_smem, (ahead + 1) % PAGE_SLOTS, BLOCK_SIZE, TILE, KEY_TOKENS)
        next_value_pages = pages_of_tile(page_smem, (ahead + 1) % PAGE_SLOTS, BLOCK_SIZE, TILE, VALUE_TOKENS)
        if AITER:
            if (t0 + TILE > context) | (t0 < first):
                zero_unseen_values(value_smem.index(slot), t0, first, context, TILE, VALUE_COPY)
        fence_async_shared()
        if WIDEN_VALUE and AITER:
            value_t = widen_contraction(value_smem.index(slot), HEAD_DIM, TILE, MMA, WARPS)
        elif WIDEN_VALUE:
            value_t = widen_pairs(value_smem.index(slot), TILE, HEAD_DIM, paired_shared(VALUE_SHARED), MMA, WARPS)
        elif AITER:
            value_t = value_smem.index(slot)
        else:
            value_t = value_smem.index(slot).permute((1, 0))
        acc = warpgroup_mma(value_t, probs_t, acc)

    total = gl.convert_layout(gl.sum(sums, 0), gl.SliceLayout(0, MMA))
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, MMA))
    if PAIRED:
        channel = paired_channel(channel)
    store_result(
        acc * out_scale, channel, gl.convert_layout(row_max, gl.SliceLayout(0, MMA)), total, n_tiles > 0,
        out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
        sequence, kv_head, split, 0, kv_heads, num_splits, stride_out_token, stride_out_head,
        N, QUERY_LENGTH, GROUP, HEAD_DIM, MMA, 1,
    )
