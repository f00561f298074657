"""What a sweep says while it runs (events) and when it ends (reports)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import EXIT_INTERRUPTED, EXIT_NOTHING_PASSED, EXIT_OK
from patune.kernels.knobs import knobs_to_dict

if TYPE_CHECKING:
    from patune.configs.winner import Winner
    from patune.environment import Environment
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.trial import TrialResult

REPORT_SCHEMA = 1


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
        failures: how many of them ended in each status other than ``ok``.
    """

    key: Key
    winner: Winner | None
    default_knobs: Knobs
    default: TrialResult | None
    trials: int
    failures: dict[str, int]

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
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """How a sweep ended.

    Attributes:
        evidence: ``measured`` or ``emulated``.
        read_ceiling_gb_s: read bandwidth measured in this run; None for emulated targets and before it was measured.
        interrupted: by Ctrl-C.
        trials: recorded by this run.
    """

    target: Target
    evidence: str
    environment: Environment
    read_ceiling_gb_s: float | None
    interrupted: bool
    seconds: float
    trials: int
    keys: tuple[KeyReport, ...]

    @property
    def exit_code(self) -> int:
        """130 when interrupted, 3 when a key has no winner, else 0."""
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
        source: who proposed it: ``default``, ``incumbent``, ``neighbour``, ``search``.
        best: best score of the key so far; None while nothing passed.
        done: trials that count, of all keys, those of earlier runs included.
        total: what ``done`` reaches when nothing stops the sweep.
    """

    key: Key
    knobs: Knobs
    result: TrialResult
    source: str
    best: float | None
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEnded:
    """A key has its winner, or none."""

    report: KeyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence for people."""

    text: str


SweepEvent = SweepStarted | TrialEnded | KeyEnded | Note
