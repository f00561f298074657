"""Waves in lockstep: they part and meet again, and nobody touches the state of a wave that is elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from asm_snippets import LANE, kernel_text, run
from gluon_kernels import compile_async_sum, compile_decode, compile_softmax

from patune.emulator import Execution, Program, Traffic, lockstep, machine
from patune.emulator.registers import POISON
from patune.emulator.waves import Batch, RegisterPlan
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WAVES = 4
WORKGROUPS = 5
# s20 = wave, s21 = number of the wave in the launch, s[22:23] = first argument, s[24:25] = second, v1 = 4 * lane
HEAD = f"""
s_load_dwordx4 s[22:25], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
v_lshrrev_b32_e32 v2, 6, v0
v_readfirstlane_b32 s20, v2
s_mul_i32 s21, s2, {WAVES}
s_add_u32 s21, s21, s20
v_and_b32_e32 v1, 63, v0
v_lshlrev_b32_e32 v1, 2, v1
s_lshl_b32 s26, s21, 2
"""


def launch(
    body: str,
    arguments: Sequence[Any],
    *,
    arch: str = "gfx942",
    shared_b: int = 4096,
    watched: bool = True,
) -> Execution:
    program = Program(kernel_text(HEAD + body, ["ptr"] * len(arguments), arch), shared_b)
    return program.launch((WORKGROUPS, 1, 1), WAVES, arguments, detect_races=watched)


def dump(values: Sequence[str]) -> str:
    return "\n".join(
        f"v_mov_b32_e32 v21, {value}\nglobal_store_dword v20, v21, s[24:25] offset:{4 * i}"
        for i, value in enumerate(values)
    )


def in_order(execution: Execution) -> Execution:
    """Races by workgroup: their order in time depends on the batch."""
    return replace(execution, races=tuple(sorted(execution.races, key=lambda r: r.workgroup)))


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Execution]], Execution]:
    """Runs something with one workgroup at a time and with all together; both have to see the same."""

    def run_both(call: Callable[[], Execution]) -> Execution:
        monkeypatch.setattr(machine, "BATCH_WAVES", 1)
        one_by_one = in_order(call())
        monkeypatch.setattr(machine, "BATCH_WAVES", 64)
        together = in_order(call())
        assert together == one_by_one
        return together

    return run_both


# ---- sets of waves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_warps", [1, 3, 4])
def test_sets_cover_exactly_their_waves(num_warps: int) -> None:
    batch = Batch(RegisterPlan(1, 1), num_warps=num_warps, workgroups=5, scratch_b=4, blocks=2)
    random = np.random.default_rng(0)
    everyone = (1 << batch.waves) - 1
    for members in [everyone, *random.integers(1, everyone + 1, 40).tolist()]:
        batch.vector[:] = batch.scalar[:] = batch.hits[:] = batch.scratch[:] = 0
        for w in batch.sets_of(members):
            w.put(batch.plan.view(("v",), lambda v, s: v), np.ones(1, np.uint32))
            w.rows[batch.plan.view(("s",), lambda v, s: s)][...] += 1
            w.hits[1] += 1
            w.scratch[...] += 1
            np.testing.assert_array_equal(w.numbers.size, w.count)
        flags = np.array([members >> n & 1 for n in range(batch.waves)]).reshape(5, num_warps)
        np.testing.assert_array_equal(
            batch.vector, np.broadcast_to(flags[None, ..., None], batch.vector.shape)
        )
        np.testing.assert_array_equal(
            batch.scalar, np.broadcast_to(flags[..., None], batch.scalar.shape)
        )
        np.testing.assert_array_equal(
            batch.scratch, np.broadcast_to(flags[None, ..., None], batch.scratch.shape)
        )
        np.testing.assert_array_equal(batch.hits, [0 * flags, flags])  # fmt: skip


def test_regular_sets_are_one_slice() -> None:
    batch = Batch(RegisterPlan(1, 1), num_warps=4, workgroups=5, scratch_b=0, blocks=1)
    workgroup = lambda *waves: sum(1 << n for n in waves)  # noqa: E731
    first_waves = sum(workgroup(0) << 4 * g for g in range(5))
    for members, count in (
        ((1 << 20) - 1, 1), (first_waves, 1), (sum(workgroup(1, 2, 3) << 4 * g for g in range(5)), 1),
        (workgroup(0, 1, 2, 3) << 8, 1), (0b1111_0000_0000_1111_1111, 2), (0b0001_0000_0011, 2),
    ):  # fmt: skip
        assert len(batch.sets_of(members)) == count


# ---- divergence -----------------------------------------------------------------------------------------------------

LOOP = """
s_load_dword s5, s[22:23], s26
s_waitcnt lgkmcnt(0)
s_mov_b32 s6, 0
s_mov_b32 s7, 0
s_cmp_eq_u32 s5, 0
s_cbranch_scc1 .LDONE
.LLOOP:
s_bitcmp1_b32 s7, 0
s_cbranch_scc0 .LEVEN
s_add_u32 s6, s6, s7
s_branch .LJOIN
.LEVEN:
v_mov_b32_e32 v3, s7
v_readlane_b32 s8, v3, s20
s_lshl_b32 s8, s8, 1
s_add_u32 s6, s6, s8
.LJOIN:
s_add_u32 s7, s7, 1
s_cmp_lt_u32 s7, s5
s_cbranch_scc1 .LLOOP
.LDONE:
v_mov_b32_e32 v4, s6
v_mov_b32_e32 v5, s26
global_store_dword v5, v4, s[24:25]
"""


@pytest.mark.parametrize("seed", range(4))
def test_waves_of_different_trip_counts(seed: int, both: Any) -> None:
    n = WAVES * WORKGROUPS
    trips = np.random.default_rng(seed).integers(0, 9, n).astype(np.uint32)
    if seed == 0:  # whole workgroups take different paths
        trips = np.repeat(trips[:WORKGROUPS], WAVES)
    out = np.zeros(n, np.uint32)
    execution = both(lambda: launch(LOOP, [trips, out]))
    np.testing.assert_array_equal(out, [sum(i if i % 2 else 2 * i for i in range(t)) for t in trips])  # fmt: skip
    odd, even = trips // 2, (trips + 1) // 2
    before, after = len(HEAD.strip().splitlines()) + 6, 4
    per_wave = before + odd * 4 + even * 6 + trips * 3 + after
    assert execution.slots_per_workgroup == per_wave.reshape(-1, WAVES).sum(axis=1).tolist()
    assert execution.wave_instructions == per_wave.sum()
    assert execution.histogram["v_readlane_b32"] == even.sum()


def test_waves_meet_where_their_paths_join(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, int]] = []
    original = lockstep.Lockstep._run_block

    def record(self: Any, block: Any, index: int, w: Any, positions: Any) -> None:
        runs.append((index, w.count))
        original(self, block, index, w, positions)

    monkeypatch.setattr(lockstep.Lockstep, "_run_block", record)
    body = "s_cmp_eq_u32 s20, 1\ns_cbranch_scc1 .LONE\ns_nop 0\ns_branch .LJOIN\n.LONE:\ns_nop 0\n.LJOIN:\ns_nop 0"
    launch(body, [np.zeros(1)] * 2)
    # Waves 0, 2 and 3 of every workgroup are two slices.
    others = [(1, WORKGROUPS), (1, 2 * WORKGROUPS)]
    assert runs == [(0, WAVES * WORKGROUPS), *others, (2, WORKGROUPS), (3, WAVES * WORKGROUPS)]


def test_a_loop_without_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "MAX_INSTRUCTIONS", 5000)
    with pytest.raises(EmulatorError, match="more than 5000 wave instructions"):
        launch("s_cmp_eq_u32 s21, 9\n.LLOOP:\ns_cbranch_scc1 .LLOOP", [np.zeros(1)] * 2)


@pytest.mark.parametrize("seed", range(3))
def test_buffers_of_changing_sets_of_waves(seed: int) -> None:
    """Descriptors are looked at once; sets of equal size and different shape must not mix them up."""
    n = WAVES * WORKGROUPS
    body = f"""
    s_load_dword s5, s[22:23], s26
    s_waitcnt lgkmcnt(0)
    s_mov_b64 s[28:29], s[22:23]
    s_mov_b32 s30, 0x1000
    s_mov_b32 s31, 0x27000
    v_mov_b32_e32 v4, 0
    s_mov_b32 s6, 0
    .LLOOP:
    s_lshr_b32 s7, s5, s6
    s_bitcmp1_b32 s7, 0
    s_cbranch_scc0 .LNEXT
    v_mov_b32_e32 v3, s26
    buffer_load_dword v5, v3, s[28:31], 0 offen offset:{4 * n}
    s_waitcnt vmcnt(0)
    v_add_u32_e32 v4, v4, v5
    .LNEXT:
    s_add_u32 s6, s6, 1
    s_cmp_lt_u32 s6, 8
    s_cbranch_scc1 .LLOOP
    v_mov_b32_e32 v20, s26
    {dump(["v4"])}
    """
    source = np.random.default_rng(seed).integers(0, 256, 2 * n).astype(np.uint32)
    if seed == 0:  # eight waves: two whole workgroups, then half of four
        wave = np.arange(n)
        source[:n] = np.where(wave < 8, 1, 0) + np.where((wave < 16) & (wave % WAVES < 2), 2, 0)
    out = np.zeros(n, np.uint32)
    launch(body, [source, out])
    np.testing.assert_array_equal(out, np.bitwise_count(source[:n]) * source[n:])


ROUNDS = """
s_load_dword s5, s[22:23], s26
s_waitcnt lgkmcnt(0)
s_mov_b32 s6, 0
v_mov_b32_e32 v7, 0
.LLOOP:
s_cmp_ge_u32 s6, s5
s_cbranch_scc1 .LEND
s_lshl_b32 s8, s20, 2
v_mov_b32_e32 v3, s8
v_add_u32_e32 v4, s6, v0
ds_write_b32 v3, v4
s_waitcnt lgkmcnt(0)
s_barrier
s_cmp_eq_u32 s20, 0
s_cbranch_scc0 .LOTHERS
v_mov_b32_e32 v6, 0
ds_read_b32 v5, v6 offset:4
s_waitcnt lgkmcnt(0)
v_add_u32_e32 v7, v7, v5
s_branch .LJOIN
.LOTHERS:
v_mov_b32_e32 v6, 0
ds_read_b32 v5, v6
s_waitcnt lgkmcnt(0)
v_add_u32_e32 v7, v7, v5
.LJOIN:
s_waitcnt lgkmcnt(0)
s_barrier
s_add_u32 s6, s6, 1
s_branch .LLOOP
.LEND:
v_mov_b32_e32 v8, s26
global_store_dword v8, v7, s[24:25]
"""


def test_barriers_after_some_waves_have_ended(both: Any) -> None:
    """Waves exchange the work-item number of their last lane plus the round; those whose rounds are over have ended."""
    rounds = np.array([3, 1, 2, 3] * WORKGROUPS, np.uint32)
    rounds[4:8] = 5, 5, 0, 0
    rounds[8:12] = 0
    out = np.zeros_like(rounds)
    execution = both(lambda: launch(ROUNDS, [rounds, out]))
    want = []
    for number, mine in enumerate(rounds):
        wave, first = number % WAVES, number - number % WAVES
        seen, partner = 0, 1 if wave == 0 else 0
        for i in range(mine):
            # An ended partner's last word stays in shared memory.
            last = min(i, int(rounds[first + partner]) - 1)
            seen += 63 + 64 * partner + last
        want.append(seen)
    np.testing.assert_array_equal(out, want)
    assert execution.races == ()
    assert execution.histogram["s_barrier"] == 2 * rounds.sum()


# ---- isolation ------------------------------------------------------------------------------------------------------

DUMPED = 12  # words of each wave
ISOLATION = f"""
s_load_dword s5, s[22:23], s26
s_waitcnt lgkmcnt(0)
s_add_u32 s30, s21, 0x100
s_mov_b32 s31, 0x77
s_mov_b64 s[32:33], 0x55
s_mov_b64 vcc, 0x33
s_mov_b32 m0, s30
v_mov_b32_e32 v10, s30
v_mov_b32_e32 v11, s30
v_mov_b32_e32 v14, 1.0
v_mov_b32_e32 v15, 0x49742400
v_accvgpr_write_b32 a1, v10
s_lshl_b32 s34, s20, 8
v_add_u32_e32 v12, s34, v1
ds_write_b32 v12, v10
scratch_store_dword off, v10, off
s_cmp_lg_u32 s5, 1
s_cbranch_scc1 .LSKIP
s_mov_b32 s30, 1
s_mov_b32 s31, 2
s_mov_b64 s[32:33], 3
s_mov_b64 vcc, 4
s_mov_b32 m0, 5
v_mov_b32_e32 v10, 6
v_writelane_b32 v11, s31, 0
v_accvgpr_write_b32 a1, 8
ds_write_b32 v12, v10
scratch_store_dword off, v10, off
s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1
s_mov_b64 exec, 0xff
v_mov_b32_e32 v13, 9
s_cmp_eq_u32 s31, 0
.LSKIP:
s_cselect_b32 s35, 1, 0
s_mov_b64 s[36:37], exec
s_mov_b64 exec, -1
v_cvt_pk_fp8_f32 v16, v15, v15
ds_read_b32 v17, v12
scratch_load_dword v18, off, off
s_waitcnt vmcnt(0) lgkmcnt(0)
v_accvgpr_read_b32 v19, a1
s_mul_i32 s38, s21, {4 * DUMPED}
v_mov_b32_e32 v20, s38
"""


@pytest.mark.parametrize("seed", range(5))
def test_a_wave_that_is_elsewhere_keeps_everything(seed: int) -> None:
    n = WAVES * WORKGROUPS
    chosen = np.random.default_rng(seed).integers(0, 2, n).astype(np.uint32)
    if seed == 0:
        chosen[:] = np.arange(n) % WAVES == 2
    out = np.zeros((n, DUMPED), np.uint32)
    values = ["s30", "s31", "s32", "vcc_lo", "m0", "v10", "v11", "v19", "v17", "v18", "s35", "s36"]
    program = Program(kernel_text(HEAD + ISOLATION + dump(values), ["ptr", "ptr"], scratch_b=4), 4096)  # fmt: skip
    program.launch((WORKGROUPS, 1, 1), WAVES, [chosen, out])
    for wave in range(n):
        own = wave + 0x100
        untouched = [own, 0x77, 0x55, 0x33, own, own, own, own, own, own, 1, 0xFFFF_FFFF]
        trashed = [1, 2, 3, 4, 5, 6, own, 8, 6, 6, 0, 0xFF]
        assert out[wave].tolist() == (trashed if chosen[wave] else untouched), wave
    # MODE: 1e6 overflows to NaN, or clamps
    program = Program(kernel_text(HEAD + ISOLATION + dump(["v16"]), ["ptr", "ptr"], scratch_b=4), 4096)  # fmt: skip
    program.launch((WORKGROUPS, 1, 1), WAVES, [chosen, out])
    np.testing.assert_array_equal(out[:, 0] & 0xFF, np.where(chosen, 0x7F, 0x80))


def test_every_workgroup_starts_fresh(both: Any) -> None:
    """Batches are used again, by the next workgroups and by the next launch."""
    body = f"""
    v_mov_b32_e32 v15, 0x49742400
    v_cvt_pk_fp8_f32 v16, v15, v15
    v_and_b32_e32 v16, 0xff, v16
    scratch_load_dword v18, off, off
s_waitcnt vmcnt(0) lgkmcnt(0)
    s_mul_i32 s38, s21, 16
    v_mov_b32_e32 v20, s38
    {dump(["v16", "v18", "v40", "s70"])}
    s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1
    scratch_store_dword off, v15, off
    v_mov_b32_e32 v40, 1
    s_mov_b32 s70, 1
    """
    program = Program(kernel_text(HEAD + body, ["ptr", "ptr"], scratch_b=4), 0)
    out = np.zeros((WAVES * WORKGROUPS, 4), np.uint32)
    for _ in range(2):
        both(lambda: program.launch((WORKGROUPS, 1, 1), WAVES, [out, out]))
        assert {tuple(row) for row in out.tolist()} == {(0x80, POISON, POISON, POISON)}


@pytest.mark.parametrize("name", ["v_permlane32_swap_b32_e32 v10, v11", "v_mfma_f32_16x16x16_f16 v[12:15], v[10:11], v[10:11], 0"])  # fmt: skip
def test_what_ignores_exec_still_leaves_other_waves_alone(name: str) -> None:
    body = f"""
    s_load_dword s5, s[22:23], s26
    s_waitcnt lgkmcnt(0)
    v_mov_b32_e32 v10, 0x3c003c00
    v_mov_b32_e32 v11, 0x40004000
    v_mov_b32_e32 v12, 7
    s_cmp_lg_u32 s5, 1
    s_cbranch_scc1 .LSKIP
    {name}
    .LSKIP:
    s_mul_i32 s38, s21, 8
    v_mov_b32_e32 v20, s38
    v_readlane_b32 s39, v10, 40
    {dump(["s39", "v12"])}
    """
    n = WAVES * WORKGROUPS
    chosen = np.random.default_rng(1).integers(0, 2, n).astype(np.uint32)
    out = np.zeros((n, 2), np.uint32)
    launch(body, [chosen, out], arch="gfx950")
    done = [0x40004000, 7] if "permlane" in name else [0x3C003C00, np.float32(40).view(np.uint32)]
    np.testing.assert_array_equal(out, np.where(chosen[:, None], done, [0x3C003C00, 7]))


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_first_offending_wave_is_named() -> None:
    body = """
    s_cmp_ge_u32 s21, 7
    s_cselect_b32 s5, 0x1000, 0
    v_add_u32_e32 v3, s5, v1
    global_load_dword v4, v3, s[22:23]
    """
    with pytest.raises(EmulatorError, match=r"argument0\[4096\.\.4100\] of 256 bytes") as error:
        launch(body, [np.zeros(64, np.uint32), np.zeros(1)])
    assert "workgroup (1, 0, 0), wave 3, pc 12: global_load_dword v4" in str(error.value)


def test_shared_memory_ends_where_the_workgroup_s_own_ends() -> None:
    with pytest.raises(EmulatorError, match="bytes up to 260 of 256") as error:
        launch("s_lshl_b32 s5, s21, 2\ns_sub_u32 s5, s5, 8\ns_max_i32 s5, s5, 0\nv_add_u32_e32 v3, s5, v1\nds_read_b32 v4, v3", [np.zeros(1)] * 2, shared_b=256, watched=False)  # fmt: skip
    assert "workgroup (0, 0, 0), wave 3" in str(error.value)


DIRECT = """
s_load_dword s5, s[22:23], s26
s_waitcnt lgkmcnt(0)
s_add_u32 s28, s22, 0x100
s_addc_u32 s29, s23, 0
s_mov_b32 s30, 256
s_mov_b32 s31, 0x27000
s_lshl_b32 s34, s20, 8
s_mov_b32 m0, s34
v_add_u32_e32 v12, s34, v1
{before}
buffer_load_dword v1, s[28:31], 0 offen lds
s_cmp_lg_u32 s5, 1
s_cbranch_scc1 .LSKIP
s_waitcnt vmcnt(0)
.LSKIP:
ds_read_b32 v4, v12
s_waitcnt lgkmcnt(0)
s_lshl_b32 s35, s21, 8
v_add_u32_e32 v5, s35, v1
global_store_dword v5, v4, s[24:25]
s_waitcnt vmcnt(0)
"""


@pytest.mark.parametrize("partial", [False, True])
def test_a_wait_lands_only_the_loads_of_its_own_wave(partial: bool, both: Any) -> None:
    n = WAVES * WORKGROUPS
    waits = np.random.default_rng(2).integers(0, 2, n).astype(np.uint32)
    source = np.zeros(128, np.uint32)
    source[:n], source[64:] = waits, LANE + 1000
    out = np.zeros((n, 64), np.uint32)
    before = "s_mov_b64 exec, 0xfff" if partial else ""
    body = DIRECT.format(before=before).replace("ds_read", "s_mov_b64 exec, -1\nds_read")
    execution = both(lambda: launch(body, [source, out], shared_b=1024, watched=False))
    landed = waits[:, None].astype(bool) & ((12 if partial else 64) > LANE)
    np.testing.assert_array_equal(out, np.where(landed, source[64:], 0xA5A5_A5A5))
    moved = 4 * n * (12 if partial else 64)
    assert execution.lds_traffic == Traffic(load_b=4 * n * 64, store_b=moved)


def test_traffic_of_shared_memory_counts_active_lanes() -> None:
    body = "v_lshlrev_b32_e32 v2, 4, v0\nv_and_b32_e32 v2, 0x3ff, v2\nds_write_b64 v2, v[4:5]\ns_mov_b64 exec, 7\nds_read2_b32 v[6:7], v2 offset1:1\nds_write_b8 v2, v4"
    execution = run(body, [np.zeros(1)], waves=2, grid=(3, 1, 1), shared_b=1024)
    assert execution.lds_traffic == Traffic(load_b=6 * 3 * 8, store_b=6 * (64 * 8 + 3))
    program = Program(kernel_text(body, ["ptr"]), 1024)
    assert program.launch((1, 1, 1), 1, [np.zeros(1)], count=False).lds_traffic == Traffic()


def test_spills_with_offsets_that_differ_between_waves(both: Any) -> None:
    body = f"""
    s_lshl_b32 s5, s20, 2
    v_mov_b32_e32 v3, s21
    v_mov_b32_e32 v2, 9
    scratch_store_dword off, v2, off offset:8
    scratch_store_dword off, v3, s5
    scratch_load_dword v4, off, off offset:8
    s_waitcnt vmcnt(0)
    v_mov_b32_e32 v20, s26
    {dump(["v4"])}
    """
    n = WAVES * WORKGROUPS
    out = np.zeros(n, np.uint32)
    program = Program(kernel_text(HEAD + body, ["ptr", "ptr"], scratch_b=4 * WAVES), 0)
    execution = both(lambda: program.launch((WORKGROUPS, 1, 1), WAVES, [out, out]))
    np.testing.assert_array_equal(out, np.where(np.arange(n) % WAVES == 2, np.arange(n), 9))
    assert execution.spill_bytes == 3 * n * 256


# ---- races ----------------------------------------------------------------------------------------------------------

SAME_PLACE = "v_mov_b32_e32 v2, {}\nds_write_b32 v1, v2"


def test_different_values_in_one_instruction_are_a_race(both: Any) -> None:
    assert both(lambda: launch(SAME_PLACE.format("s2"), [np.zeros(1)] * 2)).races == ()
    found = both(lambda: launch(SAME_PLACE.format("s20"), [np.zeros(1)] * 2)).races
    assert [(r.workgroup, r.wave, r.other, r.byte, r.access) for r in found] == [
        (g, 3, other, 0, "write") for g in range(WORKGROUPS) for other in (0, 1, 2)
    ]
    # One wave of four differs, and it is not the last one.
    body = "s_cmp_eq_u32 s20, 1\ns_cselect_b32 s5, 9, 8\n" + SAME_PLACE.format("s5")
    found = both(lambda: launch(body, [np.zeros(1)] * 2)).races
    assert [(r.wave, r.other) for r in found] == [(3, 1)] * WORKGROUPS


def test_one_broken_workgroup_among_many(both: Any) -> None:
    body = "s_cmp_eq_u32 s2, 3\ns_cselect_b32 s5, s20, 8\n" + SAME_PLACE.format("s5")
    found = both(lambda: launch(body, [np.zeros(1)] * 2)).races
    assert {r.workgroup for r in found} == {3}


# ---- real kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_batches_of_any_size_agree_on_compiled_kernels(arch: str, both: Any) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((5, 1000), dtype=np.float32)
    build = compile_softmax(arch)
    softmax = Program(build.asm["amdgcn"], build.metadata.shared)
    outputs: list[np.ndarray] = []

    def run_softmax() -> Execution:
        outputs.append(np.full_like(x, np.nan))
        return softmax.launch((5, 1, 1), 4, [x, outputs[-1], 1000, 1000])

    assert both(run_softmax).races == ()
    np.testing.assert_array_equal(*outputs[-2:])

    build = compile_decode(arch, "bf16", 64, 64)
    decode = Program(build.asm["amdgcn"], build.metadata.shared)
    q, k, v = (
        (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for shape in ((16, 64), (4, 128, 64), (4, 128, 64))
    )
    table = np.array([2, 0, 3], np.int32)

    def run_decode() -> Execution:
        outputs.append(np.full((16, 64), np.nan, np.float32))
        arguments = [q, k, v, table, outputs[-1], 0.18, 300]
        return decode.launch((3, 1, 1), 4, arguments)

    execution = both(run_decode)
    assert execution.races == ()
    assert execution.lds_traffic.load_b > 0
    np.testing.assert_array_equal(*outputs[-2:])


def test_batches_of_any_size_agree_on_direct_to_lds_loads(both: Any) -> None:
    x = np.random.default_rng(0).integers(-8, 8, (5, 1024)).astype(np.float32)
    build = compile_async_sum()
    program = Program(build.asm["amdgcn"], build.metadata.shared)
    outputs: list[np.ndarray] = []

    def call() -> Execution:
        outputs.append(np.full(1024, np.nan, np.float32))
        return program.launch((3, 1, 1), 4, [x, outputs[-1], 5])

    execution = both(call)
    np.testing.assert_array_equal(outputs[-1], x.sum(0))
    np.testing.assert_array_equal(outputs[-2], x.sum(0))
    assert execution.lds_traffic == Traffic(load_b=3 * x.nbytes, store_b=3 * x.nbytes)
