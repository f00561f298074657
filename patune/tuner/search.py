"""The search of one key: an in-memory Optuna study that is asked for knobs and told what became of them.

Nothing is stored here. The study is rebuilt from the config store's trials, which costs 6 ms per 100 trials (2026-11).
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from patune.errors import InvalidValueError, reject
from patune.kernels.space import REDUCE_KNOBS
from patune.tuner.model_sampler import ModelSampler
from patune.tuner.pool_sampler import LocalSampler, PoolSampler, WholePoolSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from optuna.distributions import BaseDistribution

    from patune.kernels.knobs import Knobs
    from patune.trial import TrialResult
    from patune.tuner.lessons import Guide
    from patune.tuner.model import PoolModel

optuna.logging.set_verbosity(optuna.logging.WARNING)

SamplerName = Literal["model", "local", "tpe", "gp", "random", "brute"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
POOL_SAMPLERS = ("model", "local", "brute")  # never leave the pool
GAIN_SHARE = 0.003  # a smaller improvement is noise: two measurements of one configuration differ by 0.1 to 0.4 % (H200, 2026-11-22)
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
        source: ``default``, one of the seeds' (``incumbent``, ``candidate``, ``neighbour``), or the sampler's name.
        infeasible: why they cannot work (only tpe, gp and random leave the pool), or empty.
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
        sampler: one of SAMPLERS: ``model`` and ``local`` search the pool, ``brute`` goes through it, ``tpe``, ``gp`` and ``random`` are Optuna's.
        seed: the same seed and results give the same proposals.
        limit: trials in all, those of ``history`` included.
        patience: trials in a row without a gain that is more than noise, after which it is over; 0 is never.
        whole_pool: a pool of no more than this is tried to its end, whatever the patience says.
        seeds: (source, knobs) to try after the default.
        history: earlier trials of the key, to be learned from and not repeated.
        guide: what the model sampler begins with; None is nothing.
        searches: whether anything but the default, the seeds and the history is proposed.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        sampler: str,
        seed: int,
        limit: int,
        patience: int = 0,
        whole_pool: int = 0,
        seeds: Iterable[tuple[str, Knobs]] = (),
        history: Iterable[tuple[Knobs, TrialResult]] = (),
        guide: Guide | None = None,
        searches: bool = True,
    ) -> None:
        wanted = [("default", space.default), *((s, canonical(k)) for s, k in seeds)]
        wanted = [(s, k) for s, k in wanted if space.feasible(k) is None]
        past = list(history)
        self._space = space
        self._seed = seed
        self._pool = list(dict.fromkeys([*space.pool, *(k for _, k in wanted)]))
        self._members = tuple(self._pool)  # as the sampler counts them
        self._choices = _spanned(space.choices, [*self._pool, *(k for k, _ in past)])
        self._distributions = _distributions(self._choices)
        self._sampler_name = sampler
        self._guide = guide
        self._sampler = self._new_sampler()
        self._study = optuna.create_study(direction="minimize", sampler=self._sampler)
        self._patience, self._whole_pool, self._idle = patience, whole_pool, 0
        self._searches = searches
        self._open: dict[int, tuple[optuna.Trial, Knobs]] = {}
        self._waiting = 0  # of the default and the seeds
        self._seen: set[Knobs] = set()
        self._best: tuple[float, Knobs] | None = None
        self.asked = 0
        # earlier trials count as asked, also of knobs that have left the pool since (blocked ones)
        reachable = len({*self._pool, *(knobs for knobs, _ in past)})
        self.limit = limit if sampler not in POOL_SAMPLERS else min(limit, reachable)
        for knobs, result in past:
            self._restore(knobs, result)
        self._queue(wanted)

    @property
    def best(self) -> tuple[float, Knobs] | None:
        """Score and knobs of the best trial so far."""
        return self._best

    @property
    def why_stopped(self) -> str:
        """``trials``: the limit is reached; ``patience``: nothing gets better; ``pool``: nothing is left; empty while it goes on."""
        if self._seen.issuperset(self._pool):
            return "pool"
        if self.asked >= self.limit:
            return "trials"
        if self._waiting:
            return ""
        if not self._searches:
            return "pool"
        large = len(self._pool) > self._whole_pool
        return "patience" if self._patience and large and self._idle >= self._patience else ""

    def ask(self) -> Suggestion | None:
        """What to try next, or None when it is over (see :attr:`why_stopped`)."""
        if self.why_stopped:
            return None
        trial, knobs = self._ask_fresh()
        source = trial.user_attrs.get(SOURCE, self._sampler_name)
        self._waiting -= SOURCE in trial.user_attrs
        self._seen.add(knobs)
        self._open[trial.number] = trial, knobs
        self.asked += 1
        return Suggestion(
            number=trial.number,
            knobs=knobs,
            source=source,
            infeasible=self._space.feasible(knobs) or "",
        )

    def discard(self, knobs: Knobs) -> None:
        """Take knobs out of the pool that something else has settled: their build, or another key's trial.

        A suggestion of them that is open is no trial then and must not be told; nothing happens to knobs that were told.
        """
        number = next((n for n, (_, k) in self._open.items() if k == knobs), None)
        if number is not None:
            trial, _ = self._open.pop(number)
            self._study.tell(trial, state=TrialState.FAIL)
            self.asked -= 1
        elif knobs in self._seen:
            return
        self._seen.add(knobs)
        if knobs in self._pool:
            self._pool.remove(knobs)
        if isinstance(self._sampler, PoolSampler):
            self._sampler.drop(self._params(knobs))

    def tell(self, suggestion: Suggestion, result: TrialResult) -> None:
        """What became of a suggestion."""
        trial, knobs = self._open.pop(suggestion.number)
        if result.score is None:
            if result.status != "duplicate":
                trial.set_constraint(BROKEN, 1.0)
            # not FAIL: TPE forgets those, and proposes them again
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, result.score)
        self._note_score(knobs, result)

    def _new_sampler(self) -> optuna.samplers.BaseSampler:
        pooled: dict[str, Any] = {
            "pool": [self._params(k) for k in self._members],
            "choices": self._choices,
            "seed": self._seed,
            "canonical": lambda params: self._params(canonical(self._knobs(params))),
        }
        match self._sampler_name:
            case "model":
                return ModelSampler(**pooled, model=self._model)
            case "local":
                return LocalSampler(**pooled)
            case "brute":
                return WholePoolSampler(**pooled)
            case "tpe":
                return optuna.samplers.TPESampler(seed=self._seed)
            case "random":
                return optuna.samplers.RandomSampler(seed=self._seed)
            case "gp":
                return _gp_sampler(self._seed)
        raise reject("sampler", self._sampler_name, SAMPLERS)

    def _model(self) -> PoolModel | None:
        return None if self._guide is None else self._guide.model(self._members)

    def _params(self, knobs: Knobs) -> dict[str, Any]:
        return {name: getattr(knobs, name) for name in self._choices}

    def _knobs(self, params: Mapping[str, Any]) -> Knobs:
        return dataclasses.replace(self._space.default, **params)

    def _queue(self, wanted: Iterable[tuple[str, Knobs]]) -> None:
        queued = set(self._seen)
        for source, knobs in wanted:
            if knobs not in queued:
                queued.add(knobs)
                self._waiting += 1
                self._study.enqueue_trial(self._params(knobs), user_attrs={SOURCE: source})

    def _ask_fresh(self) -> tuple[optuna.Trial, Knobs]:
        for _ in range(ASK_AGAIN_LIMIT):
            trial = self._study.ask(self._distributions)
            knobs = canonical(self._knobs(trial.params))
            if knobs not in self._seen:
                return trial, knobs
            self._waiting -= (
                SOURCE in trial.user_attrs
            )  # a seed that its build has settled meanwhile
            self._study.tell(trial, state=TrialState.FAIL)  # a repeat, which says nothing new
        free = [k for k in self._pool if k not in self._seen]
        knobs = random.Random(f"{self._seed}/{self.asked}").choice(free)
        self._study.enqueue_trial(self._params(knobs))
        return self._study.ask(self._distributions), knobs

    def _restore(self, knobs: Knobs, result: TrialResult) -> None:
        if knobs in self._seen:
            return
        ok = result.score is not None
        self._study.add_trial(
            create_trial(
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
        """Keep the best ok result, and count how long nothing was better than it by more than noise."""
        score = result.score if result.ok else None
        gained = score is not None and (
            self._best is None or score < self._best[0] * (1.0 - GAIN_SHARE)
        )
        self._idle = 0 if gained else self._idle + 1
        if score is not None and (self._best is None or score < self._best[0]):
            self._best = score, knobs


def _gp_sampler(seed: int) -> optuna.samplers.BaseSampler:
    try:
        return optuna.samplers.GPSampler(seed=seed)
    except ImportError as error:
        raise InvalidValueError(
            f"sampler='gp' needs scipy, which is not here ({error}); install it (pip install scipy), or choose another: {', '.join(SAMPLERS)}."
        ) from error


def _distributions(choices: Mapping[str, Sequence[Any]]) -> dict[str, BaseDistribution]:
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
