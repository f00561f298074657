"""Split-KV paged decode for Hopper (sm_90), swapped wgmma.

    S^T[TILE, N] = K[TILE, D] Q^T[D, N]      P = online softmax along TILE      O^T[D, N] += V^T[D, TILE] P^T[TILE, N]

The KV tokens, then the head channels, are the M = 64 side of wgmma and the query rows are its N side (8, 16, 32 or 64): the tensor core
reads K and V straight from shared memory and nothing is spent on padding 8 rows to 64. K and V arrive by cp.async in a ring of STAGES tiles.

query [batch * QUERY_LENGTH, q_heads, D] bf16/fp16; key [pages, kv_heads, D/x, BLOCK_SIZE, x] and value [pages, kv_heads, D, BLOCK_SIZE]
(AITER), or both [pages, kv_heads, BLOCK_SIZE, D] by strides; block_tables [batch, max_pages] int32; context_lengths [batch] int32.
Grid (kv_heads, num_splits, batch). With partial_out the split's (acc, max, sum) go to the workspace, without it the output is written.

Knobs (H200, 2026-11-22, facts in docs/tuning.md): num_splits is the strongest; TILE x STAGES has a cliff where shared memory leaves one
workgroup per SM (+14 % at page 16); WARPS 4 or 8 within 4 %; maxnreg within 2 %, 64 never good.
Limits: BLOCK_SIZE and TILE powers of two; D 64 or 128; key, value and query of one 16-bit type.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from patune.kernels.epilogue import store_result
from patune.kernels.gluon_compat import cp_async, workgroup_barrier
from patune.kernels.hopper_layouts import (
    channel_rows,
    key_shared,
    mma_depth,
    query_rows,
    token_rows,
    value_shared,
    vector_length,
)
from patune.kernels.tiles import (
    first_visible,
    row_offset,
    softmax_step,
    table_entry,
    tile_range,
    visible,
)


@gluon.jit
def _copy_token_rows(
    cache_ptr, tile_smem, table_ptr, t0, first, context,
    stride_page, stride_token,
    AITER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Start the copy of a [TILE, HEAD_DIM] tile: an AITER key, or a key or value by strides. Masked tokens become zeros."""
    VECTOR: gl.constexpr = vector_length(cache_ptr.dtype.element_ty)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    if AITER:  # the token stride is x = VECTOR by definition: 16 bytes, which a run-time stride would not prove
        token_step = VECTOR
        channel_offset = (channel // VECTOR) * (BLOCK_SIZE * VECTOR) + channel % VECTOR
    else:
        token_step = stride_token
        channel_offset = channel
    if BLOCK_SIZE >= TILE:
        page = gl.load(table_ptr + t0 // BLOCK_SIZE)
        base = cache_ptr + page.to(gl.int64) * stride_page
        token_offset = (t0 % BLOCK_SIZE + token) * token_step
        pointers = base + token_offset[:, None] + channel_offset[None, :]
    else:
        index, mapped = table_entry(t0 + token, first, context, BLOCK_SIZE)
        # page 0 is always mapped; a vector load hides that a page repeats, and the 16-byte copies need to know
        pages = gl.max_constancy(gl.load(table_ptr + index, mask=mapped, other=0), [BLOCK_SIZE])
        base = cache_ptr + pages.to(gl.int64) * stride_page + (token % BLOCK_SIZE) * token_step
        pointers = base[:, None] + channel_offset[None, :]
    kept = (t0 + token >= first) & (t0 + token < context)
    cp_async(tile_smem, pointers, mask=kept[:, None])


@gluon.jit
def _copy_channel_rows(
    cache_ptr, tile_smem, table_ptr, t0, first, context, stride_page,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Start the copy of an AITER value tile [HEAD_DIM, TILE]. A mask along the vector axis would break 16-byte copies: the caller masks."""
    token = gl.arange(0, TILE, layout=gl.SliceLayout(0, LAYOUT))
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, LAYOUT))
    if BLOCK_SIZE >= TILE:
        page = gl.load(table_ptr + t0 // BLOCK_SIZE)
        # written as tile index * TILE: `t0 % BLOCK_SIZE` loses the alignment and cp.async refuses transfers under 4 bytes
        in_page = ((t0 // TILE) % (BLOCK_SIZE // TILE)) * TILE
        base = cache_ptr + page.to(gl.int64) * stride_page + in_page
        pointers = base + (channel * BLOCK_SIZE)[:, None] + token[None, :]
    else:
        index, mapped = table_entry(t0 + token, first, context, BLOCK_SIZE)
        # page 0 is always mapped; a vector load hides that a page repeats, and the 16-byte copies need to know
        pages = gl.max_constancy(gl.load(table_ptr + index, mask=mapped, other=0), [BLOCK_SIZE])
        base = cache_ptr + pages.to(gl.int64) * stride_page + token % BLOCK_SIZE
        pointers = base[None, :] + (channel * BLOCK_SIZE)[:, None]
    cp_async(tile_smem, pointers)


@gluon.jit
def _copy_tile(
    key_ptr, value_ptr, key_smem, value_smem, table_ptr, t0, first, context, live,
    stride_key_page, stride_key_token, stride_value_page, stride_value_token,
    AITER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr,
    KEY_COPY: gl.constexpr, VALUE_COPY: gl.constexpr,
):
    """Start the copies of one (K, V) tile as two commit groups; a tile beyond the split's end commits empty groups."""
    if live:
        _copy_token_rows(
            key_ptr, key_smem, table_ptr, t0, first, context,
            stride_key_page, stride_key_token,
            AITER, HEAD_DIM, BLOCK_SIZE, TILE, KEY_COPY,
        )
    async_copy.commit_group()
    if live:
        if AITER:
            _copy_channel_rows(
                value_ptr, value_smem, table_ptr, t0, first, context, stride_value_page,
                HEAD_DIM, BLOCK_SIZE, TILE, VALUE_COPY,
            )
        else:
            _copy_token_rows(
                value_ptr, value_smem, table_ptr, t0, first, context,
                stride_value_page, stride_value_token,
                False, HEAD_DIM, BLOCK_SIZE, TILE, VALUE_COPY,
            )
    async_copy.commit_group()


@gluon.jit
def _zero_unseen_values(value_smem, t0, first, context, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Zero the tokens of an AITER value tile outside [first, context): 0 * NaN of an unused slot would poison the sum."""
    token = t0 + gl.arange(0, TILE, layout=gl.SliceLayout(0, LAYOUT))
    values = value_smem.load(LAYOUT)
    kept = ((token >= first) & (token < context))[None, :]
    value_smem.store(gl.where(kept, values.to(gl.float32), 0.0).to(values.dtype))


@gluon.jit(do_not_specialize=["kv_heads", "num_splits", "window", "stride_table"])
def hopper_decode_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, context_ptr,
    out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
    stride_table, stride_query_token, stride_query_head, stride_out_token, stride_out_head,
    stride_key_page, stride_key_head, stride_key_token, stride_value_page, stride_value_head, stride_value_token,
    score_scale_log2, kv_heads, num_splits, window,
    ROWS: gl.constexpr, N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, AITER: gl.constexpr, WINDOWED: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, PROBS_K_MAJOR: gl.constexpr,
):
    """Decode one split of one walk; see the module docstring."""
    gl.static_assert(TILE % 64 == 0 and HEAD_DIM % 64 == 0, "wgmma's M side is 64")
    gl.static_assert(N >= 8 and N >= ROWS, "wgmma's N side is at least 8 (a smaller one aborts the compiler process)")
    gl.static_assert(BLOCK_SIZE % TILE == 0 or TILE % BLOCK_SIZE == 0, "a tile is a part of a page or whole pages")
    gl.static_assert(PROBS_K_MAJOR or N > 8, "N = 8 with N-major probabilities gives wrong results in Triton 3.6")
    kv_head = gl.program_id(0)
    split = gl.program_id(1)
    sequence = gl.program_id(2)
    context = gl.load(context_ptr + sequence)
    first = first_visible(context, window, QUERY_LENGTH, WINDOWED)
    begin, end = tile_range(context, first, split, num_splits, TILE)
    n_tiles = end - begin
    table_ptr += sequence * stride_table
    key_ptr += kv_head * stride_key_head
    value_ptr += kv_head * stride_value_head

    DTYPE: gl.constexpr = key_ptr.dtype.element_ty
    VECTOR: gl.constexpr = vector_length(DTYPE)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, mma_depth(DTYPE)])
    KEY_COPY: gl.constexpr = token_rows(TILE, HEAD_DIM, VECTOR, WARPS, AITER)
    VALUE_COPY: gl.constexpr = channel_rows(TILE, VECTOR, WARPS, BLOCK_SIZE) if AITER else KEY_COPY
    VALUE_SHAPE: gl.constexpr = [HEAD_DIM, TILE] if AITER else [TILE, HEAD_DIM]
    PROBS_SHAPE: gl.constexpr = [N, TILE] if PROBS_K_MAJOR else [TILE, N]
    key_smem = gl.allocate_shared_memory(
        DTYPE, [STAGES, TILE, HEAD_DIM], key_shared(TILE, HEAD_DIM, VECTOR, AITER, DTYPE)
    )
    value_smem = gl.allocate_shared_memory(
        DTYPE, [STAGES] + VALUE_SHAPE, value_shared(TILE, HEAD_DIM, BLOCK_SIZE, AITER, DTYPE)
    )
    probs_smem = gl.allocate_shared_memory(
        DTYPE, PROBS_SHAPE, gl.NVMMASharedLayout.get_default_for(PROBS_SHAPE, DTYPE)
    )

    AHEAD: gl.constexpr = STAGES - 1  # tiles in flight besides the one that is computed on
    for tile in gl.static_range(AHEAD):
        _copy_tile(
            key_ptr, value_ptr, key_smem.index(tile), value_smem.index(tile), table_ptr,
            (begin + tile) * TILE, first, context, tile < n_tiles,
            stride_key_page, stride_key_token, stride_value_page, stride_value_token,
            AITER, HEAD_DIM, BLOCK_SIZE, TILE, KEY_COPY, VALUE_COPY,
        )

    QUERY_LOAD: gl.constexpr = query_rows(HEAD_DIM, WARPS)
    query_row = gl.arange(0, N, layout=gl.SliceLayout(1, QUERY_LOAD))
    query_channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, QUERY_LOAD))
    query_offset = row_offset(
        sequence, kv_head, query_row, stride_query_token, stride_query_head, QUERY_LENGTH, GROUP
    )
    query = gl.load(
        query_ptr + query_offset[:, None] + query_channel[None, :], mask=(query_row < ROWS)[:, None], other=0.0
    )
    query_smem = gl.allocate_shared_memory(
        DTYPE, [N, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([N, HEAD_DIM], DTYPE), query
    )
    fence_async_shared()

    row = gl.arange(0, N, layout=gl.SliceLayout(0, MMA))
    limit = gl.where(row < ROWS, context - QUERY_LENGTH + row // GROUP, context - 1)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, MMA))
    row_max = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, MMA))
    sums = gl.zeros([TILE, N], gl.float32, MMA)
    acc = gl.zeros([HEAD_DIM, N], gl.float32, MMA)
    no_scores = gl.zeros([TILE, N], gl.float32, MMA)

    for i in range(n_tiles):
        slot = i % STAGES
        t0 = (begin + i) * TILE
        # K(i) has landed once all but the newest 2 * STAGES - 3 groups have; the barrier in the wait also frees the slot of tile i - 1
        if STAGES > 1:
            async_copy.wait_group(2 * STAGES - 3)
        else:
            workgroup_barrier()
        ahead = i + AHEAD
        _copy_tile(
            key_ptr, value_ptr, key_smem.index(ahead % STAGES), value_smem.index(ahead % STAGES), table_ptr,
            (begin + ahead) * TILE, first, context, ahead < n_tiles,
            stride_key_page, stride_key_token, stride_value_page, stride_value_token,
            AITER, HEAD_DIM, BLOCK_SIZE, TILE, KEY_COPY, VALUE_COPY,
        )
        if STAGES == 1:
            async_copy.wait_group(1)
        fence_async_shared()
        scores = warpgroup_mma(key_smem.index(slot), query_smem.permute((1, 0)), no_scores, use_acc=False)
        seen = visible((t0 + token)[:, None], limit[None, :], window, WINDOWED)
        probs, rescale, row_max, sums = softmax_step(scores * score_scale_log2, seen, row_max, sums, 0)
        acc = acc * rescale[None, :]
        probs_t = probs_smem.permute((1, 0)) if PROBS_K_MAJOR else probs_smem
        probs_t.store(probs.to(DTYPE))
        async_copy.wait_group(2 * STAGES - 2)  # V(i)
        if AITER:
            if (t0 + TILE > context) | (t0 < first):
                _zero_unseen_values(value_smem.index(slot), t0, first, context, TILE, VALUE_COPY)
        fence_async_shared()
        value_t = value_smem.index(slot) if AITER else value_smem.index(slot).permute((1, 0))
        acc = warpgroup_mma(value_t, probs_t, acc)

    store_result(
        acc, row_max, gl.sum(sums, 0), n_tiles > 0,
        out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
        sequence, kv_head, split, kv_heads, num_splits, stride_out_token, stride_out_head,
        ROWS, N, QUERY_LENGTH, GROUP, HEAD_DIM, MMA, 1,
    )
