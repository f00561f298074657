"""Runs cases: each is compiled in a worker process, then its correctness gate is emulated there, or run on the GPU.

Rows come in the order of the cases, each as soon as those before it are known. A case that kills its worker or hangs costs its own row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from patune.tuner import check_tasks, tasks
from patune.tuner.check_cases import select_cases
from patune.tuner.check_rows import CheckReport, CheckRow, make_row
from patune.tuner.crew import PRELOAD, Crew, first_done

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from patune.tuner.check_cases import CheckCase, CheckOptions
    from patune.tuner.crew import Outcome, Ticket

BUILDS_AHEAD = 2  # per worker: more would only delay the first rows
POLL_S = 0.5  # how late Ctrl-C is seen


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def run_checks(
    cases: Sequence[CheckCase],
    *,
    jobs: int | None = None,
    gate: bool = True,
    on_device: bool = False,
    worker_tasks: Mapping[str, str] | None = None,
    preload: Sequence[str] = PRELOAD,
) -> Generator[CheckRow]:
    """The row of every case, in order.

    Args:
        cases: such as those of :func:`patune.tuner.check_cases.select_cases`.
        jobs: worker processes; None is one per CPU.
        gate: False stops after the static facts on every AMD target.
        on_device: gate NVIDIA cases, whose target has to be the GPU of this process; else they stop after the static facts.
        worker_tasks: ``build`` and ``gate`` as ``module:function``; the real ones when None.
        preload: modules that worker processes find imported.

    Raises:
        WorkerStartError: workers die before they can take a task.
    """
    runnable = sum(not case.infeasible for case in cases)
    size = max(1, min(jobs or cpu_count(), runnable))
    with contextlib.ExitStack() as stack:

        def crew_of(workers: int) -> Crew:
            return stack.enter_context(
                Crew(workers, tasks=worker_tasks or check_tasks.TASKS, preload=preload)
            )

        builders = crew_of(size)
        gates = {"amd": builders} if gate else {}
        if on_device:
            gates["nvidia"] = crew_of(1)  # a gate that hangs must not slow down another's
        yield from _Checker(cases, builders, gates).rows()


def check(
    options: CheckOptions, *, jobs: int | None = None, notify: Callable[[CheckRow], None]
) -> CheckReport:
    """Check everything that the options name.

    Args:
        options: what to check.
        jobs: worker processes; None is one per CPU.
        notify: called with every row as it comes, in the caller's thread.

    Raises:
        WorkerStartError: workers die before they can take a task.
    """
    from patune.environment import current_environment

    started = time.monotonic()
    rows = []
    with contextlib.closing(run_checks(select_cases(options), jobs=jobs)) as running:
        for row in running:
            rows.append(row)
            notify(row)
    return CheckReport(
        options=options,
        environments={target.arch: current_environment(target) for target in options.targets},
        rows=tuple(rows),
        seconds=time.monotonic() - started,
    )


class _Checker:
    """Where each case stands.

    Builds are judged in the order of the cases, so that the first of several identical ones is always the one that is gated.

    Args:
        cases: in the order of the rows.
        builders: compile.
        gates: by vendor, who runs the gate of its targets; the others end after the static facts.
    """

    def __init__(
        self, cases: Sequence[CheckCase], builders: Crew, gates: Mapping[str, Crew]
    ) -> None:
        self._cases, self._builders, self._gates = cases, builders, gates
        self._crews = list(dict.fromkeys([builders, *gates.values()]))
        self._tickets: dict[Ticket, int] = {}
        self._builds: dict[int, dict[str, Any]] = {}  # built, not judged yet
        self._facts: dict[int, dict[str, Any] | None] = {}
        self._first: dict[str, int] = {}  # identity -> the case that is gated for all
        self._equals: dict[int, int] = {}
        self._rows: dict[int, CheckRow] = {}
        self._submitted = self._judged = 0

    def rows(self) -> Iterator[CheckRow]:
        """All rows."""
        for index in range(len(self._cases)):
            while (row := self._finished(index)) is None:
                self._submit_builds()
                self._judge_builds()
                if index not in self._rows and index not in self._equals:
                    done = first_done(self._crews, POLL_S)
                    if done is not None:
                        self._take(*done)
            yield row

    def _finished(self, index: int) -> CheckRow | None:
        if index in self._equals:
            self._rows[index] = self._identical(index, self._rows[self._equals[index]])
        return self._rows.get(index)

    def _submit_builds(self) -> None:
        """Keep the workers busy, and no more: rows should come while later cases are still to be built."""
        while self._submitted < len(self._cases):
            if self._submitted - self._judged >= BUILDS_AHEAD * self._builders.size:
                return
            case = self._cases[self._submitted]
            if case.infeasible:
                self._builds[self._submitted] = {"status": "infeasible", "reason": case.infeasible}
            else:
                ticket = self._builders.submit("build", case.to_dict(), tasks.BUILD_LIMIT_S)
                self._tickets[ticket] = self._submitted
            self._submitted += 1

    def _judge_builds(self) -> None:
        while (build := self._builds.pop(self._judged, None)) is not None:
            self._judge(self._judged, build)
            self._judged += 1

    def _judge(self, index: int, build: dict[str, Any]) -> None:
        """End the case, or find the one that speaks for it, or send it to the gate."""
        case = self._cases[index]
        facts = self._facts[index] = build.get("facts")
        if build["status"] != "ok":
            self._rows[index] = make_row(
                index + 1, case, build["status"], reason=build["reason"], facts=facts
            )
            return
        first = self._first.setdefault(build["identity"], index)
        if first != index:
            self._equals[index] = first
        elif (crew := self._gates.get(case.target.vendor)) is not None:
            ticket = crew.submit("gate", case.to_dict(), tasks.gate_limit_s(case.target))
            self._tickets[ticket] = index
        else:
            self._rows[index] = make_row(index + 1, case, "static_ok", facts=facts)

    def _take(self, ticket: Ticket, outcome: Outcome) -> None:
        index = self._tickets.pop(ticket)
        answer = tasks.answer_of(outcome, ticket.task)
        if ticket.task == "build":
            self._builds[index] = answer
        else:
            facts = self._facts[index]
            self._rows[index] = make_row(index + 1, self._cases[index], facts=facts, **answer)

    def _identical(self, index: int, first: CheckRow) -> CheckRow:
        verdict = "" if first.outcome == "passed" else f": {first.status}"
        row = make_row(
            index + 1,
            self._cases[index],
            "identical",
            reason=f"same build as {first.label} (row {first.number}){verdict}",
            same_as=first.number,
            facts=self._facts[index],
            gate_cases=first.gate_cases,
            error_rms=first.error_rms,
        )
        return dataclasses.replace(row, outcome=first.outcome)
