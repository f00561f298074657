"""Scalar instructions against Python integers, with SCC; loops and branches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from asm_snippets import run_lanes, run_scalars

M32, M64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


def s32(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def s64(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def in_s32(x: int) -> bool:
    return -(1 << 31) <= x < 1 << 31


# instruction on s20 and s21 -> (result, SCC or None where it stays 1)
ALU32 = {
    "s_add_u32 s22, s20, s21": lambda a, b: (a + b, a + b > M32),
    "s_sub_u32 s22, s20, s21": lambda a, b: (a - b, a < b),
    "s_addc_u32 s22, s20, s21": lambda a, b: (a + b + 1, a + b + 1 > M32),
    "s_subb_u32 s22, s20, s21": lambda a, b: (a - b - 1, a < b + 1),
    "s_add_i32 s22, s20, s21": lambda a, b: (a + b, not in_s32(s32(a) + s32(b))),
    "s_sub_i32 s22, s20, s21": lambda a, b: (a - b, not in_s32(s32(a) - s32(b))),
    "s_mul_i32 s22, s20, s21": lambda a, b: (a * b, None),
    "s_mul_hi_u32 s22, s20, s21": lambda a, b: (a * b >> 32, None),
    "s_mul_hi_i32 s22, s20, s21": lambda a, b: (s32(a) * s32(b) >> 32, None),
    "s_and_b32 s22, s20, s21": lambda a, b: (a & b, a & b != 0),
    "s_or_b32 s22, s20, s21": lambda a, b: (a | b, a | b != 0),
    "s_xor_b32 s22, s20, s21": lambda a, b: (a ^ b, a != b),
    "s_andn2_b32 s22, s20, s21": lambda a, b: (a & ~b, a & ~b != 0),
    "s_orn2_b32 s22, s20, s21": lambda a, b: (a | ~b, (a | ~b) & M32 != 0),
    "s_nand_b32 s22, s20, s21": lambda a, b: (~(a & b), ~(a & b) & M32 != 0),
    "s_nor_b32 s22, s20, s21": lambda a, b: (~(a | b), ~(a | b) & M32 != 0),
    "s_xnor_b32 s22, s20, s21": lambda a, b: (~(a ^ b), ~(a ^ b) & M32 != 0),
    "s_lshl_b32 s22, s20, s21": lambda a, b: (a << (b & 31), a << (b & 31) & M32 != 0),
    "s_lshr_b32 s22, s20, s21": lambda a, b: (a >> (b & 31), a >> (b & 31) != 0),
    "s_ashr_i32 s22, s20, s21": lambda a, b: (s32(a) >> (b & 31), s32(a) >> (b & 31) != 0),
    "s_bfe_u32 s22, s20, 0x50003": lambda a, b: (a >> 3 & 31, a >> 3 & 31 != 0),
    "s_bfe_i32 s22, s20, 0x50003": lambda a, b: (((a >> 3 & 31) ^ 16) - 16, a >> 3 & 31 != 0),
    "s_bfm_b32 s22, 5, 3": lambda a, b: (0xF8, None),
    "s_pack_ll_b32_b16 s22, s20, s21": lambda a, b: (a & 0xFFFF | b << 16, None),
    "s_lshl1_add_u32 s22, s20, s21": lambda a, b: (a * 2 + b, a * 2 + b > M32),
    "s_lshl3_add_u32 s22, s20, s21": lambda a, b: (a * 8 + b, a * 8 + b > M32),
    "s_min_i32 s22, s20, s21": lambda a, b: (min(s32(a), s32(b)), s32(a) < s32(b)),
    "s_max_i32 s22, s20, s21": lambda a, b: (max(s32(a), s32(b)), s32(a) >= s32(b)),
    "s_min_u32 s22, s20, s21": lambda a, b: (min(a, b), a < b),
    "s_max_u32 s22, s20, s21": lambda a, b: (max(a, b), a >= b),
    "s_cselect_b32 s22, s20, s21": lambda a, b: (a, None),
    "s_mov_b32 s22, s20": lambda a, b: (a, None),
    "s_not_b32 s22, s20": lambda a, b: (~a, ~a & M32 != 0),
    "s_abs_i32 s22, s20": lambda a, b: (abs(s32(a)), a != 0),
    "s_brev_b32 s22, s20": lambda a, b: (int(f"{a:032b}"[::-1], 2), None),
    "s_sext_i32_i8 s22, s20": lambda a, b: (((a & 0xFF) ^ 0x80) - 0x80, None),
    "s_sext_i32_i16 s22, s20": lambda a, b: (((a & 0xFFFF) ^ 0x8000) - 0x8000, None),
    "s_ff1_i32_b32 s22, s20": lambda a, b: ((a & -a).bit_length() - 1, None),
    "s_flbit_i32_b32 s22, s20": lambda a, b: (32 - a.bit_length() if a else -1, None),
    "s_bcnt1_i32_b32 s22, s20": lambda a, b: (a.bit_count(), a != 0),
    "s_mov_b32 s22, s20\ns_addk_i32 s22, 0x8000": lambda a, b: (a - 0x8000, not in_s32(s32(a) - 0x8000)),
    "s_mov_b32 s22, s20\ns_mulk_i32 s22, 0x7f": lambda a, b: (a * 0x7F, None),
    "s_movk_i32 s22, 0xfffe": lambda a, b: (-2, None),
    "s_mov_b32 s22, s20\ns_bitset1_b32 s22, 7": lambda a, b: (a | 128, None),
    "s_mov_b32 s22, s20\ns_bitset0_b32 s22, 7": lambda a, b: (a & ~128, None),
    "s_mov_b32 s22, 9\ns_cmov_b32 s22, s20": lambda a, b: (a, None),
}  # fmt: skip
EDGES = [0, 1, 2, 31, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_8000]
SET_SCC = "s_cmp_eq_u32 s20, s20\n"


def pairs() -> list[tuple[int, int]]:
    generator = random.Random(3)
    return [(a, b) for a in EDGES for b in EDGES[::3]] + [
        (generator.getrandbits(32), generator.getrandbits(32)) for _ in range(4)
    ]


def scalar_cases(
    template: str, results: str, cases: list[tuple[int, ...]], per_case: int
) -> list[int]:
    """Run a snippet for every case in one program, collecting ``per_case`` scalars of each."""
    lines, out = [], []
    for case in cases:
        lines.append(template.format(*(f"{value:#x}" for value in case)))
        lines += [
            f"v_writelane_b32 v{20 + len(out) // 64}, {r}, {len(out) % 64 + i}"
            for i, r in enumerate(results.split())
        ]
        out += [0] * per_case
    registers = range(20, 20 + (len(out) + 63) // 64)
    rows = run_lanes("\n".join(lines), out=registers)
    return [int(v) for v in np.concatenate(rows)[: len(out)]]


@pytest.mark.parametrize("instruction", ALU32)
def test_alu32(instruction: str) -> None:
    cases = pairs()
    template = f"s_mov_b32 s20, {{0}}\ns_mov_b32 s21, {{1}}\n{SET_SCC}{instruction}\ns_cselect_b32 s23, 1, 0"
    got = scalar_cases(template, "s22 s23", cases, 2)
    for i, (a, b) in enumerate(cases):
        result, scc = ALU32[instruction](a, b)
        assert got[2 * i : 2 * i + 2] == [result & M32, 1 if scc is None else int(scc)], (a, b)


ALU64 = {
    "s_and_b64 s[24:25], s[20:21], s[22:23]": lambda a, b: (a & b, a & b != 0),
    "s_or_b64 s[24:25], s[20:21], s[22:23]": lambda a, b: (a | b, a | b != 0),
    "s_xor_b64 s[24:25], s[20:21], s[22:23]": lambda a, b: (a ^ b, a != b),
    "s_andn2_b64 s[24:25], s[20:21], s[22:23]": lambda a, b: (a & ~b, a & ~b != 0),
    "s_not_b64 s[24:25], s[20:21]": lambda a, b: (~a, ~a & M64 != 0),
    "s_mov_b64 s[24:25], s[20:21]": lambda a, b: (a, None),
    "s_cselect_b64 s[24:25], s[20:21], s[22:23]": lambda a, b: (a, None),
    "s_lshl_b64 s[24:25], s[20:21], s22": lambda a, b: (a << (b & 63), a << (b & 63) & M64 != 0),
    "s_lshr_b64 s[24:25], s[20:21], s22": lambda a, b: (a >> (b & 63), a >> (b & 63) != 0),
    "s_ashr_i64 s[24:25], s[20:21], s22": lambda a, b: (s64(a) >> (b & 63), s64(a) >> (b & 63) != 0),
    "s_bfe_u64 s[24:25], s[20:21], 0x240004": lambda a, b: (a >> 4 & (1 << 36) - 1, a >> 4 & (1 << 36) - 1 != 0),
    "s_mov_b32 s25, 0\ns_bcnt1_i32_b64 s24, s[20:21]": lambda a, b: (a.bit_count(), a != 0),
}  # fmt: skip


@pytest.mark.parametrize("instruction", ALU64)
def test_alu64(instruction: str) -> None:
    words = [(a, b, b, a) for a, b in pairs()[::2]]
    template = f"s_mov_b32 s20, {{0}}\ns_mov_b32 s21, {{1}}\ns_mov_b32 s22, {{2}}\ns_mov_b32 s23, {{3}}\n{SET_SCC}{instruction}\ns_cselect_b32 s26, 1, 0"
    got = scalar_cases(template, "s24 s25 s26", words, 3)
    for i, (a, b, c, d) in enumerate(words):
        result, scc = ALU64[instruction](a | b << 32, c | d << 32)
        result &= M64
        assert got[3 * i : 3 * i + 3] == [
            result & M32,
            result >> 32,
            1 if scc is None else int(scc),
        ]


COMPARE = {
    "s_cmp_eq_u32 s20, s21": lambda a, b: a == b, "s_cmp_lg_u32 s20, s21": lambda a, b: a != b,
    "s_cmp_lt_u32 s20, s21": lambda a, b: a < b, "s_cmp_ge_u32 s20, s21": lambda a, b: a >= b,
    "s_cmp_lt_i32 s20, s21": lambda a, b: s32(a) < s32(b), "s_cmp_le_i32 s20, s21": lambda a, b: s32(a) <= s32(b),
    "s_cmp_gt_i32 s20, s21": lambda a, b: s32(a) > s32(b), "s_cmpk_lt_i32 s20, 0xfffe": lambda a, b: s32(a) < -2,
    "s_cmpk_gt_u32 s20, 0xfffe": lambda a, b: a > 0xFFFE, "s_bitcmp1_b32 s20, s21": lambda a, b: a >> (b & 31) & 1 == 1,
    "s_bitcmp0_b32 s20, 31": lambda a, b: not a >> 31, "s_cmp_eq_u64 s[20:21], s[20:21]": lambda a, b: True,
}  # fmt: skip


@pytest.mark.parametrize("instruction", COMPARE)
def test_compare(instruction: str) -> None:
    cases = pairs()
    template = f"s_mov_b32 s20, {{0}}\ns_mov_b32 s21, {{1}}\n{instruction}\ns_cselect_b32 s22, 1, 0"
    got = scalar_cases(template, "s22", cases, 1)
    assert got == [int(COMPARE[instruction](a, b)) for a, b in cases]


@pytest.mark.parametrize(
    ("name", "function"),
    [("and", lambda a, e: a & e), ("or", lambda a, e: a | e), ("xor", lambda a, e: a ^ e), ("andn2", lambda a, e: a & ~e)],
)  # fmt: skip
def test_saveexec(name: str, function: object) -> None:
    mask = 0x0000_FFFF_1234_0001
    body = f"s_mov_b32 s20, {mask & M32:#x}\ns_mov_b32 s21, {mask >> 32:#x}\ns_mov_b32 exec_hi, 0xff00\ns_{name}_saveexec_b64 s[22:23], s[20:21]\ns_mov_b64 s[24:25], exec\ns_mov_b64 exec, -1"
    old, new = 0xFF00_FFFF_FFFF, function(mask, 0xFF00_FFFF_FFFF) & M64  # type: ignore[operator]
    assert run_scalars(body, [22, 23, 24, 25]) == [old & M32, old >> 32, new & M32, new >> 32]


def test_loop_and_conditional_branches() -> None:
    body = """
    s_mov_b32 s20, 0
    s_mov_b32 s21, 0
    .LLOOP:
    s_add_i32 s20, s20, 1
    s_bitcmp1_b32 s20, 0
    s_cbranch_scc0 .LEVEN
    s_add_i32 s21, s21, s20
    .LEVEN:
    s_cmp_lt_i32 s20, 10
    s_cbranch_scc1 .LLOOP
    s_branch .LEND
    s_mov_b32 s21, 0
    .LEND:
    s_mov_b64 vcc, 0
    s_cbranch_vccz .LDONE
    s_mov_b32 s21, 0
    .LDONE:
    s_nop 0
    """
    assert run_scalars(body, [20, 21]) == [10, 1 + 3 + 5 + 7 + 9]
