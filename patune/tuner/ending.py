"""The end of a key: who gets a second measurement, who wins, and the report about it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from patune.trial import EVIDENCE_RANK, Timing
from patune.tuner.finals import choose_finalists, choose_winner, decide
from patune.tuner.key_state import FINAL_SOURCE, fails
from patune.tuner.progress import KeyEnded, KeyReport
from patune.tuner.search import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from patune.configs.store import Store
    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs
    from patune.target import Target
    from patune.trial import TrialResult
    from patune.tuner.finals import Decision
    from patune.tuner.key_state import Ended, KeyState
    from patune.tuner.progress import SweepEvent
    from patune.tuner.recorder import Recorder

BRIEF_FINALISTS = 2  # besides the default and the incumbent, when the budget is used up
UNTRIED = "the standing winner stays: the search ended before it was tried in this environment"


class Ending:
    """Ends keys, each one as soon as its search is over: an interrupt later loses nothing of it.

    Attributes:
        reports: of the keys that ended, by state.
    """

    def __init__(
        self,
        *,
        store: Store,
        recorder: Recorder,
        notify: Callable[[SweepEvent], None],
        finalists: int,
        target: Target,
        evidence: str,
    ) -> None:
        self._store, self._recorder, self._notify = store, recorder, notify
        self._finalists, self._target, self._evidence = finalists, target, evidence
        self.reports: dict[KeyState, KeyReport] = {}

    def finalists(self, state: KeyState, *, brief: bool) -> tuple[Knobs, ...]:
        """Who is timed again; none when there is nobody to compare with."""
        count = min(self._finalists, BRIEF_FINALISTS) if brief else self._finalists
        chosen = choose_finalists(state.passed, state.space.default, state.incumbent, count)
        return tuple(chosen) if len(chosen) > 1 else ()

    def decide(
        self, state: KeyState, finalists: Sequence[Knobs], answer: Mapping[str, Any]
    ) -> None:
        """End a key whose finalists were timed in turns; ``answer`` is what the task ``retime`` returned."""
        for knobs, timing in zip(finalists, answer["timings"], strict=True):
            result = dataclasses.replace(
                state.trials[knobs].result, timing=Timing.from_dict(timing)
            )
            state.timed[knobs] = self._recorder.write(state, knobs, result, FINAL_SOURCE)
        passes = dict(zip(finalists, answer["samples"], strict=True))
        decision = decide(passes, state.space.default, state.incumbent)
        self._end(state, decision.winner, decision)

    def settle(self, state: KeyState) -> None:
        """End a key with the trials that it has."""
        self._end(state, choose_winner(state.passed, state.space.default, state.incumbent), None)

    def _end(self, state: KeyState, knobs: Knobs | None, decision: Decision | None) -> None:
        speedup = decision.speedup if decision else None
        reason = decision.reason if decision else ""
        state.ended, state.ending = True, False
        ended = state.trials | state.timed
        default = ended.get(state.space.default) or state.default
        verdict = state.incumbent_result
        winner, retired = None, ""
        if state.incumbent is not None and verdict is None:
            winner, reason, speedup = *self._untried(state, ended), None
        else:
            if verdict is not None and fails(verdict):
                retired = self._retire(state, verdict)
            if knobs is not None:
                winner = self._store.promote(
                    ended[knobs].trial_id,
                    default_trial_id=default.trial_id if default else None,
                    speedup=speedup,
                )
        every = [*state.trials.values(), *state.rejected.values()]
        failures = Counter(e.result.status for e in every if not e.result.ok)
        report = KeyReport(
            key=state.key,
            winner=winner,
            default_knobs=state.space.default,
            default=default.result if default else None,
            trials=len(state.trials),
            failures=dict(sorted(failures.items())),
            speedup=speedup,
            stopped=state.stopped,
            decision=reason,
            incumbent=verdict,
            retired=retired,
        )
        self.reports[state] = report
        self._notify(KeyEnded(report=report))

    def _standing(self, state: KeyState) -> Winner | None:
        """What is served for the key at this moment."""
        key = state.key
        return self._store.winner(target=self._target, problem=key.problem, workload=key.workload)

    def _untried(self, state: KeyState, ended: Mapping[Knobs, Ended]) -> tuple[Winner | None, str]:
        """An end before the standing winner was tried here: it stays. The default alone is no reason to drop it."""
        return (self._standing(state), UNTRIED) if ended else (None, "")

    def _retire(self, state: KeyState, verdict: TrialResult) -> str:
        """The standing winner failed here: it is not served any more, unless better evidence or another process says otherwise."""
        standing = self._standing(state)
        if (
            standing is None
            or canonical(standing.knobs) != state.incumbent
            or EVIDENCE_RANK[standing.evidence] > EVIDENCE_RANK[self._evidence]
        ):
            return ""
        reason = f"{verdict.status}: {verdict.reason}" if verdict.reason else verdict.status
        self._store.retire(
            target=self._target,
            problem=state.key.problem,
            workload=state.key.workload,
            reason=reason,
        )
        return reason
