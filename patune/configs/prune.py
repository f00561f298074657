"""Deletes losing trials, and then what nothing refers to any more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import delete, exists, func, select

from patune.configs import history
from patune.configs.models import (
    BlockRow,
    EnvironmentRow,
    HistoryRow,
    MessageRow,
    MissRow,
    RobustRow,
    RunRow,
    TrialRow,
    WinnerRow,
)
from patune.configs.winner import check_time
from patune.record import check_int
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from patune.configs.database import Database

KEY = ("target_id", "problem_id", "workload_id")
RUNNING_DAYS = 2  # a run without an end that began earlier was killed
CHUNK = 500  # ids of one statement; SQLite before 3.32 takes 999 values


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was deleted, or would be.

    Attributes:
        misses: of keys that have a winner now.
        bytes: that a database file became smaller by; 0 for a dry run and on a server, which uses the room again by itself.
    """

    trials: int
    messages: int
    runs: int
    environments: int
    misses: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """JSON types only."""
        return {name: getattr(self, name) for name in self.__slots__}


class _Trial(NamedTuple):
    id: int
    run_id: int
    target_id: int
    environment_id: int
    problem_id: int
    workload_id: int
    knobs: str
    status: str
    evidence: str | None
    protocol: str | None
    score: float | None
    message_id: int | None
    created: str

    @property
    def key(self) -> tuple[int, int, int]:
        return self.target_id, self.problem_id, self.workload_id


COLUMNS = (
    *(getattr(TrialRow, name) for name in _Trial._fields if name != "score"),
    func.coalesce(TrialRow.median_us, TrialRow.busiest_simd_slots).label("score"),
)


class _Plan(NamedTuple):
    """Ids of what goes, in an order that no reference hinders."""

    misses: list[int]
    trials: list[int]
    messages: list[int]
    runs: list[int]
    environments: list[int]
    per_key: Counter[tuple[int, int, int]]


TABLES = {
    "misses": MissRow,
    "trials": TrialRow,
    "messages": MessageRow,
    "runs": RunRow,
    "environments": EnvironmentRow,
}


def run(database: Database, *, keep: int, before: str | None, dry_run: bool) -> Pruned:
    """See :meth:`patune.configs.store.Store.prune`."""
    check_int("keep", keep, low=0)
    if before is not None:
        check_time("before", before)
    with database.transaction(writes=not dry_run) as session:
        plan = _plan(session, keep, before)
        if not dry_run:
            _delete(session, plan)
    counts = {name: len(getattr(plan, name)) for name in TABLES}
    gone = any(counts.values()) and not dry_run
    return Pruned(**counts, bytes=database.shrink() if gone else 0)


def _plan(session: Session, keep: int, before: str | None) -> _Plan:
    found = select(*(COLUMNS)).order_by(TrialRow.id)
    trials = [_Trial(**row) for row in session.execute(found).mappings()]
    kept = _kept(session, trials, keep)
    gone = [t for t in trials if t.id not in kept and (before is None or t.created < before)]
    lost = {t.id for t in gone}
    left = [t for t in trials if t.id not in lost]
    blocks = session.scalars(select(BlockRow.message_id))
    messages = {t.message_id for t in left} | set(blocks)
    runs = {t.run_id for t in left}
    ended = {row.id: row.ended for row in session.execute(select(RunRow.id, RunRow.ended))}
    idle = [id for id, end in ended.items() if id not in runs and end is not None]
    environments = _environments(session, set(idle))
    return _Plan(
        misses=_answered(session),
        trials=[t.id for t in gone],
        messages=[id for id in session.scalars(select(MessageRow.id)) if id not in messages],
        runs=idle,
        environments=[
            id for id in session.scalars(select(EnvironmentRow.id)) if id not in environments
        ],
        per_key=Counter(t.key for t in gone),
    )


def _kept(session: Session, trials: Sequence[_Trial], keep: int) -> set[int]:
    """Ids of the trials that stay, whatever their age."""
    named = {id for row in session.execute(REFERRED) for id in row if id is not None}
    named |= set(session.scalars(select(BlockRow.trial_id)))
    since = (datetime.now(UTC) - timedelta(days=RUNNING_DAYS)).strftime("%Y-%m-%dT%H:%M:%SZ")
    running = select(RunRow.id).where(RunRow.ended.is_(None), RunRow.started >= since)
    open_runs = set(session.scalars(running))
    speaking: dict[tuple[int, ...], dict[str, _Trial]] = {}
    for trial in trials:
        if trial.status != "duplicate":
            speaking.setdefault((*trial.key, trial.environment_id), {})[trial.knobs] = trial
    best = {t.id for group in speaking.values() for t in _best(list(group.values()), keep)}
    kept = {t.id for t in trials if t.id in named or t.id in best or t.run_id in open_runs}
    # A later trial that found kept knobs at fault stays: without it the earlier one would be believed again.
    heard = {(*t.key, t.environment_id, t.knobs) for t in trials if t.id in kept}
    return kept | {
        t.id
        for place, group in speaking.items()
        for t in group.values()
        if (*place, t.knobs) in heard
    }


REFERRED = select(WinnerRow.trial_id, WinnerRow.default_trial_id)


def _best(group: Sequence[_Trial], keep: int) -> list[_Trial]:
    """The best of different knobs, as :func:`patune.configs.ranking.ranked` has them."""
    newest_of = {t.protocol: t.id for t in group if t.status == "ok"}

    def order(trial: _Trial) -> tuple[int, int, float, int]:
        rank = EVIDENCE_RANK[str(trial.evidence)]
        return -rank, -newest_of[trial.protocol], trial.score or 0.0, trial.id

    return sorted((t for t in group if t.status == "ok"), key=order)[:keep]


def _environments(session: Session, gone_runs: set[int]) -> set[int]:
    """Ids of the environments that something refers to when these runs are gone."""
    runs = session.execute(select(RunRow.id, RunRow.environment_id))
    used = {row.environment_id for row in runs if row.id not in gone_runs}
    for column in (
        WinnerRow.environment_id,
        RobustRow.environment_id,
        HistoryRow.environment_id,
    ):
        used |= {id for id in session.scalars(select(column).distinct()) if id is not None}
    return used


def _answered(session: Session) -> list[int]:
    """Misses of keys that have a winner now."""
    same = (getattr(WinnerRow, name) == getattr(MissRow, name) for name in KEY)
    query = select(MissRow.id).where(exists().where(*same, WinnerRow.state != "retired"))
    return list(session.scalars(query))


def _delete(session: Session, plan: _Plan) -> None:
    for (target_id, problem_id, workload_id), count in plan.per_key.items():
        history.append(
            session,
            "pruned",
            key={"target_id": target_id, "problem_id": problem_id, "workload_id": workload_id},
            reason=f"{count} trials deleted",
        )
    for name, table in TABLES.items():
        ids = getattr(plan, name)
        for start in range(0, len(ids), CHUNK):
            of_it = table.__table__.c.id
            session.execute(delete(table.__table__).where(of_it.in_(ids[start : start + CHUNK])))  # type: ignore[arg-type]
