"""A sweep: options in, winners in the store, a report out."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import NoUsableGpuError, reject
from patune.kernels.knobs import knobs_to_dict
from patune.record import check_int, check_number, check_text, digest
from patune.tuner.finals import choose_finalists, choose_winner
from patune.tuner.key_state import open_key
from patune.tuner.progress import (
    Key,
    KeyEnded,
    KeyReport,
    Note,
    SweepEvent,
    SweepReport,
    SweepStarted,
)
from patune.tuner.search import SAMPLERS
from patune.tuner.workbench import search_space, standard_workbench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from patune.configs.store import Store
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.tuner.coordinator import Coordinator
    from patune.tuner.key_state import KeyState
    from patune.tuner.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """What to tune, and for how long.

    Attributes:
        problems, workloads: the keys are their product.
        trials: per key; those of earlier runs in the same environment count.
        budget_s: stop asking for trials after this many seconds; None is no limit. The final measurements come on top.
        seed: of the search.
        sampler: ``pool``, ``tpe`` or ``random``.
        command: recorded with the run.

    Raises:
        InvalidValueError: a value is outside of what is allowed.
    """

    target: Target
    problems: tuple[Problem, ...]
    workloads: tuple[Workload, ...]
    trials: int
    budget_s: float | None = None
    seed: int = 0
    sampler: str = "pool"
    command: str = "patune sweep"

    def __post_init__(self) -> None:
        check_int("trials", self.trials, low=1)
        check_int("seed", self.seed, low=0)
        check_text("command", self.command)
        if self.budget_s is not None:
            check_number("budget_s", self.budget_s, low=0.0)
        if self.sampler not in SAMPLERS:
            raise reject("sampler", self.sampler, SAMPLERS)
        if not self.keys:
            raise reject("keys", (), "at least one problem and one workload")

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every problem under every workload."""
        return tuple(
            Key(problem=problem, workload=workload)
            for problem in dict.fromkeys(self.problems)
            for workload in dict.fromkeys(self.workloads)
        )


class _Interrupt:
    """Ctrl-C as a flag: a transaction is never torn. The second one raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.seen = False
        self._before: Any = signal.SIG_DFL

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch, in the main thread; elsewhere Python gets no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = signal.signal(signal.SIGINT, self._on_signal) or signal.SIG_DFL
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._before)


def plan_sweep(options: SweepOptions) -> list[dict[str, Any]]:
    """What a sweep would try, without running or writing anything: per key its pool, its default knobs and its trials.

    Raises:
        UnsupportedProblemError: no knobs compute a problem on the target.
    """
    plan = []
    for key in options.keys:
        space = search_space(key.problem, key.workload, options.target)
        planned = options.trials
        if options.sampler == "pool":
            planned = min(planned, len(space.pool))
        plan.append(
            {
                "key": key.to_dict(),
                "pool": len(space.pool),
                "default": knobs_to_dict(space.default),
                "trials": planned,
            }
        )
    return plan


def run_sweep(
    options: SweepOptions,
    store: Store,
    notify: Callable[[SweepEvent], None],
    workbench: Workbench | None = None,
) -> SweepReport:
    """Tune every key, store every trial as it ends, promote the winners.

    Ctrl-C and the end of the budget stop the search; what was found by then is promoted.

    Args:
        options: what to tune.
        store: takes the trials and winners.
        notify: called with every event, in the caller's thread.
        workbench: tools other than the target's own.

    Raises:
        NoUsableGpuError: the target has to be measured and its device is not here, or stopped working during the sweep.
        UnsupportedProblemError: no knobs compute a problem on the target.
    """
    from patune.tuner.coordinator import Coordinator

    started = time.monotonic()
    workbench = workbench or standard_workbench(options.target)
    states = _open_keys(options, store, workbench)
    run_id = _begin(options, store, workbench, notify)
    coordinator = Coordinator(
        states,
        target=options.target,
        workbench=workbench,
        store=store,
        run_id=run_id,
        notify=notify,
    )
    interrupt = _Interrupt()
    with coordinator, interrupt.watched():
        _search(coordinator, interrupt, options, started, notify)
        reports = tuple(_end_key(state, coordinator, interrupt, store, notify) for state in states)
    store.end_run(run_id)
    _check_device(coordinator, options)
    return SweepReport(
        target=options.target,
        evidence=workbench.evidence,
        environment=workbench.environment,
        read_ceiling_gb_s=coordinator.ceiling_gb_s,
        interrupted=interrupt.seen,
        seconds=time.monotonic() - started,
        trials=coordinator.recorded,
        keys=reports,
    )


def _open_keys(options: SweepOptions, store: Store, workbench: Workbench) -> Sequence[KeyState]:
    winners = store.winners(arch=options.target.arch)
    states = []
    for key in options.keys:
        stored = store.trials(
            target=options.target,
            problem=key.problem,
            workload=key.workload,
            environment=workbench.environment,
        )
        states.append(
            open_key(
                key,
                workbench.space(key.problem, key.workload),
                target=options.target,
                winners=winners,
                stored=stored,
                sampler=options.sampler,
                # a key's search does not depend on which other keys are swept
                seed=int(digest([options.seed, key.to_dict()])[:8], 16),
                limit=options.trials,
            )
        )
    return states


def _begin(
    options: SweepOptions,
    store: Store,
    workbench: Workbench,
    notify: Callable[[SweepEvent], None],
) -> int:
    """Record the run, and say that it starts."""
    run_id = store.begin_run(
        target=options.target,
        environment=workbench.environment,
        sampler=options.sampler,
        seed=options.seed,
        command=options.command,
    )
    notify(
        SweepStarted(
            keys=options.keys,
            trials_per_key=options.trials,
            target=options.target,
            evidence=workbench.evidence,
        )
    )
    return run_id


def _check_device(coordinator: Coordinator, options: SweepOptions) -> None:
    if coordinator.device_error:
        raise NoUsableGpuError(
            f"{options.target.device_name} stopped working during the sweep: {coordinator.device_error}. The "
            f"{coordinator.recorded} trials before that are stored. Check the device (nvidia-smi), then run the same command: it goes on "
            "where this one ended."
        )


def _search(
    coordinator: Coordinator,
    interrupt: _Interrupt,
    options: SweepOptions,
    started: float,
    notify: Callable[[SweepEvent], None],
) -> None:
    end = float("inf") if options.budget_s is None else started + options.budget_s
    try:
        coordinator.search(lambda: interrupt.seen or time.monotonic() > end)
    except KeyboardInterrupt:  # raised by notify, or in a thread's stead
        interrupt.seen = True
    if interrupt.seen:
        notify(Note(text="Interrupted: keeping the best of every key so far."))
    elif time.monotonic() > end:
        notify(Note(text=f"The budget of {options.budget_s:g} s is used up."))


def _end_key(
    state: KeyState,
    coordinator: Coordinator,
    interrupt: _Interrupt,
    store: Store,
    notify: Callable[[SweepEvent], None],
) -> KeyReport:
    """Measure the finalists again where that is possible, promote the winner."""
    default = state.space.default
    ended = dict(state.trials)
    passed = state.passed
    finalists = choose_finalists(passed, default, state.incumbent)
    can_time = coordinator.ceiling_gb_s is not None and not coordinator.device_error
    if can_time and len(finalists) > 1 and not interrupt.seen:
        timed = coordinator.retime(state, finalists, lambda: interrupt.seen)
        ended |= timed
        if timed:
            passed = {knobs: end.result for knobs, end in timed.items()}
    knobs = choose_winner(passed, default, state.incumbent)
    winner = None
    if knobs is not None:
        baseline = ended.get(default)
        winner = store.promote(
            ended[knobs].trial_id, default_trial_id=baseline.trial_id if baseline else None
        )
    failures = Counter(t.result.status for t in state.trials.values() if not t.result.ok)
    report = KeyReport(
        key=state.key,
        winner=winner,
        default_knobs=default,
        default=ended[default].result if default in ended else None,
        trials=len(state.trials),
        failures=dict(sorted(failures.items())),
    )
    notify(KeyEnded(report=report))
    return report
