"""The one process that asks the search, feeds the workers and writes the database.

A trial goes ``ask -> build -> evaluate -> record``. Any step may end it, and every end is recorded in its own transaction.
On a device, builders run ahead on the CPU so that the device always finds the next trial compiled.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.kernels.knobs import knobs_to_dict
from patune.trial import Timing, TrialResult
from patune.tuner import tasks
from patune.tuner.crew import Crew, first_done
from patune.tuner.key_state import FINAL_SOURCE, Ended, Memory
from patune.tuner.progress import Note, TrialEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from patune.configs.store import Store
    from patune.kernels.knobs import Knobs
    from patune.target import Target
    from patune.tuner.crew import Outcome, Ticket
    from patune.tuner.key_state import KeyState
    from patune.tuner.progress import SweepEvent
    from patune.tuner.search import Suggestion
    from patune.tuner.workbench import Workbench

POLL_S = 0.2  # how late Ctrl-C or the end of the budget is seen
KEY_AHEAD = 8  # suggestions of one key in flight: batches of 8 cost the search 0 to 4 % (replayed on brute-forced kernels, 2026-11)
BUILD_AHEAD = 2  # suggestions in flight per builder of a device
CANARY_TRIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A suggestion on its way through the stages.

    Attributes:
        stage: ``build``, ``evaluate``, or for the device itself ``read_ceiling`` and ``canary``.
        facts: of its builds, once there are any.
    """

    stage: str
    state: KeyState | None = None
    suggestion: Suggestion | None = None
    facts: dict[str, Any] | None = None
    seconds: float = 0.0


class Coordinator:
    """Runs the trials of a sweep; a context manager that owns the worker processes.

    Args:
        states: the keys.
        run_id: of the store's run that the trials belong to.

    Attributes:
        ceiling_gb_s: read bandwidth of the device, once it is measured.
        device_error: why the device is not used any more, or empty.
        recorded: trials recorded so far; finalists that are timed again are no new trials.
    """

    def __init__(
        self,
        states: Sequence[KeyState],
        *,
        target: Target,
        workbench: Workbench,
        store: Store,
        run_id: int,
        notify: Callable[[SweepEvent], None],
    ) -> None:
        self._states, self._target, self._workbench = states, target, workbench
        self._store, self._run_id, self._notify = store, run_id, notify
        self.ceiling_gb_s: float | None = None
        self.device_error = ""
        self.recorded = 0
        self._done = sum(state.search.asked for state in states)
        self._total = sum(max(state.search.limit, state.search.asked) for state in states)
        self._jobs: dict[Ticket, Job] = {}
        self._ready: list[Job] = []
        self._canaries = 0
        self._memory = Memory()
        for state in states:
            for knobs, ended in state.trials.items():
                self._memory.learn(state.key.problem, knobs, ended.result)
        self._farm = self._crew(workbench.builders)
        self._device = self._crew(1) if workbench.measured else self._farm
        self._crews = list(dict.fromkeys([self._farm, self._device]))

    def _crew(self, size: int) -> Crew:
        return Crew(size, tasks=self._workbench.tasks, preload=self._workbench.preload)

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        for crew in self._crews:
            crew.close()

    def search(self, stop: Callable[[], bool]) -> None:
        """Run trials until every key reached its limit, ``stop`` says so, or the device is lost; then drop what still runs."""
        if self._workbench.measured:
            self._submit(Job(stage="read_ceiling"))
        try:
            while not stop() and not self.device_error:
                self._fill()
                done = first_done(self._crews, POLL_S)
                if done is not None:
                    self._handle(*done)
                elif not self._jobs:
                    return
        finally:
            self._jobs.clear()
            self._ready.clear()
            for crew in self._crews:
                crew.cancel()

    def retime(
        self, state: KeyState, finalists: Sequence[Knobs], stop: Callable[[], bool]
    ) -> dict[Knobs, Ended]:
        """Time finalists in turns and record that; empty when it did not work out."""
        payload = {
            "target": self._target.to_dict(),
            "problem": state.key.problem.to_dict(),
            "workload": state.key.workload.to_dict(),
            "knobs": [knobs_to_dict(knobs) for knobs in finalists],
            "ceiling_gb_s": self.ceiling_gb_s,
        }
        self._device.submit("retime", payload, tasks.RETIME_LIMIT_S)
        while (done := self._device.next_done(POLL_S)) is None:
            if stop():
                self._device.cancel()
                return {}
        outcome = done[1]
        if outcome.kind != "ok":
            self._note(f"The finalists could not be timed again: {outcome.reason}")
            return {}
        timed = {}
        for knobs, timing in zip(finalists, outcome.result, strict=True):
            before = state.trials[knobs].result
            result = dataclasses.replace(before, timing=Timing.from_dict(timing))
            timed[knobs] = self._write(state, knobs, result, FINAL_SOURCE)
        return timed

    def _fill(self) -> None:
        """Ask for suggestions while there are workers for them; the key with the fewest trials first."""
        ahead = self._farm.size * BUILD_AHEAD if self._workbench.measured else self._farm.size + 1
        while sum(state.in_flight for state in self._states) < ahead:
            open_states = [s for s in self._states if not s.exhausted and s.in_flight < KEY_AHEAD]
            if not open_states:
                break
            state = min(open_states, key=lambda s: s.search.asked)
            suggestion = state.search.ask()
            if suggestion is None:
                state.exhausted = True
            else:
                self._begin(state, suggestion)
        self._feed()

    def _begin(self, state: KeyState, suggestion: Suggestion) -> None:
        state.in_flight += 1
        if suggestion.infeasible:
            result = TrialResult(status="infeasible", reason=suggestion.infeasible)
            self._record(state, suggestion, result)
        elif not self._settle(state, suggestion):
            self._submit(Job(stage="build", state=state, suggestion=suggestion))

    def _settle(self, state: KeyState, suggestion: Suggestion) -> bool:
        """Record a trial whose fate another key's trial has decided."""
        known = self._memory.broken(state.key.problem, suggestion.knobs)
        if known is not None:
            self._record(state, suggestion, known)
        return known is not None

    def _feed(self) -> None:
        """Start evaluations where there are workers for them."""
        if not self._workbench.measured:
            while self._ready and len(self._farm.in_flight) < self._farm.size:
                self._evaluate_next()
        elif self._device.in_flight or self.ceiling_gb_s is None or self.device_error:
            return
        elif self._canaries:
            self._submit_canary()
        else:
            while self._ready and not self._device.in_flight:
                self._evaluate_next()

    def _evaluate_next(self) -> None:
        """The oldest suggestion first: defaults before everything else."""
        job = min(self._ready, key=lambda j: j.suggestion.number if j.suggestion else 0)
        self._ready.remove(job)
        assert job.state is not None
        assert job.suggestion is not None
        if not self._settle(job.state, job.suggestion):
            self._submit(job)

    def _submit(self, job: Job) -> None:
        if job.stage == "read_ceiling":
            ticket = self._device.submit("read_ceiling", None, tasks.CEILING_LIMIT_S)
        elif job.stage == "build":
            payload = self._request(job).to_dict()
            ticket = self._farm.submit("build", payload, tasks.BUILD_LIMIT_S)
        else:
            measured = self._workbench.measured
            limit_s = tasks.DEVICE_LIMIT_S if measured else tasks.EMULATE_LIMIT_S
            ticket = self._device.submit("evaluate", self._request(job).to_dict(), limit_s)
        self._jobs[ticket] = job

    def _request(self, job: Job) -> tasks.TrialRequest:
        assert job.state is not None
        assert job.suggestion is not None
        key, knobs = job.state.key, job.suggestion.knobs
        canary = job.stage == "canary"
        return tasks.TrialRequest(
            target=self._target,
            problem=key.problem,
            workload=key.workload,
            knobs=knobs,
            facts=job.facts,
            passed=None if canary else self._memory.passed(key.problem, knobs),
            incumbent_us=job.state.best_score if self._workbench.measured else None,
            ceiling_gb_s=self.ceiling_gb_s,
        )

    def _handle(self, ticket: Ticket, outcome: Outcome) -> None:
        job = self._jobs.pop(ticket)
        if job.stage == "read_ceiling":
            self._handle_ceiling(outcome)
        elif job.stage == "canary":
            self._handle_canary(outcome)
        elif job.stage == "build":
            self._handle_build(job, outcome)
        else:
            self._handle_evaluation(job, outcome)

    def _handle_build(self, job: Job, outcome: Outcome) -> None:
        state, suggestion = job.state, job.suggestion
        assert state is not None
        assert suggestion is not None
        if outcome.kind != "ok":
            self._record(state, suggestion, tasks.result_of(outcome, "build"))
            return
        build, seconds = outcome.result, outcome.seconds
        if build["status"] != "ok":
            result = TrialResult(
                status=build["status"],
                reason=build["reason"],
                facts=build["facts"],
                seconds=seconds,
            )
            self._memory.learn(state.key.problem, suggestion.knobs, result)
            self._record(state, suggestion, result)
            return
        facts = build["facts"]
        same = (build["digest"], suggestion.knobs.num_splits)
        first = state.builds.setdefault(same, suggestion.knobs)
        if first != suggestion.knobs:
            result = TrialResult(
                status="duplicate",
                reason=f"same machine code and grid as {_difference(first, suggestion.knobs)}",
                facts=facts,
                seconds=seconds,
            )
            self._record(state, suggestion, result)
            return
        self._ready.append(dataclasses.replace(job, stage="evaluate", facts=facts, seconds=seconds))
        self._feed()

    def _handle_evaluation(self, job: Job, outcome: Outcome) -> None:
        state, suggestion = job.state, job.suggestion
        assert state is not None
        assert suggestion is not None
        if outcome.kind == "ok":
            result = TrialResult.from_dict(outcome.result)
        else:
            result = tasks.result_of(outcome, "evaluate")
            if self._workbench.measured and (outcome.kind != "error" or outcome.poisoned):
                self._canaries = CANARY_TRIES
        self._memory.learn(state.key.problem, suggestion.knobs, result)
        self._feed()  # before the database: the device must not wait for it
        facts = result.facts or job.facts
        seconds = result.seconds + job.seconds
        self._record(state, suggestion, dataclasses.replace(result, facts=facts, seconds=seconds))

    def _handle_ceiling(self, outcome: Outcome) -> None:
        if outcome.kind == "ok":
            self._canaries = 0
            if self.ceiling_gb_s is None:
                self.ceiling_gb_s = outcome.result
                self._note(f"Read bandwidth of this device: {outcome.result:.0f} GB/s.")
        else:
            self._lose_canary(f"the read-only kernel failed ({outcome.reason})")
        self._feed()

    def _submit_canary(self) -> None:
        """Known good work: default knobs that passed before, else the read-only kernel."""
        for state in self._states:
            ended = state.trials.get(state.space.default)
            if ended is not None and ended.result.ok:
                from patune.tuner.search import Suggestion

                known_good = Suggestion(number=-1, knobs=state.space.default, source="canary")
                self._submit(Job(stage="canary", state=state, suggestion=known_good))
                return
        self._submit(Job(stage="read_ceiling"))

    def _handle_canary(self, outcome: Outcome) -> None:
        if outcome.kind == "ok" and outcome.result["status"] == "ok":
            self._canaries = 0
        else:
            reason = outcome.reason or outcome.result["reason"]
            self._lose_canary(f"default knobs that had passed failed ({reason})")
        self._feed()

    def _lose_canary(self, what: str) -> None:
        self._canaries = (self._canaries or CANARY_TRIES) - 1
        if self._canaries:
            self._note(f"The device may be lost: {what}. Trying once more.")
            if self.ceiling_gb_s is None:
                self._submit(Job(stage="read_ceiling"))
        else:
            self.device_error = what

    def _record(self, state: KeyState, suggestion: Suggestion, result: TrialResult) -> None:
        """Store a trial's end and let the search know."""
        knobs = suggestion.knobs
        state.trials[knobs] = self._write(state, knobs, result, suggestion.source)
        self.recorded += 1
        state.search.tell(suggestion, result)
        state.in_flight -= 1
        self._done += 1
        self._notify(
            TrialEnded(
                key=state.key,
                knobs=knobs,
                result=result,
                source=suggestion.source,
                best=state.best_score,
                done=self._done,
                total=self._total,
            )
        )

    def _write(self, state: KeyState, knobs: Knobs, result: TrialResult, source: str) -> Ended:
        trial_id = self._store.record_trial(
            self._run_id,
            problem=state.key.problem,
            workload=state.key.workload,
            knobs=knobs,
            result=result,
            source=source,
        )
        return Ended(trial_id=trial_id, result=result)

    def _note(self, text: str) -> None:
        self._notify(Note(text=text))


def _difference(first: Knobs, second: Knobs) -> str:
    """The knobs of ``first`` that ``second`` has otherwise."""
    mine, theirs = first.to_dict(), second.to_dict()
    return ", ".join(f"{name}={mine[name]}" for name in mine if mine[name] != theirs[name])
