"""Knobs whose fault was confirmed. They hold for a kernel source, whatever the compiler, the driver and the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from patune.configs import history, rows
from patune.configs.block import FAULTS, Block
from patune.configs.history import Served
from patune.configs.models import BlockRow, ProblemRow, TargetRow
from patune.configs.winner import utc_now
from patune.errors import InvalidValueError
from patune.problem import Problem
from patune.trial import TrialResult

__all__ = ["Block", "block", "blocked", "blocks"]

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from patune.configs.models import TrialRow
    from patune.kernels.knobs import Knobs


def block(session: Session, trial: TrialRow) -> None:
    """Put a trial's knobs on the list, once.

    Raises:
        InvalidValueError: the trial did not end in a fault.
    """
    if trial.status not in FAULTS:
        raise InvalidValueError(
            f"trial_id={trial.id} ended as {trial.status!r} and cannot be blocked; allowed: {', '.join(FAULTS)}."
        )
    place = {
        "arch": session.get_one(TargetRow, trial.target_id).arch,
        "kernel_source_hash": trial.environment.kernel_source_hash,
        "problem_id": trial.problem_id,
        "knobs_hash": trial.knobs_hash,
    }
    if session.scalars(select(BlockRow).filter_by(**place)).one_or_none() is not None:
        return
    history.append(
        session,
        "blocked",
        key={"target_id": trial.target_id, "problem_id": trial.problem_id},
        now=Served(trial.knobs, None, None),
        trial_id=trial.id,
        environment_id=trial.environment_id,
        reason=f"{trial.status}: {trial.message.text}" if trial.message else trial.status,
    )
    session.add(
        BlockRow(
            **place,
            knobs=trial.knobs,
            status=trial.status,
            message_id=trial.message_id,
            trial_id=trial.id,
            created=utc_now(),
        )
    )


def blocked(
    session: Session, arch: str, kernel_source_hash: str, problem: Problem
) -> dict[Knobs, TrialResult]:
    """The list's knobs with the status and the reason of their fault, in the order of their coming."""
    found = rows.find(session, ProblemRow, problem)
    if found is None:
        return {}
    query = (
        select(BlockRow)
        .filter_by(arch=arch, kernel_source_hash=kernel_source_hash, problem_id=found.id)
        .order_by(BlockRow.id)
    )
    return dict(rows.readable(session.scalars(query), _stored))


def _stored(row: BlockRow) -> tuple[Knobs, TrialResult]:
    reason = row.message.text if row.message else ""
    return rows.knobs_of(row.knobs), TrialResult(status=row.status, reason=reason)


def blocks(session: Session, arch: str | None) -> list[Block]:
    """Every entry, or those of an architecture, in an order that does not tell when they came."""
    query = select(BlockRow)
    if arch is not None:
        query = query.filter(BlockRow.arch == arch)
    return sorted(rows.readable(session.scalars(query), _entry), key=_order)


def _entry(row: BlockRow) -> Block:
    return Block(
        arch=row.arch,
        kernel_source_hash=row.kernel_source_hash,
        problem=rows.to_record(row.problem, Problem),
        knobs=rows.knobs_of(row.knobs),
        status=row.status,
        reason=row.message.text if row.message else "",
        created=row.created,
    )


def _order(entry: Block) -> tuple[str | int, ...]:
    parts = (entry.arch, entry.kernel_source_hash, *entry.problem.to_dict().values())
    return *parts, rows.knobs_text(entry.knobs)
