"""Arguments of a launch, and every way to leave their memory."""

from __future__ import annotations

import numpy as np
import pytest
from asm_snippets import LANE, LOAD_ADDRESSES, kernel_text, run

from patune.emulator import Program, Traffic
from patune.errors import EmulatorError

STORE = (
    LOAD_ADDRESSES.format(shift=2)
    + "global_load_dword v4, v1, s[20:21]\ns_waitcnt vmcnt(0)\nglobal_store_dword v1, v4, s[22:23]"
)


@pytest.mark.parametrize("missing", [1, 4])
def test_out_of_bounds_names_argument_wave_and_instruction(missing: int) -> None:
    program = Program(kernel_text(STORE, ["ptr", "ptr"]), 0)
    short = np.zeros(256 - missing, np.uint8)
    with pytest.raises(
        EmulatorError, match=rf"load of 4 bytes.*keys\[252\.\.256\] of {256 - missing} bytes"
    ) as error:
        program.launch((1, 1, 1), 1, [short, np.zeros(64, np.int32)], names=["keys", "out"])
    assert "workgroup (0, 0, 0), wave 0, pc 3: global_load_dword v4, v1, s[20:21]" in str(
        error.value
    )
    with pytest.raises(EmulatorError, match=r"out\[252\.\.256\]"):
        program.launch((1, 1, 1), 1, [np.zeros(64, np.int32), short], names=["keys", "out"])


@pytest.mark.parametrize("offset", [-4, 1 << 30, -(1 << 31)])
def test_wild_addresses_are_caught_far_from_any_array(offset: int) -> None:
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + f"""
    v_ashrrev_i32_e32 v3, 31, v0
    s_mov_b32 s24, {offset & 0xFFFF_FFFF:#x}
    s_ashr_i32 s25, s24, 31
    v_mov_b32_e32 v2, v1
    v_mov_b32_e32 v3, 0
    v_lshl_add_u64 v[2:3], v[2:3], 0, s[24:25]
    v_lshl_add_u64 v[2:3], s[20:21], 0, v[2:3]
    global_load_dword v4, v[2:3], off
    """
    )
    with pytest.raises(EmulatorError, match="out-of-bounds global load"):
        run(body, [np.zeros(64, np.int32), np.zeros(64, np.int32)])


@pytest.mark.parametrize(
    "operation", ["global_load_dword v4, v[2:3], off", "global_store_dword v[2:3], v4, off"]
)
@pytest.mark.parametrize("offset", [-4, -2, 254])
def test_one_lane_out_of_bounds_is_enough(operation: str, offset: int) -> None:
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + f"""
    v_cmp_eq_u32_e32 vcc, 5, v0
    s_movk_i32 s24, {offset & 0xFFFF:#x}
    v_mov_b32_e32 v2, s24
    v_cndmask_b32_e32 v2, v1, v2, vcc
    v_ashrrev_i32_e32 v3, 31, v2
    v_lshl_add_u64 v[2:3], s[20:21], 0, v[2:3]
    {operation}
    """
    )
    with pytest.raises(
        EmulatorError, match=rf"argument argument0\[{offset}\.\.{offset + 4}\] of 256 bytes"
    ):
        run(body, [np.zeros(64, np.int32), np.zeros(64, np.int32)])


@pytest.mark.parametrize("shift", [16, 0])
def test_scalar_base_before_the_array(shift: int) -> None:
    source, target = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + f"""
    s_sub_u32 s20, s20, 16
    s_subb_u32 s21, s21, 0
    v_add_u32_e32 v2, {shift}, v1
    global_load_dword v4, v2, s[20:21]
    s_waitcnt vmcnt(0)
    global_store_dword v1, v4, s[22:23]
    """
    )
    if shift:
        run(body, [source, target])
        np.testing.assert_array_equal(target, source)
    else:
        with pytest.raises(EmulatorError, match=r"argument0\[-16\.\.-12\] of 256 bytes"):
            run(body, [source, target])


def test_lanes_of_one_access_may_reach_different_arrays() -> None:
    a, b = np.arange(64, dtype=np.uint32), np.arange(64, dtype=np.uint32) + 100
    body = (
        LOAD_ADDRESSES.format(shift=2)
        + """
    v_mov_b32_e32 v2, v1
    v_mov_b32_e32 v3, 0
    v_lshl_add_u64 v[4:5], s[20:21], 0, v[2:3]
    v_lshl_add_u64 v[6:7], s[22:23], 0, v[2:3]
    v_cmp_gt_u32_e32 vcc, 20, v0
    v_cndmask_b32_e32 v4, v4, v6, vcc
    v_cndmask_b32_e32 v5, v5, v7, vcc
    global_load_dword v8, v[4:5], off
    s_waitcnt vmcnt(0)
    v_add_u32_e32 v8, 0x3e8, v8
    global_store_dword v[4:5], v8, off
    """
    )
    run(body, [a, b])
    np.testing.assert_array_equal(a, np.where(LANE < 20, LANE, LANE + 1000))
    np.testing.assert_array_equal(b, np.where(LANE < 20, LANE + 1100, LANE + 100))


def test_arrays_that_share_memory_alias() -> None:
    storage = np.arange(128, dtype=np.uint32)
    program = Program(kernel_text(STORE, ["ptr", "ptr"]), 0)
    execution = program.launch((1, 1, 1), 1, [storage[:100], storage[36:]], names=["a", "b"])
    np.testing.assert_array_equal(storage[36:100], np.arange(64))
    assert execution.traffic == {"a|b": Traffic(load_b=256, store_b=256)}


def test_disjoint_views_of_one_storage_keep_their_own_bounds() -> None:
    storage = np.arange(126, dtype=np.uint32)
    program = Program(kernel_text(STORE, ["ptr", "ptr"]), 0)
    with pytest.raises(EmulatorError, match="a"):
        program.launch((1, 1, 1), 1, [storage[:63], storage[63:]], names=["a", "b"])


def test_same_array_twice_and_empty_arrays() -> None:
    array = np.arange(64, dtype=np.uint32)
    program = Program(kernel_text(STORE.replace("v4, s[22", "v0, s[22"), ["ptr", "ptr", "ptr"]), 0)
    program.launch((1, 1, 1), 1, [array, array, np.zeros(0, np.float32)])
    np.testing.assert_array_equal(array, LANE)


def test_unsuitable_arguments_are_refused() -> None:
    program = Program(kernel_text(STORE, ["ptr", "ptr", 4]), 0)
    good = np.zeros(64, np.int32)
    read_only = good.copy()
    read_only.setflags(write=False)
    for arguments, message in (
        ([np.zeros(128, np.int32)[::2], good, 1], "contiguous"),
        ([good, read_only, 1], "read-only argument argument1"),
        ([good, 5, 1], "wants an array"),
        ([good, good, good], "wants a number"),
        ([good, good, 1 << 40], "does not fit a slot of 4 bytes"),
        ([good], "slots"),
        ([good, good, 1, 2], "slots"),
    ):
        with pytest.raises(EmulatorError, match=message):
            program.launch((1, 1, 1), 1, arguments)


def test_more_waves_than_the_kernel_was_compiled_for_are_refused() -> None:
    with pytest.raises(EmulatorError, match="compiled for workgroups of at most 512"):
        run("s_nop 0", [np.zeros(4)], waves=9)
