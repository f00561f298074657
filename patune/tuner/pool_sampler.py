"""An Optuna sampler over an enumerated pool of valid parameters: Hamming-1 local search that never repeats and never leaves the pool.

With seeds it reaches the optimum of real brute-forced kernels in 20 to 50 trials, TPE 82 to 97 % of it in 100 (2026-11).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    Params = Mapping[str, Any]
    Point = tuple[Any, ...]

RANDOM_START = 1  # number of the trial that starts anywhere; trial 0 is the default
RESTART_SHARE = 0.25  # of the proposals once the best point's neighbourhood is exhausted


class PoolSampler(optuna.samplers.BaseSampler):
    """Proposes unmeasured members of a pool: a random start, then neighbours of the best, nearest values first.

    Trials that run count as taken, so several can be asked for before one is told; while nothing else is known their neighbours come next,
    not random members, most of which are bad (7 of 9 spill on gfx942). Only COMPLETE and running trials attract the search. The n-th
    proposal depends on the seed, n and the trials told, and not on what this object did before: a resumed study goes on as it would have.

    Args:
        pool: the valid parameters, without repetition; at least one.
        choices: parameter name to its values in ascending order; neighbours are near in this order.
        seed: of the random choices.
        canonical: spelling of parameters that the pool uses, where several spellings mean the same.
    """

    def __init__(
        self,
        pool: Sequence[Params],
        choices: Mapping[str, Sequence[Any]],
        *,
        seed: int,
        canonical: Callable[[Params], Params] = dict,
    ) -> None:
        self._names = tuple(choices)
        self._choices = {name: tuple(values) for name, values in choices.items()}
        self._pool: list[Point] = [self._point(params) for params in pool]
        self._index = {point: i for i, point in enumerate(self._pool)}
        assert len(self._index) == len(self._pool) > 0
        self._members: dict[Point, int | None] = dict(self._index)
        self._seed = seed
        self._canonical = canonical
        self._space: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in self._choices.items()
        }

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters, always."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next proposal.

        Raises:
            RuntimeError: every member of the pool was proposed.
        """
        taken, centres = self._history(study, trial.number)
        chance = random.Random(f"{self._seed}/{trial.number}")
        index = self._pick(taken, [] if trial.number <= RANDOM_START else centres, chance)
        return dict(zip(self._names, self._pool[index], strict=True))

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Refused: a parameter outside of the pool's would leave the pool."""
        raise RuntimeError(
            f"parameter {param_name!r} is not one of the pool's: {', '.join(self._names)}"
        )

    def _point(self, params: Params) -> Point:
        return tuple(params[name] for name in self._names)

    def _member(self, point: Point) -> int | None:
        """The member that a point spells, if any."""
        if point not in self._members:
            params = self._canonical(dict(zip(self._names, point, strict=True)))
            self._members[point] = self._index.get(self._point(params))
        return self._members[point]

    def _history(self, study: optuna.Study, current: int) -> tuple[set[int], list[int]]:
        """Members proposed so far, and those worth a look around, best first: all that have a value, else those that run."""
        sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        taken: set[int] = set()
        running: list[int] = []
        scores: dict[int, float] = {}
        for trial in study.get_trials(deepcopy=False):
            if trial.number == current or set(trial.params) != set(self._names):
                continue
            index = self._member(self._point(trial.params))
            if index is None:
                continue
            taken.add(index)
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                scores[index] = sign * trial.value
            elif trial.state == TrialState.RUNNING:
                running.append(index)
        return taken, sorted(scores, key=lambda i: (scores[i], i)) or running

    def _pick(self, taken: set[int], centres: list[int], chance: random.Random) -> int:
        free = [i for i in range(len(self._pool)) if i not in taken]
        if not free:
            raise RuntimeError(f"all {len(self._pool)} members of the pool were proposed")
        for rank, centre in enumerate(centres):
            if rank == 1 and chance.random() < RESTART_SHARE:
                break  # the best point is a local optimum
            near = [(d, j) for d, j in self._neighbours(centre) if j not in taken]
            if near:
                nearest = min(d for d, _ in near)
                return chance.choice([j for d, j in near if d == nearest])
        return chance.choice(free)

    def _neighbours(self, index: int) -> Iterator[tuple[int, int]]:
        """(steps along the changed parameter, member) for every member that differs in one parameter."""
        point = self._pool[index]
        for axis, name in enumerate(self._names):
            values = self._choices[name]
            here = values.index(point[axis])
            for step, value in enumerate(values):
                changed = (*point[:axis], value, *point[axis + 1 :])
                member = self._member(changed)
                if member is not None and member != index:
                    yield abs(step - here), member
