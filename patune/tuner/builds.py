"""What the compile farm does: a problem's pool ahead of the device, or in the emulator one suggestion at a time."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

from patune.trial import TrialResult
from patune.tuner import tasks
from patune.tuner.jobs import Job
from patune.tuner.precheck import Precheck, build_of, difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.tuner.crew import Outcome
    from patune.tuner.key_state import KeyState, Memory
    from patune.tuner.precheck import Rejection
    from patune.tuner.recorder import Recorder
    from patune.tuner.search import Suggestion


class Client(Protocol):
    """Who is told what became of the builds of suggestions."""

    def built(
        self, state: KeyState, suggestion: Suggestion, facts: dict[str, Any] | None, seconds: float
    ) -> None:
        """It may be evaluated."""
        ...

    def rejected(self, state: KeyState, suggestion: Suggestion, result: TrialResult) -> None:
        """It ends here."""
        ...


class Builds(Protocol):
    """Either way to build."""

    def want(self, state: KeyState, suggestion: Suggestion) -> None:
        """Have a suggestion built; the client hears of it, at once when the build is known."""
        ...

    def next_job(self) -> Job | None:
        """What to compile next."""
        ...

    def handle(self, job: Job, outcome: Outcome) -> None:
        """Take in what became of a job."""
        ...

    def is_ready(self, problem: Problem) -> bool:
        """Whether keys of the problem may be searched."""
        ...


def _once_more(job: Job, outcome: Outcome) -> Job | None:
    """The job again when its compiler died for the first time: somebody else may have killed it, for want of memory for example."""
    if outcome.kind != "crash" or job.fault:
        return None
    return dataclasses.replace(job, fault=outcome.reason)


class AheadBuilds:
    """Every build of a problem once, before its search: defaults and seeds of all problems first, then pool by pool.

    Args:
        states: problem by problem.
        recorder: takes what is rejected.
        client: hears of suggestions.
    """

    def __init__(self, states: Sequence[KeyState], recorder: Recorder, client: Client) -> None:
        self._recorder, self._client = recorder, client
        self._states: dict[Problem, list[KeyState]] = {}
        for state in states:
            self._states.setdefault(state.key.problem, []).append(state)
        self._prechecks = {p: _precheck(mine) for p, mine in self._states.items()}
        self._waiting: dict[tuple[Problem, Knobs], list[tuple[KeyState, Suggestion]]] = (
            collections.defaultdict(list)
        )
        self._again: collections.deque[Job] = collections.deque()
        for problem, precheck in self._prechecks.items():
            for rejection in precheck.inherited():
                self._discard(problem, rejection)

    def want(self, state: KeyState, suggestion: Suggestion) -> None:
        """Have a suggestion built, unless its build is known."""
        problem, knobs = state.key.problem, suggestion.knobs
        precheck = self._prechecks[problem]
        precheck.add(knobs)
        if precheck.knows(knobs):
            self._pass_on(precheck, state, suggestion, 0.0)
        else:
            self._waiting[problem, build_of(knobs)].append((state, suggestion))

    def next_job(self) -> Job | None:
        """Urgent builds of all problems first; none where no key is searched any more."""
        if self._again:
            return self._again.popleft()
        for urgent in (True, False):
            for problem, precheck in self._prechecks.items():
                searched = any(not state.stopped for state in self._states[problem])
                knobs = precheck.next(urgent=urgent) if searched else None
                if knobs is not None:
                    state = self._states[problem][0]
                    return Job(stage="precheck", state=state, precheck=precheck, build=knobs)
        return None

    def handle(self, job: Job, outcome: Outcome) -> None:
        """Take a build's verdict in: for the pools of all keys, in the database once."""
        assert job.precheck is not None
        assert job.state is not None
        assert job.build is not None
        if (again := _once_more(job, outcome)) is not None:
            self._again.append(again)
            return
        problem = job.state.key.problem
        verdict = tasks.answer_of(outcome, "build")
        rejections = job.precheck.settle(job.build, verdict, outcome.seconds)
        waiting = self._waiting.pop((problem, build_of(job.build)), [])
        for state, suggestion in waiting:
            self._pass_on(job.precheck, state, suggestion, outcome.seconds)
        for rejection in rejections:
            self._reject(problem, rejection)

    def is_ready(self, problem: Problem) -> bool:
        """Every build of the pool has its verdict."""
        return self._prechecks[problem].done

    def _pass_on(
        self, precheck: Precheck, state: KeyState, suggestion: Suggestion, seconds: float
    ) -> None:
        result = precheck.rejection(suggestion.knobs)
        is_default = suggestion.knobs == state.space.default
        if result is None or (result.status == "duplicate" and is_default):
            self._client.built(state, suggestion, precheck.facts(suggestion.knobs), seconds)
        else:
            self._client.rejected(state, suggestion, result)

    def _reject(self, problem: Problem, rejection: Rejection) -> None:
        """Take knobs out of every pool; the record is with the key that is searched first."""
        self._discard(problem, rejection)
        states = self._states[problem]
        first = next((state for state in states if not state.stopped), states[0])
        if not any(knobs in first.rejected for knobs in rejection.knobs):
            named = (k for k in rejection.knobs if k != first.space.default)
            knobs = (
                next(named, None) if rejection.result.status == "duplicate" else rejection.knobs[0]
            )
            if knobs is not None and knobs not in first.trials:
                self._recorder.reject(first, knobs, rejection.result)

    def _discard(self, problem: Problem, rejection: Rejection) -> None:
        for knobs in rejection.knobs:
            for state in self._states[problem]:
                if knobs == state.incumbent:
                    state.incumbent_build = rejection.result
                # a default is measured even where another key's default is the same code
                if rejection.result.status != "duplicate" or knobs != state.space.default:
                    state.search.discard(knobs)


def _precheck(states: Sequence[KeyState]) -> Precheck:
    """The builds of one problem's keys."""
    first = [state.space.default for state in states]
    first += [state.incumbent for state in states if state.incumbent is not None]
    pool = dict.fromkeys(knobs for state in states for knobs in state.space.pool)
    broken = {build: result for state in states for build, result in state.broken.items()}
    return Precheck([k for k in first if states[0].space.feasible(k) is None], pool, broken)


class LazyBuilds:
    """Builds of suggestions as they come, for targets whose builds take as long as their evaluation."""

    def __init__(self, memory: Memory, client: Client) -> None:
        self._memory, self._client = memory, client
        self._queue: collections.deque[Job] = collections.deque()

    def want(self, state: KeyState, suggestion: Suggestion) -> None:
        """Queue the build."""
        self._queue.append(Job(stage="build", state=state, suggestion=suggestion))

    def next_job(self) -> Job | None:
        """In the order of asking."""
        return self._queue.popleft() if self._queue else None

    def handle(self, job: Job, outcome: Outcome) -> None:
        """Reject the suggestion, or pass it on."""
        if (again := _once_more(job, outcome)) is not None:
            self._queue.append(again)
            return
        state, suggestion = job.trial
        knobs = suggestion.knobs
        build, seconds = tasks.answer_of(outcome, "build"), outcome.seconds
        facts = build.get("facts")
        if build["status"] != "ok":
            result = TrialResult(
                status=build["status"], reason=build["reason"], facts=facts, seconds=seconds
            )
            self._memory.learn(state.key.problem, knobs, result)
            self._client.rejected(state, suggestion, result)
            return
        first = state.builds.setdefault((build["digest"], knobs.num_splits), knobs)
        if first == knobs or knobs == state.space.default:  # a report needs the default's own
            self._client.built(state, suggestion, facts, seconds)
            return
        reason = f"same machine code and grid as {difference(first, knobs)}"
        result = TrialResult(status="duplicate", reason=reason, facts=facts, seconds=seconds)
        self._client.rejected(state, suggestion, result)

    def is_ready(self, problem: Problem) -> bool:
        """Always: nothing is built ahead."""
        return True
