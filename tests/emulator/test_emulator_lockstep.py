"""Waves in lockstep: they part and meet again, and nobody touches the state of a wave that is elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from asm_snippets import kernel_text
from lockstep_waves import HEAD, WAVES, WORKGROUPS, dump, launch

from patune.emulator import Program, lockstep
from patune.emulator.registers import POISON
from patune.emulator.waves import Batch, RegisterPlan
from patune.errors import EmulatorError

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
