"""fp8 cache tiles as 16-bit operands of wgmma, widened in registers.

wgmma's left operand may come from registers: lane 4 * r + c of a warp holds rows r and r + 8 of its 16, and of every 16 contraction
elements the four {2c, 2c + 1, 2c + 8, 2c + 9}. Read in memory order these are pairs of fp8, 2-byte loads. But a contraction may run in any
order if both operands agree on it: here lane c owns 16 neighbouring bytes at a time, one 16-byte load, and the other operand is laid out
in the same order (`contraction_order`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from patune.kernels.gluon_compat import reinterpret_shared

PANEL = gl.constexpr(128)  # elements over which a warp's four columns of lanes are spread: 2 x 16 bytes each
# Four pairs of fp8 (channels 2p and 2p + 1 of four tokens) to four fp16 of the even channel and four of the odd one.
UNPAIR = gl.constexpr(
    """{
    .reg .b32 even, odd; .reg .b16 a, b, c, d;
    prmt.b32 even, $4, $5, 0x6420;
    prmt.b32 odd, $4, $5, 0x7531;
    mov.b32 {a, b}, even;
    mov.b32 {c, d}, odd;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    cvt.rn.f16x2.e4m3x2 $2, c;
    cvt.rn.f16x2.e4m3x2 $3, d;
}"""
)


@gluon.constexpr_function
def _doubling(first, until, axis):
    """Bases first, 2 * first, ... below until, along an axis."""
    bases = []
    while first < until:
        bases.append([first, 0] if axis == 0 else [0, first])
        first *= 2
    return bases


@gluon.constexpr_function
def _contraction_registers(ROWS, LENGTH, WARPS):
    """Registers of a [ROWS, LENGTH] fp8 tile: each lane has the elements that it contributes to wgmma, in 16-byte runs."""
    run = min(LENGTH, 128) // 4
    registers = _doubling(1, run, 1) + _doubling(128, LENGTH, 1) + [[8, 0]] + _doubling(16 * WARPS, ROWS, 0)
    lanes = [[0, run], [0, 2 * run], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _doubling(16, 16 * WARPS, 0), [], [ROWS, LENGTH])


@gluon.constexpr_function
def _pair_registers(PAIRS, LENGTH, WARPS):
    """Registers of a [PAIRS, LENGTH] tile of channel pairs, as ldmatrix.trans delivers them."""
    registers = [[0, 1], [0, 8]] + _doubling(16, LENGTH, 1) + _doubling(8 * WARPS, PAIRS, 0)
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _doubling(8, 8 * WARPS, 0), [], [PAIRS, LENGTH])


@gluon.jit
def contraction_order(tensor, LENGTH: gl.constexpr):
    """Reorder axis 1 of [rows, LENGTH] from memory order to the order of `widen_contraction`. Moves no data between threads."""
    P: gl.constexpr = min(LENGTH, PANEL)
    ROWS: gl.constexpr = tensor.shape[0]
    split = tensor.reshape([ROWS, LENGTH // P, 4, P // 16, 2, 2])
    return split.permute((0, 1, 3, 4, 2, 5)).reshape([ROWS, LENGTH])


@gluon.jit
def ordered_channel(position, LENGTH: gl.constexpr):
    """Memory position of the contraction element that `contraction_order` puts at `position`."""
    P: gl.constexpr = min(LENGTH, PANEL)
    lane = (position // 2) % 4
    half = (position // 8) % 2
    step = (position % P) // 16
    return (position // P) * P + lane * (P // 4) + step * 4 + half * 2 + position % 2


@gluon.jit
def paired_channel(position):
    """Channel at a position of `widen_pairs`' rows: in runs of 16, eight even channels and then the eight odd ones beside them."""
    return (position // 16) * 16 + (position % 8) * 2 + (position // 8) % 2


@gluon.jit
def widen_contraction(smem, ROWS: gl.constexpr, LENGTH: gl.constexpr, MMA: gl.constexpr, WARPS: gl.constexpr):
    """fp16 left operand [ROWS, LENGTH] of an fp8 tile whose contraction axis is contiguous, in `contraction_order`."""
    stored = smem.load(_contraction_registers(ROWS, LENGTH, WARPS))
    ordered = contraction_order(stored.to(gl.float16), LENGTH)
    return gl.convert_layout(ordered, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def widen_pairs(smem, LENGTH: gl.constexpr, CHANNELS: gl.constexpr, SHARED: gl.constexpr, MMA: gl.constexpr, WARPS: gl.constexpr):
    """fp16 left operand [CHANNELS, LENGTH] of an fp8 tile [LENGTH, CHANNELS]: the contraction axis is the strided one.

    ldmatrix transposes 16-bit elements, so channels move in pairs; the even ones become rows r and the odd ones rows r + 8
    (`paired_channel`). SHARED is the tile's layout seen as 16-bit elements.
    """
    PAIRS: gl.constexpr = CHANNELS // 2
    pairs = reinterpret_shared(smem, gl.int16, LENGTH, PAIRS, SHARED)
    stored = pairs.permute((1, 0)).load(_pair_registers(PAIRS, LENGTH, WARPS))
    even, odd = gl.inline_asm_elementwise(
        UNPAIR, "=r,=r,=r,=r,r,r", [stored], dtype=(gl.float16, gl.float16), is_pure=True, pack=4
    )
    both = gl.join(even, odd).reshape([CHANNELS // 16, 8, LENGTH, 2])
    operand = both.permute((0, 3, 1, 2)).reshape([CHANNELS, LENGTH])
    return gl.convert_layout(operand, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
