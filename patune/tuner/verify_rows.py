"""What a verification says of each winner, and what it comes to: the counts and the exit code."""

from __future__ import annotations

import itertools
import shlex
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from patune import settings
from patune.configs.dispatcher import sweep_command
from patune.errors import EXIT_ERROR, EXIT_NO_GPU, EXIT_OK
from patune.kernels.knobs import knobs_to_dict
from patune.record import check_choice, check_int
from patune.target import Target
from patune.tuner.check_rows import STATUSES

if TYPE_CHECKING:
    from patune.configs.winner import Winner
    from patune.environment import Environment
    from patune.settings import DatabasePlace

VERIFY_SCHEMA = 1
EMULATOR = "emulator"
CORE = ("block_size", "head_dim", "qg")

Outcome = Literal["passed", "failed", "not_verified"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
UNKNOWN = ("no_device", "not_verified")  # nobody who could tell was asked
# static_ok is no verdict on values, identical none of its own
WINNER_STATUSES = tuple(name for name in STATUSES if name not in ("static_ok", "identical"))


def outcome_of(status: str) -> Outcome:
    """What a status comes to. A build that spills is right and slow, but a sweep would refuse it: it fails."""
    if status == "ok":
        return "passed"
    return "not_verified" if status in UNKNOWN else "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where winners are stored."""

    path: DatabasePlace
    kind: Literal["database", "pack"]

    @property
    def option(self) -> list[str]:
        """What a command needs to find a database that is not the usual one."""
        return [] if self.path == settings.absolute_place() else ["--db", str(self.path)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedWinner:
    """The verdict on one stored winner.

    Attributes:
        place: what its gate runs for here: its own target, in the emulator, or the GPU that is here; None without one.
        changes: what the GPU and the environment differ in: the stored value, and the present one.
        stale: it needs a second look: some change may have made it slow or wrong.
        status: one of ``WINNER_STATUSES``.
        reason: one line; empty when the winner passed.
        gate_cases: correctness cases passed now.
        error_rms: worst relative RMS error that the gate saw now; None before the gate, and where it is not finite.
    """

    winner: Winner
    place: Target | None
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    stale: bool = False
    status: str
    reason: str = ""
    gate_cases: int = 0
    error_rms: float | None = None

    def __post_init__(self) -> None:
        check_choice("status", self.status, WINNER_STATUSES)
        check_int("gate_cases", self.gate_cases, low=0)

    @property
    def checked_on(self) -> str | None:
        """``emulator``, or the name of the GPU."""
        if self.place is None:
            return None
        return EMULATOR if self.place.vendor == "amd" else self.place.device_name

    @property
    def tunable_here(self) -> bool:
        """Whether a sweep here is for the very part that the winner is for."""
        target = self.winner.target
        return target == (Target.named(target.arch) if target.vendor == "amd" else self.place)

    @property
    def outcome(self) -> Outcome:
        """``passed``, ``failed`` or ``not_verified``."""
        return outcome_of(self.status)

    def next_command(self, source: Source) -> str | None:
        """What decides who serves the key; None when the winner did not fail. A pack's winners are tuned anew."""
        if self.outcome != "failed":
            return None
        winner = self.winner
        if source.kind == "pack":
            return sweep_command(winner.problem, winner.workload, winner.target)
        every = [] if self.stale else ["--all"]
        return shlex.join(["patune", "verify", "--adopt", *every, *self._filters(), *source.option])

    def _filters(self) -> list[str]:
        """The options that narrow `patune verify` to the winner's core and architecture."""
        core = {name: getattr(self.winner.problem, name) for name in CORE}
        words = [("--" + name.replace("_", "-"), str(value)) for name, value in core.items()]
        return [*itertools.chain(*words), "--target", self.winner.target.arch]

    def to_dict(self, source: Source) -> dict[str, Any]:
        """JSON types only."""
        winner = self.winner
        return {
            "target": winner.target.to_dict(),
            "problem": winner.problem.to_dict(),
            "workload": winner.workload.to_dict(),
            "knobs": knobs_to_dict(winner.knobs),
            "evidence": winner.evidence,
            "checked_on": self.checked_on,
            "status": self.status,
            "outcome": self.outcome,
            "reason": self.reason,
            "gate_cases": self.gate_cases,
            "error_rms": self.error_rms,
            "stale": self.stale,
            "changes": {
                name: {"stored": stored, "present": present}
                for name, (stored, present) in self.changes.items()
            },
            "stored": {
                "environment": winner.environment.to_dict(),
                "gate_cases": winner.gate_cases,
                "error_rms": winner.error_rms,
                "created": winner.created,
                "imported_from": winner.imported_from,
            },
            "run_next": self.next_command(source),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """A whole verification.

    Attributes:
        environments: by architecture: what builds depend on now.
        winners: in the order of the source.
        seconds: wall time.
    """

    source: Source
    environments: dict[str, Environment]
    winners: tuple[VerifiedWinner, ...]
    seconds: float

    def of(self, outcome: Outcome) -> list[VerifiedWinner]:
        """The winners with this outcome."""
        return [winner for winner in self.winners if winner.outcome == outcome]

    @property
    def exit_code(self) -> int:
        """1 when a winner no longer passes, else 4 when one could not be verified, else 0."""
        if self.of("failed"):
            return EXIT_ERROR
        return EXIT_NO_GPU if self.of("not_verified") else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": VERIFY_SCHEMA,
            "source": str(self.source.path),
            "environments": {arch: e.to_dict() for arch, e in self.environments.items()},
            "seconds": self.seconds,
            "exit_code": self.exit_code,
            "outcomes": {outcome: len(self.of(outcome)) for outcome in get_args(Outcome)},
            "statuses": dict(Counter(winner.status for winner in self.winners)),
            "winners": [winner.to_dict(self.source) for winner in self.winners],
        }
