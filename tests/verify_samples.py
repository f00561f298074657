"""Stored winners for the tests of a verification."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from patune.configs.packs import pack_document, pack_text
from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.environment import Environment, current_environment
from patune.kernels.defaults import default_knobs
from patune.problem import Problem, Workload
from patune.target import Target
from patune.trial import CountedWork, Timing, TrialResult

if TYPE_CHECKING:
    from pathlib import Path

GFX942, H200 = Target.named("gfx942"), Target.named("sm_90")
H100 = Target(arch="sm_90", device_name="NVIDIA H100 80GB HBM3", compute_units=114)
PROBLEM = Problem(block_size=16, head_dim=64, qg=4)
COUNTED = CountedWork(
    busiest_simd_slots=900.0,
    wave_instructions=1000,
    mfma=100,
    global_bytes=4096,
    lds_bytes=2048,
    spill_bytes=0,
)
TIMING = Timing(median_us=8.0, p20_us=7.9, p80_us=8.1, replays=24, read_fraction=0.5)


def older(environment: Environment) -> Environment:
    """As it was before Triton and the kernels changed."""
    return dataclasses.replace(
        environment,
        triton="3.5.0",
        compiler="llvm of triton 3.5.0",
        kernel_source_hash="ce69e675" * 8,
    )


def winner(
    target: Target = GFX942,
    *,
    problem: Problem = PROBLEM,
    batch: int = 1,
    environment: Environment | None = None,
    **knobs: Any,
) -> Winner:
    """The default knobs of batch 1 with these changed, stored in the present environment unless another is given."""
    usual = default_knobs(problem, Workload(batch=1, kv_heads=8, context=512), target)
    measured = target.vendor == "nvidia"
    return Winner(
        target=target,
        environment=environment or current_environment(target),
        problem=problem,
        workload=Workload(batch=batch, kv_heads=8, context=512),
        knobs=dataclasses.replace(usual, **knobs),
        evidence="measured" if measured else "emulated",
        timing=TIMING if measured else None,
        counted=None if measured else COUNTED,
        default_score=None,
        default_knobs=None,
        trials=8,
        gate_cases=7,
        error_rms=0.0025,
        created="2026-11-22T10:42:00Z",
    )


def tune(path: Path, *winners: Winner) -> None:
    """A database as sweeps leave it."""
    with Store.open(path) as store:
        for found in winners:
            run = store.begin_run(
                target=found.target,
                environment=found.environment,
                sampler="pool",
                seed=0,
                command="patune sweep",
            )
            result = TrialResult(
                status="ok",
                gate_cases=found.gate_cases,
                error_rms=found.error_rms,
                timing=found.timing,
                counted=found.counted,
            )
            at = {"problem": found.problem, "workload": found.workload, "knobs": found.knobs}
            trial = store.record_trial(run, **at, result=result, source="search")
            store.promote(trial, default_trial_id=None)
            store.end_run(run)


def pack(path: Path, *winners: Winner) -> None:
    """A pack file."""
    path.write_text(pack_text(pack_document(list(winners))), encoding="utf-8")
