"""The config database: every trial with its reason, the winner of every key, and what must not be tried again."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from patune import settings
from patune.configs import blocklist, queries, robust, rows
from patune.configs.candidate import MAX_CANDIDATES
from patune.configs.database import explained, open_engine, open_readonly_engine
from patune.configs.models import EnvironmentRow, RunRow, TargetRow, TrialRow
from patune.configs.rows import StoredTrial
from patune.configs.winner import Verdict, Winner, compare, utc_now
from patune.errors import DatabaseError, InvalidValueError
from patune.record import check_choice, check_int, check_text
from patune.target import ARCHS
from patune.trial import WITH_EVIDENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import sqlalchemy

    from patune.configs.candidate import Candidate, Candidates
    from patune.configs.winner import RobustWinner, Speedup, WinnerKey
    from patune.environment import Environment
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.trial import TrialResult

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
        file = settings.database_place(path).absolute()
        return cls(file, open_engine(file, create=create, forward=forward))

    @classmethod
    def read(cls, path: Path | None = None) -> Store:
        """Open the database so that nothing can be written: no schema is brought forward, and a read-only folder will do.

        Args:
            path: as in :meth:`open`.

        Raises:
            DatabaseError: the file is missing, not ours, damaged, or of another schema; nothing was changed.
        """
        file = settings.database_place(path).absolute()
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
            key = queries.key_ids(session, target, problem, workload)
            if key is None:
                return []
            query = select(TrialRow).filter_by(**key).order_by(TrialRow.id)
            if environment is not None:
                of_it = select(EnvironmentRow.id).filter_by(key=environment.key).scalar_subquery()
                query = query.where(TrialRow.environment_id == of_it)
            return rows.readable(session.scalars(query), rows.stored_trial)

    def top(
        self, *, target: Target, problem: Problem, workload: Workload, k: int = 5
    ) -> list[StoredTrial]:
        """The best ``k`` trials of a key with different knobs, over all environments; only ok ones.

        Of knobs that were measured more than once the newest trial counts. Measured ones come before emulated ones, times of
        the newest protocol before others, then the better score.

        Raises:
            InvalidValueError: ``k`` is not at least 1.
        """
        check_int("k", k, low=1)
        with self._transaction(writes=False) as session:
            key = queries.key_ids(session, target, problem, workload)
            return queries.ranked(session, key)[:k] if key is not None else []

    def candidates(self, *, arch: str, problem: Problem, workload: Workload) -> list[Knobs]:
        """What is worth trying first for a key: winners, then the best trials, of every device of the architecture; at most 8."""
        with self._transaction(writes=False) as session:
            return queries.candidates(session, arch, problem, workload)

    def runners_up(self, winners: Sequence[Winner]) -> Candidates:
        """Per winner's key the best other knobs of its environment, kind of evidence and protocol: what packs carry beside it."""
        with self._transaction(writes=False) as session:
            return {
                winner.key: found
                for winner in winners
                if (found := queries.runners_up(session, winner, MAX_CANDIDATES))
            }

    def arch_trials(
        self, *, arch: str, environment: Environment
    ) -> list[tuple[Problem, Workload, StoredTrial]]:
        """Every trial of an architecture and environment that teaches something about other keys, in the order of recording.

        Those have evidence, or a failure that is settled: :data:`patune.configs.queries.SETTLED`.
        """
        with self._transaction(writes=False) as session:
            return queries.arch_trials(session, arch, environment)

    def block(self, trial_id: int) -> None:
        """Never try a trial's knobs again for its problem, kernel source and architecture: its fault was confirmed.

        What is blocked already stays as it is.

        Raises:
            InvalidValueError: no such trial, or it did not end in a fault of the device or its driver.
        """
        with self._transaction(writes=True) as session:
            blocklist.block(session, self._trial(session, "trial_id", trial_id))

    def blocked(
        self, *, arch: str, kernel_source_hash: str, problem: Problem
    ) -> dict[Knobs, TrialResult]:
        """Knobs that must not be tried, with the status and the reason of the confirmed fault."""
        with self._transaction(writes=False) as session:
            return blocklist.blocked(session, arch, kernel_source_hash, problem)

    def put_robust(self, winner: RobustWinner) -> None:
        """Store the robust winner of a (target, problem, objective), in the place of an earlier one."""
        with self._transaction(writes=True) as session:
            robust.put(session, winner)

    def robust(
        self, *, target: Target | None = None, problem: Problem | None = None
    ) -> list[RobustWinner]:
        """Robust winners, all or those of a target or problem, in the order of target, problem and objective."""
        with self._transaction(writes=False) as session:
            return robust.stored(session, target, problem)

    def failures(self, *, target: Target, problem: Problem, workload: Workload) -> dict[str, int]:
        """How many trials of a key ended in each status without evidence."""
        with self._transaction(writes=False) as session:
            key = queries.key_ids(session, target, problem, workload)
            if key is None:
                return {}
            query = (
                select(TrialRow.status, func.count())
                .filter_by(**key)
                .where(TrialRow.status.not_in(WITH_EVIDENCE))
                .group_by(TrialRow.status)
                .order_by(TrialRow.status)
            )
            return {row[0]: row[1] for row in session.execute(query)}

    def promote(
        self, trial_id: int, *, default_trial_id: int | None, speedup: Speedup | None = None
    ) -> Winner:
        """Make a trial the winner of its key, and return the winner that stands afterwards.

        That is another one when the key already has a better kind of evidence.

        Args:
            trial_id: an ok trial.
            default_trial_id: the trial of the default knobs that it was compared with.
            speedup: over that trial, where both were measured interleaved.

        Raises:
            InvalidValueError: no such trial, it did not pass the gate, the default's is of another key or environment, or there
                is a speedup without a measured default.
        """
        with self._transaction(writes=True) as session:
            trial = self._trial(session, "trial_id", trial_id)
            default = None
            if default_trial_id is not None:
                default = self._trial(session, "default_trial_id", default_trial_id)
            queries.check_promotable(trial, default, speedup)
            row = rows.standing(session, trial)
            if row is None or not queries.outranks(row, trial):
                comparable = default is not None and default.evidence == trial.evidence
                row = rows.set_winner(
                    session,
                    trial,
                    default_trial_id=default_trial_id,
                    default_knobs=default.knobs if default else None,
                    default_score=queries.score(default) if default and comparable else None,
                    trials=rows.tried(session, trial),
                    created=utc_now(),
                    imported_from=None,
                    **rows.speedup_columns(speedup),
                )
            return rows.stored_winner(row)

    def _trial(self, session: Session, name: str, trial_id: int) -> TrialRow:
        trial = session.get(TrialRow, trial_id)
        if trial is None:
            raise InvalidValueError(f"{name}={trial_id!r} is not in {self.path}.")
        return trial

    def winner(self, *, target: Target, problem: Problem, workload: Workload) -> Winner | None:
        """What is served for a key, if anything was promoted or imported."""
        with self._transaction(writes=False) as session:
            return queries.served(session, target, problem, workload)

    def winners(
        self,
        *,
        arch: str | None = None,
        block_size: int | None = None,
        head_dim: int | None = None,
        qg: int | None = None,
    ) -> list[Winner]:
        """Everything that is served, of all keys or of those that the arguments name, in the order of the keys."""
        with self._transaction(writes=False) as session:
            return queries.winners(
                session, arch, {"block_size": block_size, "head_dim": head_dim, "qg": qg}
            )

    def merge(
        self,
        incoming: Sequence[Winner],
        candidates: Mapping[WinnerKey, Sequence[Candidate]] | None = None,
        *,
        imported_from: str,
        dry_run: bool = False,
    ) -> list[tuple[Verdict, str]]:
        """Take winners of a pack in, all in one transaction; says per winner what became of it and why.

        The rule is :func:`patune.configs.winner.compare`. The candidates of a winner's key become trials when it is taken in.
        A dry run decides and writes nothing.
        """
        verdicts = []
        name = rows.plain_text(imported_from)
        with self._transaction(writes=not dry_run) as session:
            runs: dict[tuple[Target, Environment], RunRow] = {}
            for winner in incoming:
                verdict, why = compare(winner, queries.served(session, *winner.key))
                verdicts.append((verdict, why))
                if verdict == "kept" or dry_run:
                    continue
                home = (winner.target, winner.environment)
                if home not in runs:
                    runs[home] = rows.add_run(
                        session, *home, sampler="import", seed=0, command=f"patune import {name}"
                    )
                    runs[home].ended = utc_now()
                beside = (candidates or {}).get(winner.key, ())
                queries.take_in(session, runs[home], winner, beside, imported_from=name)
        return verdicts
