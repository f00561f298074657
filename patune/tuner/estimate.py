"""What a sweep would try and about how long that takes, without running or writing anything."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import DatabaseError
from patune.kernels.knobs import knobs_to_dict
from patune.tuner.efforts import EFFORTS, trial_limit
from patune.tuner.key_state import FOREIGN_SOURCES
from patune.tuner.progress import UNTRIED_SOURCES
from patune.tuner.workbench import MAX_BUILDERS, search_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.settings import DatabasePlace
    from patune.target import Target
    from patune.tuner.progress import Key
    from patune.tuner.sweep import SweepOptions

PLAN_SCHEMA = 1
NO_TRIALS = (*FOREIGN_SOURCES, *UNTRIED_SOURCES)  # sources of stored rows that do not count

# Measured on an H200 machine, seconds: 595 trials and 32 finals took 144 and 23 s (benchmarks/results/2026-11-22_h200_sweep_seed1.json.gz).
GATE_S = 0.15  # per (problem, knobs): keys of one problem share it
CLOCK_S = 0.1  # per trial
FINALS_S = 0.7  # per key
READ_CEILING_S = 10.0  # once
BUILDS_CPU_S = 110.0  # CPU time of all builds of a problem, 890 s for 8 of them in that sweep; the builders share it
# Steps that take longer than a graph of many make every replay longer.
GRAPH_S = 0.0015
REPLAYS_PER_TRIAL = 15  # 9 to 45 that count and at least 2 to warm up (patune/tuner/clock.py)
READ_B_PER_S = 4.3e12  # read ceiling of an H200; others differ by less than the range says

# Emulated: 192 trials of 24 keys took 3 min 24 s on 2 cores, compiling from an empty cache included (README, 2026-11-23).
EMULATED_CORE_S = 204 * 2 / 192
EMULATED_CONTEXT = 4096  # tokens that these trials walked
# Gates of head_dim 256 and of several query tokens take 2 to 4 times as long as the plain ones (docs/emulation.md, Speed).
EMULATED_SLOW = 3.0

LOW, HIGH = 0.7, 1.5  # machines and builds differ: seconds are given as a range


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedKey:
    """What a sweep would do for one key.

    Attributes:
        pool: feasible knobs.
        default: trial 0.
        trials: that count in the end, at most.
        stored: of them, already in the database for this environment.
        patience: trials without a gain after which the key stops before that; equal to ``trials`` when it never does.
    """

    key: Key
    pool: int
    default: Knobs
    trials: int
    stored: int
    patience: int

    @property
    def remaining(self) -> int:
        """Trials still to run, at most."""
        return max(0, self.trials - self.stored)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "key": self.key.to_dict(),
            "pool": self.pool,
            "default": knobs_to_dict(self.default),
            "trials": self.trials,
            "stored": self.stored,
            "remaining": self.remaining,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep would do.

    Attributes:
        evidence: ``measured`` or ``emulated``.
        builders: processes that compile, and emulate.
        seconds: least and most that it would take; the least has every key stop for want of gains.
        stored_note: why stored trials could not be counted; empty when they were.
    """

    target: Target
    evidence: str
    effort: str
    sampler: str
    robust: str | None
    budget_s: float | None
    builders: int
    keys: tuple[PlannedKey, ...]
    seconds: tuple[float, float]
    stored_note: str = ""

    @property
    def remaining(self) -> int:
        """Trials still to run, at most."""
        return sum(planned.remaining for planned in self.keys)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": PLAN_SCHEMA,
            "dry_run": True,
            "target": self.target.to_dict(),
            "evidence": self.evidence,
            "effort": self.effort,
            "sampler": self.sampler,
            "robust": self.robust,
            "budget_s": self.budget_s,
            "trials": sum(planned.trials for planned in self.keys),
            "stored": sum(planned.stored for planned in self.keys),
            "remaining": self.remaining,
            "seconds": {"low": round(self.seconds[0], 1), "high": round(self.seconds[1], 1)},
            "stored_note": self.stored_note,
            "keys": [planned.to_dict() for planned in self.keys],
        }


def plan(options: SweepOptions, database: DatabasePlace) -> SweepPlan:
    """What a sweep of these options would do with this database, which need not exist.

    Raises:
        UnsupportedProblemError: no knobs compute a problem on the target.
        DatabaseError: the file is no config database.
    """
    evidence = "measured" if options.target.vendor == "nvidia" else "emulated"
    counts, note = (
        ([0] * len(options.keys), "") if options.fresh else stored_trials(options, database)
    )
    effort = EFFORTS[options.effort]
    limit = trial_limit(options.effort, evidence, options.trials)
    keys = []
    for key, stored in zip(options.keys, counts, strict=True):
        space = search_space(key.problem, key.workload, options.target)
        trials = min(limit, len(space.pool))
        whole = len(space.pool) <= effort.whole_pool or options.sampler == "brute"
        keys.append(
            PlannedKey(
                key=key,
                pool=len(space.pool),
                default=space.default,
                trials=trials,
                stored=min(stored, trials),
                patience=trials if whole else min(trials, effort.patience[evidence] + 1),
            )
        )
    builders = builders_of(evidence)
    return SweepPlan(
        target=options.target,
        evidence=evidence,
        effort=options.effort,
        sampler=options.sampler,
        robust=options.robust,
        budget_s=options.budget_s,
        builders=builders,
        keys=tuple(keys),
        seconds=estimate_seconds(keys, evidence, builders, options.budget_s),
        stored_note=note,
    )


def builders_of(evidence: str) -> int:
    """Worker processes that compile, as :func:`patune.tuner.workbench.standard_workbench` has them."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_BUILDERS, cores - 1)) if evidence == "measured" else cores


def stored_trials(options: SweepOptions, database: DatabasePlace) -> tuple[list[int], str]:
    """Per key the trials that count already, and why they could not be counted (else empty). Reads only."""
    from patune.configs.readonly import found_schema
    from patune.configs.store import Store
    from patune.environment import current_environment

    none = [0] * len(options.keys)
    if not found_schema(database):
        return none, ""
    try:
        store = Store.read(database)
    except DatabaseError:
        return none, "the database has an older schema: its trials are not counted here"
    with store:
        environment = current_environment(options.target)
        stored = [
            store.trials(
                target=options.target,
                problem=key.problem,
                workload=key.workload,
                environment=environment,
            )
            for key in options.keys
        ]
    return [
        len({trial.knobs for trial in trials if trial.source not in NO_TRIALS}) for trials in stored
    ], ""


def estimate_seconds(
    keys: Sequence[PlannedKey], evidence: str, builders: int, budget_s: float | None = None
) -> tuple[float, float]:
    """Least and most seconds of a sweep of these keys."""
    least = {planned: min(planned.remaining, planned.patience) for planned in keys}
    most = {planned: planned.remaining for planned in keys}
    one = _measured_s if evidence == "measured" else _emulated_s
    low = LOW * one(least, builders, shared=True)
    high = HIGH * one(most, builders, shared=False)
    if budget_s is not None:  # finals come on top of it
        high = min(high, budget_s + HIGH * len(keys) * FINALS_S)
        low = min(low, high)
    return low, high


def _measured_s(trials: dict[PlannedKey, int], builders: int, *, shared: bool) -> float:
    """One device, with builds beside it. ``shared``: keys of a problem try the same knobs, builds hide behind the device or it behind them."""
    if not any(trials.values()):
        return 0.0
    distinct = _distinct(trials, max if shared else sum)
    device = READ_CEILING_S + GATE_S * distinct
    for planned, count in trials.items():
        device += count * _clock_s(planned.key.problem, planned.key.workload)
        device += FINALS_S if count else 0.0
    builds = BUILDS_CPU_S * len({p.key.problem for p, count in trials.items() if count}) / builders
    return max(device, builds) if shared else device + builds


def _clock_s(problem: Problem, workload: Workload) -> float:
    """Timing one trial: as good as constant until one step takes longer than a graph of many."""
    step_s = workload.kv_bytes(problem) / READ_B_PER_S
    return CLOCK_S + REPLAYS_PER_TRIAL * max(0.0, step_s - GRAPH_S)


def _emulated_s(trials: dict[PlannedKey, int], builders: int, *, shared: bool) -> float:
    """All cores compile, gate and count. ``shared``: many splits walk a long context, which then takes hardly longer than a short one."""
    seconds = sum(
        count * (1.0 if shared else _emulated_weight(planned.key))
        for planned, count in trials.items()
    )
    return seconds * EMULATED_CORE_S / builders


def _emulated_weight(key: Key) -> float:
    """How much longer a trial can take than those that the figure is from.

    A single split walks the whole context: in proportion to it. With 38 splits of 32768 tokens a trial took 1.4 times as long (3 trials
    in 11 s, of 4096 tokens in 8 s; 2 cores, 2026-11-22).
    """
    weight = max(1.0, key.workload.context / EMULATED_CONTEXT)
    slow = key.problem.query_length > 1 or key.problem.head_dim > 128
    return weight * (EMULATED_SLOW if slow else 1.0)


def _distinct(trials: dict[PlannedKey, int], of_a_problem: Callable[[Iterable[int]], int]) -> int:
    """Pairs of problem and knobs that are built and gated."""
    by_problem: dict[Problem, list[int]] = defaultdict(list)
    for planned, count in trials.items():
        by_problem[planned.key.problem].append(count)
    return sum(of_a_problem(counts) for counts in by_problem.values())
