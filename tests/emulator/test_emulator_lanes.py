"""Masks and movement between lanes: comparisons, selects, EXEC, DPP, permutes, swizzles, lanes to scalars."""

from __future__ import annotations

import numpy as np
import pytest
from asm_snippets import LANE, run_lanes, run_scalars

from patune.errors import EmulatorError

VALUES = np.random.default_rng(5).integers(0, 1 << 32, 64, dtype=np.uint32)
OTHERS = np.where(LANE % 3 == 0, VALUES, np.roll(VALUES, 7)).astype(np.uint32)
MASK = 0x8000_1234_FFFF_0001
IN_MASK = np.array([MASK >> lane & 1 for lane in range(64)], bool)

COMPARED = {
    "u32": lambda v: v.astype(np.int64), "i32": lambda v: v.view(np.int32).astype(np.int64),
    "u16": lambda v: (v & 0xFFFF).astype(np.int64), "i16": lambda v: v.astype(np.uint16).view(np.int16).astype(np.int64),
    "f32": lambda v: v.view(np.float32), "f16": lambda v: v.astype(np.uint16).view(np.float16),
}  # fmt: skip
CONDITIONS = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def select(condition: str) -> str:
    return f"{condition}\nv_cndmask_b32_e64 v1, 0, 1, s[20:21]"


@pytest.mark.parametrize("type_name", COMPARED)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_comparison(type_name: str, condition: str) -> None:
    body = select(f"v_cmp_{condition}_{type_name}_e64 s[20:21], v2, v3")
    (got,) = run_lanes(body, {2: VALUES, 3: OTHERS})
    convert = COMPARED[type_name]
    np.testing.assert_array_equal(got, CONDITIONS[condition](convert(VALUES), convert(OTHERS)))


def test_wide_comparison_and_vcc() -> None:
    body = "v_cmp_lt_u64_e32 vcc, v[2:3], v[4:5]\nv_cndmask_b32_e32 v1, v2, v4, vcc"
    (got,) = run_lanes(body, {2: VALUES, 3: OTHERS, 4: OTHERS, 5: OTHERS})
    a = VALUES.astype(np.uint64) | OTHERS.astype(np.uint64) << np.uint64(32)
    b = OTHERS.astype(np.uint64) | OTHERS.astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(got, np.where(a < b, OTHERS, VALUES))


def test_comparison_of_inactive_lanes_is_zero_and_select_keeps_them() -> None:
    body = "v_cmp_eq_u32_e64 s[20:21], v2, v2\nv_mov_b32_e32 v1, s20\nv_mov_b32_e32 v4, s21\nv_cndmask_b32_e64 v5, 7, 9, s[20:21]"
    low, high, chosen = run_lanes(body, {2: VALUES}, out=(1, 4, 5), exec_mask=MASK)
    assert int(low[0]) | int(high[0]) << 32 == MASK
    np.testing.assert_array_equal(chosen, np.where(IN_MASK, 9, 0x1234))


def test_select_with_negated_float_and_sdwa_source() -> None:
    body = "s_mov_b64 s[20:21], 0x7fff\nv_cndmask_b32_e64 v1, v2, -v3, s[20:21]\ns_mov_b64 vcc, s[20:21]\nv_cndmask_b32_sdwa v4, v2, v3, vcc dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_1"
    got, sdwa = run_lanes(body, {2: VALUES, 3: OTHERS}, out=(1, 4))
    np.testing.assert_array_equal(got, np.where(LANE < 15, OTHERS ^ np.uint32(1 << 31), VALUES))
    np.testing.assert_array_equal(sdwa, np.where(LANE < 15, OTHERS >> 16, VALUES))


def test_saveexec_branch_and_restore() -> None:
    body = """
    v_cmp_gt_u32_e32 vcc, 10, v0
    s_and_saveexec_b64 s[20:21], vcc
    s_cbranch_execz .LSKIP
    v_mov_b32_e32 v1, 5
    .LSKIP:
    s_or_b64 exec, exec, s[20:21]
    v_add_u32_e32 v1, 1, v1
    """
    (got,) = run_lanes(body)
    np.testing.assert_array_equal(got, np.where(LANE < 10, 6, 0x1235))


def test_cmpx_becomes_exec() -> None:
    (got,) = run_lanes("v_cmpx_lt_u32_e32 vcc, 60, v0\nv_mov_b32_e32 v1, 5\ns_mov_b64 exec, -1")
    np.testing.assert_array_equal(got, np.where(LANE > 60, 5, 0x1234))


# ---- DPP: (control, source lane or -1) -------------------------------------------------------------------------------

DPP = {
    "quad_perm:[1,0,3,2]": lambda i: i ^ 1,
    "quad_perm:[3,3,0,1]": lambda i: (i & ~3) + (3, 3, 0, 1)[i & 3],
    "row_shr:4": lambda i: i - 4 if i % 16 >= 4 else -1,
    "row_shl:1": lambda i: i + 1 if i % 16 < 15 else -1,
    "row_ror:8": lambda i: i // 16 * 16 + (i - 8) % 16,
    "row_mirror": lambda i: i // 16 * 16 + 15 - i % 16,
    "row_half_mirror": lambda i: i // 8 * 8 + 7 - i % 8,
    "row_bcast:15": lambda i: i // 16 * 16 - 1 if i >= 16 else -1,
    "row_bcast:31": lambda i: 31 if i >= 32 else -1,
    "row_newbcast:3": lambda i: i // 16 * 16 + 3,
}


def dpp_model(control: str, rows: int, banks: int, zero: bool, active: np.ndarray) -> np.ndarray:
    """v_add_u32_dpp v1, v2, v3 with v1 preset to 0x1234."""
    out = np.full(64, 0x1234, np.uint32)
    for lane in range(64):
        if not active[lane] or not rows >> lane // 16 & 1 or not banks >> lane % 16 // 4 & 1:
            continue
        source = DPP[control](lane)
        if source < 0 or not active[source]:
            if not zero:
                continue
            first = 0
        else:
            first = int(VALUES[source])
        out[lane] = (first + int(OTHERS[lane])) & 0xFFFF_FFFF
    return out


@pytest.mark.parametrize("control", DPP)
@pytest.mark.parametrize(
    ("rows", "banks", "zero"), [(0xF, 0xF, True), (0xF, 0xF, False), (0xA, 0x5, False)]
)
@pytest.mark.parametrize("mask", [None, MASK])
def test_dpp(control: str, rows: int, banks: int, zero: bool, mask: int | None) -> None:
    flags = f"row_mask:{rows:#x} bank_mask:{banks:#x}" + (" bound_ctrl:1" if zero else "")
    body = f"v_add_u32_dpp v1, v2, v3 {control} {flags}"
    (got,) = run_lanes(body, {2: VALUES, 3: OTHERS}, exec_mask=mask)
    active = np.ones(64, bool) if mask is None else IN_MASK
    np.testing.assert_array_equal(got, dpp_model(control, rows, banks, zero, active))
    moved = f"v_mov_b32_dpp v1, v2 {control} {flags}\nv_mov_b32_e32 v4, v1"
    (got,) = run_lanes(moved, {2: VALUES}, exec_mask=mask)
    want = dpp_model(control, rows, banks, zero, active)
    np.testing.assert_array_equal(got, np.where(want == 0x1234, want, want - OTHERS))


# ---- permutes -------------------------------------------------------------------------------------------------------


def test_bpermute_pulls_and_permute_pushes() -> None:
    lanes = np.random.default_rng(1).permutation(64)
    address = (4 * lanes).astype(np.uint32)
    body = (
        "ds_bpermute_b32 v1, v3, v2\nds_permute_b32 v4, v3, v2\nds_bpermute_b32 v5, v3, v2 offset:4"
    )
    pulled, pushed, shifted = run_lanes(body, {2: VALUES, 3: address}, out=(1, 4, 5))
    np.testing.assert_array_equal(pulled, VALUES[lanes])
    np.testing.assert_array_equal(pushed[lanes], VALUES)
    np.testing.assert_array_equal(shifted, VALUES[(lanes + 1) % 64])


def test_bpermute_from_an_inactive_lane_gives_zero() -> None:
    (got,) = run_lanes(
        "ds_bpermute_b32 v1, v3, v2",
        {2: VALUES, 3: (4 * (LANE ^ 1)).astype(np.uint32)},
        exec_mask=MASK,
    )
    np.testing.assert_array_equal(
        got, np.where(IN_MASK, np.where(IN_MASK[LANE ^ 1], VALUES[LANE ^ 1], 0), 0x1234)
    )


SWIZZLES = {
    "swizzle(SWAP,16)": LANE ^ 16,
    "swizzle(REVERSE,8)": LANE ^ 7,
    "swizzle(BROADCAST,4,2)": (LANE & ~3) + 2,
    "swizzle(QUAD_PERM,3,2,1,0)": LANE ^ 3,
    'swizzle(BITMASK_PERM,"01pip")': (LANE & 32) | 8 | (LANE & 4) | (~LANE & 2) | (LANE & 1),
}


@pytest.mark.parametrize("pattern", SWIZZLES)
def test_swizzle(pattern: str) -> None:
    (got,) = run_lanes(f"ds_swizzle_b32 v1, v2 offset:{pattern}", {2: VALUES})
    np.testing.assert_array_equal(got, VALUES[SWIZZLES[pattern]])


@pytest.mark.parametrize("group", [16, 32])
def test_permlane_swap(group: int) -> None:
    a, b = run_lanes(
        f"v_permlane{group}_swap_b32_e32 v2, v3", {2: VALUES, 3: OTHERS}, out=(2, 3), arch="gfx950"
    )
    odd = LANE // group % 2 == 1
    np.testing.assert_array_equal(a, np.where(odd, OTHERS[(LANE - group) % 64], VALUES))
    np.testing.assert_array_equal(b, np.where(odd, OTHERS, VALUES[(LANE + group) % 64]))


def test_permlane_swap_under_a_partial_exec_is_refused() -> None:
    with pytest.raises(EmulatorError, match="partial EXEC"):
        run_lanes("v_permlane32_swap_b32_e32 v2, v3", {2: VALUES, 3: OTHERS}, exec_mask=MASK)


def test_lanes_and_scalars() -> None:
    body = """
    s_mov_b32 s20, 0xc0de
    s_mov_b32 s21, 5
    v_writelane_b32 v2, s20, 7
    v_writelane_b32 v2, s20, s21
    v_readlane_b32 s22, v2, 9
    v_readlane_b32 s23, v2, s21
    v_cmp_lt_u32_e32 vcc, 40, v0
    s_and_saveexec_b64 s[24:25], vcc
    v_readfirstlane_b32 s26, v2
    s_mov_b64 exec, s[24:25]
    v_mov_b32_e32 v4, s22
    v_mov_b32_e32 v5, s23
    v_mov_b32_e32 v6, s26
    """
    row, nine, five, first = run_lanes(body, {2: VALUES}, out=(2, 4, 5, 6))
    want = VALUES.copy()
    want[[5, 7]] = 0xC0DE
    np.testing.assert_array_equal(row, want)
    assert (int(nine[0]), int(five[0]), int(first[0])) == (VALUES[9], 0xC0DE, VALUES[41])


def test_mbcnt_counts_lower_lanes() -> None:
    body = f"s_mov_b32 s20, {MASK & 0xFFFF_FFFF:#x}\ns_mov_b32 s21, {MASK >> 32:#x}\nv_mbcnt_lo_u32_b32 v1, s20, 3\nv_mbcnt_hi_u32_b32 v1, s21, v1"
    (got,) = run_lanes(body)
    want = [3 + (MASK & ((1 << lane) - 1)).bit_count() for lane in range(64)]
    np.testing.assert_array_equal(got, want)


def test_scalar_sources_of_vector_instructions() -> None:
    assert run_scalars(
        "s_mov_b32 s20, 3\ns_cmp_eq_u32 s20, 3\nv_mov_b32_e32 v9, src_scc\nv_readfirstlane_b32 s21, v9",
        [21],
    ) == [1]
