"""Lane-wise vector instructions against a Python model of one lane."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from asm_snippets import LANE, run, run_lanes
from lane_models import FLOAT, INTEGER, M32, f16, f32, s32

from patune.errors import EmulatorError

EDGES = [
    0,
    1,
    2,
    31,
    32,
    33,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x0080_0000,
]
SELECTORS = "s_mov_b32 s20, 0x07060302\ns_mov_b32 s21, 0x05040100\ns_mov_b32 s22, 0x0c0b0a09\n"
EXEC = 0x0F0F_0000_FFFF_1235
ACTIVE = np.array([EXEC >> lane & 1 for lane in range(64)], bool)


def integers(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 1 << 32, 64, dtype=np.uint32)
    values[:: seed + 3][: len(EDGES)] = EDGES[: len(values[:: seed + 3])]
    return values


def floats(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.standard_normal(64) * 2.0 ** random.integers(-6, 6, 64)
    values[seed] = 1.0
    return values.astype(np.float32).view(np.uint32)


def check(instruction: str, model: object, sources: list[np.ndarray]) -> None:
    registers = {i + 2: values for i, values in enumerate(sources)}
    arch = "gfx950" if "bitop3" in instruction or "cvt_pk_" in instruction else "gfx942"
    (got,) = run_lanes(SELECTORS + instruction, registers, arch=arch)
    want = np.array([model(*(int(s[lane]) for s in sources)) & M32 for lane in LANE], np.uint32)  # type: ignore[operator]
    np.testing.assert_array_equal(got, want)
    (masked,) = run_lanes(SELECTORS + instruction, registers, arch=arch, exec_mask=EXEC)
    np.testing.assert_array_equal(masked, np.where(ACTIVE, want, 0x1234))


@pytest.mark.parametrize("instruction", INTEGER)
def test_integer_instruction(instruction: str) -> None:
    selectors = integers(9) & np.uint32(0x0F0F0F0F) if "v_perm" in instruction else integers(2)
    first = integers(0)
    if "cvt_f32_f16" in instruction:
        first &= np.uint32(0xFBFF_FBFF)  # no NaN: payloads are not compared
    check(instruction, INTEGER[instruction], [first, integers(1), selectors])


@pytest.mark.parametrize("instruction", FLOAT)
def test_float_instruction(instruction: str) -> None:
    check(instruction, FLOAT[instruction], [floats(0), floats(1), floats(2)])


def test_max_ignores_nan_and_comparisons_know_it() -> None:
    nan, one = np.full(64, 0x7FC0_0000, np.uint32), np.full(64, 0x3F80_0000, np.uint32)
    for name in ("v_max_f32_e32", "v_min_f32_e32"):
        (got,) = run_lanes(f"{name} v1, v2, v3", {2: nan, 3: one})
        assert (got == 0x3F80_0000).all()
    body = "\n".join(
        f"v_cmp_{c}_f32_e64 s[20:21], v2, v3\nv_cndmask_b32_e64 v{i}, 0, 1, s[20:21]"
        for i, c in enumerate(("lt", "neq", "nlt", "o", "u", "lg"), 4)
    )
    rows = run_lanes(body, {2: nan, 3: one}, out=range(4, 10))
    assert [int(row[0]) for row in rows] == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "instruction",
    [
        "v_fma_f32 v1, v2, v3, v4", "v_fma_f32 v1, -v2, v3, v4", "v_fmac_f32_e32 v1, v2, v3",
        "v_fmamk_f32 v1, v2, 0x3fc00000, v4", "v_fmaak_f32 v1, v2, v3, 0x3fc00000", "v_div_fmas_f32 v1, v2, v3, v4",
    ],
)  # fmt: skip
def test_fused_multiply_add_rounds_once(instruction: str) -> None:
    a, b, c = (floats(seed) for seed in (3, 4, 5))
    (got,) = run_lanes(instruction, {1: c, 2: a, 3: b, 4: c})
    for lane in LANE:
        x, y, z = (Fraction(f32(int(v[lane]))) for v in (a, b, c))
        if "fmamk" in instruction:
            y = Fraction(3, 2)
        elif "fmaak" in instruction:
            z = Fraction(3, 2)
        elif "-v2" in instruction:
            x = -x
        result = f32(int(got[lane]))
        half_ulp = Fraction(float(np.spacing(np.float32(abs(result))))) / 2
        assert abs(Fraction(result) - (x * y + z)) <= half_ulp


PAIRS = {  # instruction with v[2:3], v[4:5] and v6 as sources -> model of 64-bit values
    "v_lshlrev_b64 v[8:9], v6, v[2:3]": lambda a, b, n: a << (n & 63),
    "v_lshrrev_b64 v[8:9], 24, v[2:3]": lambda a, b, n: a >> 24,
    "v_ashrrev_i64 v[8:9], v6, v[2:3]": lambda a, b, n: (a - (a >> 63 << 64)) >> (n & 63),
    "v_lshl_add_u64 v[8:9], v[2:3], 0, v[4:5]": lambda a, b, n: a + b,
    "v_lshl_add_u64 v[8:9], v[2:3], 3, v[4:5]": lambda a, b, n: (a << 3) + b,
    "v_mov_b64_e32 v[8:9], v[4:5]": lambda a, b, n: b,
    "v_mad_u64_u32 v[8:9], s[20:21], v6, v2, v[4:5]": lambda a, b, n: n * (a & M32) + b,
    "v_mad_i64_i32 v[8:9], s[20:21], v6, v2, v[4:5]": lambda a, b, n: s32(n) * s32(a & M32) + b,
    "v_add_co_u32_e32 v8, vcc, v2, v4\nv_addc_co_u32_e32 v9, vcc, v3, v5, vcc": lambda a, b, n: (
        a + b
    ),
    "v_sub_co_u32_e32 v8, vcc, v2, v4\nv_subb_co_u32_e32 v9, vcc, v3, v5, vcc": lambda a, b, n: (
        a - b
    ),
    "v_subrev_co_u32_e32 v8, vcc, v2, v4\nv_subb_co_u32_e32 v9, vcc, v5, v3, vcc": lambda a, b, n: (
        b - a
    ),
    "v_pk_mov_b32 v[8:9], v[2:3], v[4:5] op_sel:[1,0]": lambda a, b, n: a >> 32 | (b & M32) << 32,
    "v_pk_mov_b32 v[8:9], v[2:3], v[4:5] op_sel:[0,1]": lambda a, b, n: a & M32 | b >> 32 << 32,
}


@pytest.mark.parametrize("instruction", PAIRS)
def test_64_bit_instruction(instruction: str) -> None:
    sources = {register: integers(register) for register in (2, 3, 4, 5, 6)}
    low, high = run_lanes(instruction, sources, out=(8, 9))
    for lane in LANE:
        word = {r: int(v[lane]) for r, v in sources.items()}
        want = PAIRS[instruction](word[2] | word[3] << 32, word[4] | word[5] << 32, word[6])
        assert int(low[lane]) | int(high[lane]) << 32 == want % (1 << 64)


PACKED = {  # result (low, high) of float pairs a = v[2:3], b = v[4:5]
    "v_pk_mul_f32 v[8:9], v[2:3], v[4:5]": lambda a, b: (a[0] * b[0], a[1] * b[1]),
    "v_pk_mul_f32 v[8:9], v[2:3], v[4:5] op_sel_hi:[1,0]": lambda a, b: (a[0] * b[0], a[1] * b[0]),
    "v_pk_add_f32 v[8:9], v[2:3], v[4:5] op_sel:[1,0] op_sel_hi:[0,1]": lambda a, b: (a[1] + b[0], a[0] + b[1]),
    "v_pk_add_f32 v[8:9], v[2:3], v[4:5] neg_lo:[0,1] neg_hi:[0,1]": lambda a, b: (a[0] - b[0], a[1] - b[1]),
    "v_pk_add_f32 v[8:9], v[2:3], v[4:5] neg_lo:[1,0]": lambda a, b: (b[0] - a[0], a[1] + b[1]),
    "v_pk_fma_f32 v[8:9], v[2:3], v[4:5], 1.0 op_sel_hi:[1,1,0]": lambda a, b: (a[0] * b[0] + 1, a[1] * b[1] + 1),
    "v_pk_mul_f32 v[8:9], v[2:3], s[20:21] op_sel_hi:[1,0]": lambda a, b: (a[0] * 1.5, a[1] * 1.5),
}  # fmt: skip


@pytest.mark.parametrize("instruction", PACKED)
def test_packed_float(instruction: str) -> None:
    # Multiples of 1/16 below 16: products and sums are exact, so the order of rounding does not matter.
    small = np.random.default_rng(0).integers(-255, 255, (4, 64)) / 16
    sources = {r: small[i].astype(np.float32) for i, r in enumerate((2, 3, 4, 5))}
    got = run_lanes("s_mov_b32 s20, 0x3fc00000\n" + instruction, sources, out=(8, 9))
    a, b = (sources[2], sources[3]), (sources[4], sources[5])
    for row, want in zip(got, PACKED[instruction](a, b), strict=True):
        np.testing.assert_array_equal(row.view(np.float32), want.astype(np.float32))


def test_packed_half() -> None:
    a, b, c = integers(0) & 0x3FFF_3FFF, integers(1) & 0x3FFF_3FFF, integers(2) & 0x3FFF_3FFF
    body = "v_pk_add_f16 v5, v2, v3\nv_pk_mul_f16 v6, v2, v3 op_sel_hi:[0,1]\nv_pk_fma_f16 v7, v2, v3, v4 neg_lo:[0,0,1]\nv_pk_max_f16 v8, v2, v3"
    rows = run_lanes(body, {2: a, 3: b, 4: c}, out=(5, 6, 7, 8))
    for lane in LANE:
        (al, ah), (bl, bh), (cl, ch) = (
            (f16(int(v[lane])), f16(int(v[lane]) >> 16)) for v in (a, b, c)
        )
        want = [
            (al + bl, ah + bh), (al * bl, al * bh), (al * bl - cl, ah * bh + ch), (max(al, bl), max(ah, bh)),
        ]  # fmt: skip
        for row, (low, high) in zip(rows, want, strict=True):
            assert row.view(np.float16)[2 * lane] == np.float16(low)
            assert row.view(np.float16)[2 * lane + 1] == np.float16(high)


def test_half_select_of_sources_and_destination() -> None:
    a, b = integers(0) & 0x3FFF_3FFF, integers(1) & 0x3FFF_3FFF
    (got,) = run_lanes("v_add_f16_e64 v1, v2, v3 op_sel:[1,0,1]", {2: a, 3: b})
    halves = (a >> 16).astype(np.uint16).view(np.float16) + b.astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(got >> 16, halves.view(np.uint16))
    assert (got & 0xFFFF == 0x1234).all()


def test_accumulation_registers_hold_values() -> None:
    a = integers(0)
    body = "v_accvgpr_write_b32 a3, v2\nv_accvgpr_mov_b32 a4, a3\nv_accvgpr_read_b32 v1, a4"
    np.testing.assert_array_equal(run_lanes(body, {2: a})[0], a)


FP8_BODY = "v_cvt_pk_f32_fp8_e32 v[4:5], v2\nv_cvt_pk_f32_fp8_sdwa v[6:7], v2 src0_sel:WORD_1\nv_cvt_f32_bf8_e32 v8, v2"


def test_fp8_to_float() -> None:
    import torch

    a = integers(0)
    rows = run_lanes(FP8_BODY, {2: a}, out=(4, 5, 6, 7, 8))
    codes = torch.from_numpy(a.view(np.uint8).copy())
    fp8 = codes.view(torch.float8_e4m3fnuz).float().numpy().reshape(64, 4)
    for i in range(4):
        np.testing.assert_array_equal(rows[i].view(np.float32), fp8[:, i])
    bf8 = codes.view(torch.float8_e5m2fnuz).float().numpy().reshape(64, 4)
    np.testing.assert_array_equal(rows[4].view(np.float32), bf8[:, 0])


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_scaled_fp8_to_float_on_gfx950(kind: str) -> None:
    import torch

    a = integers(0) & 0x7B7B_7B7B  # no NaN: payloads of converted NaN are not compared
    pair = "v[4:5]" if kind == "f32" else "v4"
    body = f"v_cvt_scalef32_pk_{kind}_fp8 {pair}, v2, 1.0 op_sel:[1,0,0]"
    rows = run_lanes(body, {2: a}, out=(4, 5), arch="gfx950")
    values = (
        torch.from_numpy(a.view(np.uint8).copy())
        .view(torch.float8_e4m3fn)
        .float()
        .view(64, 4)[:, 2:]
    )
    if kind == "f32":
        np.testing.assert_array_equal(np.stack(rows).view(np.float32).T, values.numpy())
    else:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        want = values.to(dtype).view(torch.int16).numpy().astype(np.uint16)
        np.testing.assert_array_equal(rows[0].view(np.uint16).reshape(64, 2), want)


@pytest.mark.parametrize(("arch", "overflow"), [("gfx942", 0), ("gfx942", 1), ("gfx950", 1)])
def test_float_to_fp8_into_either_half(arch: str, overflow: int) -> None:
    import torch

    scaled = arch == "gfx950"
    name, extra = ("v_cvt_scalef32_pk_fp8_f32", ", 1.0") if scaled else ("v_cvt_pk_fp8_f32", "")
    high = "op_sel:[0,0,0,1]" if scaled else "op_sel:[0,0,1]"
    body = f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), {overflow}\n{name} v1, v2, v3{extra}\n{name} v1, v3, v2{extra} {high}"
    a, b = floats(0), floats(1)
    a[5] = np.float32(1e6).view(np.uint32)
    (got,) = run_lanes(body, {2: a, 3: b}, arch=arch)
    dtype = torch.float8_e4m3fn if scaled else torch.float8_e4m3fnuz
    top = torch.finfo(dtype).max
    codes = [
        torch.from_numpy(v.view(np.float32)).clamp(-top, top).to(dtype).view(torch.uint8).numpy()
        for v in (a, b)
    ]
    if not overflow:
        codes[0][5] = 0x80  # NaN
    want = np.stack([codes[0], codes[1], codes[1], codes[0]], axis=1)
    np.testing.assert_array_equal(got.view(np.uint8).reshape(64, 4), want)


@pytest.mark.parametrize(
    "instruction",
    [
        "v_frobnicate_b32 v1, v2",
        "v_mul_f32_e64 v1, v2, v3 mul:2",
        "v_add_u32_e64 v1, v2, v3 clamp",
        "v_cvt_scalef32_pk_f32_fp8 v[4:5], v2, v3",
        "v_add_f32_sdwa v1, v2, v3 dst_sel:DWORD dst_unused:UNUSED_SEXT src0_sel:DWORD src1_sel:DWORD row_shr:1",
        "v_mov_b32_dpp v1, v2 wave_shl:1 row_mask:0xf bank_mask:0xf",
        "v_mov_b32_e32 v1, vccz",
        "v_pk_mul_f32 v[4:5], v[2:3], 2.0",
        "v_pk_add_f16 v4, v2, 1.0",
        "v_pk_mov_b32 v[4:5], v[2:3], v[2:3]",
        "v_add_f32_e32 v1, 0x1_0, v2",
        "v_lshl_add_u64 v[4:5], v[2:3], 0, 0xfffffff0",
        "s_frobnicate_b32 s4, s5",
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 0",
        "ds_frobnicate_b32 v1, v2",
        "flat_load_dword v1, v[2:3]",
        "global_atomic_add v1, v2, s[10:11]",
        "buffer_load_dword v1, v2, s[20:23], 0 idxen",
        "v_mfma_f32_4x4x4_16b_f16 v[4:7], v[2:3], v[2:3], 0",
        "v_mfma_f32_16x16x16_f16 v[4:7], v[2:3], v[2:3], 0 blgp:1",
    ],
)
def test_what_is_not_verified_is_refused(instruction: str) -> None:
    with pytest.raises(EmulatorError, match="not verified") as error:
        run(instruction, [np.zeros(4, np.float32)])
    assert instruction.split()[0] in str(error.value)


def test_registers_beyond_the_allocation_are_refused() -> None:
    with pytest.raises(EmulatorError, match="allocates"):
        run("v_mov_b32_e32 v200, 0", [np.zeros(4, np.float32)])
