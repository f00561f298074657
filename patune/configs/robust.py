"""Robust winners in the database: one per target, problem and objective."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sqlalchemy import select

from patune.configs import history, rows
from patune.configs.history import Served
from patune.configs.models import EnvironmentRow, ProblemRow, RobustRow, TargetRow
from patune.configs.winner import RobustWinner
from patune.environment import Environment
from patune.problem import Problem, Workload
from patune.record import canonical_json
from patune.target import Target

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def put(session: Session, winner: RobustWinner) -> None:
    """Store a robust winner in the place of the one with its target, problem and objective."""
    environment = winner.environment
    environment_id = rows.find_or_add(session, EnvironmentRow, environment, key=environment.key).id
    place = {
        "target_id": rows.find_or_add(session, TargetRow, winner.target).id,
        "problem_id": rows.find_or_add(session, ProblemRow, winner.problem).id,
        "objective": winner.objective,
    }
    row = session.scalars(select(RobustRow).filter_by(**place)).one_or_none()
    if row is None:
        row = RobustRow(**place)
        session.add(row)
        before = None
    else:
        before = Served(row.knobs, None, row.score)
    row.environment_id = environment_id
    row.workloads = canonical_json([workload.to_dict() for workload in winner.workloads])
    row.knobs = rows.knobs_text(winner.knobs)
    row.regrets = canonical_json(list(winner.regrets))
    row.score = winner.score
    row.created = winner.created
    history.append(
        session,
        "robust",
        key={"target_id": row.target_id, "problem_id": row.problem_id},
        now=Served(row.knobs, None, row.score),
        before=before,
        environment_id=environment_id,
        reason=f"{winner.objective} of {len(winner.workloads)} workloads",
    )


def stored(session: Session, target: Target | None, problem: Problem | None) -> list[RobustWinner]:
    """The robust winners of a target and of a problem, or of all."""
    query = select(RobustRow)
    if target is not None:
        query = query.join(RobustRow.target).filter_by(**target.to_dict())
    if problem is not None:
        query = query.join(RobustRow.problem).filter_by(**problem.to_dict())
    return sorted(rows.readable(session.scalars(query), _winner), key=_order)


def _winner(row: RobustRow) -> RobustWinner:
    return RobustWinner(
        target=rows.to_record(row.target, Target),
        environment=rows.to_record(row.environment, Environment),
        problem=rows.to_record(row.problem, Problem),
        objective=row.objective,
        workloads=tuple(Workload.from_dict(part) for part in json.loads(row.workloads)),
        knobs=rows.knobs_of(row.knobs),
        regrets=tuple(json.loads(row.regrets)),
        score=row.score,
        created=row.created,
    )


def _order(winner: RobustWinner) -> tuple[str | int, ...]:
    parts = (*winner.target.to_dict().values(), *winner.problem.to_dict().values())
    return *parts, winner.objective
