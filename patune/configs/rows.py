"""Between database rows and the value records, and what one transaction does with them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from patune.configs.constraints import SQLITE
from patune.configs.models import (
    SPEEDUP_COLUMNS,
    EnvironmentRow,
    MessageRow,
    ProblemRow,
    RunRow,
    TargetRow,
    TrialRow,
    WinnerRow,
    WorkloadRow,
)
from patune.configs.winner import Speedup, Winner, utc_now
from patune.environment import Environment
from patune.errors import InvalidValueError
from patune.kernels.knobs import Knobs, knobs_from_dict, knobs_to_dict
from patune.problem import Problem, Workload
from patune.record import Record, canonical_json, digest
from patune.target import Target
from patune.trial import CountedWork, Timing, TrialResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.orm import Session

    from patune.configs.constraints import Base

LOGGER = logging.getLogger("patune")

RecordT = TypeVar("RecordT", bound=Record)
RowT = TypeVar("RowT", bound="Base")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTrial:
    """A trial as the database has it.

    Attributes:
        source: which part of the tuner proposed it.
        created: when it was recorded, UTC to the second.
        environment_key: :attr:`patune.environment.Environment.key` of its run.
    """

    id: int
    knobs: Knobs
    result: TrialResult
    source: str
    created: str
    environment_key: str


def to_record(row: Base, kind: type[RecordT]) -> RecordT:
    """The record whose fields are columns of the row."""
    return kind(**{f.name: getattr(row, f.name) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def find(session: Session, kind: type[RowT], record: Record) -> RowT | None:
    """The row of a record, if there is one; asked for once per session, which is one transaction."""
    found: dict[object, RowT] = session.info.setdefault(kind, {})
    if record not in found:
        row = session.scalars(select(kind).filter_by(**record.to_dict())).one_or_none()
        if row is None:
            return None
        found[record] = row
    return found[record]


def find_or_add(session: Session, kind: type[RowT], record: Record, **extra: object) -> RowT:
    """The row of a record, added when it is new."""
    row = find(session, kind, record)
    if row is None:
        _insert_once(session, kind, **record.to_dict(), **extra)
        row = find(session, kind, record)
        assert row is not None, "it was there, or it was added"
    return row


def _insert_once(session: Session, kind: type[Base], **values: object) -> None:
    """Add a row unless another process just did: one that is not committed yet is waited for."""
    insert = sqlite.insert if session.get_bind().dialect.name == SQLITE else postgresql.insert
    session.execute(insert(kind).values(**values).on_conflict_do_nothing())


@functools.lru_cache(maxsize=4096)
def knobs_of(text: str) -> Knobs:
    """Back from :func:`knobs_text`; trials of many sizes share few knobs."""
    return knobs_from_dict(json.loads(text))


def knobs_text(knobs: Knobs) -> str:
    """The one spelling of knobs in the database."""
    return canonical_json(knobs_to_dict(knobs))


def plain_text(text: str) -> str:
    """The text with what UTF-8 and PostgreSQL cannot carry replaced: compilers and paths emit anything."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def add_run(
    session: Session,
    target: Target,
    environment: Environment,
    *,
    sampler: str,
    seed: int,
    command: str,
) -> RunRow:
    """A new run, started now."""
    run = RunRow(
        target_id=find_or_add(session, TargetRow, target).id,
        environment_id=find_or_add(session, EnvironmentRow, environment, key=environment.key).id,
        sampler=sampler,
        seed=seed,
        command=plain_text(command),
        started=utc_now(),
    )
    session.add(run)
    session.flush()
    return run


def message_of(session: Session, message: str) -> int | None:
    """The id of a text, stored when it is new; None for an empty one."""
    if not message:
        return None
    plain = plain_text(message)
    sha256 = hashlib.sha256(plain.encode()).hexdigest()
    query = select(MessageRow.id).filter_by(sha256=sha256)
    found = session.scalars(query).one_or_none()
    if found is None:
        _insert_once(session, MessageRow, sha256=sha256, text=plain)
        found = session.scalars(query).one()
    return found


def _finite(error_rms: float | None) -> float | None:
    """An error that is not a finite number is none: JSON has no word for it, and the status tells it."""
    return error_rms if error_rms is not None and math.isfinite(error_rms) else None


def _facts_text(facts: dict[str, Any] | None) -> str | None:
    if facts is None:
        return None
    try:
        return canonical_json(facts)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"facts={facts!r} is not JSON: {error}.") from error


def add_trial(
    session: Session,
    run: RunRow,
    problem: Problem,
    workload: Workload,
    knobs: Knobs,
    result: TrialResult,
    *,
    source: str,
) -> TrialRow:
    """A new trial of a run."""
    row = TrialRow(
        run_id=run.id,
        target_id=run.target_id,
        environment_id=run.environment_id,
        problem_id=find_or_add(session, ProblemRow, problem).id,
        workload_id=find_or_add(session, WorkloadRow, workload).id,
        knobs=knobs_text(knobs),
        knobs_hash=digest(knobs_to_dict(knobs)),
        source=source,
        status=result.status,
        message_id=message_of(session, result.reason),
        gate_cases=result.gate_cases,
        error_rms=_finite(result.error_rms),
        evidence=result.evidence,
        facts=_facts_text(result.facts),
        seconds=result.seconds,
        created=utc_now(),
        **(result.timing.to_dict() if result.timing else {}),
        **(result.counted.to_dict() if result.counted else {}),
    )
    session.add(row)
    session.flush()
    return row


def _timing(row: TrialRow) -> Timing | None:
    return to_record(row, Timing) if row.median_us is not None else None


def _counted(row: TrialRow) -> CountedWork | None:
    return to_record(row, CountedWork) if row.busiest_simd_slots is not None else None


def stored_trial(row: TrialRow) -> StoredTrial:
    """The trial that a row holds."""
    return StoredTrial(
        id=row.id,
        knobs=knobs_of(row.knobs),
        result=TrialResult(
            status=row.status,
            reason=row.message.text if row.message else "",
            gate_cases=row.gate_cases,
            error_rms=_finite(row.error_rms),
            timing=_timing(row),
            counted=_counted(row),
            facts=json.loads(row.facts) if row.facts is not None else None,
            seconds=row.seconds,
        ),
        source=row.source,
        created=row.created,
        environment_key=row.environment.key,
    )


def _speedup(row: WinnerRow) -> Speedup | None:
    if row.speedup is None or row.speedup_low is None or row.speedup_high is None:
        return None
    return Speedup(ratio=row.speedup, low=row.speedup_low, high=row.speedup_high)


def speedup_columns(speedup: Speedup | None) -> dict[str, float | None]:
    """What a winner's row says about its speedup."""
    if speedup is None:
        return dict.fromkeys(SPEEDUP_COLUMNS)
    return dict(zip(SPEEDUP_COLUMNS, (speedup.ratio, speedup.low, speedup.high), strict=True))


def stored_winner(row: WinnerRow) -> Winner:
    """The winner that a row holds."""
    return Winner(
        target=to_record(row.target, Target),
        environment=to_record(row.trial.environment, Environment),
        problem=to_record(row.problem, Problem),
        workload=to_record(row.workload, Workload),
        knobs=knobs_of(row.trial.knobs),
        evidence=row.evidence,
        timing=_timing(row.trial),
        counted=_counted(row.trial),
        default_score=row.default_score,
        default_knobs=knobs_of(row.default_knobs) if row.default_knobs else None,
        trials=row.trials,
        gate_cases=row.trial.gate_cases,
        error_rms=_finite(row.trial.error_rms),
        created=row.created,
        imported_from=row.imported_from,
        speedup=_speedup(row),
    )


def score(trial: TrialRow) -> float | None:
    """What the search minimised."""
    return trial.median_us if trial.median_us is not None else trial.busiest_simd_slots


def readable(rows: Iterable[RowT], parse: Callable[[RowT], ValueT]) -> list[ValueT]:
    """The rows that this patune understands; another version's knobs or problems are skipped with a log line."""
    values = []
    for row in rows:
        try:
            values.append(parse(row))
        except (InvalidValueError, json.JSONDecodeError) as error:
            LOGGER.warning("Skipped row %s of %s: %s", row.id, row.__tablename__, error)  # type: ignore[attr-defined]
    return values


def key_ids(
    session: Session, target: Target, problem: Problem, workload: Workload
) -> dict[str, int] | None:
    """Row ids of a key; None when a part of it was never recorded."""
    found_target = find(session, TargetRow, target)
    found_problem = find(session, ProblemRow, problem)
    found_workload = find(session, WorkloadRow, workload)
    if found_target is None or found_problem is None or found_workload is None:
        return None
    return {
        "target_id": found_target.id,
        "problem_id": found_problem.id,
        "workload_id": found_workload.id,
    }


def served(session: Session, target: Target, problem: Problem, workload: Workload) -> Winner | None:
    """The winner of a key, unless it is retired."""
    key = key_ids(session, target, problem, workload)
    if key is None:
        return None
    query = select(WinnerRow).filter_by(**key).where(WinnerRow.state != "retired")
    found = readable(session.scalars(query), stored_winner)
    return found[0] if found else None
