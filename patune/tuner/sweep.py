"""A sweep: options in, winners in the store, a report out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from patune.errors import NoUsableGpuError
from patune.record import digest
from patune.tuner.interrupts import Interrupt
from patune.tuner.key_state import open_key
from patune.tuner.lessons import Guide, Lesson, shipped_lessons, stored_lessons
from patune.tuner.options import SweepOptions
from patune.tuner.progress import Note, SweepEvent, SweepReport, SweepStarted
from patune.tuner.seeds import NEIGHBOUR_SEEDS, PACKED_SEEDS, seeds_for
from patune.tuner.workbench import standard_workbench

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.configs.store import Store
    from patune.tuner.coordinator import Coordinator
    from patune.tuner.key_state import KeyState, SearchPlan
    from patune.tuner.progress import RobustReport
    from patune.tuner.workbench import Workbench

__all__ = ["SweepOptions", "run_sweep"]


def run_sweep(
    options: SweepOptions,
    store: Store,
    notify: Callable[[SweepEvent], None],
    workbench: Workbench | None = None,
) -> SweepReport:
    """Tune every key, store every trial as it ends, promote a key's winner as soon as its search is over.

    Ctrl-C, SIGTERM and the end of the budget stop the search; what was found by then is promoted.

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
    from patune.tuner.ending import Ending
    from patune.tuner.recorder import Recorder

    began = time.monotonic()
    workbench = workbench or standard_workbench(options.target)
    plan = options.plan(workbench.evidence)
    states = _open_keys(options, plan, store, workbench)
    run_id = _begin(options, plan, store, workbench, notify)
    recorder = Recorder(
        states,
        store=store,
        run_id=run_id,
        notify=notify,
    )
    ending = Ending(
        store=store,
        recorder=recorder,
        notify=notify,
        finalists=plan.finalists,
        target=options.target,
        evidence=workbench.evidence,
    )
    coordinator = Coordinator(
        states,
        target=options.target,
        workbench=workbench,
        recorder=recorder,
        ending=ending,
        robust=options.robust,
        began=began,
        budget_s=options.budget_s,
    )
    interrupt = Interrupt()
    with interrupt.watched():  # also while the workers are stopped and the run is closed
        with coordinator:
            _run(coordinator, interrupt, notify)
            robust = _store_robust(coordinator, options, store, workbench)
        store.end_run(run_id)
    _check_device(coordinator, options, recorder.recorded)
    now = time.monotonic()
    return SweepReport(
        target=options.target,
        evidence=workbench.evidence,
        environment=workbench.environment,
        read_ceiling_gb_s=coordinator.ceiling_gb_s,
        interrupted=interrupt.seen,
        terminated=interrupt.terminated,
        seconds=now - began,
        trials=recorder.recorded,
        keys=tuple(ending.reports[state] for state in states),
        robust=robust,
        device_busy=coordinator.busy.report(now) if workbench.measured else None,
    )


def _open_keys(
    options: SweepOptions, plan: SearchPlan, store: Store, workbench: Workbench
) -> list[KeyState]:
    target, environment = options.target, workbench.environment
    winners = store.winners(arch=target.arch)
    states: list[KeyState] = []
    lessons = _lessons(options, store, workbench, states)
    for key in options.keys:
        problem, workload = key.problem, key.workload
        candidates = [
            *store.candidates(arch=target.arch, problem=problem, workload=workload),
            *workbench.candidates(problem, workload),
        ]
        stored = store.trials(
            target=target, problem=problem, workload=workload, environment=environment
        )
        states.append(
            open_key(
                key,
                workbench.space(key.problem, key.workload),
                plan=plan,
                # a key's search does not depend on which other keys are swept
                seed=int(digest([options.seed, key.to_dict()])[:8], 16),
                seeds=seeds_for(
                    key,
                    target=target,
                    winners=winners,
                    candidates=candidates,
                    packed=PACKED_SEEDS if plan.searches else plan.limit,
                    neighbours=NEIGHBOUR_SEEDS if plan.searches else 0,
                ),
                stored=[] if options.fresh else stored,
                blocked=store.blocked(
                    arch=target.arch,
                    kernel_source_hash=environment.kernel_source_hash,
                    problem=key.problem,
                ),
                guide=Guide(key, target, lessons),
            )
        )
    return states


def _lessons(
    options: SweepOptions, store: Store, workbench: Workbench, states: list[KeyState]
) -> Callable[[], list[Lesson]]:
    """What keys have shown by the time that somebody asks: in this sweep, in earlier ones of this environment, in the shipped pools."""
    target = options.target
    trials = store.arch_trials(arch=target.arch, environment=workbench.environment)
    earlier = stored_lessons(target, trials, without=options.keys)
    shipped = shipped_lessons(target.arch)

    def lessons() -> list[Lesson]:
        now = [
            Lesson(target=target, key=state.key, points=tuple(scores.items()))
            for state in states
            if (scores := state.scores)
        ]
        return [*now, *earlier, *shipped]

    return lessons


def _begin(
    options: SweepOptions,
    plan: SearchPlan,
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
            trials_per_key=plan.limit,
            target=options.target,
            evidence=workbench.evidence,
        )
    )
    return run_id


def _run(
    coordinator: Coordinator, interrupt: Interrupt, notify: Callable[[SweepEvent], None]
) -> None:
    try:
        coordinator.run(lambda: interrupt.seen)
    except KeyboardInterrupt:  # raised by notify, or in a thread's stead
        interrupt.seen = True
    if interrupt.seen:
        notify(Note(text="Interrupted: keeping the best of every key so far."))
    coordinator.finish("interrupt" if interrupt.seen else "device")


def _store_robust(
    coordinator: Coordinator, options: SweepOptions, store: Store, workbench: Workbench
) -> tuple[RobustReport, ...]:
    if coordinator.robust is None:
        return ()
    reports = coordinator.robust.reports(options.target, workbench.environment)
    for report in reports:
        if report.winner is not None:
            store.put_robust(report.winner)
    return reports


def _check_device(coordinator: Coordinator, options: SweepOptions, recorded: int) -> None:
    if coordinator.device_error:
        raise NoUsableGpuError(
            f"{options.target.device_name} stopped working during the sweep: {coordinator.device_error}. The "
            f"{recorded} trials before that are stored. Check the device (nvidia-smi), then run the same command: it goes on "
            "where this one ended."
        )
