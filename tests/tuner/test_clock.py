from __future__ import annotations

import itertools
import math

import pytest
import torch

from patune.kernels.calls import KernelCall
from patune.kernels.knobs import HopperKnobs
from patune.problem import Problem, Workload
from patune.target import Target
from patune.tuner import clock
from patune.tuner.clock import (
    GRAPH_US,
    MAX_CALLS,
    RACE_REPLAYS,
    REPLAYS,
    Bench,
    race,
    rounds_for,
    summarise,
)
from patune.tuner.rotation import FlatPool

CPU = torch.device("cpu")
PROBLEM = Problem(block_size=16, head_dim=64, qg=2, kv_layout="hnd")
WORKLOAD = Workload(batch=2, kv_heads=1, context=32)
SPLIT = HopperKnobs(partition_tokens=64, num_splits=2, num_stages=1, num_warps=4)


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


class Graph:
    """Stands for a captured graph: replaying it runs the steps and takes a microsecond each."""

    def __init__(self, steps, flush, warm_up_us):
        self.steps, self.flush, self.warm_up_us = steps, flush, warm_up_us

    def replay_us(self):
        for step in self.steps:
            step()
        return 1.0


@pytest.fixture
def launches(monkeypatch):
    """What a bench on the CPU launched: (inputs, workspace as found)."""
    seen = []

    class Kernel:
        def __init__(self, inputs, out, workspace):
            self.of = inputs, out, workspace

        def __getitem__(self, grid):
            return self.launch

        def launch(self):
            inputs, out, workspace = self.of
            seen.append((inputs, workspace.clone(), bool(out.isnan().all())))
            workspace.fill_(math.nan)
            out.fill_(len(seen))

    def plan_decode(inputs, knobs, target, *, out, workspace):
        kernel = Kernel(inputs, out, workspace)
        return [KernelCall(kernel=kernel, grid=(1, 1, 1), arguments={}, constants={})]

    monkeypatch.setattr(clock, "plan_decode", plan_decode)
    monkeypatch.setattr(clock, "record", Graph)
    monkeypatch.setattr(clock, "MEMORY_SHARE", 1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2 * 2 * 4096, 0))
    return seen


def make_bench(problem=PROBLEM, **options):
    target = Target.named("sm_90")
    pool = FlatPool(CPU)
    return Bench(problem, WORKLOAD, target, pool, device=CPU, ceiling_gb_s=4600.0, **options)


def test_calls_share_table_lengths_query_and_output_but_not_the_cache(launches):
    bench = make_bench(lengths=(17, 32))
    assert (bench.rotation.sets, bench.rotation.set_pages) == (5, 4)
    bench.record(SPLIT).replay_us()
    assert len(launches) == 5
    for name in ("block_tables", "context_lengths", "query"):
        assert len({getattr(inputs, name).data_ptr() for inputs, _, _ in launches}) == 1
    assert len({inputs.key_cache.data_ptr() for inputs, _, _ in launches}) == 5
    assert launches[0][0].context_lengths.tolist() == [17, 32]


def test_output_is_the_second_launch_over_nan(launches):
    out = make_bench().output(SPLIT)
    assert (out.dtype, out.shape) == (torch.bfloat16, (2, 2, 64))
    assert [poisoned for _, _, poisoned in launches] == [True, True]
    assert out.unique().tolist() == [2.0]


def test_fp8_queries_give_bf16_outputs(launches):
    problem = Problem(
        block_size=16,
        head_dim=64,
        qg=2,
        kv_layout="hnd",
        query_dtype="fp8_e4m3fn",
        kv_dtype="fp8_e4m3fn",
    )
    assert make_bench(problem).output(SPLIT).dtype == torch.bfloat16


def test_small_rotations_are_flushed(launches, monkeypatch):
    monkeypatch.setattr(clock, "flush_buffer", lambda device: torch.zeros(3))
    assert make_bench().record(SPLIT, warm_up_us=7.0).flush.numel() == 3
    assert make_bench().record(SPLIT, warm_up_us=7.0).warm_up_us == 7.0


def test_finalists_take_turns_and_bytes_are_those_of_the_real_lengths(launches):
    bench = make_bench(lengths=(17, 32))
    first, second = bench.retime([SPLIT, SPLIT])
    assert (first.median_us, first.replays, second.replays) == (1.0, REPLAYS, REPLAYS)
    assert first.read_fraction == pytest.approx(49 * 2 * 64 * 2 / 1e-6 / 4600e9)
    assert bench.time(SPLIT).median_us == 1.0
