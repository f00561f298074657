"""What serving processes asked for in vain: their captures, taken in once each."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import delete, func, select

from patune.configs import rows
from patune.configs.models import MissRow, ProblemRow, TargetRow, WorkloadRow
from patune.configs.winner import utc_now
from patune.problem import Problem, Workload
from patune.record import check_int, check_text
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import Session

    from patune.configs.winner import WinnerKey

CapturedMiss = tuple[Target, Problem, Workload, str, int]


class StoredMiss(NamedTuple):
    """How often a key that nothing was tuned for was asked for.

    Attributes:
        source: the layer that answered.
    """

    target: Target
    problem: Problem
    workload: Workload
    source: str
    calls: int


def add(session: Session, capture: str, misses: Iterable[StoredMiss | CapturedMiss]) -> int:
    """Take a capture in, once; returns the rows added.

    Raises:
        InvalidValueError: the capture has no name, or a miss was asked for less than once.
    """
    check_text("capture", capture)
    calls: Counter[tuple[Target, Problem, Workload, str]] = Counter()
    for target, problem, workload, source, count in misses:
        check_int("calls", count, low=1)
        check_text("source", source)
        calls[target, problem, workload, source] += count
    if session.scalars(select(MissRow.id).filter_by(capture=capture).limit(1)).first() is not None:
        return 0
    now = utc_now()
    for (target, problem, workload, source), count in calls.items():
        session.add(
            MissRow(
                capture=capture,
                target_id=rows.find_or_add(session, TargetRow, target).id,
                problem_id=rows.find_or_add(session, ProblemRow, problem).id,
                workload_id=rows.find_or_add(session, WorkloadRow, workload).id,
                source=source,
                calls=count,
                created=now,
            )
        )
    session.flush()
    return len(calls)


def stored(session: Session, arch: str | None) -> list[StoredMiss]:
    """The misses of an architecture or of all, added up over the captures, in the order of the keys."""
    # A server adds 64-bit integers up to a decimal number, so this adds up here.
    query = select(MissRow)
    if arch is not None:
        query = query.join(MissRow.target).where(TargetRow.arch == arch)
    calls: Counter[tuple[Target, Problem, Workload, str]] = Counter()
    for miss in rows.readable(session.scalars(query), _miss):
        calls[miss[:-1]] += miss.calls
    return sorted((StoredMiss(*key, count) for key, count in calls.items()), key=_order)


def _miss(row: MissRow) -> StoredMiss:
    return StoredMiss(
        target=rows.to_record(row.target, Target),
        problem=rows.to_record(row.problem, Problem),
        workload=rows.to_record(row.workload, Workload),
        source=row.source,
        calls=row.calls,
    )


def _order(miss: StoredMiss) -> tuple[str | int, ...]:
    parts = (miss.target, miss.problem, miss.workload)
    return *(value for part in parts for value in part.to_dict().values()), miss.source


def drop(session: Session, keys: Iterable[WinnerKey]) -> int:
    """Delete the misses of keys; returns how many rows those were."""
    dropped = 0
    for target, problem, workload in keys:
        key = rows.key_ids(session, target, problem, workload)
        if key is None:
            continue
        of_it = MissRow.__table__.c
        count = select(func.count()).select_from(MissRow).filter_by(**key)
        dropped += session.scalars(count).one()
        session.execute(
            delete(MissRow).where(*(of_it[name] == value for name, value in key.items()))
        )
    return dropped
