"""Hypothesis strategies of stored configurations and requests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from config_samples import (
    ENVIRONMENT,
    H100,
    H200,
    KNOBS,
    LATER_ENVIRONMENT,
    MI300X,
    PROBLEM,
    winner,
)
from hypothesis import strategies as st

from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.problem import Problem, Workload

if TYPE_CHECKING:
    from patune.configs.winner import Winner

targets = st.sampled_from([H200, H100, MI300X])
problems = st.sampled_from(
    [
        PROBLEM,
        Problem(block_size=1024, head_dim=128, qg=8, windowed=True),
        Problem(block_size=16, head_dim=64, qg=8),
    ]
)
workloads = st.builds(
    Workload,
    batch=st.integers(1, 512),
    kv_heads=st.sampled_from([1, 2, 8]),
    context=st.integers(1, 2**20),
)
# So few values that requests and neighbours meet: equal walks, factors of exactly two, equal distances, equal dates.
crowded_targets = st.sampled_from([H200, H200, H200, H100])
crowded_problems = st.sampled_from(
    [PROBLEM, PROBLEM, PROBLEM, Problem(block_size=16, head_dim=64, qg=8)]
)
crowded_workloads = st.builds(
    Workload,
    batch=st.sampled_from([2, 3, 4, 6, 8]),
    kv_heads=st.sampled_from([1, 2]),
    context=st.sampled_from([1024, 2048, 2049]),
)
times = st.sampled_from(["2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z"])
scores = st.floats(min_value=0.5, max_value=1e6)
hopper_knobs = st.builds(
    HopperKnobs,
    partition_tokens=st.sampled_from([64, 128]),
    num_splits=st.integers(1, 128),
    num_stages=st.integers(1, 4),
    num_warps=st.just(4),
    maxnreg=st.sampled_from([0, 168]),
    probs_k_major=st.booleans(),
)
cdna_knobs = st.builds(
    CdnaKnobs,
    partition_tokens=st.sampled_from([128, 256]),
    num_splits=st.integers(1, 128),
    num_stages=st.integers(1, 2),
    num_warps=st.just(4),
    waves_per_eu=st.integers(0, 8),
)


@st.composite
def winners(draw: st.DrawFn) -> Winner:
    target = draw(targets)
    knobs = hopper_knobs if target.limits.family == "hopper_wgmma" else cdna_knobs
    evidence = {draw(st.sampled_from(["median_us", "slots"])): draw(scores)}
    default_knobs = draw(st.none() | knobs)
    return winner(
        target=target,
        environment=draw(st.sampled_from([ENVIRONMENT, LATER_ENVIRONMENT])),
        problem=draw(problems),
        workload=draw(workloads),
        knobs=draw(knobs),
        default_knobs=default_knobs,
        default_score=draw(st.none() | scores) if default_knobs else None,
        trials=draw(st.integers(1, 500)),
        error_rms=draw(st.none() | st.floats(min_value=0, max_value=1)),
        created=draw(times),
        **evidence,
    )


@st.composite
def crowded_winners(draw: st.DrawFn) -> Winner:
    evidence = {draw(st.sampled_from(["median_us", "slots"])): draw(st.integers(1, 5)) * 10.0}
    return winner(
        target=draw(crowded_targets),
        problem=draw(crowded_problems),
        workload=draw(crowded_workloads),
        knobs=replace(KNOBS, num_splits=draw(st.integers(1, 9))),
        created=draw(times),
        **evidence,
    )
