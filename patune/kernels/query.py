"""Loading the query rows of a walk as the left operand of the first product."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from patune.kernels.tiles import row_offset


@gluon.constexpr_function
def top_log2(dtype):
    """A row's largest element goes to [2^n, 2^(n+1)), half of the type's range: fp16 ends at 2^16, e4m3fn at 448, e4m3fnuz at 240."""
    if dtype.primitive_bitwidth == 16:
        return 14.0
    return 7.0 if dtype == gl.float8e4nv else 6.0


@gluon.jit
def load_query(
    query_ptr, query_scale_ptr, channel, sequence, kv_head, first_row,
    stride_query_token, stride_query_head, query_scale_step, kv_heads,
    DTYPE: gl.constexpr, N: gl.constexpr, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Rows first_row + [0, N) of a walk as DTYPE, [N, channels] in LAYOUT, and the factor [N] that each row's scores have to be multiplied with.

    Rows that the walk does not have are zeros. ``channel`` is which channel each column holds. A row that DTYPE cannot hold is scaled by a
    power of two.
    """
    row = first_row + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    is_row = row < QUERY_LENGTH * GROUP
    offset = row_offset(sequence, kv_head, row, stride_query_token, stride_query_head, QUERY_LENGTH, GROUP)
    query = gl.load(query_ptr + offset[:, None] + channel[None, :], mask=is_row[:, None], other=0.0)
    factor = gl.full([N], 1.0, gl.float32, gl.SliceLayout(1, LAYOUT))
    FITS: gl.constexpr = query.dtype == DTYPE or query.dtype.primitive_bitwidth == 8
    if not FITS:
        TOP: gl.constexpr = top_log2(DTYPE)
        wide = query.to(gl.float32)
        largest = gl.max(gl.abs(wide), 1)
        shift = TOP - gl.floor(gl.log2(gl.where(largest > 0.0, largest, 1.0)))
        shift = gl.minimum(gl.maximum(shift, -100.0), 100.0)
        factor = gl.exp2(-shift)
        query = (wide * gl.exp2(shift)[:, None]).to(DTYPE)
    else:
        query = query.to(DTYPE)
    if query_scale_ptr is not None:
        token = sequence * QUERY_LENGTH + row // GROUP
        index = (token * (kv_heads * GROUP) + kv_head * GROUP + row % GROUP) * query_scale_step
        factor = factor * gl.load(query_scale_ptr + index, mask=is_row, other=0.0)
    return query, factor
