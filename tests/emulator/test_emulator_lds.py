"""Shared memory: loads and stores of every width, bounds, poison, and the race detector."""

from __future__ import annotations

import numpy as np
import pytest
from asm_snippets import LANE, kernel_text, run, run_lanes

from patune.emulator import Execution, Program
from patune.errors import EmulatorError

RANDOM = np.random.default_rng(0).integers(0, 1 << 32, (8, 64), dtype=np.uint32)
POISON = 0xA5A5_A5A5


@pytest.mark.parametrize(("bits", "registers"), [(32, 1), (64, 2), (96, 3), (128, 4)])
def test_wide_access(bits: int, registers: int) -> None:
    lanes = np.random.default_rng(1).permutation(64)
    span = lambda first: f"v{first}" if registers == 1 else f"v[{first}:{first + registers - 1}]"  # noqa: E731
    body = f"ds_write_b{bits} v2, {span(4)} offset:32\nds_read_b{bits} {span(8)}, v3 offset:32"
    sources = {2: (16 * LANE).astype(np.uint32), 3: (16 * lanes).astype(np.uint32)}
    sources |= {4 + i: RANDOM[i] for i in range(registers)}
    got = run_lanes(body, sources, out=range(8, 8 + registers), shared_b=32 + 64 * 16)
    for i in range(registers):
        np.testing.assert_array_equal(got[i], RANDOM[i][lanes])


@pytest.mark.parametrize(
    ("write", "read", "model"),
    [
        ("ds_write_b8 v2, v3 offset:1", "ds_read_u8 v1, v2 offset:1", lambda x: x & 0xFF),
        ("ds_write_b8 v2, v3 offset:1", "ds_read_i8 v1, v2 offset:1", lambda x: (x & 0xFF ^ 0x80) - 0x80),
        ("ds_write_b8_d16_hi v2, v3", "ds_read_u8 v1, v2", lambda x: x >> 16 & 0xFF),
        ("ds_write_b16 v2, v3 offset:2", "ds_read_u16 v1, v2 offset:2", lambda x: x & 0xFFFF),
        ("ds_write_b16 v2, v3 offset:2", "ds_read_i16 v1, v2 offset:2", lambda x: (x & 0xFFFF ^ 0x8000) - 0x8000),
        ("ds_write_b16_d16_hi v2, v3", "ds_read_u16 v1, v2", lambda x: x >> 16),
        ("ds_write_b16 v2, v3", "ds_read_u16_d16_hi v1, v2", lambda x: (x & 0xFFFF) << 16 | 0x1234),
        ("ds_write_b16 v2, v3", "v_mov_b32_e32 v1, -1\nds_read_u16_d16 v1, v2", lambda x: x & 0xFFFF | 0xFFFF0000),
        ("ds_write_b16 v2, v3", "ds_read_b32 v1, v2", lambda x: x & 0xFFFF | POISON & 0xFFFF0000),
    ],
)  # fmt: skip
def test_narrow_access(write: str, read: str, model: object) -> None:
    (got,) = run_lanes(
        f"{write}\n{read}", {2: (4 * LANE).astype(np.uint32), 3: RANDOM[0]}, shared_b=256, watched=False
    )  # fmt: skip
    want = [model(int(x)) & 0xFFFF_FFFF for x in RANDOM[0]]  # type: ignore[operator]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("suffix", "unit"), [("", 1), ("st64", 64)])
@pytest.mark.parametrize("bits", [32, 64])
def test_two_offsets(suffix: str, unit: int, bits: int) -> None:
    size, n = bits // 8, bits // 32
    pair = lambda first: f"v{first}" if n == 1 else f"v[{first}:{first + 1}]"  # noqa: E731
    near, far = 3 * size * unit, 70 * size * unit
    body = f"""
    ds_write2{suffix}_b{bits} v2, {pair(4)}, {pair(6)} offset0:3 offset1:70
    v_add_u32_e32 v3, {far:#x}, v2
    ds_read_b32 v8, v3
    v_add_u32_e32 v3, {near:#x}, v2
    ds_read_b32 v9, v3
    ds_read2{suffix}_b{bits} v[2:{1 + 2 * n}], v2 offset0:70 offset1:3
    """
    sources = {2: (size * (LANE % 2)).astype(np.uint32)}
    sources |= {4 + i: np.tile(RANDOM[i][:2], 32) for i in range(4)}
    out = [8, 9, *range(2, 2 + 2 * n)]
    far_word, near_word, *both = run_lanes(body, sources, out=out, shared_b=far + 2 * size)
    np.testing.assert_array_equal(far_word, sources[6])
    np.testing.assert_array_equal(near_word, sources[4])
    for i in range(n):
        np.testing.assert_array_equal(both[i], sources[6 + i])
        np.testing.assert_array_equal(both[n + i], sources[4 + i])


@pytest.mark.parametrize(("bits", "n"), [(16, 4), (8, 8)])
def test_transposing_read(bits: int, n: int) -> None:
    body = f"ds_write_b64 v2, v[4:5]\nds_read_b64_tr_b{bits} v[6:7], v2"
    got = run_lanes(
        body,
        {2: (8 * LANE).astype(np.uint32), 4: RANDOM[0], 5: RANDOM[1]},
        out=(6, 7),
        shared_b=512,
        arch="gfx950",
    )
    elements = np.stack([RANDOM[0], RANDOM[1]], axis=1).view(f"u{bits // 8}").reshape(64, n)
    result = np.stack(got, axis=1).copy().view(f"u{bits // 8}").reshape(64, n)
    for lane in range(64):
        block = elements[lane // 16 * 16 : lane // 16 * 16 + 16].reshape(n, 16)
        np.testing.assert_array_equal(result[lane], block[:, lane % 16])


def test_uninitialised_shared_memory_is_poisoned_in_every_workgroup() -> None:
    target = np.zeros(2, np.uint32)
    body = """
    s_load_dwordx2 s[20:21], s[0:1], 0x0
    s_waitcnt lgkmcnt(0)
    v_mov_b32_e32 v1, 0
    ds_read_b32 v2, v1
    ds_write_b32 v1, v1
    s_lshl_b32 s3, s2, 2
    v_mov_b32_e32 v3, s3
    s_waitcnt lgkmcnt(0)
    global_store_dword v3, v2, s[20:21]
    """
    run(body, [target], grid=(2, 1, 1), shared_b=4, watched=False)
    assert target.tolist() == [POISON, POISON]
    with pytest.raises(EmulatorError, match="read of shared memory byte 0, which nobody has written") as error:  # fmt: skip
        run(body, [target], grid=(2, 1, 1), shared_b=4)
    assert "workgroup (0, 0, 0), wave 0, pc 3: ds_read_b32 v2, v1" in str(error.value)


@pytest.mark.parametrize(
    ("write", "byte"),
    [("ds_write_b16 v2, v3", 2), ("ds_write_b8 v2, v3 offset:1", 0), ("s_mov_b64 exec, 0xff\nds_write_b32 v2, v3\ns_mov_b64 exec, -1", 32)],
)  # fmt: skip
def test_the_first_byte_that_nobody_has_written_is_named(write: str, byte: int) -> None:
    with pytest.raises(EmulatorError, match=f"shared memory byte {byte}, which nobody"):
        run_lanes(f"{write}\nds_read_b32 v1, v2", {2: (4 * LANE).astype(np.uint32)}, shared_b=256)


@pytest.mark.parametrize(
    "instruction",
    ["ds_read_b64 v[4:5], v2", "ds_write_b64 v2, v[4:5]", "ds_read_b32 v4, v2 offset:508"],
)
def test_out_of_bounds(instruction: str) -> None:
    with pytest.raises(
        EmulatorError, match=r"out-of-bounds shared memory (read|write): bytes up to \d+ of 508"
    ):
        run_lanes(instruction, {2: (8 * LANE).astype(np.uint32)}, shared_b=508)


# ---- races ----------------------------------------------------------------------------------------------------------


def races(body: str, waves: int = 2, *, detect: bool = True) -> Execution:
    """v1 = 4 * lane, v2 = 4 * (work-item), v3 = wave number, s20 = the same; shared memory holds zeros."""

    blank = "".join(f"ds_write_b128 v44, v[40:43] offset:{1024 * i}\n" for i in range(4))
    zeros = "".join(f"v_mov_b32_e32 v{i}, 0\n" for i in range(40, 44))
    head = f"{zeros}v_and_b32_e32 v44, 63, v0\nv_lshlrev_b32_e32 v44, 4, v44\n{blank}s_barrier\n"
    head += "v_and_b32_e32 v1, 63, v0\nv_lshlrev_b32_e32 v1, 2, v1\nv_lshlrev_b32_e32 v2, 2, v0\nv_lshrrev_b32_e32 v3, 6, v0\nv_readfirstlane_b32 s20, v3\n"
    text = (head + body).replace("s_barrier", "s_waitcnt lgkmcnt(0)\ns_barrier")
    program = Program(kernel_text(text, ["ptr"]), 4096)
    return program.launch((2, 1, 1), waves, [np.zeros(1)], detect_races=detect)


def test_write_then_read_of_another_wave() -> None:
    exchange = "ds_write_b32 v2, v0\n{}\nv_xor_b32_e32 v4, 0x100, v2\nds_read_b32 v5, v4"
    assert races(exchange.format("s_barrier")).races == ()
    found = races(exchange.format("s_nop 0")).races
    # In lockstep each wave reads what the other has just written, in two workgroups.
    assert [(r.workgroup, r.wave, r.other, r.byte, r.access) for r in found] == [
        (0, 0, 1, 256, "read"),
        (0, 1, 0, 0, "read"),
        (1, 0, 1, 256, "read"),
        (1, 1, 0, 0, "read"),
    ]
    assert str(found[1]) == (
        "wave 1 and wave 0 touch shared memory byte 0 without a barrier in between: read by `ds_read_b32 v5, v4`"
    )
    assert races(exchange.format("s_nop 0"), detect=False).races == ()


def test_read_then_write_of_another_wave() -> None:
    body = "ds_write_b32 v1, v1\ns_barrier\nds_read_b32 v5, v1\n{}\nds_write_b32 v1, v3"
    # Both waves overwrite what both have read, with different values.
    found = races(body.format("s_nop 0")).races
    assert [(r.workgroup, r.wave, r.other, r.access) for r in found] == [
        *((workgroup, wave, None, "write") for workgroup in (0, 1) for wave in (0, 1)),
        (0, 1, 0, "write"),
        (1, 1, 0, "write"),
    ]
    one_reads = "v_mov_b32_e32 v4, 0x400\nv_mul_lo_u32 v4, v4, v3\nv_add_u32_e32 v4, v1, v4\nds_read_b32 v5, v4\n{}\nds_write_b32 v1, v1"
    found = races(
        one_reads.format("s_nop 0")
    ).races  # wave 0 reads the start, wave 1 reads elsewhere
    assert [(r.wave, r.other, r.byte, r.access) for r in found] == [(1, 0, 0, "write")] * 2
    assert races(one_reads.format("s_barrier")).races == ()


def test_several_readers_are_named_as_such() -> None:
    body = "ds_read_b32 v5, v1\ns_cmp_lg_u32 s20, 2\ns_cbranch_scc1 .LEND\nds_write_b32 v1, v1\n.LEND:\ns_nop 0"
    found = races(body, waves=3).races
    assert found[0].other is None
    assert "several waves" in str(found[0])


def test_equal_values_from_two_waves_are_no_race_but_different_ones_are() -> None:
    assert races("ds_write_b32 v1, v1").races == ()
    found = races("ds_write_b32 v1, v3").races
    assert [(r.wave, r.other, r.access) for r in found] == [(1, 0, "write")] * 2
    # One different byte in the middle of a wide store
    body = "v_mov_b32_e32 v4, 0\nv_mov_b32_e32 v5, 0\nv_lshlrev_b32_e32 v6, 8, v3\nv_mov_b32_e32 v7, 0\nv_lshlrev_b32_e32 v1, 2, v1\nds_write_b128 v1, v[4:7]"
    assert [r.byte for r in races(body).races] == [9, 9]


def test_neighbouring_bytes_are_independent() -> None:
    body = "v_lshlrev_b32_e32 v4, 1, v3\nv_add_u32_e32 v4, v1, v4\nds_write_b16 v4, v3\nds_read_u16 v5, v4"
    assert races(body).races == ()


def test_own_accesses_never_race() -> None:
    body = "ds_write_b32 v2, v0\nds_read_b64 v[4:5], v2 offset:1024\nds_read_b32 v5, v2\nds_write_b32 v2, v3\nds_read_b32 v5, v2"
    assert races(body).races == ()


@pytest.mark.parametrize("before", ["ds_write_b32 v2, v0", "ds_read_b32 v5, v2\nds_write_b32 v6, v0"])  # fmt: skip
def test_a_barrier_forgets_accesses_of_all_kinds(before: str) -> None:
    """Two intervals, each with accesses of its own before the one that touches the other wave's bytes."""
    other = "v_xor_b32_e32 v4, 0x100, v2\nv_add_u32_e32 v6, 0x400, v2\n"
    after = "ds_read_b32 v7, v6 offset:1024\nds_write_b32 v6, v0\nds_write_b32 v4, v0"
    body = f"{other}{before}\n{{}}\n{after}"
    assert races(body.format("s_barrier")).races == ()
    assert races(body.format("s_nop 0")).races != ()


def test_partial_exec_touches_only_its_lanes() -> None:
    body = "v_cmp_eq_u32_e32 vcc, 0, v3\ns_and_saveexec_b64 s[24:25], vcc\nds_write_b32 v1, v3\ns_mov_b64 exec, s[24:25]\nv_cmp_eq_u32_e32 vcc, 1, v3\ns_and_saveexec_b64 s[24:25], vcc\nds_write_b32 v1, v3 offset:256"
    assert races(body).races == ()


COPY = """
s_load_dwordx4 s[20:23], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
s_mov_b32 s24, s20
s_mov_b32 s25, s21
s_movk_i32 s26, 0x100
s_mov_b32 s27, 0x27000
v_and_b32_e32 v1, 63, v0
v_lshlrev_b32_e32 v1, 2, v1
v_lshrrev_b32_e32 v3, 6, v0
v_readfirstlane_b32 s28, v3
s_lshl_b32 s28, s28, 8
s_mov_b32 m0, s28
v_add_u32_e32 v2, s28, v1
ds_write_b32 v2, v1
{before}
buffer_load_dword v1, s[24:27], 0 offen lds
{after}
"""


def copied(before: str, after: str, waves: int = 1) -> Execution:
    """Each wave copies 256 B to its own part of shared memory, which it has written before; v2: its lanes' bytes."""
    body = COPY.format(before=before, after=after)
    body = body.replace("s_barrier", "s_waitcnt lgkmcnt(0)\ns_barrier")
    return run(body, [np.zeros(64, np.uint32)] * 2, arch="gfx950", waves=waves, shared_b=512)


def test_what_touches_a_copy_under_way_races_with_it() -> None:
    waited = "s_waitcnt vmcnt(0)\n"
    for access in ("ds_read_b32 v4, v2", "ds_write_b32 v2, v1"):
        assert copied("", waited + access).races == ()
        (race,) = copied("", access).races
        assert (race.wave, race.other, race.byte, race.under_way) == (0, 0, 0, True)
    assert str(race) == (
        "wave 0 touches shared memory byte 0 while a copy of wave 0 into it is under way: write by `ds_write_b32 v2, v1`"
    )
    (race,) = copied("", "buffer_load_dword v1, s[24:27], 0 offen lds").races
    assert race.under_way
    assert copied("", waited + "buffer_load_dword v1, s[24:27], 0 offen lds").races == ()


def test_a_copy_is_checked_when_it_is_issued() -> None:
    """It may write at once, so what another wave has read since the barrier conflicts, whenever it lands."""
    other = "v_xor_b32_e32 v5, 0x100, v2\nds_read_b32 v4, v5\n"
    assert copied("s_barrier\n" + other + "s_barrier", "", waves=2).races == ()
    found = copied("s_barrier\n" + other, "s_waitcnt vmcnt(0)", waves=2).races
    assert {(r.wave, r.other, r.access, r.under_way) for r in found} >= {(0, 1, "write", False), (1, 0, "write", False)}  # fmt: skip
