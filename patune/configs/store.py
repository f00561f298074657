"""The config database: every trial with its reason, the winner of every key, and what must not be tried again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from patune.configs import (
    blocklist,
    captures,
    history,
    merging,
    promotion,
    prune,
    queries,
    ranking,
    robust,
    rows,
)
from patune.configs.candidate import MAX_CANDIDATES
from patune.configs.database import Database
from patune.configs.models import EnvironmentRow, RunRow, TargetRow, TrialRow
from patune.configs.rows import StoredTrial
from patune.configs.winner import utc_now
from patune.errors import InvalidValueError
from patune.record import check_choice, check_int, check_text
from patune.target import ARCHS
from patune.trial import WITH_EVIDENCE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy.orm import Session

    from patune.configs.block import Block
    from patune.configs.candidate import Candidate, Candidates
    from patune.configs.captures import CapturedMiss, StoredMiss
    from patune.configs.history import HistoryEvent
    from patune.configs.merging import Merged
    from patune.configs.prune import Pruned
    from patune.configs.winner import RobustWinner, Speedup, Winner, WinnerKey
    from patune.environment import Environment
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.trial import TrialResult

__all__ = ["Store", "StoredTrial"]


class Store(Database):
    """The config database with all that is asked of it and written to it, each in a transaction of its own."""

    def begin_run(
        self, *, target: Target, environment: Environment, sampler: str, seed: int, command: str
    ) -> int:
        """Record that a sweep starts; its trials refer to the id."""
        with self.transaction(writes=True) as session:
            return rows.add_run(
                session, target, environment, sampler=sampler, seed=seed, command=command
            ).id

    def end_run(self, run_id: int) -> None:
        """Record that a sweep ended.

        Raises:
            InvalidValueError: there is no such run.
        """
        with self.transaction(writes=True) as session:
            self._run(session, run_id).ended = utc_now()

    def _run(self, session: Session, run_id: int) -> RunRow:
        run = session.get(RunRow, run_id)
        if run is None:
            raise InvalidValueError(f"run_id={run_id!r} is not in {self.place}.")
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
        with self.transaction(writes=True) as session:
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
        with self.transaction(writes=False) as session:
            key = rows.key_ids(session, target, problem, workload)
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
        with self.transaction(writes=False) as session:
            key = rows.key_ids(session, target, problem, workload)
            return ranking.ranked(session, key)[:k] if key is not None else []

    def candidates(self, *, arch: str, problem: Problem, workload: Workload) -> list[Knobs]:
        """What is worth trying first for a key: winners, then the best trials, of every device of the architecture; at most 8."""
        with self.transaction(writes=False) as session:
            return ranking.candidates(session, arch, problem, workload)

    def runners_up(self, winners: Sequence[Winner]) -> Candidates:
        """Per winner's key the best other knobs of its environment, kind of evidence and protocol: what packs carry beside it."""
        with self.transaction(writes=False) as session:
            return {
                winner.key: found
                for winner in winners
                if (found := ranking.runners_up(session, winner, MAX_CANDIDATES))
            }

    def arch_trials(
        self, *, arch: str, environment: Environment
    ) -> list[tuple[Problem, Workload, StoredTrial]]:
        """Every trial of an architecture and environment that teaches something about other keys, in the order of recording.

        Those have evidence, or a failure that is settled: :data:`patune.configs.queries.SETTLED`.
        """
        with self.transaction(writes=False) as session:
            return queries.arch_trials(session, arch, environment)

    def block(self, trial_id: int) -> None:
        """Never try a trial's knobs again for its problem, kernel source and architecture: its fault was confirmed.

        What is blocked already stays as it is.

        Raises:
            InvalidValueError: no such trial, or it did not end in a fault of the device or its driver.
        """
        with self.transaction(writes=True) as session:
            blocklist.block(session, self._trial(session, "trial_id", trial_id))

    def blocked(
        self, *, arch: str, kernel_source_hash: str, problem: Problem
    ) -> dict[Knobs, TrialResult]:
        """Knobs that must not be tried, with the status and the reason of the confirmed fault."""
        with self.transaction(writes=False) as session:
            return blocklist.blocked(session, arch, kernel_source_hash, problem)

    def blocks(self, *, arch: str | None = None) -> list[Block]:
        """The blocklist, all of it or that of an architecture, in the order of architecture, kernel source, problem and knobs."""
        with self.transaction(writes=False) as session:
            return blocklist.blocks(session, arch)

    def put_robust(self, winner: RobustWinner) -> None:
        """Store the robust winner of a (target, problem, objective), in the place of an earlier one."""
        with self.transaction(writes=True) as session:
            robust.put(session, winner)

    def robust(
        self, *, target: Target | None = None, problem: Problem | None = None
    ) -> list[RobustWinner]:
        """Robust winners, all or those of a target or problem, in the order of target, problem and objective."""
        with self.transaction(writes=False) as session:
            return robust.stored(session, target, problem)

    def failures(self, *, target: Target, problem: Problem, workload: Workload) -> dict[str, int]:
        """How many trials of a key ended in each status without evidence."""
        with self.transaction(writes=False) as session:
            key = rows.key_ids(session, target, problem, workload)
            if key is None:
                return {}
            query = (
                select(TrialRow.status, func.count())
                .filter_by(**key)
                .where(TrialRow.status.not_in(WITH_EVIDENCE))
                .group_by(TrialRow.status)
            )
            return {row[0]: row[1] for row in sorted(session.execute(query), key=tuple)}

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
        with self.transaction(writes=True) as session:
            trial = self._trial(session, "trial_id", trial_id)
            default = None
            if default_trial_id is not None:
                default = self._trial(session, "default_trial_id", default_trial_id)
            promotion.check_promotable(trial, default, speedup)
            return rows.stored_winner(promotion.promote(session, trial, default, speedup))

    def _trial(self, session: Session, name: str, trial_id: int) -> TrialRow:
        trial = session.get(TrialRow, trial_id)
        if trial is None:
            raise InvalidValueError(f"{name}={trial_id!r} is not in {self.place}.")
        return trial

    def winner(self, *, target: Target, problem: Problem, workload: Workload) -> Winner | None:
        """What is served for a key, if anything was promoted or imported."""
        with self.transaction(writes=False) as session:
            return rows.served(session, target, problem, workload)

    def winners(
        self,
        *,
        arch: str | None = None,
        block_size: int | None = None,
        head_dim: int | None = None,
        qg: int | None = None,
    ) -> list[Winner]:
        """Everything that is served, of all keys or of those that the arguments name, in the order of the keys."""
        with self.transaction(writes=False) as session:
            return queries.winners(
                session, arch, {"block_size": block_size, "head_dim": head_dim, "qg": qg}
            )

    def merge(
        self,
        incoming: Sequence[Winner],
        candidates: Mapping[WinnerKey, Sequence[Candidate]] | None = None,
        *,
        robust: Sequence[RobustWinner] = (),
        blocks: Sequence[Block] = (),
        imported_from: str,
        dry_run: bool = False,
    ) -> Merged:
        """Take a pack's entries in, all in one transaction; says of each what became of it and why.

        The rules are :func:`patune.configs.winner.compare` and :func:`patune.configs.winner.compare_robust`; blocklists are united.
        The candidates of a winner's key become trials when it is taken in. A dry run decides and writes nothing.
        """
        with self.transaction(writes=not dry_run) as session:
            return merging.merge(
                session,
                incoming,
                candidates,
                robust=robust,
                blocks=blocks,
                imported_from=imported_from,
                dry_run=dry_run,
            )

    def retire(
        self, *, target: Target, problem: Problem, workload: Workload, reason: str
    ) -> Winner | None:
        """Serve a key's winner no more; gives it back, or None when nothing was served. It stays with its trials."""
        with self.transaction(writes=True) as session:
            key = rows.key_ids(session, target, problem, workload)
            return promotion.retire(session, key, reason) if key is not None else None

    def generation(self) -> int:
        """A number that grows with every change of what is served; 0 before the first."""
        with self.transaction(writes=False) as session:
            return history.generation(session)

    def history(
        self, *, target: Target, problem: Problem, workload: Workload
    ) -> list[HistoryEvent]:
        """What happened to a key and to its whole problem, oldest first."""
        with self.transaction(writes=False) as session:
            key = rows.key_ids(session, target, problem, workload)
            return history.events(session, key) if key is not None else []

    def add_capture(self, capture: str, misses: Iterable[StoredMiss | CapturedMiss]) -> int:
        """Take in what one serving process asked for in vain; the rows added, 0 when the capture was taken in before.

        Args:
            capture: its uuid.
            misses: target, problem, workload, source that answered, and calls; those of one key are added up.

        Raises:
            InvalidValueError: the capture has no name, or a miss was asked for less than once.
        """
        with self.transaction(writes=True) as session:
            return captures.add(session, capture, misses)

    def misses(self, *, arch: str | None = None) -> list[StoredMiss]:
        """Calls of keys that nothing was tuned for, over all captures, in the order of the keys."""
        with self.transaction(writes=False) as session:
            return captures.stored(session, arch)

    def drop_misses(self, keys: Iterable[WinnerKey]) -> int:
        """Forget the misses of keys that are tuned now; returns how many rows those were."""
        with self.transaction(writes=True) as session:
            return captures.drop(session, keys)

    def prune(self, *, keep: int = 10, before: str | None = None, dry_run: bool = False) -> Pruned:
        """Delete losing trials, then what nothing refers to any more; a file gives its room back.

        What stays: trials of winners, of the defaults that they were compared with and of the blocklist, the ``keep`` best of
        each key and environment, the trial that speaks for the knobs of one of these, and those of a sweep that may be running.

        Args:
            keep: configurations of each key and environment.
            before: only trials recorded before this UTC time, such as 2026-11-22T10:42:00Z; None for all.
            dry_run: count and delete nothing.

        Raises:
            InvalidValueError: ``keep`` is negative, or ``before`` is no such time.
        """
        return prune.run(self, keep=keep, before=before, dry_run=dry_run)
