"""The state of one key during a sweep: its search, what was tried, and what is remembered across keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patune.trial import TrialResult
from patune.tuner.precheck import build_of
from patune.tuner.progress import PRECHECK_SOURCE, UNTRIED_SOURCES
from patune.tuner.search import KeySearch, SearchSpace, canonical
from patune.tuner.tasks import ran_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from patune.configs.store import StoredTrial
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.tuner.lessons import Guide
    from patune.tuner.progress import Key

FINAL_SOURCE = "final"  # a finalist's second measurement
FOREIGN_SOURCES = (
    FINAL_SOURCE,
    "pack",
    "robust",
)  # not trials of a search; what an import took in is `pack`
# What proves that knobs must not be served: a time limit, a full device or an unknown error do not.
FAILING = (
    *("infeasible", "compile_error", "out_of_resources", "spills", "wrong", "nonfinite", "flaky"),
    *("launch_error", "illegal_access", "crash"),
)
# Verdicts on the build or the gate, which know nothing of the workload: other keys of the problem need not repeat them.
SETTLED = (
    *("compile_error", "compile_timeout", "out_of_resources", "spills"),
    *("wrong", "nonfinite", "flaky"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A recorded trial."""

    trial_id: int
    result: TrialResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """How the keys of a sweep are searched.

    Attributes:
        limit: trials per key, those of earlier runs included.
        patience: trials without a gain after which a key stops.
        whole_pool: pools up to this size are tried whole.
        finalists: that are timed again besides the default and the incumbent.
        searches: whether anything but the default and the seeds is tried.
    """

    sampler: str
    limit: int
    patience: int
    whole_pool: int
    finalists: int
    searches: bool


@dataclass(slots=True, kw_only=True, eq=False)
class KeyState:
    """One key of the sweep.

    Attributes:
        space: without what is blocked.
        incumbent: knobs of the standing winner, as the search spells them.
        trials: that count, by knobs, the latest of each.
        rejected: what the precheck or another key's verdict ended before a trial, as far as it is recorded for this key.
        broken: builds that earlier runs rejected.
        incumbent_build: why the build of the incumbent was rejected, where the record of it is with another key.
        builds: knobs that made a build first, by (digest, splits): what else runs the same machine code on the same grid is a duplicate.
        timed: finalists, as they were timed in turns.
        opened: its first trial, the default, was asked for.
        in_flight: suggestions without a result.
        paused: nothing to ask for until one of those ends: a rejected build leaves room for another trial.
        stopped: why its search ended; empty while it goes on.
        deadline: monotonic time at which its share of the budget ends.
        out_of_memory: fewest splits that ran out of device memory.
        ending: its finalists are being timed.
        ended: its winner is decided.
    """

    key: Key
    space: SearchSpace
    search: KeySearch
    incumbent: Knobs | None
    trials: dict[Knobs, Ended]
    rejected: dict[Knobs, Ended] = field(default_factory=dict)
    broken: dict[Knobs, TrialResult] = field(default_factory=dict)
    incumbent_build: TrialResult | None = None
    builds: dict[tuple[str, int], Knobs] = field(default_factory=dict)
    timed: dict[Knobs, Ended] = field(default_factory=dict)
    opened: bool = False
    in_flight: int = 0
    paused: bool = False
    stopped: str = ""
    deadline: float | None = None
    out_of_memory: int | None = None
    ending: bool = False
    ended: bool = False

    @property
    def passed(self) -> dict[Knobs, TrialResult]:
        """Results that can win."""
        return {knobs: ended.result for knobs, ended in self.trials.items() if ended.result.ok}

    @property
    def scores(self) -> dict[Knobs, float]:
        """Scores of the trials that have one."""
        scores = {knobs: ended.result.score for knobs, ended in self.trials.items()}
        return {knobs: score for knobs, score in scores.items() if score is not None}

    @property
    def best_score(self) -> float | None:
        """Of the trials so far."""
        return self.search.best[0] if self.search.best else None

    @property
    def default(self) -> Ended | None:
        """What became of the default."""
        return self.trials.get(self.space.default) or self.rejected.get(self.space.default)

    @property
    def default_score(self) -> float | None:
        """Of the default, when it passed."""
        return self.default.result.score if self.default else None

    @property
    def incumbent_result(self) -> TrialResult | None:
        """What became of the standing winner's knobs in this environment; None when they were not tried, and where there are none."""
        if self.incumbent is None:
            return None
        ended = self.trials.get(self.incumbent) or self.rejected.get(self.incumbent)
        if ended is not None:
            return ended.result
        if reason := self.space.feasible(self.incumbent):
            return TrialResult(status="infeasible", reason=reason)
        return self.incumbent_build or self.broken.get(build_of(self.incumbent))

    def ask_limit(self) -> int:
        """Trials that it will have when nothing stops it early."""
        return self.search.asked if self.stopped else max(self.search.limit, self.search.asked)

    def too_large(self, knobs: Knobs) -> TrialResult | None:
        """Why knobs need not be tried: fewer splits, which share a smaller workspace, ran out of device memory."""
        if self.out_of_memory is None or knobs.num_splits <= self.out_of_memory:
            return None
        return TrialResult(
            status="out_of_resources",
            reason=f"not tried: num_splits={self.out_of_memory} ran out of device memory",
        )

    def learn(self, knobs: Knobs, result: TrialResult) -> None:
        """Remember what a trial says about this key's others."""
        if ran_out_of_memory(result):
            self.out_of_memory = min(knobs.num_splits, self.out_of_memory or knobs.num_splits)


class Memory:
    """What trials of one key say about the same problem and knobs under another workload."""

    def __init__(self) -> None:
        self._broken: dict[tuple[Problem, Knobs], TrialResult] = {}
        self._passed: dict[tuple[Problem, Knobs], tuple[int, float | None]] = {}

    def learn(self, problem: Problem, knobs: Knobs, result: TrialResult) -> None:
        """Remember a result."""
        if result.score is not None:
            self._passed[problem, knobs] = result.gate_cases, result.error_rms
        elif result.status in SETTLED and not ran_out_of_memory(result):
            self._broken[problem, knobs] = result

    def block(self, problem: Problem, knobs: Knobs, result: TrialResult) -> None:
        """Remember a fault that was confirmed."""
        self._broken[problem, knobs] = result

    def broken(self, problem: Problem, knobs: Knobs) -> TrialResult | None:
        """The verdict of another key's trial that holds here too."""
        known = self._broken.get((problem, knobs))
        return known and dataclasses.replace(known, seconds=0.0)

    def passed(self, problem: Problem, knobs: Knobs) -> tuple[int, float | None] | None:
        """Gate cases and worst error, when another key's trial passed the gate."""
        return self._passed.get((problem, knobs))


def open_key(
    key: Key,
    space: SearchSpace,
    *,
    plan: SearchPlan,
    seed: int,
    seeds: Sequence[tuple[str, Knobs]] = (),
    stored: Iterable[StoredTrial] = (),
    blocked: Mapping[Knobs, TrialResult] | None = None,
    guide: Guide | None = None,
) -> KeyState:
    """A key as earlier runs left it.

    Args:
        key: what is tuned.
        space: what may be tried for it.
        plan: how it is searched.
        seed: of the sampler.
        seeds: (source, knobs) to try after the default; the source of the standing winner is ``incumbent``.
        stored: the key's trials in this environment.
        blocked: knobs that brought the device down, and what they did: never tried again.
        guide: what other keys have shown.
    """
    space = without(space, blocked or {})
    if not plan.searches:
        wanted = dict.fromkeys([space.default, *(knobs for _, knobs in seeds)])
        pool = [knobs for knobs in wanted if space.feasible(knobs) is None]
        space = dataclasses.replace(space, pool=pool)
    trials, rejected, broken = _sorted_out(stored)
    incumbent = next((canonical(knobs) for source, knobs in seeds if source == "incumbent"), None)
    limit = plan.limit
    if incumbent is not None and incumbent not in trials | rejected:
        # it has its trial, however many others there are: else nobody knows whether it still holds
        limit = max(limit, len({*trials, space.default, incumbent}))
    search = KeySearch(
        space,
        sampler=plan.sampler,
        seed=seed,
        limit=limit,
        patience=plan.patience,
        whole_pool=plan.whole_pool,
        seeds=seeds,
        history=[(knobs, ended.result) for knobs, ended in trials.items()],
        guide=guide,
        searches=plan.searches,
    )
    state = KeyState(
        key=key,
        space=space,
        search=search,
        incumbent=incumbent,
        trials=trials,
        rejected=rejected,
        broken=broken,
        opened=bool(trials) or space.default in rejected,
    )
    for knobs, ended in trials.items():
        state.learn(knobs, ended.result)
    for knobs in list(space.pool):
        if knobs in rejected or (knobs not in trials and build_of(knobs) in broken):
            search.discard(knobs)
    return state


def _sorted_out(
    stored: Iterable[StoredTrial],
) -> tuple[dict[Knobs, Ended], dict[Knobs, Ended], dict[Knobs, TrialResult]]:
    """Trials that count, knobs that were rejected without one, and the builds that this was for; the newest record speaks for its knobs."""
    trials: dict[Knobs, Ended] = {}
    rejected: dict[Knobs, Ended] = {}
    broken: dict[Knobs, TrialResult] = {}
    for trial in stored:
        if trial.source in FOREIGN_SOURCES:
            continue
        for known in (trials, rejected):
            known.pop(trial.knobs, None)
        ended = Ended(trial_id=trial.id, result=trial.result)
        (rejected if trial.source in UNTRIED_SOURCES else trials)[trial.knobs] = ended
        if trial.source == PRECHECK_SOURCE and trial.result.status != "duplicate":
            broken[build_of(trial.knobs)] = trial.result
    return trials, rejected, broken


def fails(result: TrialResult) -> bool:
    """Whether a result proves that its knobs must not be served."""
    return result.status in FAILING and not ran_out_of_memory(result)


def without(space: SearchSpace, blocked: Mapping[Knobs, TrialResult]) -> SearchSpace:
    """The space without blocked knobs, which have their reason for not being feasible."""
    if not blocked:
        return space

    def feasible(knobs: Knobs) -> str | None:
        if knobs in blocked:
            return f"blocked: {blocked[knobs].status}: {blocked[knobs].reason}"
        return space.feasible(knobs)

    pool = [knobs for knobs in space.pool if knobs not in blocked]
    return dataclasses.replace(space, pool=pool, feasible=feasible)
