"""What a sweep says while it runs (events) and when it ends (reports)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import EXIT_INTERRUPTED, EXIT_NOTHING_PASSED, EXIT_OK
from patune.kernels.knobs import knobs_to_dict

if TYPE_CHECKING:
    from patune.configs.winner import RobustWinner, Speedup, Winner
    from patune.environment import Environment
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.trial import TrialResult

REPORT_SCHEMA = 1
# a build that was rejected: it speaks for all knobs that would run it
PRECHECK_SOURCE = "precheck"
KNOWN_SOURCE = "known"  # what other trials say about these knobs
UNTRIED_SOURCES = (PRECHECK_SOURCE, KNOWN_SOURCE)  # of results that are no trials
EXIT_TERMINATED = 143  # by SIGTERM, as a shell says it


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What there is one winner for on a target."""

    problem: Problem
    workload: Workload

    def to_dict(self) -> dict[str, Any]:
        """The problem's fields, and the workload."""
        return {**self.problem.to_dict(), "workload": self.workload.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """How a key ended.

    Attributes:
        winner: what serving uses from now on; None when nothing passed.
        default_knobs: trial 0.
        default: its last result; None when it was not tried.
        trials: that count for the key, those of earlier runs in the same environment included.
        failures: how many configurations ended in each status other than ``ok``, those included that were rejected unmeasured.
        speedup: default's time over the winner's, measured in turns; None without such a measurement.
        stopped: why the search ended: ``trials``, ``patience``, ``pool``, ``budget``, ``interrupt`` or ``device``.
        decision: why the winner won, for people; empty without finals.
        incumbent: what became of the knobs that were served before; None when they were not tried, and where there were none.
        retired: why those are not served any more, where they failed; else empty.
    """

    key: Key
    winner: Winner | None
    default_knobs: Knobs
    default: TrialResult | None
    trials: int
    failures: dict[str, int]
    speedup: Speedup | None = None
    stopped: str = ""
    decision: str = ""
    incumbent: TrialResult | None = None
    retired: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        default = None
        if self.default is not None:
            default = {
                "knobs": knobs_to_dict(self.default_knobs),
                "status": self.default.status,
                "reason": self.default.reason,
                "score": self.default.score,
                "timing": self.default.timing.to_dict() if self.default.timing else None,
            }
        return {
            "key": self.key.to_dict(),
            "winner": self.winner.to_dict() if self.winner else None,
            "default": default,
            "trials": self.trials,
            "failures": self.failures,
            "speedup": self.speedup.to_dict() if self.speedup else None,
            "stopped": self.stopped,
            "decision": self.decision,
            "retired": self.retired,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustReport:
    """How the search for one configuration for all workloads of a problem ended.

    Attributes:
        objective: ``worst`` or ``mean`` regret.
        winner: None when no configuration ran under every workload.
        default_score: the objective of the problem's first default; None when it did not run everywhere.
        candidates: that were compared; those given up early included.
    """

    problem: Problem
    objective: str
    workloads: tuple[Workload, ...]
    winner: RobustWinner | None
    default_score: float | None
    candidates: int

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "problem": self.problem.to_dict(),
            "objective": self.objective,
            "workloads": [workload.to_dict() for workload in self.workloads],
            "winner": self.winner.to_dict() if self.winner else None,
            "default_score": self.default_score,
            "candidates": self.candidates,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBusy:
    """How much of a sweep the device had work.

    Attributes:
        busy_s: sum of the spans.
        wall_s: from the start of the sweep to its end.
        share: busy over wall.
        share_after_first_minute: the same without the first minute; None in a sweep that took no longer.
        spans: (start, end, kind) of each piece of work, seconds since the start of the sweep.
    """

    busy_s: float
    wall_s: float
    share: float
    share_after_first_minute: float | None
    spans: tuple[tuple[float, float, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; spans to the millisecond."""
        return {
            "busy_s": self.busy_s,
            "wall_s": self.wall_s,
            "share": self.share,
            "share_after_first_minute": self.share_after_first_minute,
            "spans": [[round(start, 3), round(end, 3), kind] for start, end, kind in self.spans],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """How a sweep ended.

    Attributes:
        evidence: ``measured`` or ``emulated``.
        read_ceiling_gb_s: read bandwidth measured in this run; None for emulated targets and before it was measured.
        interrupted: by Ctrl-C or SIGTERM.
        terminated: by SIGTERM.
        trials: recorded by this run.
        device_busy: of a sweep that measures.
    """

    target: Target
    evidence: str
    environment: Environment
    read_ceiling_gb_s: float | None
    interrupted: bool
    seconds: float
    trials: int
    keys: tuple[KeyReport, ...]
    terminated: bool = False
    device_busy: DeviceBusy | None = None
    robust: tuple[RobustReport, ...] = ()

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 when interrupted otherwise, 3 when a key has no winner, else 0."""
        if self.terminated:
            return EXIT_TERMINATED
        if self.interrupted:
            return EXIT_INTERRUPTED
        return EXIT_OK if all(key.winner for key in self.keys) else EXIT_NOTHING_PASSED

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": REPORT_SCHEMA,
            "target": self.target.to_dict(),
            "evidence": self.evidence,
            "environment": self.environment.to_dict(),
            "read_ceiling_gb_s": self.read_ceiling_gb_s,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "trials": self.trials,
            "keys": [key.to_dict() for key in self.keys],
            "robust": [robust.to_dict() for robust in self.robust],
            "device_busy": self.device_busy.to_dict() if self.device_busy else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepStarted:
    """The first event."""

    keys: tuple[Key, ...]
    trials_per_key: int
    target: Target
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded:
    """A trial was recorded.

    Attributes:
        source: who proposed it (:class:`patune.tuner.search.Suggestion`), or ``precheck``: rejected without a trial.
        best: best score of the key so far; None while nothing passed.
        done: trials that count, of all keys, those of earlier runs included.
        total: what ``done`` reaches when nothing stops a key early.
        default: score of the key's default; None while it has none.
    """

    key: Key
    knobs: Knobs
    result: TrialResult
    source: str
    best: float | None
    done: int
    total: int
    default: float | None = None

    @property
    def counts(self) -> bool:
        """A trial, and not knobs that were rejected without one."""
        return self.source not in UNTRIED_SOURCES


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEnded:
    """A key has its winner, or none."""

    report: KeyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence for people."""

    text: str


SweepEvent = SweepStarted | TrialEnded | KeyEnded | Note
