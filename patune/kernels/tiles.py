"""What every decode kernel shares: which tiles a split walks, what a row sees, and one online-softmax step.

Words: a walk is one (sequence, KV head) pair, a tile is TILE tokens of its context, tile t = tokens [t * TILE, (t + 1) * TILE).
Row r of a walk is query token r // GROUP of query head kv_head * GROUP + r % GROUP; it sees tokens <= limit(r), and with a window the
last `window` of them, its own included. Scores are in log2 units inside kernels: softmax_scale * log2(e) is folded into one factor.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NEG_INF = gl.constexpr(float("-inf"))
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
SMALLEST_SCALE_LOG2 = gl.constexpr(-100.0)  # value scales below 2^-100 count as that in the softmax reference: their product is 0 anyway


@gluon.jit
def first_visible(context, window, QUERY_LENGTH: gl.constexpr, WINDOWED: gl.constexpr):
    """Earliest token that any query token of the sequence sees: what lies before is neither read nor trusted to be finite."""
    if WINDOWED:
        return gl.maximum(context - QUERY_LENGTH - window + 1, 0)
    else:
        return context * 0


@gluon.jit
def tile_range(context, first, split, TILE: gl.constexpr):
    """Tiles begin, begin + num_splits, ... below end belong to a split.

    Whole tiles go to splits, so no token is lost at a split edge and none is loaded twice; dealt in turn, no split gets two tiles more than
    another, and the first tile does not depend on the context: its page can be looked up before the context has arrived.
    """
    return first // TILE + split, (context + TILE - 1) // TILE


@gluon.jit
def visible(position, limit, window, WINDOWED: gl.constexpr):
    """Mask of the tokens that a row sees; position and limit broadcast against each other."""
    seen = position <= limit
    if WINDOWED:
        seen = seen & (position > limit - window)
    return seen


@gluon.jit
def softmax_step(scores, seen, row_max, sums, AXIS: gl.constexpr, value_log2=None):
    """One online-softmax update along AXIS: returns probabilities, rescale factor, new row max, sums.

    `sums` keeps the un-reduced sums in the shape of `scores`, so the only cross-lane work per tile is the max.
    A row that has seen nothing has row_max = -inf; the guard keeps -inf - -inf out of exp2.
    `value_log2`, log2 of the tokens' value scales, moves the reference of the maximum only: probabilities times value scales are then
    at most 1 and fit 16 bits, whatever the scales are.
    """
    scores = gl.where(seen, scores, NEG_INF)
    if value_log2 is None:
        new_max = gl.maximum(row_max, gl.max(scores, AXIS))
    else:
        new_max = gl.maximum(row_max, gl.max(scores + value_log2, AXIS))
    finite_max = gl.where(new_max == NEG_INF, 0.0, new_max)
    rescale = gl.exp2(row_max - finite_max)
    probs = gl.exp2(scores - gl.expand_dims(finite_max, AXIS))
    sums = sums * gl.expand_dims(rescale, AXIS) + probs
    return probs, rescale, new_max, sums


@gluon.jit
def capped(scores, softcap_log2):
    """Soft-capped scores, cap * tanh(score / cap), scores and cap in log2 units. tanh by exp2: tanh.approx is off by 2^-11, 0.02 at a cap of 50."""
    return softcap_log2 * (1.0 - 2.0 / (1.0 + gl.exp2(scores * (2.0 * LOG2E / softcap_log2))))


@gluon.jit
def table_entry(position, first, context, BLOCK_SIZE: gl.constexpr):
    """Block-table index of each token, and whether its page holds anything of [first, context).

    The mask is per page, not per token: a page then repeats for all of its tokens, as the loads' max_constancy hints say.
    """
    index = position // BLOCK_SIZE
    return index, (index >= first // BLOCK_SIZE) & (index * BLOCK_SIZE < context)


@gluon.jit
def row_offset(sequence, kv_head, row, stride_token, stride_head, QUERY_LENGTH: gl.constexpr, GROUP: gl.constexpr):
    """Element offset of a row's head vector in query [batch * QUERY_LENGTH, q_heads, HEAD_DIM] or in the output."""
    return (sequence.to(gl.int64) * QUERY_LENGTH + row // GROUP) * stride_token + (kv_head * GROUP + row % GROUP) * stride_head


@gluon.jit
def with_sink(sinks_ptr, head, row_max, row_sum, keep):
    """Fold the raw sink logit of each row's head into (max, sum). Returns the factor for the accumulator and the new sum.

    The sink goes through the max, so a large one cannot overflow. Without sinks the factor is 1.
    """
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + head, mask=keep, other=0.0).to(gl.float32) * LOG2E
        top = gl.maximum(row_max, sink)
        factor = gl.exp2(row_max - top)
        return factor, row_sum * factor + gl.exp2(sink - top)
    else:
        return row_sum * 0.0 + 1.0, row_sum


@gluon.jit
def inverse_or_zero(row_sum):
    """1 / sum, and 0 for a row that saw nothing: its output is zeros, not NaN."""
    return gl.where(row_sum > 0.0, 1.0 / gl.where(row_sum > 0.0, row_sum, 1.0), 0.0)


@gluon.jit
def log_sum_exp(row_max, row_sum):
    """Natural-log LSE of scores in log2 units, -inf for a row that saw nothing."""
    return gl.where(row_sum > 0.0, (row_max + gl.log2(gl.where(row_sum > 0.0, row_sum, 1.0))) * LN2, NEG_INF)
