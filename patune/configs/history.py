"""What was served for a key, and since when: a log that is only added to.

Every change of what is served is an event, written in the transaction of the change. So the newest event's number is the
generation of what is served: who polls it needs no other look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import func, or_, select

from patune.configs import rows
from patune.configs.models import EVENTS, HistoryRow
from patune.configs.winner import utc_now
from patune.environment import Environment
from patune.kernels.knobs import Knobs, knobs_to_dict
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

    from patune.configs.models import WinnerRow

__all__ = ["EVENTS", "HistoryEvent", "Served", "append", "events", "generation", "served_by"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """One event of a key.

    Attributes:
        created: when, UTC to the second.
        event: ``promoted`` (took the place), ``kept`` (was challenged, or scored anew, and stays), ``imported`` (came with a pack),
            ``retired`` (is not served any more), ``blocked`` (knobs that must not be tried), ``robust`` (for several workloads),
            ``pruned`` (losers were deleted).
        workload: None where the event is of the whole problem.
        knobs, evidence, score: what is served since, or what the event is about; None where nothing is.
        environment: that they were scored in.
        previous_knobs, previous_evidence, previous_score: what was served before.
        reason: one line; may be empty.
    """

    id: int
    created: str
    event: str
    target: Target
    problem: Problem
    workload: Workload | None
    knobs: Knobs | None
    evidence: str | None
    score: float | None
    environment: Environment | None
    previous_knobs: Knobs | None
    previous_evidence: str | None
    previous_score: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        knobs = {
            name: knobs_to_dict(value) if (value := getattr(self, name)) is not None else None
            for name in ("knobs", "previous_knobs")
        }
        records = {
            name: value.to_dict() if (value := getattr(self, name)) is not None else None
            for name in ("target", "problem", "workload", "environment")
        }
        plain = {
            name: getattr(self, name)
            for name in (
                *("id", "created", "event", "evidence", "score"),
                *("previous_evidence", "previous_score", "reason"),
            )
        }
        return {name: (plain | records | knobs)[name] for name in self.__slots__}


class Served(NamedTuple):
    """What a key is served with, as rows spell it."""

    knobs: str
    evidence: str | None
    score: float | None


def served_by(row: WinnerRow | None) -> Served | None:
    """What a winner's row serves; None without one and when it is retired."""
    if row is None or row.state == "retired":
        return None
    return Served(row.trial.knobs, row.evidence, rows.score(row.trial))


def append(
    session: Session,
    event: str,
    *,
    key: Mapping[str, int | None],
    now: Served | None = None,
    before: Served | None = None,
    trial_id: int | None = None,
    environment_id: int | None = None,
    reason: str = "",
) -> None:
    """Add an event, in the transaction of what it tells.

    Args:
        session: the transaction.
        event: one of :data:`patune.configs.models.EVENTS`.
        key: ``target_id``, ``problem_id`` and, unless it is of the whole problem, ``workload_id``.
        now: what is served since, or what the event is about.
        before: what was served.
        trial_id: of ``now``.
        environment_id: of ``now``.
        reason: one line.
    """
    knobs, evidence, score = now or (None, None, None)
    previous = before or (None, None, None)
    session.add(
        HistoryRow(
            created=utc_now(),
            event=event,
            **key,
            trial_id=trial_id,
            knobs=knobs,
            evidence=evidence,
            score=score,
            environment_id=environment_id,
            previous_knobs=previous[0],
            previous_evidence=previous[1],
            previous_score=previous[2],
            reason=rows.plain_text(reason),
        )
    )
    session.flush()


def generation(session: Session) -> int:
    """The newest event's number; 0 before the first."""
    return session.scalars(select(func.max(HistoryRow.id))).one() or 0


def events(session: Session, key: Mapping[str, int]) -> list[HistoryEvent]:
    """The events of a key and those of its whole problem, oldest first."""
    workload_id = key["workload_id"]
    query = (
        select(HistoryRow)
        .filter_by(target_id=key["target_id"], problem_id=key["problem_id"])
        .where(or_(HistoryRow.workload_id == workload_id, HistoryRow.workload_id.is_(None)))
        .order_by(HistoryRow.id)
    )
    return rows.readable(session.scalars(query), _event)


def _event(row: HistoryRow) -> HistoryEvent:
    return HistoryEvent(
        id=row.id,
        created=row.created,
        event=row.event,
        target=rows.to_record(row.target, Target),
        problem=rows.to_record(row.problem, Problem),
        workload=rows.to_record(row.workload, Workload) if row.workload else None,
        knobs=rows.knobs_of(row.knobs) if row.knobs else None,
        evidence=row.evidence,
        score=row.score,
        environment=rows.to_record(row.environment, Environment) if row.environment else None,
        previous_knobs=rows.knobs_of(row.previous_knobs) if row.previous_knobs else None,
        previous_evidence=row.previous_evidence,
        previous_score=row.previous_score,
        reason=row.reason,
    )
