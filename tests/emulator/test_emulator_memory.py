"""Global, buffer and scratch instructions, and scalar loads."""

from __future__ import annotations

import numpy as np
import pytest
from asm_snippets import LANE, LOAD_ADDRESSES, kernel_text, run, run_lanes

from patune.emulator import Program, Traffic
from patune.errors import EmulatorError


def copy_body(load: str, store: str, shift: int) -> str:
    return LOAD_ADDRESSES.format(shift=shift) + f"{load}\ns_waitcnt vmcnt(0)\n{store}"


WIDTHS = {
    "dword": (4, "v4"),
    "dwordx2": (8, "v[4:5]"),
    "dwordx3": (12, "v[4:6]"),
    "dwordx4": (16, "v[4:7]"),
}


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("offset", [0, 4, 6])
def test_global_copy_with_scalar_base(name: str, offset: int) -> None:
    width, registers = WIDTHS[name]
    stride = 16
    source = np.random.default_rng(0).integers(0, 256, 64 * stride + 16, dtype=np.uint8)
    target = np.zeros_like(source)
    body = copy_body(
        f"global_load_{name} {registers}, v1, s[20:21] offset:{offset}",
        f"global_store_{name} v1, {registers}, s[22:23] offset:{offset}", 4,
    )  # fmt: skip
    execution = run(body, [source, target])
    want = np.zeros_like(source)
    for lane in range(64):
        at = slice(lane * stride + offset, lane * stride + offset + width)
        want[at] = source[at]
    np.testing.assert_array_equal(target, want)
    assert execution.traffic == {
        "argument0": Traffic(load_b=64 * width), "argument1": Traffic(store_b=64 * width)
    }  # fmt: skip


def test_global_access_with_64_bit_addresses_and_negative_offset() -> None:
    source, target = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + """
    v_mov_b32_e32 v2, s20
    v_mov_b32_e32 v3, s21
    v_add_co_u32_e32 v2, vcc, v2, v1
    v_addc_co_u32_e32 v3, vcc, 0, v3, vcc
    v_lshl_add_u64 v[2:3], v[2:3], 0, 16
    global_load_dword v4, v[2:3], off offset:-16
    s_waitcnt vmcnt(0)
    v_xor_b32_e32 v1, 4, v1
    global_store_dword v1, v4, s[22:23]
    """
    )
    run(body, [source, target])
    np.testing.assert_array_equal(target, LANE ^ 1)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("ubyte", lambda b: b[:, 1].astype(np.uint32)), ("sbyte", lambda b: b[:, 1].view(np.int8).astype(np.int32)),
        ("ushort", lambda b: b[:, 1:3].copy().view(np.uint16)[:, 0].astype(np.uint32)),
        ("sshort", lambda b: b[:, 1:3].copy().view(np.int16)[:, 0].astype(np.int32)),
        ("short_d16", lambda b: b[:, 1:3].copy().view(np.uint16)[:, 0] | np.uint32(0xABCD_0000)),
        ("short_d16_hi", lambda b: b[:, 1:3].copy().view(np.uint16)[:, 0].astype(np.uint32) << 16 | 0x1234),
    ],
)  # fmt: skip
def test_narrow_loads(name: str, model: object) -> None:
    source = np.random.default_rng(1).integers(0, 256, (64, 4), dtype=np.uint8)
    target = np.zeros(64, np.uint32)
    load = f"v_mov_b32_e32 v4, 0xabcd1234\nglobal_load_{name} v4, v1, s[20:21] offset:1"
    run(copy_body(load, "global_store_dword v1, v4, s[22:23]", 2), [source, target])
    np.testing.assert_array_equal(target, np.asarray(model(source)).view(np.uint32))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "shift", "size"),
    [("byte", 0, 1), ("byte_d16_hi", 16, 1), ("short", 0, 2), ("short_d16_hi", 16, 2)],
)
def test_narrow_stores(name: str, shift: int, size: int) -> None:
    source = np.random.default_rng(1).integers(0, 1 << 32, 64, dtype=np.uint32)
    target = np.zeros(256, np.uint8)
    run(
        copy_body("global_load_dword v4, v1, s[20:21]", f"global_store_{name} v1, v4, s[22:23]", 2),
        [source, target],
    )
    want = np.zeros((64, 4), np.uint8)
    want[:, :size] = (source >> shift).astype(np.uint32).view(np.uint8).reshape(64, 4)[:, :size]
    np.testing.assert_array_equal(target, want.reshape(-1))


def test_inactive_lanes_neither_load_nor_store() -> None:
    source, target = np.arange(64, dtype=np.uint32) + 100, np.zeros(64, np.uint32)
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + """
    v_mov_b32_e32 v4, 7
    v_cmp_gt_u32_e32 vcc, 10, v0
    v_cndmask_b32_e64 v5, -1, v1, vcc
    s_and_saveexec_b64 s[24:25], vcc
    global_load_dword v4, v5, s[20:21]
    s_waitcnt vmcnt(0)
    global_store_dword v5, v4, s[22:23]
    s_mov_b64 exec, s[24:25]
    v_cmp_gt_u32_e32 vcc, 0, v0
    s_and_saveexec_b64 s[24:25], vcc
    global_load_dword v4, v5, s[20:21]
    s_waitcnt vmcnt(0)
    global_store_dword v5, v4, s[22:23]
    """
    )
    execution = run(body, [source, target])
    np.testing.assert_array_equal(target, np.where(LANE < 10, source, 0))
    assert execution.traffic["argument0"].load_b == 40


# ---- buffers --------------------------------------------------------------------------------------------------------

DESCRIPTOR = """
s_and_b32 s21, s21, 0xffff
s_mov_b32 s25, s21
s_mov_b32 s24, s20
s_mov_b32 s26, {size}
s_mov_b32 s27, 0x27000
s_mov_b32 s28, {soffset}
"""


def test_buffer_loads_beyond_the_descriptor_read_zero() -> None:
    source, target = np.arange(80, dtype=np.uint32) + 1, np.zeros(64, np.uint32)
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + DESCRIPTOR.format(size=160, soffset=16)
        + """
    v_cmp_eq_u32_e32 vcc, 3, v0
    v_bfrev_b32_e32 v2, 1
    v_cndmask_b32_e32 v2, v1, v2, vcc
    buffer_load_dword v4, v2, s[24:27], s28 offen offset:8
    s_waitcnt vmcnt(0)
    global_store_dword v1, v4, s[22:23]
    """
    )
    run(body, [source, target])
    byte = 4 * LANE + 24
    want = np.where((byte + 4 <= 160) & (LANE != 3), byte // 4 + 1, 0)
    np.testing.assert_array_equal(target, want)


def test_buffer_stores_beyond_the_descriptor_are_dropped() -> None:
    target = np.zeros(64, np.uint32)
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + "s_mov_b64 s[20:21], s[22:23]"
        + DESCRIPTOR.format(size=100, soffset=0)
        + """
    v_cmp_eq_u32_e32 vcc, 3, v0
    v_bfrev_b32_e32 v2, 1
    v_cndmask_b32_e32 v2, v1, v2, vcc
    buffer_store_dword v0, v2, s[24:27], 0 offen
    """
    )
    execution = run(body, [np.zeros(1, np.uint32), target])
    np.testing.assert_array_equal(target, np.where((LANE < 25) & (LANE != 3), LANE, 0))
    assert execution.traffic["argument1"].store_b == 96


def test_an_access_across_the_end_of_its_descriptor_is_refused() -> None:
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + DESCRIPTOR.format(size=100, soffset=0)
        + "buffer_load_dwordx2 v[4:5], v1, s[24:27], 0 offen"
    )
    with pytest.raises(EmulatorError, match="straddles"):
        run(body, [np.zeros(64, np.uint32), np.zeros(1)])


def test_buffer_beyond_the_array_is_an_error_even_inside_the_descriptor() -> None:
    body = (
        LOAD_ADDRESSES.format(shift=4)
        + DESCRIPTOR.format(size="0x7ffffffe", soffset=0)
        + "buffer_load_dwordx4 v[4:7], v1, s[24:27], 0 offen"
    )
    with pytest.raises(EmulatorError, match=r"argument0\[1008\.\.1024\] of 1020 bytes") as error:
        run(body, [np.zeros(255, np.float32), np.zeros(1, np.float32)])
    assert "workgroup (0, 0, 0), wave 0, pc 9: buffer_load_dwordx4" in str(error.value)


def test_swizzled_buffers_are_refused() -> None:
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + DESCRIPTOR.format(size=256, soffset=0)
        + "s_or_b32 s25, s25, 0x80000000\nbuffer_load_dword v4, v1, s[24:27], 0 offen"
    )
    with pytest.raises(EmulatorError, match="swizzled"):
        run(body, [np.zeros(64, np.float32), np.zeros(1, np.float32)])


@pytest.mark.parametrize("waited", [True, False])
def test_direct_to_lds_loads_land_when_they_are_waited_for(waited: bool) -> None:
    source, target = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    wait = "s_waitcnt vmcnt(0)" if waited else "s_waitcnt lgkmcnt(0)"
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + DESCRIPTOR.format(size=256, soffset=0)
        + f"""
    s_mov_b32 m0, 512
    buffer_load_dword v1, s[24:27], 0 offen lds
    {wait}
    ds_read_b32 v4, v1 offset:512
    s_waitcnt lgkmcnt(0)
    global_store_dword v1, v4, s[22:23]
    """
    )
    run(body, [source, target], shared_b=1024, watched=False)
    assert (target == source).all() if waited else (target == 0xA5A5_A5A5).all()


@pytest.mark.parametrize(("keep", "landed"), [(3, 0), (2, 1), (1, 1), (0, 2)])
def test_a_wait_lands_the_oldest_loads(keep: int, landed: int) -> None:
    source, target = np.arange(64, dtype=np.uint32), np.zeros(128, np.uint32)
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + DESCRIPTOR.format(size=256, soffset=0)
        + f"""
    s_mov_b32 m0, 0
    buffer_load_dword v1, s[24:27], 0 offen lds
    global_load_dword v6, v1, s[20:21]
    s_mov_b32 m0, 256
    buffer_load_dword v1, s[24:27], 0 offen lds
    s_waitcnt vmcnt({keep}) lgkmcnt(0)
    ds_read2st64_b32 v[4:5], v1 offset1:1
    s_waitcnt lgkmcnt(0)
    global_store_dword v1, v4, s[22:23]
    global_store_dword v1, v5, s[22:23] offset:256
    """
    )
    run(body, [source, target], shared_b=512, watched=False)
    for i in range(2):
        got = target[64 * i : 64 * i + 64]
        assert (got == source).all() if i < landed else (got == 0xA5A5_A5A5).all()


# ---- scratch and scalars --------------------------------------------------------------------------------------------


def test_scratch_spills_and_counts() -> None:
    body = """
    s_mov_b32 s20, 16
    v_mov_b32_e32 v3, 9
    scratch_store_dwordx2 off, v[2:3], off offset:8
    scratch_store_dword off, v2, s20 offset:4
    v_mov_b32_e32 v2, 0
    scratch_load_dwordx2 v[4:5], off, off offset:8
    scratch_load_dword v6, off, s20 offset:4
    """
    values = np.arange(64, dtype=np.uint32) * 3
    a, b, c = run_lanes(body, {2: values}, out=(4, 5, 6), scratch_b=24)
    np.testing.assert_array_equal(a, values)
    assert (b == 9).all()
    np.testing.assert_array_equal(c, values)
    with pytest.raises(EmulatorError, match=r"scratch access: bytes 16\.\.24 of 20"):
        run_lanes("scratch_load_dwordx2 v[4:5], off, off offset:16", scratch_b=20)


def test_spill_bytes() -> None:
    execution = run(
        "scratch_store_dword off, v0, off\nv_cmp_gt_u32_e32 vcc, 4, v0\ns_mov_b64 exec, vcc\nscratch_load_dword v1, off, off",
        [np.zeros(1)],
        scratch_b=4,
        waves=2,
    )
    assert execution.spill_bytes == 2 * 256 + 4 * 4  # the second wave has no lane below 4


def test_scalar_loads_and_argument_slots() -> None:
    table, target = np.arange(16, dtype=np.uint32), np.zeros(16, np.uint32)
    body = """
    s_load_dwordx4 s[20:23], s[0:1], 0x0
    s_load_dword s24, s[0:1], 0x10
    s_load_dwordx2 s[26:27], s[0:1], 0x18
    s_waitcnt lgkmcnt(0)
    s_load_dword s25, s[20:21], s24 offset:0x8
    s_waitcnt lgkmcnt(0)
    v_mov_b32_e32 v1, s25
    v_mov_b32_e32 v2, s26
    v_mov_b32_e32 v3, s27
    v_mov_b32_e32 v5, 0
    global_store_dwordx3 v5, v[1:3], s[22:23]
    """
    program = Program(kernel_text(body, ["ptr", "ptr", 4, 8]), 0)
    program.launch((1, 1, 1), 1, [table, target, 12, 1.5])
    assert target[0] == 5
    assert target[1:3].view(np.float64)[0] == 1.5
    program.launch((1, 1, 1), 1, [table, target, np.int32(8), -2])
    assert (target[0], target[1:3].view(np.int64)[0]) == (4, -2)
