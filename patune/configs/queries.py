"""What the store asks within one transaction, of many keys at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from patune.configs import rows
from patune.configs.models import (
    EnvironmentRow,
    ProblemRow,
    TargetRow,
    TrialRow,
    WinnerRow,
    WorkloadRow,
)
from patune.problem import Problem, Workload
from patune.trial import WITH_EVIDENCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

    from patune.configs.rows import StoredTrial
    from patune.configs.winner import Winner
    from patune.environment import Environment


# Failures that the build or the computed values prove. Faults of a device are settled when they are on the blocklist.
SETTLED = ("compile_error", "out_of_resources", "spills", "wrong", "nonfinite", "flaky")


def winners(session: Session, arch: str | None, problem: Mapping[str, int | None]) -> list[Winner]:
    """Winners that are not retired, of an architecture and of problems with the values that are given."""
    query = (
        select(WinnerRow)
        .join(WinnerRow.target)
        .join(WinnerRow.problem)
        .where(WinnerRow.state != "retired")
        .where(
            *(getattr(ProblemRow, n) == value for n, value in problem.items() if value is not None)
        )
    )
    if arch is not None:
        query = query.where(TargetRow.arch == arch)
    return sorted(rows.readable(session.scalars(query), rows.stored_winner), key=_sort_key)


def _sort_key(winner: Winner) -> tuple[str | int, ...]:
    return tuple(
        value
        for part in (winner.target, winner.problem, winner.workload)
        for value in part.to_dict().values()
    )


def arch_trials(
    session: Session, arch: str, environment: Environment
) -> list[tuple[Problem, Workload, StoredTrial]]:
    """Trials with evidence or a settled failure, of every key of an architecture in one environment; one query."""
    of_it = select(EnvironmentRow.id).filter_by(key=environment.key).scalar_subquery()
    query = (
        select(TrialRow, ProblemRow, WorkloadRow)
        .join(TargetRow, TargetRow.id == TrialRow.target_id)
        .join(ProblemRow, ProblemRow.id == TrialRow.problem_id)
        .join(WorkloadRow, WorkloadRow.id == TrialRow.workload_id)
        .where(TargetRow.arch == arch, TrialRow.environment_id == of_it)
        .where(TrialRow.status.in_((*WITH_EVIDENCE, *SETTLED)))
        .order_by(TrialRow.id)
    )
    problems: dict[int, Problem] = {}
    workloads: dict[int, Workload] = {}
    found = session.execute(query).all()
    keys = {trial.id: (problem, workload) for trial, problem, workload in found}

    def parse(trial: TrialRow) -> tuple[Problem, Workload, StoredTrial]:
        problem, workload = keys[trial.id]
        if problem.id not in problems:
            problems[problem.id] = rows.to_record(problem, Problem)
        if workload.id not in workloads:
            workloads[workload.id] = rows.to_record(workload, Workload)
        return problems[problem.id], workloads[workload.id], rows.stored_trial(trial)

    return rows.readable([trial for trial, _, _ in found], parse)
