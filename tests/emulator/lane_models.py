"""What vector instructions compute, lane by lane with Python numbers: the oracle of the numpy implementation.

Each entry is (instruction with v2, v3, v4 as sources and v1 as destination, function of their bit patterns).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np

Model = Callable[[int, int, int], int]
M32 = 0xFFFF_FFFF


def f32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits32(value: float) -> int:
    with np.errstate(over="ignore"):
        return int(np.float32(value).view(np.uint32))


def f16(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def bits16(value: float) -> int:
    with np.errstate(over="ignore"):
        return int(np.float16(value).view(np.uint16))


def s32(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def s24(bits: int) -> int:
    return ((bits & 0xFFFFFF) ^ 0x800000) - 0x800000


def s16(bits: int) -> int:
    return ((bits & 0xFFFF) ^ 0x8000) - 0x8000


def _permute(a: int, b: int, selector: int) -> int:
    data = b.to_bytes(4, "little") + a.to_bytes(4, "little")
    out = 0
    for i, pick in enumerate(selector.to_bytes(4, "little")):
        if pick < 8:
            byte = data[pick]
        elif pick < 12:
            byte = 0xFF * (data[2 * (pick - 8) + 1] >> 7)
        else:
            byte = 0 if pick == 12 else 0xFF
        out |= byte << 8 * i
    return out


def _field(a: int, offset: int, width: int, signed: bool) -> int:
    offset, width = offset & 31, width & 31
    value = (a >> offset) & ((1 << width) - 1)
    return value - (1 << width) if signed and width and value >> (width - 1) else value


def _bf16(value: float) -> int:
    bits = bits32(value)
    if math.isnan(f32(bits)):
        return bits >> 16 | 0x40
    kept, rest = bits >> 16, bits & 0xFFFF
    return kept + (rest > 0x8000 or (rest == 0x8000 and kept & 1))


def _number(value: float, fallback: float) -> float:
    return fallback if math.isnan(value) else value


def _max(*values: float) -> float:
    numbers = [v for v in values if not math.isnan(v)]
    return max(numbers) if numbers else math.nan


def _min(*values: float) -> float:
    numbers = [v for v in values if not math.isnan(v)]
    return min(numbers) if numbers else math.nan


INTEGER: dict[str, Model] = {
    "v_mov_b32_e32 v1, v2": lambda a, b, c: a,
    "v_not_b32_e32 v1, v2": lambda a, b, c: ~a,
    "v_bfrev_b32_e32 v1, v2": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "v_and_b32_e32 v1, v2, v3": lambda a, b, c: a & b,
    "v_or_b32_e32 v1, v2, v3": lambda a, b, c: a | b,
    "v_xor_b32_e32 v1, v2, v3": lambda a, b, c: a ^ b,
    "v_xnor_b32_e32 v1, v2, v3": lambda a, b, c: ~(a ^ b),
    "v_or3_b32 v1, v2, v3, v4": lambda a, b, c: a | b | c,
    "v_and_or_b32 v1, v2, v3, v4": lambda a, b, c: a & b | c,
    "v_bfi_b32 v1, v2, v3, v4": lambda a, b, c: a & b | ~a & c,
    "v_bfe_u32 v1, v2, v3, v4": lambda a, b, c: _field(a, b, c, False),
    "v_bfe_u32 v1, v2, 5, 11": lambda a, b, c: _field(a, 5, 11, False),
    "v_bfe_i32 v1, v2, v3, v4": lambda a, b, c: _field(a, b, c, True),
    "v_bfe_i32 v1, v2, 3, 9": lambda a, b, c: _field(a, 3, 9, True),
    "v_bfe_i32 v1, v2, 0, 0": lambda a, b, c: 0,
    "v_perm_b32 v1, v2, v3, v4": _permute,
    "v_perm_b32 v1, v2, v3, s20": lambda a, b, c: _permute(a, b, 0x07060302),
    "v_perm_b32 v1, v2, v3, s21": lambda a, b, c: _permute(a, b, 0x05040100),
    "v_perm_b32 v1, v2, v3, s22": lambda a, b, c: _permute(a, b, 0x0C0B0A09),
    "v_perm_b32 v1, 0x12345678, v3, s20": lambda a, b, c: _permute(0x12345678, b, 0x07060302),
    "v_ffbh_u32_e32 v1, v2": lambda a, b, c: 32 - a.bit_length() if a else M32,
    "v_lshlrev_b32_e32 v1, v2, v3": lambda a, b, c: b << (a & 31),
    "v_lshlrev_b32_e32 v1, 7, v3": lambda a, b, c: b << 7,
    "v_lshrrev_b32_e32 v1, v2, v3": lambda a, b, c: b >> (a & 31),
    "v_lshrrev_b32_e32 v1, 9, v3": lambda a, b, c: b >> 9,
    "v_ashrrev_i32_e32 v1, v2, v3": lambda a, b, c: s32(b) >> (a & 31),
    "v_ashrrev_i32_e32 v1, 31, v3": lambda a, b, c: s32(b) >> 31,
    "v_ashrrev_i32_e32 v1, s20, v3": lambda a, b, c: s32(b) >> 2,
    "v_alignbit_b32 v1, v2, v3, v4": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_lshl_or_b32 v1, v2, v3, v4": lambda a, b, c: a << (b & 31) | c,
    "v_lshl_or_b32 v1, v2, 4, v4": lambda a, b, c: a << 4 | c,
    "v_lshl_add_u32 v1, v2, v3, v4": lambda a, b, c: (a << (b & 31)) + c,
    "v_lshl_add_u32 v1, v2, 3, v4": lambda a, b, c: (a << 3) + c,
    "v_add_lshl_u32 v1, v2, v3, v4": lambda a, b, c: (a + b) << (c & 31),
    "v_add_lshl_u32 v1, v2, v3, 1": lambda a, b, c: (a + b) << 1,
    "v_add_u32_e32 v1, v2, v3": lambda a, b, c: a + b,
    "v_add_u32_e32 v1, 0x1000, v3": lambda a, b, c: b + 0x1000,
    "v_sub_u32_e32 v1, v2, v3": lambda a, b, c: a - b,
    "v_subrev_u32_e32 v1, v2, v3": lambda a, b, c: b - a,
    "v_add3_u32 v1, v2, v3, v4": lambda a, b, c: a + b + c,
    "v_xad_u32 v1, v2, v3, v4": lambda a, b, c: (a ^ b) + c,
    "v_mul_lo_u32 v1, v2, v3": lambda a, b, c: a * b,
    "v_mul_hi_u32 v1, v2, v3": lambda a, b, c: a * b >> 32,
    "v_mul_hi_i32 v1, v2, v3": lambda a, b, c: s32(a) * s32(b) >> 32,
    "v_mul_u32_u24_e32 v1, v2, v3": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mul_i32_i24_e32 v1, v2, v3": lambda a, b, c: s24(a) * s24(b),
    "v_mad_u32_u24 v1, v2, v3, v4": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_mad_i32_i24 v1, v2, v3, v4": lambda a, b, c: s24(a) * s24(b) + c,
    "v_min_u32_e32 v1, v2, v3": lambda a, b, c: min(a, b),
    "v_max_u32_e32 v1, v2, v3": lambda a, b, c: max(a, b),
    "v_min_i32_e32 v1, v2, v3": lambda a, b, c: min(s32(a), s32(b)),
    "v_max_i32_e32 v1, v2, v3": lambda a, b, c: max(s32(a), s32(b)),
    "v_min3_u32 v1, v2, v3, v4": min,
    "v_max3_u32 v1, v2, v3, v4": max,
    "v_min3_i32 v1, v2, v3, v4": lambda a, b, c: min(s32(a), s32(b), s32(c)),
    "v_max3_i32 v1, v2, v3, v4": lambda a, b, c: max(s32(a), s32(b), s32(c)),
    "v_bitop3_b32 v1, v2, v3, v4 bitop3:0x6c": lambda a, b, c: b ^ (a & c),
    "v_bitop3_b32 v1, v2, v3, v4 bitop3:0x78": lambda a, b, c: a ^ (b & c),
    "v_bitop3_b16 v1, v2, v3, v4 bitop3:0xec": lambda a, b, c: (b | a & c) & 0xFFFF,
    # 16 bits
    "v_add_u16_e32 v1, v2, v3": lambda a, b, c: (a + b) & 0xFFFF,
    "v_sub_u16_e32 v1, v2, v3": lambda a, b, c: (a - b) & 0xFFFF,
    "v_subrev_u16_e32 v1, v2, v3": lambda a, b, c: (b - a) & 0xFFFF,
    "v_mul_lo_u16_e32 v1, v2, v3": lambda a, b, c: a * b & 0xFFFF,
    "v_mad_legacy_u16 v1, v2, v3, v4": lambda a, b, c: (a * b + c) & 0xFFFF,
    "v_lshlrev_b16_e32 v1, v2, v3": lambda a, b, c: (b << (a & 15)) & 0xFFFF,
    "v_lshrrev_b16_e32 v1, v2, v3": lambda a, b, c: (b & 0xFFFF) >> (a & 15),
    "v_ashrrev_i16_e32 v1, v2, v3": lambda a, b, c: (s16(b) >> (a & 15)) & 0xFFFF,
    "v_min_u16_e32 v1, v2, v3": lambda a, b, c: min(a & 0xFFFF, b & 0xFFFF),
    "v_max_u16_e32 v1, v2, v3": lambda a, b, c: max(a & 0xFFFF, b & 0xFFFF),
    "v_min_i16_e32 v1, v2, v3": lambda a, b, c: min(s16(a), s16(b)) & 0xFFFF,
    "v_max_i16_e32 v1, v2, v3": lambda a, b, c: max(s16(a), s16(b)) & 0xFFFF,
    "v_pack_b32_f16 v1, v2, v3": lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16,
    "v_pack_b32_f16 v1, v2, v3 op_sel:[1,1,0]": lambda a, b, c: a >> 16 | b & 0xFFFF0000,
    "v_pk_add_u16 v1, v2, v3": lambda a, b, c: (a + b) & 0xFFFF | ((a >> 16) + (b >> 16) & 0xFFFF) << 16,
    "v_pk_mul_lo_u16 v1, v2, v3 op_sel_hi:[1,0]": lambda a, b, c: a * b & 0xFFFF | ((a >> 16) * b & 0xFFFF) << 16,
    "v_pk_lshlrev_b16 v1, 8, v3 op_sel_hi:[0,1]": lambda a, b, c: (b << 8) & 0xFF00 | (b >> 16 << 24),
    "v_pk_lshrrev_b16 v1, 4, v3 op_sel_hi:[0,1]": lambda a, b, c: (b & 0xFFFF) >> 4 | b >> 20 << 16,
    "v_pk_ashrrev_i16 v1, 4, v3 op_sel_hi:[0,1]": lambda a, b, c: s16(b) >> 4 & 0xFFFF | (s16(b >> 16) >> 4 & 0xFFFF) << 16,
    # SDWA
    "v_and_b32_sdwa v1, v2, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:DWORD": lambda a, b, c: a >> 16 & b,
    "v_or_b32_sdwa v1, v2, v3 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD": lambda a, b, c: (a | b) << 16,
    "v_lshrrev_b32_sdwa v1, v2, v3 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD": lambda a, b, c: (b >> (a & 31) & 0xFF) << 8,
    "v_lshlrev_b32_sdwa v1, v2, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_3": lambda a, b, c: b >> 24 << (a & 31),
    "v_add_u32_sdwa v1, v2, sext(v3) dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_1": lambda a, b, c: a + s16(b >> 16),
    "v_mov_b32_sdwa v1, v2 dst_sel:BYTE_2 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_1": lambda a, b, c: 0x1234 | (a >> 8 & 0xFF) << 16,
    "v_lshrrev_b16_sdwa v1, v2, v3 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_2 src1_sel:WORD_1": lambda a, b, c: 0x1234 | b >> 16 >> (a >> 16 & 15) << 16,
    # conversions between floats and integers
    "v_cvt_f32_u32_e32 v1, v2": lambda a, b, c: bits32(a),
    "v_cvt_f32_i32_e32 v1, v2": lambda a, b, c: bits32(s32(a)),
    "v_cvt_f32_ubyte0_e32 v1, v2": lambda a, b, c: bits32(a & 0xFF),
    "v_cvt_f32_f16_e32 v1, v2": lambda a, b, c: bits32(f16(a)),
    "v_cvt_f32_f16_sdwa v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1": lambda a, b, c: bits32(f16(a >> 16)),
    "v_cvt_f32_bf16_e32 v1, v2": lambda a, b, c: (a & 0xFFFF) << 16,
}  # fmt: skip

FLOAT: dict[str, Model] = {
    "v_add_f32_e32 v1, v2, v3": lambda a, b, c: bits32(f32(a) + f32(b)),
    "v_add_f32_e64 v1, v2, -v3": lambda a, b, c: bits32(f32(a) - f32(b)),
    "v_add_f32_e64 v1, |v2|, -|v3|": lambda a, b, c: bits32(abs(f32(a)) - abs(f32(b))),
    "v_add_f32_e64 v1, v2, v3 clamp": lambda a, b, c: bits32(_number(min(max(f32(a) + f32(b), 0), 1), 0)),
    "v_sub_f32_e32 v1, v2, v3": lambda a, b, c: bits32(f32(a) - f32(b)),
    "v_subrev_f32_e32 v1, v2, v3": lambda a, b, c: bits32(f32(b) - f32(a)),
    "v_mul_f32_e32 v1, v2, v3": lambda a, b, c: bits32(f32(a) * f32(b)),
    "v_mul_f32_e32 v1, 0x3fb8aa3b, v3": lambda a, b, c: bits32(f32(0x3FB8AA3B) * f32(b)),
    "v_mul_f32_e32 v1, 0.5, v3": lambda a, b, c: bits32(0.5 * f32(b)),
    "v_mul_legacy_f32 v1, v2, v3": lambda a, b, c: 0 if 0 in (f32(a), f32(b)) else bits32(f32(a) * f32(b)),
    "v_max_f32_e32 v1, v2, v3": lambda a, b, c: bits32(_max(f32(a), f32(b))),
    "v_min_f32_e32 v1, v2, v3": lambda a, b, c: bits32(_min(f32(a), f32(b))),
    "v_max3_f32 v1, v2, v3, v4": lambda a, b, c: bits32(_max(f32(a), f32(b), f32(c))),
    "v_min3_f32 v1, v2, v3, v4": lambda a, b, c: bits32(_min(f32(a), f32(b), f32(c))),
    "v_med3_f32 v1, v2, v3, v4": lambda a, b, c: bits32(sorted((f32(a), f32(b), f32(c)))[1]),
    "v_floor_f32_e32 v1, v2": lambda a, b, c: bits32(math.copysign(math.floor(f32(a)), f32(a))),
    "v_ceil_f32_e32 v1, v2": lambda a, b, c: bits32(math.copysign(math.ceil(f32(a)), f32(a))),
    "v_trunc_f32_e32 v1, v2": lambda a, b, c: bits32(math.copysign(math.trunc(f32(a)), f32(a))),
    "v_rndne_f32_e32 v1, v2": lambda a, b, c: bits32(math.copysign(round(f32(a)), f32(a))),
    "v_ldexp_f32 v1, v2, -3": lambda a, b, c: bits32(f32(a) / 8),
    "v_rcp_f32_e32 v1, v2": lambda a, b, c: bits32(1 / f32(a)),
    "v_sqrt_f32_e64 v1, |v2|": lambda a, b, c: bits32(math.sqrt(abs(f32(a)))),
    "v_rsq_f32_e64 v1, |v2|": lambda a, b, c: bits32(1 / math.sqrt(abs(f32(a)))),
    "v_exp_f32_e32 v1, v2": lambda a, b, c: bits32(2 ** f32(a)),
    "v_log_f32_e64 v1, |v2|": lambda a, b, c: bits32(math.log2(abs(f32(a)))),
    "v_cvt_u32_f32_e32 v1, v2": lambda a, b, c: min(max(int(f32(a)), 0), M32),
    "v_cvt_i32_f32_e32 v1, v2": lambda a, b, c: int(f32(a)),
    "v_cvt_f16_f32_e32 v1, v2": lambda a, b, c: bits16(f32(a)),
    "v_cvt_pk_f16_f32 v1, v2, v3": lambda a, b, c: bits16(f32(a)) | bits16(f32(b)) << 16,
    "v_cvt_pk_bf16_f32 v1, v2, v3": lambda a, b, c: _bf16(f32(a)) | _bf16(f32(b)) << 16,
    "v_cvt_f16_f32_sdwa v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD": lambda a, b, c: 0x1234 | bits16(f32(a)) << 16,
    "v_cvt_f16_f32_sdwa v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD": lambda a, b, c: bits16(f32(a)) << 16,
    "v_mul_f32_sdwa v1, v2, v3 dst_sel:WORD_0 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD": lambda a, b, c: bits32(f32(a) * f32(b)) & 0xFFFF,
    "v_div_fixup_f32 v1, v4, v3, v2": lambda a, b, c: bits32(f32(a) / f32(b)),
    "v_fma_mixlo_f16 v1, v2, v3, neg(0)": lambda a, b, c: bits16(f32(bits32(f32(a) * f32(b)))),
    "v_fma_mixhi_f16 v1, v2, v3, neg(0)": lambda a, b, c: 0x1234 | bits16(f32(bits32(f32(a) * f32(b)))) << 16,
}  # fmt: skip
