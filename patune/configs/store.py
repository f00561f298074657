"""The config database: every trial with its reason, and the winner of every key."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from patune import settings
from patune.configs import rows
from patune.configs.database import explained, open_engine, open_readonly_engine
from patune.configs.models import (
    EnvironmentRow,
    ProblemRow,
    RunRow,
    TargetRow,
    TrialRow,
    WinnerRow,
    WorkloadRow,
)
from patune.configs.rows import StoredTrial
from patune.configs.winner import Verdict, Winner, compare, utc_now
from patune.errors import DatabaseError, InvalidValueError
from patune.record import check_choice, check_text
from patune.target import ARCHS
from patune.trial import EVIDENCE_RANK, TrialResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    import sqlalchemy

    from patune.environment import Environment
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target

__all__ = ["Store", "StoredTrial"]


class Store:
    """An open config database; a context manager. Each process opens its own.

    Attributes:
        path: the file.
    """

    path: Path

    def __init__(self, path: Path, engine: sqlalchemy.Engine) -> None:
        self.path = path
        self._engine = engine
        self._pid = os.getpid()

    @classmethod
    def open(cls, path: Path | None = None, *, create: bool = True, forward: bool = True) -> Store:
        """Open the database, make it when it is missing, bring its schema forward.

        Args:
            path: the file; None for what ``PATUNE_DB`` names, else the user's data folder.
            create: make a missing file.
            forward: bring a file of an older schema forward, after a copy of it was made beside it; else refuse it.

        Raises:
            DatabaseError: the file is not ours, damaged, of a newer patune, or not writable; nothing was changed.
        """
        file = settings.database_path(path).absolute()
        return cls(file, open_engine(file, create=create, forward=forward))

    @classmethod
    def read(cls, path: Path | None = None) -> Store:
        """Open the database so that nothing can be written: no schema is brought forward, and a read-only folder will do.

        Args:
            path: as in :meth:`open`.

        Raises:
            DatabaseError: the file is missing, not ours, damaged, or of another schema; nothing was changed.
        """
        file = settings.database_path(path).absolute()
        return cls(file, open_readonly_engine(file))

    def close(self) -> None:
        """Close the connections. The last process to do so folds the log into the file."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Session]:
        if os.getpid() != self._pid:
            raise DatabaseError(
                f"{self.path} was opened by process {self._pid} and is used by its fork {os.getpid()}; "
                "SQLite does not survive that. Open a Store in each process."
            )
        engine = self._engine.execution_options(patune_writes=writes)
        with explained(self.path), Session(engine, autoflush=False) as session, session.begin():
            yield session

    def begin_run(
        self, *, target: Target, environment: Environment, sampler: str, seed: int, command: str
    ) -> int:
        """Record that a sweep starts; its trials refer to the id."""
        with self._transaction(writes=True) as session:
            return rows.add_run(
                session, target, environment, sampler=sampler, seed=seed, command=command
            ).id

    def end_run(self, run_id: int) -> None:
        """Record that a sweep ended.

        Raises:
            InvalidValueError: there is no such run.
        """
        with self._transaction(writes=True) as session:
            self._run(session, run_id).ended = utc_now()

    def _run(self, session: Session, run_id: int) -> RunRow:
        run = session.get(RunRow, run_id)
        if run is None:
            raise InvalidValueError(f"run_id={run_id!r} is not in {self.path}.")
        return run

    def record_trial(
        self,
        run_id: int,
        *,
        problem: Problem,
        workload: Workload,
        knobs: Knobs,
        result: TrialResult,
        source: str,
    ) -> int:
        """Store one trial, whatever became of it, in a transaction of its own; returns its id.

        ``source`` says which part of the tuner proposed it: default, seed, search, ...

        Raises:
            InvalidValueError: there is no such run, its target has other knobs, the source is empty, or the facts are not JSON.
        """
        check_text("source", source)
        with self._transaction(writes=True) as session:
            run = self._run(session, run_id)
            arch = session.get_one(TargetRow, run.target_id).arch
            check_choice("knobs.family", knobs.family, (ARCHS[arch].family,))
            trial = rows.add_trial(session, run, problem, workload, knobs, result, source=source)
            return trial.id

    def trials(
        self,
        *,
        target: Target,
        problem: Problem,
        workload: Workload,
        environment: Environment | None = None,
    ) -> list[StoredTrial]:
        """Trials of a key in the order of recording; of one environment, or of all."""
        with self._transaction(writes=False) as session:
            key = _key(session, target, problem, workload)
            if key is None:
                return []
            query = select(TrialRow).filter_by(**key).order_by(TrialRow.id)
            if environment is not None:
                of_it = select(EnvironmentRow.id).filter_by(key=environment.key).scalar_subquery()
                query = query.where(TrialRow.environment_id == of_it)
            return rows.readable(session.scalars(query), rows.stored_trial)

    def failures(self, *, target: Target, problem: Problem, workload: Workload) -> dict[str, int]:
        """How many trials of a key ended in each status other than ``ok``."""
        with self._transaction(writes=False) as session:
            key = _key(session, target, problem, workload)
            if key is None:
                return {}
            query = (
                select(TrialRow.status, func.count())
                .filter_by(**key)
                .where(TrialRow.status != "ok")
                .group_by(TrialRow.status)
                .order_by(TrialRow.status)
            )
            return {row[0]: row[1] for row in session.execute(query)}

    def promote(self, trial_id: int, *, default_trial_id: int | None) -> Winner:
        """Make a trial the winner of its key, and return the winner that stands afterwards.

        That is another one when the key already has a better kind of evidence. ``default_trial_id`` is the trial of
        the default knobs that it was compared with.

        Raises:
            InvalidValueError: no such trial, it did not pass the gate, or the default's is of another key or environment.
        """
        with self._transaction(writes=True) as session:
            trial = self._promotable(session, trial_id)
            default = self._comparable(session, trial, default_trial_id)
            row = rows.standing(session, trial)
            if row is None or not _outranks(row, trial):
                comparable = default is not None and default.evidence == trial.evidence
                row = rows.set_winner(
                    session,
                    trial,
                    default_trial_id=default_trial_id,
                    default_knobs=default.knobs if default else None,
                    default_score=_score(default) if default and comparable else None,
                    trials=rows.tried(session, trial),
                    created=utc_now(),
                    imported_from=None,
                )
            return rows.stored_winner(row)

    def _promotable(self, session: Session, trial_id: int) -> TrialRow:
        trial = session.get(TrialRow, trial_id)
        if trial is None:
            raise InvalidValueError(f"trial_id={trial_id!r} is not in {self.path}.")
        if trial.status != "ok":
            raise InvalidValueError(
                f"trial_id={trial_id} ended as {trial.status!r} and cannot win; allowed: a trial with status 'ok'."
            )
        return trial

    def _comparable(
        self, session: Session, trial: TrialRow, default_trial_id: int | None
    ) -> TrialRow | None:
        if default_trial_id is None:
            return None
        default = session.get(TrialRow, default_trial_id)
        if default is None:
            raise InvalidValueError(f"default_trial_id={default_trial_id!r} is not in {self.path}.")
        for name in ("target_id", "environment_id", "problem_id", "workload_id"):
            if getattr(default, name) != getattr(trial, name):
                raise InvalidValueError(
                    f"default_trial_id={default_trial_id} is of another {name[:-3]} than trial {trial.id}; "
                    "allowed: a trial of the same target, environment, problem and workload."
                )
        return default

    def winner(self, *, target: Target, problem: Problem, workload: Workload) -> Winner | None:
        """What is served for a key, if anything was promoted or imported."""
        with self._transaction(writes=False) as session:
            return _served(session, target, problem, workload)

    def winners(
        self,
        *,
        arch: str | None = None,
        block_size: int | None = None,
        head_dim: int | None = None,
        qg: int | None = None,
    ) -> list[Winner]:
        """Everything that is served, of all keys or of those that the arguments name, in the order of the keys."""
        wanted = {"block_size": block_size, "head_dim": head_dim, "qg": qg}
        problem = {name: value for name, value in wanted.items() if value is not None}
        query = (
            select(WinnerRow)
            .join(WinnerRow.target)
            .join(WinnerRow.problem)
            .where(WinnerRow.state != "retired")
            .where(*(getattr(ProblemRow, name) == value for name, value in problem.items()))
        )
        if arch is not None:
            query = query.where(TargetRow.arch == arch)
        with self._transaction(writes=False) as session:
            found = rows.readable(session.scalars(query), rows.stored_winner)
        return sorted(found, key=_sort_key)

    def merge(
        self, incoming: Sequence[Winner], *, imported_from: str, dry_run: bool = False
    ) -> list[tuple[Verdict, str]]:
        """Take winners of a pack in, all in one transaction; says per winner what became of it and why.

        The rule is :func:`patune.configs.winner.compare`. A dry run decides and writes nothing.
        """
        verdicts = []
        name = rows.plain_text(imported_from)
        with self._transaction(writes=not dry_run) as session:
            runs: dict[tuple[Target, Environment], RunRow] = {}
            for winner in incoming:
                verdict, why = compare(winner, _served(session, *winner.key))
                verdicts.append((verdict, why))
                if verdict == "kept" or dry_run:
                    continue
                home = (winner.target, winner.environment)
                if home not in runs:
                    runs[home] = rows.add_run(
                        session, *home, sampler="import", seed=0, command=f"patune import {name}"
                    )
                    runs[home].ended = utc_now()
                _take_in(session, runs[home], winner, name)
        return verdicts


def _key(
    session: Session, target: Target, problem: Problem, workload: Workload
) -> dict[str, int] | None:
    """Row ids of a key; None when a part of it was never recorded."""
    found_target = rows.find(session, TargetRow, target)
    found_problem = rows.find(session, ProblemRow, problem)
    found_workload = rows.find(session, WorkloadRow, workload)
    if found_target is None or found_problem is None or found_workload is None:
        return None
    return {
        "target_id": found_target.id,
        "problem_id": found_problem.id,
        "workload_id": found_workload.id,
    }


def _outranks(row: WinnerRow, trial: TrialRow) -> bool:
    return (
        row.state != "retired" and EVIDENCE_RANK[row.evidence] > EVIDENCE_RANK[str(trial.evidence)]
    )


def _score(trial: TrialRow) -> float | None:
    return trial.median_us if trial.median_us is not None else trial.busiest_simd_slots


def _served(
    session: Session, target: Target, problem: Problem, workload: Workload
) -> Winner | None:
    key = _key(session, target, problem, workload)
    if key is None:
        return None
    query = select(WinnerRow).filter_by(**key).where(WinnerRow.state != "retired")
    found = rows.readable(session.scalars(query), rows.stored_winner)
    return found[0] if found else None


def _take_in(session: Session, run: RunRow, winner: Winner, imported_from: str) -> None:
    result = TrialResult(
        status="ok",
        gate_cases=winner.gate_cases,
        error_rms=winner.error_rms,
        timing=winner.timing,
        counted=winner.counted,
    )
    trial = rows.add_trial(
        session, run, winner.problem, winner.workload, winner.knobs, result, source="pack"
    )
    rows.set_winner(
        session,
        trial,
        default_trial_id=None,
        default_knobs=rows.knobs_text(winner.default_knobs) if winner.default_knobs else None,
        default_score=winner.default_score,
        trials=winner.trials,
        created=winner.created,
        imported_from=imported_from,
    )


def _sort_key(winner: Winner) -> tuple[str | int, ...]:
    return tuple(
        value
        for part in (winner.target, winner.problem, winner.workload)
        for value in part.to_dict().values()
    )
