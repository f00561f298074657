"""The best trials of a key. The newest trial of an environment speaks for its knobs: a later gate that finds them wrong is believed."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from patune.configs import rows
from patune.configs.candidate import MAX_ADOPTED, MAX_CANDIDATES, Candidate
from patune.configs.models import EnvironmentRow, TargetRow, TrialRow
from patune.errors import InvalidValueError
from patune.record import canonical_json
from patune.target import Target
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

    from patune.configs.models import WinnerRow
    from patune.configs.rows import StoredTrial
    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload


def newest(key: Mapping[str, int]) -> Select[int]:
    """Ids of the trials that speak for their knobs: per environment the newest; a duplicate says itself that another one does.

    Within an environment knobs have one spelling: it names the version of the kernels.
    """
    return (
        select(func.max(TrialRow.id))
        .filter_by(**key)
        .where(TrialRow.status != "duplicate")
        .group_by(TrialRow.environment_id, TrialRow.knobs)
    )


def ranked(session: Session, key: Mapping[str, int]) -> list[StoredTrial]:
    """The ok trials of a key with different knobs, best first.

    Measured ones come first, then those of the newest protocol: times of different protocols are not compared.
    """
    query = (
        select(TrialRow)
        .where(TrialRow.id.in_(newest(key)), TrialRow.status == "ok")
        .order_by(TrialRow.id)
    )
    trials = rows.readable(session.scalars(query), rows.stored_trial)
    newest_of = {_protocol(trial): trial.id for trial in trials}

    def order(trial: StoredTrial) -> tuple[int, int, float, int]:
        rank = EVIDENCE_RANK[str(trial.result.evidence)]
        points = trial.result.score
        assert points is not None, "an ok trial has evidence"
        return -rank, -newest_of[_protocol(trial)], points, trial.id

    return sorted({trial.knobs: trial for trial in trials}.values(), key=order)


def _protocol(trial: StoredTrial) -> str | None:
    return trial.result.timing.protocol if trial.result.timing else None


def runners_up(session: Session, winner: Winner, most: int) -> tuple[Candidate, ...]:
    """The best knobs besides a winner's that were scored as it was: same environment, kind of evidence and protocol."""
    key = rows.key_ids(session, *winner.key)
    environment = rows.find(session, EnvironmentRow, winner.environment)
    if key is None or environment is None:
        return ()
    query = (
        select(TrialRow)
        .where(TrialRow.id.in_(newest(key | {"environment_id": environment.id})))
        # Emulated trials have no protocol, so this asks for the kind of evidence as well.
        .filter_by(status="ok", protocol=winner.timing.protocol if winner.timing else None)
        .order_by(TrialRow.id)
    )
    trials = rows.readable(session.scalars(query), rows.stored_trial)
    last = {trial.knobs: trial for trial in trials}
    last.pop(winner.knobs, None)
    found = [
        Candidate(
            knobs=knobs,
            timing=trial.result.timing,
            counted=trial.result.counted,
            gate_cases=trial.result.gate_cases,
        )
        for knobs, trial in last.items()
    ]
    # Equal scores by their knobs' spelling, so that a pack does not tell in which order they were tried.
    return tuple(sorted(found, key=lambda c: (c.score, rows.knobs_text(c.knobs)))[:most])


def fill_top(session: Session, row: WinnerRow) -> None:
    """Write beside a winner what :func:`runners_up` finds, for serving: once, when the winner is set."""
    key = {name: getattr(row, name) for name in ("target_id", "problem_id", "workload_id")}
    scored = func.coalesce(TrialRow.median_us, TrialRow.busiest_simd_slots)
    query = (
        select(scored, TrialRow.knobs)
        .where(TrialRow.id.in_(newest(key | {"environment_id": row.environment_id})))
        .where(TrialRow.status == "ok", TrialRow.id != row.trial_id)
        .where(TrialRow.protocol.is_not_distinct_from(row.trial.protocol))
    )
    found: dict[Knobs, list[Any]] = {}
    winning = rows.knobs_of(row.trial.knobs)
    # Not in SQL: servers sort texts by their language.
    for points, text in sorted(session.execute(query).all(), key=tuple):
        try:
            knobs = rows.knobs_of(text)
        except (InvalidValueError, json.JSONDecodeError):
            continue
        if knobs != winning:
            found.setdefault(knobs, [points, json.loads(text)])
        if len(found) == MAX_CANDIDATES:
            break
    row.top = canonical_json(list(found.values()))
    session.flush()


def _stands(session: Session, winner: Winner) -> bool:
    """Whether no later trial of a winner's environment found its knobs at fault."""
    key = rows.key_ids(session, *winner.key)
    environment = rows.find(session, EnvironmentRow, winner.environment)
    if key is None or environment is None:
        return True
    speaking = newest(key | {"environment_id": environment.id})
    query = select(TrialRow.status).where(
        TrialRow.id.in_(speaking), TrialRow.knobs == rows.knobs_text(winner.knobs)
    )
    return all(status == "ok" for status in session.scalars(query))


def candidates(session: Session, arch: str, problem: Problem, workload: Workload) -> list[Knobs]:
    """Winners of every device of an architecture, then their best trials in turn: scores of different devices are not compared."""
    devices = session.scalars(select(TargetRow).filter_by(arch=arch).order_by(TargetRow.id))
    targets = [rows.to_record(row, Target) for row in devices]
    found = [rows.served(session, target, problem, workload) for target in targets]
    standing = [winner for winner in found if winner is not None and _stands(session, winner)]
    standing.sort(key=lambda w: (EVIDENCE_RANK[w.evidence], w.created), reverse=True)
    keys = [rows.key_ids(session, target, problem, workload) for target in targets]
    best = [
        [t.knobs for t in ranked(session, key)[:MAX_ADOPTED]] for key in keys if key is not None
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*best))
    every = [*(winner.knobs for winner in standing), *(k for k in in_turn if k is not None)]
    return list(dict.fromkeys(every))[:MAX_ADOPTED]
