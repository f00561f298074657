"""The state of one key during a sweep: its search, what was tried, and what is remembered across keys."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patune.tuner.search import KeySearch, SearchSpace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from patune.configs.store import StoredTrial
    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.target import Target
    from patune.trial import TrialResult
    from patune.tuner.progress import Key

FINAL_SOURCE = "final"  # a finalist's second measurement
FOREIGN_SOURCES = (FINAL_SOURCE, "pack")  # not trials of a search: measured again, or elsewhere
NEIGHBOUR_SEEDS = 3
# Verdicts on the build or the gate, which know nothing of the workload: other keys of the problem need not repeat them.
SETTLED = ("compile_error", "out_of_resources", "spills", "wrong", "nonfinite", "unstable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A recorded trial."""

    trial_id: int
    result: TrialResult


@dataclass(slots=True, kw_only=True, eq=False)
class KeyState:
    """One key of the sweep.

    Attributes:
        incumbent: knobs of the standing winner.
        trials: by knobs, the latest of each.
        builds: knobs that made a build first, by (digest, splits): what else runs the same machine code on the same grid is a duplicate.
        in_flight: suggestions without a result.
        exhausted: nothing is left to ask for.
    """

    key: Key
    space: SearchSpace
    search: KeySearch
    incumbent: Knobs | None
    trials: dict[Knobs, Ended]
    builds: dict[tuple[str, int], Knobs] = field(default_factory=dict)
    in_flight: int = 0
    exhausted: bool = False

    @property
    def passed(self) -> dict[Knobs, TrialResult]:
        """Results with evidence."""
        return {knobs: ended.result for knobs, ended in self.trials.items() if ended.result.ok}

    @property
    def best_score(self) -> float | None:
        """Of the trials so far."""
        return self.search.best[0] if self.search.best else None


class Memory:
    """What trials of one key say about the same problem and knobs under another workload."""

    def __init__(self) -> None:
        self._broken: dict[tuple[Problem, Knobs], TrialResult] = {}
        self._passed: dict[tuple[Problem, Knobs], tuple[int, float | None]] = {}

    def learn(self, problem: Problem, knobs: Knobs, result: TrialResult) -> None:
        """Remember a result."""
        if result.ok:
            self._passed[problem, knobs] = result.gate_cases, result.error_rms
        elif result.status in SETTLED:
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
    target: Target,
    winners: Sequence[Winner],
    stored: Iterable[StoredTrial],
    sampler: str,
    seed: int,
    limit: int,
) -> KeyState:
    """A key as earlier runs left it.

    Args:
        key: what is tuned.
        space: what may be tried for it.
        target: whose winner is the incumbent.
        winners: everything that is served: the key's own is the incumbent, near ones are seeds.
        stored: the key's trials in this environment.
        sampler: name of the sampler.
        seed: of the sampler.
        limit: trials, the stored ones included.
    """
    mine = (target, key.problem, key.workload)
    incumbent = next((w.knobs for w in winners if w.key == mine), None)
    trials = {
        t.knobs: Ended(trial_id=t.id, result=t.result)
        for t in stored
        if t.source not in FOREIGN_SOURCES
    }
    seeds = [("incumbent", incumbent)] if incumbent else []
    near = sorted((d, i) for i, w in enumerate(winners) if (d := distance(key, w)) is not None)
    knobs_nearby = dict.fromkeys(winners[i].knobs for _, i in near)
    seeds += [("neighbour", knobs) for knobs in list(knobs_nearby)[:NEIGHBOUR_SEEDS]]
    search = KeySearch(
        space,
        sampler=sampler,
        seed=seed,
        limit=limit,
        seeds=seeds,
        history=[(knobs, ended.result) for knobs, ended in trials.items()],
    )
    return KeyState(key=key, space=space, search=search, incumbent=incumbent, trials=trials)


def distance(key: Key, winner: Winner) -> float | None:
    """How far a winner's key is, in doublings; None for the key itself, and for problems that differ in more than one field."""
    mine, theirs = key.problem.to_dict(), winner.problem.to_dict()
    differing = [name for name in mine if mine[name] != theirs[name]]
    if len(differing) > 1 or (not differing and winner.workload == key.workload):
        return None
    steps = abs(math.log2(key.workload.walks / winner.workload.walks))
    steps += abs(math.log2(key.workload.context / winner.workload.context))
    return steps + 2.0 * len(differing)
