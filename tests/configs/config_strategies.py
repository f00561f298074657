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
    block,
    winner,
)
from hypothesis import strategies as st

from patune.configs.block import FAULTS
from patune.configs.candidate import Candidate
from patune.configs.pack import Pack, block_order, robust_order, winner_order
from patune.configs.winner import ROBUST_OBJECTIVES, RobustWinner, Speedup
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.problem import Problem, Workload
from patune.trial import FIRST_PROTOCOL, Timing

if TYPE_CHECKING:
    from patune.configs.block import Block
    from patune.configs.candidate import Candidates
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


intervals = st.tuples(scores, scores, scores).map(sorted)
speedups = intervals.map(lambda v: Speedup(low=v[0], ratio=v[1], high=v[2]))


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    low, median, high = draw(intervals)
    inside = draw(st.booleans())
    return Timing(
        median_us=median,
        p20_us=low,
        p80_us=high,
        replays=draw(st.integers(1, 500)),
        read_fraction=draw(st.floats(0, 1.1)),
        low_us=low if inside else None,
        high_us=high if inside else None,
        protocol=draw(st.sampled_from([FIRST_PROTOCOL, "graph-cold-2"])),
    )


@st.composite
def winners(draw: st.DrawFn) -> Winner:
    target = draw(targets)
    knobs = hopper_knobs if target.limits.family == "hopper_wgmma" else cdna_knobs
    measured = draw(st.booleans())
    evidence = {"timing": draw(timings())} if measured else {"slots": draw(scores)}
    default_knobs = draw(st.none() | knobs)
    speedup = draw(st.none() | speedups) if measured and default_knobs else None
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
        speedup=speedup,
        **evidence,
    )


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[Winner], Candidates]:
    """Winners of different keys, some with candidates in the order of their scores."""
    found = list({w.key: w for w in draw(st.lists(winners(), max_size=5))}.values())
    candidates = {}
    for standing in found:
        kind = hopper_knobs if isinstance(standing.knobs, HopperKnobs) else cdna_knobs
        knobs = draw(st.lists(kind.filter(standing.knobs.__ne__), max_size=5, unique=True))
        points = sorted(
            draw(st.lists(scores, min_size=len(knobs), max_size=len(knobs), unique=True))
        )
        beside = [
            Candidate(
                knobs=one,
                timing=standing.timing and replace(standing.timing, median_us=score),
                counted=standing.counted and replace(standing.counted, busiest_simd_slots=score),
                gate_cases=draw(st.integers(1, 20)),
            )
            for one, score in zip(knobs, points, strict=True)
        ]
        if beside:
            candidates[standing.key] = tuple(beside)
    return found, candidates


@st.composite
def robust_winners(draw: st.DrawFn) -> RobustWinner:
    sizes = draw(st.lists(workloads, min_size=1, max_size=5, unique=True))
    target = draw(targets)
    return RobustWinner(
        target=target,
        environment=draw(st.sampled_from([ENVIRONMENT, LATER_ENVIRONMENT])),
        problem=draw(problems),
        objective=draw(st.sampled_from(ROBUST_OBJECTIVES)),
        workloads=tuple(sizes),
        knobs=draw(hopper_knobs if target.limits.family == "hopper_wgmma" else cdna_knobs),
        regrets=tuple(draw(st.lists(scores, min_size=len(sizes), max_size=len(sizes)))),
        score=draw(scores),
        created=draw(times),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    arch = draw(st.sampled_from(["sm_90", "gfx942", "gfx950"]))
    return block(
        arch=arch,
        kernel_source_hash=draw(st.sampled_from(["5" * 64, "6" * 64])),
        problem=draw(problems),
        knobs=draw(hopper_knobs if arch == "sm_90" else cdna_knobs),
        status=draw(st.sampled_from(FAULTS)),
        reason=draw(st.sampled_from(["", "killed after 30 s", "an illegal access"])),
        created=draw(times),
    )


@st.composite
def whole_packs(draw: st.DrawFn) -> Pack:
    """Packs with every kind of entry, as an export sorts them."""
    found, candidates = draw(packs())
    robust = {
        (w.target, w.problem, w.objective): w for w in draw(st.lists(robust_winners(), max_size=3))
    }
    blocked = {one.key: one for one in draw(st.lists(blocks(), max_size=4))}
    return Pack(
        winners=sorted(found, key=winner_order),
        candidates=candidates,
        robust=sorted(robust.values(), key=robust_order),
        blocklist=sorted(blocked.values(), key=block_order),
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
