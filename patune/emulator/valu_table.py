"""What each lane-wise vector ALU instruction computes: source types, result type, numpy function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patune.emulator.formats import bf16_from_f32, f16_bits_from_f32, f32_from_bf16

if TYPE_CHECKING:
    from patune.emulator.registers import Row

Function = Callable[..., "Row"]
_U8, _U16, _U32, _U64 = np.uint8, np.uint16, np.uint32, np.uint64
_I16, _I32, _I64 = np.int16, np.int32, np.int64
_F32, _F64 = np.float32, np.float64
_LOW24 = _U32(0xFF_FFFF)


# ---- functions that are more than an expression ---------------------------------------------------------------------


def fused_multiply_add(a: Row, b: Row, c: Row) -> Row:
    """The float32 a * b + c as float64: the product is exact, the sum rounds twice (to float64, then on the store).

    The second rounding differs from a true fused one in about one of 2**29 random cases.
    """
    product: Row = np.multiply(a, b, dtype=_F64)
    result: Row = np.add(product, c, out=product if product.shape == c.shape else None)
    return result


def _median(a: Row, b: Row, c: Row) -> Row:
    return np.maximum(np.minimum(np.maximum(a, b), c), np.minimum(a, b))


def _bit_field_u(a: Row, offset: Row, width: Row) -> Row:
    width = width & _U32(31)
    field = (a >> (offset & _U32(31))) & ((_U32(1) << width) - _U32(1))
    return np.where(width == 0, _U32(0), field)


def _bit_field_i(a: Row, offset: Row, width: Row) -> Row:
    width = width & _U32(31)
    sign = (_U32(1) << width) >> _U32(1)
    field: Row = (_bit_field_u(a, offset, width) ^ sign) - sign
    return field.view(_I32)


def _reverse_bits(a: Row) -> Row:
    for distance, low in ((1, 0x5555_5555), (2, 0x3333_3333), (4, 0x0F0F_0F0F)):
        mask = _U32(low)
        a = ((a & mask) << _U32(distance)) | ((a >> _U32(distance)) & mask)
    return np.asarray(a).byteswap()


def _leading_zeros(a: Row) -> Row:
    """v_ffbh_u32: position of the first one from the top; all ones when there is none."""
    exponent = np.floor(np.log2(np.maximum(a, 1).astype(_F64)))
    return np.where(a == 0, _F64(0xFFFF_FFFF), 31 - exponent).astype(_U32)


def _to_integer(low: int, high: int) -> Function:
    """Float to integer: towards zero, clamped to the range, NaN gives zero."""

    def convert(a: Row) -> Row:
        clamped = np.clip(np.trunc(a.astype(_F64)), low, high)
        return np.where(np.isnan(clamped), 0, clamped).astype(_I64)

    return convert


def _count_below(first_lane: int) -> Function:
    """v_mbcnt: set mask bits below the lane, of one half of the mask, plus the second source."""
    below = [(1 << max(0, min(lane - first_lane, 32))) - 1 for lane in range(64)]
    prefix = np.array(below, _U32)
    return lambda a, b: np.bitwise_count(a & prefix).astype(_U32) + b


def _multiply24(a: Row, b: Row) -> Row:
    return (a & _LOW24) * (b & _LOW24)


def _multiply24_signed(a: Row, b: Row) -> Row:
    return ((a << 8) >> 8) * ((b << 8) >> 8)


class VectorOp(NamedTuple):
    """Source types, result type (letters of :data:`patune.emulator.sources.DTYPES`) and function of an instruction."""

    sources: str
    result: str
    function: Function


def _min3(f: Function) -> Function:
    return lambda a, b, c: f(f(a, b), c)


_TABLE: dict[str, tuple[str, str, Function]] = {
    # moves and bit logic
    "mov_b32": ("u", "u", np.positive),
    "accvgpr_read_b32": ("u", "u", np.positive),
    "accvgpr_write_b32": ("u", "u", np.positive),
    "accvgpr_mov_b32": ("u", "u", np.positive),
    "not_b32": ("u", "u", np.invert),
    "bfrev_b32": ("u", "u", _reverse_bits),
    "and_b32": ("uu", "u", np.bitwise_and),
    "or_b32": ("uu", "u", np.bitwise_or),
    "xor_b32": ("uu", "u", np.bitwise_xor),
    "xnor_b32": ("uu", "u", lambda a, b: ~(a ^ b)),
    "or3_b32": ("uuu", "u", lambda a, b, c: a | b | c),
    "and_or_b32": ("uuu", "u", lambda a, b, c: (a & b) | c),
    "bfi_b32": ("uuu", "u", lambda a, b, c: (a & b) | (~a & c)),
    "bfe_u32": ("uuu", "u", _bit_field_u),
    "bfe_i32": ("uuu", "i", _bit_field_i),
    "ffbh_u32": ("u", "u", _leading_zeros),
    "mbcnt_lo_u32_b32": ("uu", "u", _count_below(0)),
    "mbcnt_hi_u32_b32": ("uu", "u", _count_below(32)),
    # shifts; the hardware uses the low bits of the amount
    "lshlrev_b32": ("uu", "u", lambda a, b: b << (a & _U32(31))),
    "lshrrev_b32": ("uu", "u", lambda a, b: b >> (a & _U32(31))),
    "ashrrev_i32": ("ui", "i", lambda a, b: b >> (a & _U32(31)).astype(_I32)),
    "lshlrev_b64": ("uU", "U", lambda a, b: b << (a & _U32(63)).astype(_U64)),
    "lshrrev_b64": ("uU", "U", lambda a, b: b >> (a & _U32(63)).astype(_U64)),
    "ashrrev_i64": ("uI", "I", lambda a, b: b >> (a & _U32(63)).astype(_I64)),
    "alignbit_b32": ("uuu", "u", lambda a, b, c: (((a.astype(_U64) << _U64(32)) | b) >> (c & _U32(31)).astype(_U64)).astype(_U32)),
    "lshl_or_b32": ("uuu", "u", lambda a, b, c: (a << (b & _U32(31))) | c),
    "lshl_add_u32": ("uuu", "u", lambda a, b, c: (a << (b & _U32(31))) + c),
    "add_lshl_u32": ("uuu", "u", lambda a, b, c: (a + b) << (c & _U32(31))),
    "lshl_add_u64": ("UuU", "U", lambda a, b, c: (a << b.astype(_U64)) + c),
    # integer arithmetic
    "add_u32": ("uu", "u", np.add),
    "sub_u32": ("uu", "u", np.subtract),
    "subrev_u32": ("uu", "u", lambda a, b: b - a),
    "add3_u32": ("uuu", "u", lambda a, b, c: a + b + c),
    "xad_u32": ("uuu", "u", lambda a, b, c: (a ^ b) + c),
    "mul_lo_u32": ("uu", "u", np.multiply),
    "mul_hi_u32": ("uu", "u", lambda a, b: (a.astype(_U64) * b >> _U64(32)).astype(_U32)),
    "mul_hi_i32": ("ii", "i", lambda a, b: (a.astype(_I64) * b >> 32).astype(_I32)),
    "mul_u32_u24": ("uu", "u", _multiply24),
    "mul_i32_i24": ("ii", "i", _multiply24_signed),
    "mad_u32_u24": ("uuu", "u", lambda a, b, c: _multiply24(a, b) + c),
    "mad_i32_i24": ("iii", "i", lambda a, b, c: _multiply24_signed(a, b) + c),
    "min_u32": ("uu", "u", np.minimum),
    "max_u32": ("uu", "u", np.maximum),
    "min_i32": ("ii", "i", np.minimum),
    "max_i32": ("ii", "i", np.maximum),
    "min3_u32": ("uuu", "u", _min3(np.minimum)),
    "max3_u32": ("uuu", "u", _min3(np.maximum)),
    "min3_i32": ("iii", "i", _min3(np.minimum)),
    "max3_i32": ("iii", "i", _min3(np.maximum)),
    # 16-bit integers; the upper half of the destination becomes zero
    "add_u16": ("HH", "H", np.add),
    "sub_u16": ("HH", "H", np.subtract),
    "subrev_u16": ("HH", "H", lambda a, b: b - a),
    "mul_lo_u16": ("HH", "H", np.multiply),
    "mad_legacy_u16": ("HHH", "H", lambda a, b, c: a * b + c),
    "lshlrev_b16": ("HH", "H", lambda a, b: b << (a & _U16(15))),
    "lshrrev_b16": ("HH", "H", lambda a, b: b >> (a & _U16(15))),
    "ashrrev_i16": ("HS", "S", lambda a, b: b >> (a & _U16(15)).astype(_I16)),
    "min_u16": ("HH", "H", np.minimum),
    "max_u16": ("HH", "H", np.maximum),
    "min_i16": ("SS", "S", np.minimum),
    "max_i16": ("SS", "S", np.maximum),
    # float32
    "add_f32": ("ff", "f", np.add),
    "sub_f32": ("ff", "f", np.subtract),
    "subrev_f32": ("ff", "f", lambda a, b: b - a),
    "mul_f32": ("ff", "f", np.multiply),
    "mul_legacy_f32": ("ff", "f", lambda a, b: np.where((a == 0) | (b == 0), _F32(0), a * b)),
    "max_f32": ("ff", "f", np.fmax),
    "min_f32": ("ff", "f", np.fmin),
    "max3_f32": ("fff", "f", _min3(np.fmax)),
    "min3_f32": ("fff", "f", _min3(np.fmin)),
    "maximum3_f32": ("fff", "f", _min3(np.maximum)),
    "minimum3_f32": ("fff", "f", _min3(np.minimum)),
    "med3_f32": ("fff", "f", _median),
    "fma_f32": ("fff", "f", fused_multiply_add),
    "fmac_f32": ("fff", "f", fused_multiply_add),
    "fmamk_f32": ("fff", "f", fused_multiply_add),
    "fmaak_f32": ("fff", "f", fused_multiply_add),
    "ldexp_f32": ("fi", "f", np.ldexp),
    "floor_f32": ("f", "f", np.floor),
    "ceil_f32": ("f", "f", np.ceil),
    "trunc_f32": ("f", "f", np.trunc),
    "rndne_f32": ("f", "f", np.rint),
    # transcendental: rounded from float64, so that every machine gives the same bits; the hardware is within 1 ulp
    "exp_f32": ("f", "f", lambda a: np.exp2(a, dtype=_F64)),
    "log_f32": ("f", "f", lambda a: np.log2(a, dtype=_F64)),
    "rcp_f32": ("f", "f", np.reciprocal),
    "rcp_iflag_f32": ("f", "f", np.reciprocal),
    "rsq_f32": ("f", "f", lambda a: 1 / np.sqrt(a, dtype=_F64)),
    "sqrt_f32": ("f", "f", np.sqrt),
    # The division sequence div_scale, div_fmas, div_fixup: the last step knows numerator and denominator, so it divides.
    "div_fmas_f32": ("fff", "f", fused_multiply_add),
    "div_fixup_f32": ("fff", "f", lambda quotient, den, num: num.astype(_F64) / den),
    # half
    "add_f16": ("hh", "h", np.add),
    "sub_f16": ("hh", "h", np.subtract),
    "mul_f16": ("hh", "h", np.multiply),
    "max_f16": ("hh", "h", np.fmax),
    "min_f16": ("hh", "h", np.fmin),
    # conversions
    "cvt_f32_i32": ("i", "f", lambda a: a.astype(_F32)),
    "cvt_f32_u32": ("u", "f", lambda a: a.astype(_F32)),
    "cvt_f32_f16": ("h", "f", lambda a: a.astype(_F32)),
    "cvt_f32_bf16": ("H", "f", f32_from_bf16),
    "cvt_f32_ubyte0": ("u", "f", lambda a: (a & _U32(0xFF)).astype(_F32)),
    "cvt_f16_f32": ("f", "h", lambda a: a.astype(np.float16)),
    "cvt_i32_f32": ("f", "i", _to_integer(-(1 << 31), (1 << 31) - 1)),
    "cvt_u32_f32": ("f", "u", _to_integer(0, (1 << 32) - 1)),
    "cvt_pk_bf16_f32": ("ff", "u", lambda a, b: bf16_from_f32(a) | (bf16_from_f32(b) << _U32(16))),
    "cvt_pk_f16_f32": ("ff", "u", lambda a, b: f16_bits_from_f32(a) | (f16_bits_from_f32(b) << _U32(16))),
    "pack_b32_f16": ("HH", "u", lambda a, b: a.astype(_U32) | (b.astype(_U32) << _U32(16))),
}  # fmt: skip
TABLE = {name: VectorOp(*entry) for name, entry in _TABLE.items()}


# ---- constant operands ----------------------------------------------------------------------------------------------
# Compiled code mostly shifts and cuts fields by constants, which saves the masking of amounts. Each entry takes the constant
# sources (None where a source is a register) and returns a function of the same sources, or None.

Constants = Sequence[int | None]


def _fold_bit_field(constants: Constants) -> Function | None:
    _, offset, width = constants
    if offset is None or width is None or not 0 < width < 32 or not 0 <= offset < 32:
        return None
    shift, mask = _U32(offset), _U32((1 << width) - 1)
    return lambda a, b, c: (a >> shift) & mask


def _fold_shift(
    position: int, dtype: type[np.unsignedinteger[Any]], combine: Callable[[Any], Function]
) -> Callable[[Constants], Function | None]:
    limit = 8 * np.dtype(dtype).itemsize

    def fold(constants: Constants) -> Function | None:
        amount = constants[position]
        return combine(dtype(amount)) if amount is not None and 0 <= amount < limit else None

    return fold


def _shift_add_64(amount: Any) -> Function:
    return (lambda a, b, c: (a << amount) + c) if amount else (lambda a, b, c: a + c)


FOLDS: dict[str, Callable[[Constants], Function | None]] = {
    "bfe_u32": _fold_bit_field,
    "lshl_add_u32": _fold_shift(1, _U32, lambda n: lambda a, b, c: (a << n) + c),
    "lshl_or_b32": _fold_shift(1, _U32, lambda n: lambda a, b, c: (a << n) | c),
    "add_lshl_u32": _fold_shift(2, _U32, lambda n: lambda a, b, c: (a + b) << n),
    "lshl_add_u64": _fold_shift(1, _U64, _shift_add_64),
}
