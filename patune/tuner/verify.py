"""Runs the correctness gate again on stored winners, under the present environment. Nothing is written.

The gate does not depend on the workload: winners of one target, problem and knobs share one. AMD targets are emulated; an NVIDIA target
is gated on any GPU of its architecture, because the machine code of one architecture is the same on all of its parts.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import InvalidValueError
from patune.second_look import Present
from patune.settings import database_place
from patune.target import Target, detect_target
from patune.tuner.check_cases import CheckCase
from patune.tuner.check_run import run_checks
from patune.tuner.crew import PRELOAD
from patune.tuner.verify_rows import Source, VerifiedWinner, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from patune.configs.winner import Winner
    from patune.environment import Environment
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.settings import ServerUrl
    from patune.tuner.check_rows import CheckRow

    Gate = tuple[Target, Problem, Knobs]  # what a gate depends on


def read_winners(
    db: Path | ServerUrl | None, pack: Path | None, *, arch: str | None = None, **core: int | None
) -> tuple[Source, list[Winner]]:
    """The winners of a pack, or else of a database, all or those that the filters name; the file is left as it is.

    Args:
        db: the database; None is the usual one.
        pack: a pack file, read in the place of a database.
        arch: of the targets.
        core: ``block_size``, ``head_dim``, ``qg``.

    Raises:
        InvalidValueError: both a database and a pack are named.
        DatabaseError: there is no database of this schema.
        DocumentError: the file is no pack.
    """
    if pack is not None and db is not None:
        raise InvalidValueError(f"--db {db} and --pack {pack} name two sources; allowed: one.")
    if pack is not None:
        from patune.configs.packs import read_pack

        found = [w for w in read_pack(pack) if _matches(w, arch, core)]
        return Source(path=pack, kind="pack"), found
    from patune.configs.store import Store

    with Store.read(database_place(db)) as store:
        return Source(path=store.place, kind="database"), store.winners(arch=arch, **core)


def _matches(winner: Winner, arch: str | None, core: Mapping[str, int | None]) -> bool:
    wanted = {name: value for name, value in core.items() if value is not None}
    same = all(getattr(winner.problem, name) == value for name, value in wanted.items())
    return same and arch in (None, winner.target.arch)


def verify_winners(
    source: Source,
    winners: Sequence[Winner],
    *,
    jobs: int | None = None,
    notify: Callable[[CheckRow, int], None],
    worker_tasks: Mapping[str, str] | None = None,
    preload: Sequence[str] = PRELOAD,
) -> VerifyReport:
    """Build and gate every winner.

    Args:
        source: where they are from.
        winners: what to verify.
        jobs: worker processes; None is one per CPU.
        notify: called with the row of every gate, and how many there are, in the caller's thread.
        worker_tasks: as for :func:`patune.tuner.check_run.run_checks`.
        preload: likewise.

    Raises:
        WorkerStartError: workers die before they can take a task.
    """
    from patune.environment import current_environment

    started = time.monotonic()
    device = device_for(winners)
    candidates = [_Candidate.of(winner, device) for winner in winners]
    cases = {c.gate: _case(c.gate) for c in candidates if c.gate is not None}
    rows: list[CheckRow] = []
    running = run_checks(
        list(cases.values()),
        jobs=jobs,
        on_device=device is not None,
        worker_tasks=worker_tasks,
        preload=preload,
    )
    with contextlib.closing(running):
        for row in running:
            rows.append(row)
            notify(row, len(cases))
    verdicts = dict(zip(cases, (_verdict(row, rows) for row in rows), strict=True))
    archs = dict.fromkeys(winner.target.arch for winner in winners)
    environments = {arch: current_environment(Target.named(arch)) for arch in archs}
    return VerifyReport(
        source=source,
        environments=environments,
        winners=tuple(c.verified(environments, verdicts) for c in candidates),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A winner on its way.

    Attributes:
        place: what its target's gates run for here: the target itself in the emulator, or the GPU; None without one.
        settled: the verdict, where no worker is needed for it.
    """

    winner: Winner
    place: Target | None
    settled: dict[str, Any] | None

    @classmethod
    def of(cls, winner: Winner, device: Target | None) -> _Candidate:
        from patune.kernels.feasibility import is_feasible

        target = winner.target
        place: Target | None = target
        if target.vendor == "nvidia":
            place = device if device is not None and device.arch == target.arch else None
        settled = None
        if reason := is_feasible(winner.knobs, winner.problem, target):
            settled = {"status": "infeasible", "reason": reason}
        elif place is None:
            settled = {"status": "no_device", "reason": f"there is no {target.arch} GPU here"}
        return cls(winner=winner, place=place, settled=settled)

    @property
    def gate(self) -> Gate | None:
        """What has to be run for it, if anything."""
        if self.place is None or self.settled is not None:
            return None
        return self.place, self.winner.problem, self.winner.knobs

    def verified(
        self,
        environments: Mapping[str, Environment],
        verdicts: Mapping[Gate, Mapping[str, Any]],
    ) -> VerifiedWinner:
        """The winner with its verdict, its own or that of its gate."""
        winner, place, gate = self.winner, self.place, self.gate
        changes: dict[str, tuple[Any, Any]] = {}
        if place is not None:
            stored, present = winner.target.to_dict(), place.to_dict()
            changes = {n: (stored[n], present[n]) for n in stored if stored[n] != present[n]}
        changes |= winner.environment.changes_to(environments[winner.target.arch])
        verdict = verdicts[gate] if gate is not None else self.settled or {}
        stale = Present(environments).look(winner).state == "reverify"
        return VerifiedWinner(winner=winner, place=place, changes=changes, stale=stale, **verdict)


def device_for(winners: Sequence[Winner]) -> Target | None:
    """The GPU that winners can be gated on; torch is imported only where one of them wants it."""
    if all(winner.target.vendor == "amd" for winner in winners):
        return None
    device = detect_target()
    return device if device is not None and device.vendor == "nvidia" else None


def _case(gate: Gate) -> CheckCase:
    target, problem, knobs = gate
    return CheckCase(target=target, problem=problem, knobs=knobs)


def _verdict(row: CheckRow, rows: Sequence[CheckRow]) -> dict[str, Any]:
    """What a row says of its winners; the row of an identical build says what the one says that was gated for both."""
    if row.same_as is not None:
        row = rows[row.same_as - 1]
    fields = ("status", "reason", "gate_cases", "error_rms")
    return {name: getattr(row, name) for name in fields}
