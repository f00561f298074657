"""Register layouts of the CDNA kernel, as compile-time functions, and the order of tokens that makes the second product free.

An MFMA of M x M rows and columns (M 16 or 32) has 64 / M groups of lanes. Its result leaves every lane with one row and four columns per
block: column 4 * GROUPS * b + 4 * g + i in lane group g. As the left operand of the next product that lane has to hold V consecutive
elements of its row: tokens GROUPS * V * q + V * g + (0 .. V - 1). The two agree when column (b, g, i) carries token (q, g, h, i) with
b = q * V / 4 + h: keys are loaded in that order, and the probabilities never leave their registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LANES = 64


@gluon.constexpr_function
def mfma_layout(dtype, WARPS, MFMA_ROWS, MFMA_VERSION):
    """MFMA result layout [warp, row, column] of operands of ``dtype``; version 3 is CDNA3, 4 is CDNA4 with twice the depth of 16-bit types."""
    depth = 32 if dtype.primitive_bitwidth == 8 or MFMA_VERSION == 4 else 16
    if MFMA_ROWS == 32:
        depth //= 2
    return gl.amd.AMDMFMALayout(
        version=MFMA_VERSION, instr_shape=[MFMA_ROWS, MFMA_ROWS, depth], transposed=True, warps_per_cta=[WARPS, 1, 1],
    )


@gluon.constexpr_function
def vector_length(dtype):
    """Elements in 16 bytes."""
    return 128 // dtype.primitive_bitwidth


@gluon.constexpr_function
def token_run(dtype, WARP_TOKENS, MFMA_ROWS, ALONG_TOKENS):
    """Consecutive tokens of a channel that a lane holds, V above: a 16-byte vector where values lie along tokens in memory, at most a warp's share."""
    longest = 128 // dtype.primitive_bitwidth if ALONG_TOKENS else 8
    return min(longest, WARP_TOKENS * MFMA_ROWS // LANES)


@gluon.constexpr_function
def _bits(first, until, axis):
    """Bases first, 2 * first, ... below until, along one of three axes."""
    bases = []
    while first < until:
        bases.append([first if i == axis else 0 for i in range(3)])
        first *= 2
    return bases


@gluon.constexpr_function
def value_rows(WARPS, WARP_TOKENS, HEAD_DIM, MFMA_ROWS, RUN):
    """Load layout of values [WARPS, WARP_TOKENS, HEAD_DIM] whose channels are contiguous: each lane has RUN tokens of HEAD_DIM / M channels.

    The lanes of a group hold a whole row of HEAD_DIM channels, so a load instruction reads 64 / M rows of it.
    """
    channels = HEAD_DIM // MFMA_ROWS
    groups = LANES // MFMA_ROWS
    return gl.DistributedLinearLayout(
        _bits(1, channels, 2) + _bits(1, RUN, 1) + _bits(groups * RUN, WARP_TOKENS, 1),
        _bits(channels, HEAD_DIM, 2) + _bits(RUN, groups * RUN, 1), _bits(1, WARPS, 0), [], [WARPS, WARP_TOKENS, HEAD_DIM],
    )


@gluon.jit
def column_token(column, RUN: gl.constexpr, MFMA_ROWS: gl.constexpr):
    """Token that a column of the first product carries."""
    GROUPS: gl.constexpr = 64 // MFMA_ROWS
    BLOCKS: gl.constexpr = RUN // 4
    block = column // (4 * GROUPS)
    return (
        (block // BLOCKS) * (GROUPS * RUN)
        + ((column // 4) % GROUPS) * RUN
        + (block % BLOCKS) * 4
        + column % 4
    )


@gluon.jit
def tokens_in_order(probs, RUN: gl.constexpr, MFMA_ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Probabilities [WARPS, N, columns] as the left operand [WARPS, N, tokens]. Moves no data between lanes."""
    GROUPS: gl.constexpr = 64 // MFMA_ROWS
    WARPS: gl.constexpr = probs.shape[0]
    N: gl.constexpr = probs.shape[1]
    TOKENS: gl.constexpr = probs.shape[2]
    split = probs.reshape([WARPS, N, TOKENS // (GROUPS * RUN), RUN // 4, GROUPS, 4])
    ordered = split.permute((0, 1, 2, 4, 3, 5)).reshape([WARPS, N, TOKENS])
    return gl.convert_layout(ordered, OPERAND, assert_trivial=True)


@gluon.jit
def position_channel(position, HEAD_DIM: gl.constexpr, MFMA_ROWS: gl.constexpr):
    """Channel at a column of the second product when `channels_in_lanes` made its right operand."""
    return (position % MFMA_ROWS) * (HEAD_DIM // MFMA_ROWS) + position // MFMA_ROWS


@gluon.jit
def channels_in_lanes(values, MFMA_ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Values [WARPS, tokens, channels] in `value_rows` as the right operand, channels in the order of `position_channel`.

    Each lane transposes its own block: a lane owns neighbouring channels in memory, and which column a channel takes is free.
    """
    WARPS: gl.constexpr = values.shape[0]
    TOKENS: gl.constexpr = values.shape[1]
    CHANNELS: gl.constexpr = values.shape[2]
    split = values.reshape([WARPS, TOKENS, MFMA_ROWS, CHANNELS // MFMA_ROWS])
    ordered = split.permute((0, 1, 3, 2)).reshape([WARPS, TOKENS, CHANNELS])
    return gl.convert_layout(ordered, OPERAND, assert_trivial=True)
