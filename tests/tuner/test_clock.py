from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from patune.problem import Problem, Workload
from patune.tuner.clock import (
    GRAPH_US,
    MAX_CALLS,
    RACE_REPLAYS,
    REPLAYS,
    race,
    rounds_for,
    summarise,
)
from patune.tuner.rotation import (
    COLD_B,
    MAX_SETS,
    FlatPool,
    make_inputs,
    make_tables,
    plan_rotation,
)

CPU = torch.device("cpu")
PROBLEM = Problem(block_size=64, head_dim=128, qg=8)
MEMORY_B = 100_000_000_000


@pytest.mark.parametrize(
    ("batch", "context", "sets"),
    [
        (1, 4096, 27),  # 16.8 MB
        (16, 4096, 4),  # 268 MB: two would do, at least four are used
        (128, 4096, 2),  # 2.1 GB
        (128, 32768, 2),
    ],
)
def test_sets_add_up_to_a_cold_l2(batch, context, sets):
    workload = Workload(batch=batch, kv_heads=8, context=context)
    rotation = plan_rotation(PROBLEM, workload, MEMORY_B)
    assert rotation.sets == sets
    assert rotation.pool_pages * rotation.page_b == sets * workload.kv_bytes(PROBLEM) >= COLD_B
    assert not rotation.flushes


def test_tiny_sets_are_flushed_instead():
    rotation = plan_rotation(PROBLEM, Workload(batch=1, kv_heads=1, context=100), MEMORY_B)
    assert (rotation.sets, rotation.table_pages) == (MAX_SETS, 2)
    assert rotation.flushes


def test_short_memory_means_fewer_pages_not_fewer_sets():
    workload = Workload(batch=128, kv_heads=8, context=32768)
    rotation = plan_rotation(PROBLEM, workload, 8_000_000_000)
    assert rotation.sets == 2
    assert rotation.pool_pages == 8_000_000_000 // rotation.page_b
    assert not rotation.flushes


def test_only_the_pages_of_a_window_count():
    problem = dataclasses.replace(PROBLEM, windowed=True, query_length=4)
    workload = Workload(
        batch=16, kv_heads=8, context=128
    )  # the window; sequences are four times as long
    rotation = plan_rotation(problem, workload, MEMORY_B)
    assert (rotation.table_pages, rotation.first_page) == (8, 5)  # 131 tokens: three pages
    assert rotation.pool_pages == rotation.sets * 16 * 3


def test_tables_are_aligned_disjoint_permutations():
    workload = Workload(batch=3, kv_heads=8, context=4000)
    rotation = plan_rotation(PROBLEM, workload, MEMORY_B)
    tables = make_tables(rotation, 3, CPU)
    assert len(tables) == rotation.sets
    assert {t.shape for t in tables} == {(3, 63)}
    assert {t.dtype for t in tables} == {torch.int32}
    assert {t.data_ptr() % 16 for t in tables} == {tables[0].data_ptr() % 16}
    pages = torch.cat([t.flatten() for t in tables])
    assert sorted(pages.tolist()) == list(range(rotation.pool_pages))
    assert pages.tolist() != sorted(pages.tolist())
    again = make_tables(rotation, 3, CPU)
    assert all(torch.equal(a, b) for a, b in zip(tables, again, strict=True))


def test_windowed_tables_give_each_set_its_own_visible_pages():
    problem = dataclasses.replace(PROBLEM, windowed=True)
    workload = Workload(batch=2, kv_heads=1, context=64)
    rotation = dataclasses.replace(plan_rotation(problem, workload, MEMORY_B), sets=3, pool_pages=6)
    tables = make_tables(rotation, 2, CPU)
    visible = torch.cat([t[:, rotation.first_page :].flatten() for t in tables])
    assert sorted(visible.tolist()) == list(range(6))
    assert all(int(t.min()) >= 0 and int(t.max()) < 6 for t in tables)


@pytest.mark.parametrize("layout", ["aiter", "nhd", "hnd"])
@pytest.mark.parametrize("windowed", [False, True])
def test_inputs_pose_the_problem_and_the_workload(layout, windowed):
    problem = dataclasses.replace(
        PROBLEM, kv_layout=layout, query_length=2, sinks=True, windowed=windowed
    )
    workload = Workload(batch=2, kv_heads=2, context=128)
    memory_b = 40 * 2 * 2 * 64 * 128 * 2
    rotation = plan_rotation(problem, workload, memory_b)
    assert rotation.pool_pages == 40
    pool = FlatPool(CPU)
    inputs = make_inputs(problem, workload, rotation, pool, make_tables(rotation, 2, CPU)[0])
    assert inputs.problem == problem
    assert inputs.key_cache.shape[0] == inputs.value_cache.shape[0] == 40
    tokens = 512 if windowed else 128
    assert inputs.context_lengths.tolist() == [tokens, tokens]
    assert inputs.sliding_window == (128 if windowed else 0)
    assert inputs.block_tables.shape == (2, tokens // 64)
    assert pool.held_b == memory_b
    key, value = inputs.key_cache.float(), inputs.value_cache.float()
    assert abs(float(key.std()) - 1) < 0.02
    assert not torch.equal(key.flatten(), value.flatten())


def test_the_pool_is_shared_and_grows():
    pool = FlatPool(CPU)
    first = pool.take(torch.bfloat16, 100)
    assert pool.take(torch.bfloat16, 60).data_ptr() == first.data_ptr()
    assert (pool.take(torch.bfloat16, 200).numel(), pool.held_b) == (200, 400)
    assert pool.take(torch.float16, 10).dtype == torch.float16


def test_rounds_make_a_graph_long_enough():
    assert rounds_for(round_us=10.0, steps=2) == GRAPH_US / 10
    assert rounds_for(round_us=2 * GRAPH_US, steps=2) == 1
    assert rounds_for(round_us=1e-9, steps=64) == MAX_CALLS // 64


def test_a_race_is_given_up_after_three_replays_of_a_hopeless_candidate():
    def samples(*values):
        return iter(itertools.chain(values, itertools.repeat(values[-1]))).__next__

    assert race(samples(16.0), incumbent_us=10.0) == [16.0] * RACE_REPLAYS
    assert len(race(samples(15.0), incumbent_us=10.0)) == REPLAYS
    assert len(race(samples(99.0, 14.0, 14.0), incumbent_us=10.0)) == REPLAYS
    assert len(race(samples(99.0), incumbent_us=None)) == REPLAYS


def test_a_timing_has_the_median_the_spread_and_the_share_of_the_ceiling():
    timing = summarise(
        [float(n) for n in range(101, 90, -1)], moved_b=96_000_000, ceiling_gb_s=2000.0
    )
    assert (timing.p20_us, timing.median_us, timing.p80_us, timing.replays) == (
        93.0,
        96.0,
        99.0,
        11,
    )
    assert timing.read_fraction == pytest.approx(0.5)  # 96 MB in 96 us are 1000 GB/s
    alone = summarise([5.0], moved_b=0, ceiling_gb_s=1.0)
    assert (alone.p20_us, alone.median_us, alone.p80_us) == (5.0, 5.0, 5.0)
