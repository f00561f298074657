"""The search of one key: an in-memory Optuna study that is asked for knobs and told what became of them.

Nothing is stored here. The study is rebuilt from the config store's trials, which costs 6 ms per 100 trials (2026-11).
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from patune.kernels.space import REDUCE_KNOBS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import optuna
    from optuna.distributions import BaseDistribution

    from patune.kernels.knobs import Knobs
    from patune.trial import TrialResult

SamplerName = Literal["pool", "tpe", "random"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
ASK_AGAIN_LIMIT = (
    20  # repeats of tpe and random in a row before a random unmeasured member is taken
)
BROKEN = "broken"  # name of the constraint that a failed trial violates
SOURCE = "source"  # user attribute of an enqueued trial


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What a key's search may propose.

    Attributes:
        pool: every feasible value once.
        choices: values per knob, ascending.
        default: trial 0.
        feasible: why knobs cannot work, or None.
    """

    pool: Sequence[Knobs]
    choices: Mapping[str, Sequence[Any]]
    default: Knobs
    feasible: Callable[[Knobs], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Knobs to try next.

    Attributes:
        number: of the study's trial.
        source: ``default``, ``incumbent``, ``neighbour`` or ``search``.
        infeasible: why they cannot work (only the tpe and random samplers leave the pool), or empty.
    """

    number: int
    knobs: Knobs
    source: str
    infeasible: str = ""


def canonical(knobs: Knobs) -> Knobs:
    """The spelling that the pool uses: knobs of the reduce kernel at their default where it does not run."""
    if not knobs.one_shot:
        return knobs
    idle: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(knobs) if f.name in REDUCE_KNOBS
    }
    return dataclasses.replace(knobs, **idle)


class KeySearch:
    """Proposes the default first, then the seeds, then what the sampler says, without repetition.

    Args:
        space: what may be proposed.
        sampler: ``pool`` (local search over the pool), or Optuna's ``tpe`` or ``random``.
        seed: the same seed and results give the same proposals.
        limit: trials in all, those of ``history`` included.
        seeds: (source, knobs) to try after the default.
        history: earlier trials of the key, to be learned from and not repeated.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        sampler: str,
        seed: int,
        limit: int,
        seeds: Iterable[tuple[str, Knobs]] = (),
        history: Iterable[tuple[Knobs, TrialResult]] = (),
    ) -> None:
        wanted = [("default", space.default), *((s, canonical(k)) for s, k in seeds)]
        wanted = [(s, k) for s, k in wanted if space.feasible(k) is None]
        past = list(history)
        self._space = space
        self._seed = seed
        self._pool = list(dict.fromkeys([*space.pool, *(k for _, k in wanted)]))
        self._choices = _spanned(space.choices, [*self._pool, *(k for k, _ in past)])
        self._distributions = _distributions(self._choices)
        self._study = self._new_study(sampler)
        self._open: dict[int, tuple[optuna.Trial, Knobs]] = {}
        self._seen: set[Knobs] = set()
        self._best: tuple[float, Knobs] | None = None
        self.asked = 0
        self.limit = limit if sampler != "pool" else min(limit, len(self._pool))
        for knobs, result in past:
            self._restore(knobs, result)
        self._queue(wanted)

    @property
    def best(self) -> tuple[float, Knobs] | None:
        """Score and knobs of the best trial so far."""
        return self._best

    def ask(self) -> Suggestion | None:
        """What to try next, or None when the limit is reached or there is nothing left to try."""
        if self.asked >= self.limit or self._seen.issuperset(self._pool):
            return None
        trial, knobs = self._ask_fresh()
        self._seen.add(knobs)
        self._open[trial.number] = trial, knobs
        self.asked += 1
        return Suggestion(
            number=trial.number,
            knobs=knobs,
            source=trial.user_attrs.get(SOURCE, "search"),
            infeasible=self._space.feasible(knobs) or "",
        )

    def tell(self, suggestion: Suggestion, result: TrialResult) -> None:
        """What became of a suggestion."""
        from optuna.trial import TrialState

        trial, knobs = self._open.pop(suggestion.number)
        if result.score is None:
            if result.status != "duplicate":
                trial.set_constraint(BROKEN, 1.0)
            # not FAIL: TPE forgets those, and proposes them again
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, result.score)
        self._note_score(knobs, result)

    def _new_study(self, sampler: str) -> optuna.Study:
        import optuna

        from patune.tuner.pool_sampler import PoolSampler

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        make: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
            "pool": lambda: PoolSampler(
                [self._params(k) for k in self._pool],
                self._choices,
                seed=self._seed,
                canonical=lambda params: self._params(canonical(self._knobs(params))),
            ),
            "tpe": lambda: optuna.samplers.TPESampler(seed=self._seed),
            "random": lambda: optuna.samplers.RandomSampler(seed=self._seed),
        }
        return optuna.create_study(direction="minimize", sampler=make[sampler]())

    def _params(self, knobs: Knobs) -> dict[str, Any]:
        return {name: getattr(knobs, name) for name in self._choices}

    def _knobs(self, params: Mapping[str, Any]) -> Knobs:
        return dataclasses.replace(self._space.default, **params)

    def _queue(self, wanted: Iterable[tuple[str, Knobs]]) -> None:
        queued = set(self._seen)
        for source, knobs in wanted:
            if knobs not in queued:
                queued.add(knobs)
                self._study.enqueue_trial(self._params(knobs), user_attrs={SOURCE: source})

    def _ask_fresh(self) -> tuple[optuna.Trial, Knobs]:
        from optuna.trial import TrialState

        for _ in range(ASK_AGAIN_LIMIT):
            trial = self._study.ask(self._distributions)
            knobs = canonical(self._knobs(trial.params))
            if knobs not in self._seen:
                return trial, knobs
            self._study.tell(trial, state=TrialState.FAIL)  # a repeat, which says nothing new
        free = [k for k in self._pool if k not in self._seen]
        knobs = random.Random(f"{self._seed}/{self.asked}").choice(free)
        self._study.enqueue_trial(self._params(knobs))
        return self._study.ask(self._distributions), knobs

    def _restore(self, knobs: Knobs, result: TrialResult) -> None:
        import optuna
        from optuna.trial import TrialState

        if knobs in self._seen:
            return
        ok = result.score is not None
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if ok else TrialState.PRUNED,
                value=result.score,
                params=self._params(knobs),
                distributions=self._distributions,
                constraints=None if ok or result.status == "duplicate" else {BROKEN: 1.0},
            )
        )
        self._seen.add(knobs)
        self.asked += 1
        self._note_score(knobs, result)

    def _note_score(self, knobs: Knobs, result: TrialResult) -> None:
        if result.score is not None and (self._best is None or result.score < self._best[0]):
            self._best = result.score, knobs


def _distributions(choices: Mapping[str, Sequence[Any]]) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution

    return {name: CategoricalDistribution(values) for name, values in choices.items()}


def _spanned(
    choices: Mapping[str, Sequence[Any]], members: Iterable[Knobs]
) -> dict[str, tuple[Any, ...]]:
    """The choices, and whatever else a member has, ascending."""
    values = {name: set(given) for name, given in choices.items()}
    for knobs in members:
        for name, known in values.items():
            known.add(getattr(knobs, name))
    return {name: tuple(sorted(known)) for name, known in values.items()}
