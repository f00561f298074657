"""Issue slots and how they fall on compute units."""

from __future__ import annotations

import numpy as np
import pytest
from asm_snippets import kernel_text, run
from hypothesis import given
from hypothesis import strategies as st

from patune.emulator import Program, busiest_simd_slots, issue_slots
from patune.errors import InvalidValueError


@pytest.mark.parametrize(
    ("mnemonic", "slots"),
    [
        ("v_mfma_f32_16x16x16_f16", 4), ("v_mfma_f32_16x16x16_bf16", 4), ("v_mfma_f32_16x16x32_f16", 4),
        ("v_mfma_f32_16x16x32_fp8_fp8", 4), ("v_mfma_f32_32x32x8_f16", 8), ("v_mfma_f32_32x32x16_bf16", 8),
        ("v_mfma_f32_16x16x128_f8f6f4", 8), ("v_mfma_f32_32x32x64_f8f6f4", 16),
        ("v_exp_f32_e32", 4), ("v_rcp_f32_e32", 4), ("v_rcp_iflag_f32_e32", 4), ("v_log_f32_e64", 4), ("v_rsq_f32_e32", 4), ("v_sqrt_f32_e32", 4),
        ("v_pk_fma_f32", 1), ("v_lshl_add_u64", 1), ("v_mul_lo_u32", 1), ("v_ldexp_f32", 1), ("s_nop", 1), ("s_waitcnt", 1), ("s_barrier", 1),
        ("global_load_dwordx4", 1), ("ds_read_b128", 1), ("s_endpgm", 1),
    ],
)  # fmt: skip
def test_issue_slots(mnemonic: str, slots: int) -> None:
    assert issue_slots(mnemonic) == slots


def dealt(pattern: list[int], total: int, warps: int, units: int) -> float:
    """Deal one wave after the other; the oracle of busiest_simd_slots."""
    simds = [[0.0] * 4 for _ in range(units)]
    waves_on = [0] * units
    for workgroup in range(total):
        unit = workgroup % units
        for _ in range(warps):
            simds[unit][waves_on[unit] % 4] += pattern[workgroup % len(pattern)] / warps
            waves_on[unit] += 1
    return max(map(max, simds))


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 40),
)
def test_busiest_simd_equals_dealing_waves_out(
    pattern: list[int], total: int, warps: int, units: int
) -> None:
    expected = pytest.approx(dealt(pattern, total, warps, units))
    for slots in (pattern, np.array(pattern)):
        assert (
            busiest_simd_slots(slots, workgroups_total=total, num_warps=warps, compute_units=units)
            == expected
        )


def test_one_wave_does_not_get_the_whole_compute_unit() -> None:
    """The same work in one wave keeps one SIMD of four busy: four times the slots of four waves."""
    one, four = (
        busiest_simd_slots([400], workgroups_total=8, num_warps=warps, compute_units=8)
        for warps in (1, 4)
    )
    assert (one, four) == (400.0, 100.0)


@pytest.mark.parametrize(
    ("pattern", "total", "warps", "units"),
    [([], 1, 1, 1), ([1], 0, 1, 1), ([1], 1, 0, 1), ([1], 1, 1, 0)],
)
def test_nothing_to_deal_is_refused(pattern: list[int], total: int, warps: int, units: int) -> None:
    with pytest.raises(InvalidValueError):
        busiest_simd_slots(pattern, workgroups_total=total, num_warps=warps, compute_units=units)


def test_counts_of_a_launch() -> None:
    body = """
    s_lshl_b32 s5, s2, 1
    s_add_u32 s5, s5, 1
    .LLOOP:
    v_exp_f32_e32 v1, v1
    v_mfma_f32_16x16x16_f16 v[4:7], v[2:3], v[2:3], 0
    s_sub_u32 s5, s5, 1
    s_cmp_lg_u32 s5, 0
    s_cbranch_scc1 .LLOOP
    s_barrier
    """
    execution = run(body, [np.zeros(1)], grid=(3, 1, 1), waves=2)
    loops = [1, 3, 5]
    assert execution.slots_per_workgroup == [2 * (2 + n * (4 + 4 + 3) + 2) for n in loops]
    assert execution.histogram["v_exp_f32_e32"] == execution.mfma == 2 * sum(loops)
    assert (
        execution.wave_instructions
        == sum(execution.histogram.values())
        == 2 * (3 * 4 + 5 * sum(loops))
    )


def test_launch_order_and_workgroup_numbers() -> None:
    body = """
    s_load_dwordx2 s[20:21], s[0:1], 0x0
    s_waitcnt lgkmcnt(0)
    s_mul_i32 s5, s4, 6
    s_mul_i32 s6, s3, 3
    s_add_u32 s5, s5, s6
    s_add_u32 s5, s5, s2
    s_lshl_b32 s6, s5, 2
    v_mov_b32_e32 v1, s6
    v_mov_b32_e32 v2, s5
    s_cmp_lg_u32 s5, 4
    s_cbranch_scc1 .LEND
    s_nop 0
    .LEND:
    global_store_dword v1, v2, s[20:21]
    """
    target = np.zeros(12, np.uint32)
    execution = run(body, [target], grid=(3, 2, 2))
    np.testing.assert_array_equal(target, np.arange(12))
    slots = execution.slots_per_workgroup
    assert [slots[i] - slots[0] for i in range(12)] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_counting_can_be_left_out_and_a_program_runs_many_times() -> None:
    program = Program(kernel_text("v_mov_b32_e32 v1, v0", ["ptr"]), 0)
    first = program.launch((1, 1, 1), 1, [np.zeros(1)], count=False)
    second = program.launch((1, 1, 1), 1, [np.zeros(1)])
    assert (first.histogram, first.traffic) == ({}, {})
    assert second.histogram == {"v_mov_b32_e32": 1, "s_endpgm": 1}
    assert first.wave_instructions == second.wave_instructions == 2
