"""What a decode kernel does with its result: normalise and write the output, or leave a partial result to the reduce kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from patune.kernels.tiles import inverse_or_zero, log_sum_exp, row_offset, with_sink


@gluon.jit
def store_result(
    acc, channel, row_max, row_sum, has_tiles,
    out_ptr, lse_ptr, sinks_ptr, partial_out_ptr, partial_max_ptr, partial_sum_ptr,
    sequence, kv_head, split, first_row, kv_heads, num_splits, stride_out_token, stride_out_head,
    N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    LAYOUT: gl.constexpr, ROW_AXIS: gl.constexpr, WITH_STATS: gl.constexpr = True,
):
    """Write acc, [N, channels] (ROW_AXIS 0) or [channels, N] (ROW_AXIS 1) in LAYOUT; channel, row_max and row_sum are slices of it.

    These are rows first_row + [0, N) of the walk, as far as it has them. Without partial_out the output row is acc / (row_sum + sink); with it acc goes
    unnormalised to the split's slot, and a split without tiles writes only max = -inf and sum = 0. WITH_STATS: write the LSE or max and
    sum too, once per row; accumulators that come in parts need it with one part only.
    """
    CHANNEL_AXIS: gl.constexpr = 1 - ROW_AXIS
    row = first_row + gl.arange(0, N, layout=gl.SliceLayout(CHANNEL_AXIS, LAYOUT))
    channel = gl.expand_dims(channel, ROW_AXIS)
    is_row = row < QUERY_LENGTH * GROUP
    if partial_out_ptr is None:
        head = kv_head * GROUP + row % GROUP
        if lse_ptr is not None and WITH_STATS:
            token = sequence * QUERY_LENGTH + row // GROUP
            lse = log_sum_exp(row_max, row_sum)
            gl.store(lse_ptr + token * (kv_heads * GROUP) + head, lse, mask=is_row)
        factor, total = with_sink(sinks_ptr, head, row_max, row_sum, is_row)
        out = acc * gl.expand_dims(factor * inverse_or_zero(total), CHANNEL_AXIS)
        offset = row_offset(sequence, kv_head, row, stride_out_token, stride_out_head, QUERY_LENGTH, GROUP)
        pointers = out_ptr + gl.expand_dims(offset, CHANNEL_AXIS) + channel
        gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(is_row, CHANNEL_AXIS))
    else:
        slot = (((sequence * kv_heads + kv_head) * num_splits + split) * (QUERY_LENGTH * GROUP)).to(gl.int64)
        if WITH_STATS:
            gl.store(partial_max_ptr + slot + row, row_max, mask=is_row)
            gl.store(partial_sum_ptr + slot + row, row_sum, mask=is_row)
        if has_tiles:
            pointers = partial_out_ptr + gl.expand_dims(slot + row, CHANNEL_AXIS) * HEAD_DIM + channel
            gl.store(pointers, acc, mask=gl.expand_dims(is_row, CHANNEL_AXIS))
