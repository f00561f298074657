"""Winners set, kept and retired: each with its runners-up beside it and an event in the history."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from patune.configs import history, ranking, rows
from patune.configs.models import TrialRow, WinnerRow
from patune.configs.winner import utc_now
from patune.errors import InvalidValueError
from patune.trial import EVIDENCE_RANK, TrialResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.orm import Session

    from patune.configs.candidate import Candidate
    from patune.configs.history import Served
    from patune.configs.models import RunRow
    from patune.configs.winner import Speedup, Winner

KEY = ("target_id", "problem_id", "workload_id")


def _key(row: TrialRow | WinnerRow) -> dict[str, int | None]:
    return {name: getattr(row, name) for name in KEY}


def standing(session: Session, key: Mapping[str, int | None]) -> WinnerRow | None:
    """The winner of a key, retired or not."""
    return session.scalars(select(WinnerRow).filter_by(**key)).one_or_none()


def check_promotable(trial: TrialRow, default: TrialRow | None, speedup: Speedup | None) -> None:
    """Refuse a trial that cannot win, and what it cannot have been compared with.

    Raises:
        InvalidValueError: the trial did not end ok, the default's is of another key or environment, or has no time for a speedup.
    """
    if trial.status != "ok":
        raise InvalidValueError(
            f"trial_id={trial.id} ended as {trial.status!r} and cannot win; allowed: a trial with status 'ok'."
        )
    for name in ("target_id", "environment_id", "problem_id", "workload_id"):
        if default is not None and getattr(default, name) != getattr(trial, name):
            raise InvalidValueError(
                f"default_trial_id={default.id} is of another {name[:-3]} than trial {trial.id}; "
                "allowed: a trial of the same target, environment, problem and workload."
            )
    if speedup is None:
        return
    kinds = trial.evidence, default.evidence if default is not None else None
    if kinds != ("measured", "measured"):
        raise InvalidValueError(
            f"speedup is set, and the evidence of the trial and of the default's is {kinds}; allowed: both measured."
        )


def promote(
    session: Session, trial: TrialRow, default: TrialRow | None, speedup: Speedup | None
) -> WinnerRow:
    """The winner of a trial's key after it was proposed: itself, unless a better kind of evidence stands."""
    row = standing(session, _key(trial))
    before = history.served_by(row)
    if row is not None and before is not None and _outranks(row, trial):
        reason = f"{row.evidence}: the {trial.evidence} trial {trial.id} does not take its place"
        _tell(session, row, "kept", before, reason)
        return row
    comparable = default is not None and default.evidence == trial.evidence
    row = _set_winner(
        session,
        row,
        trial,
        default_trial_id=default.id if default else None,
        default_knobs=default.knobs if default else None,
        default_score=rows.score(default) if default and comparable else None,
        trials=_tried(session, trial),
        created=utc_now(),
        imported_from=None,
        **rows.speedup_columns(speedup),
    )
    ranking.fill_top(session, row)
    again = before is not None and before[:2] == (trial.knobs, trial.evidence)
    _tell(session, row, "kept" if again else "promoted", before, _words(row, before))
    return row


def take_in(
    session: Session,
    run: RunRow,
    winner: Winner,
    candidates: Sequence[Candidate],
    *,
    imported_from: str,
) -> WinnerRow:
    """Make a pack's winner the winner of its key; it and its candidates become trials of the import's run."""

    def add(one: Winner | Candidate, error_rms: float | None) -> TrialRow:
        result = TrialResult(
            status="ok",
            gate_cases=one.gate_cases,
            error_rms=error_rms,
            timing=one.timing,
            counted=one.counted,
        )
        return rows.add_trial(
            session, run, winner.problem, winner.workload, one.knobs, result, source="pack"
        )

    trial = add(winner, winner.error_rms)
    row = standing(session, _key(trial))
    before = history.served_by(row)
    for candidate in candidates:
        add(candidate, None)
    row = _set_winner(
        session,
        row,
        trial,
        default_trial_id=None,
        default_knobs=rows.knobs_text(winner.default_knobs) if winner.default_knobs else None,
        default_score=winner.default_score,
        trials=winner.trials,
        created=winner.created,
        imported_from=imported_from,
        **rows.speedup_columns(winner.speedup),
    )
    ranking.fill_top(session, row)
    _tell(session, row, "imported", before, f"from {imported_from}; {_words(row, before)}")
    return row


def retire(session: Session, key: Mapping[str, int], reason: str) -> Winner | None:
    """Serve a key's winner no more; gives it back, or None when there was none."""
    row = standing(session, key)
    before = history.served_by(row)
    if row is None or before is None:
        return None
    row.state = "retired"
    history.append(session, "retired", key=key, before=before, reason=reason)
    found = rows.readable([row], rows.stored_winner)
    return found[0] if found else None


def _tell(session: Session, row: WinnerRow, event: str, before: Served | None, reason: str) -> None:
    history.append(
        session,
        event,
        key=_key(row),
        now=history.served_by(row),
        before=before,
        trial_id=row.trial_id,
        environment_id=row.environment_id,
        reason=reason,
    )


def _words(row: WinnerRow, before: Served | None) -> str:
    """Why a winner took its place, in words."""
    score = rows.score(row.trial)
    if before is None:
        return "nothing was served before"
    if before.evidence != row.evidence:
        return f"{row.evidence}, {before.evidence} before"
    same = "the same configuration, scored anew: " if before.knobs == row.trial.knobs else ""
    return f"{same}{score:g}, {before.score:g} before"


def _outranks(row: WinnerRow, trial: TrialRow) -> bool:
    """Whether a winner stays because its kind of evidence is the better one."""
    return EVIDENCE_RANK[row.evidence] > EVIDENCE_RANK[str(trial.evidence)]


def _tried(session: Session, trial: TrialRow) -> int:
    """Configurations tried for a trial's key in its environment; a finalist that was timed again counts once."""
    return session.scalars(
        select(func.count(TrialRow.knobs_hash.distinct())).filter_by(
            **_key(trial), environment_id=trial.environment_id
        )
    ).one()


def _set_winner(
    session: Session, row: WinnerRow | None, trial: TrialRow, **values: object
) -> WinnerRow:
    """Make a trial the winner of its key."""
    if row is None:
        row = WinnerRow(**_key(trial))
        session.add(row)
    for name, value in values.items():
        setattr(row, name, value)
    row.trial_id, row.status, row.evidence = trial.id, trial.status, str(trial.evidence)
    row.environment_id = trial.environment_id
    row.state, row.top = "fresh", "[]"
    session.flush()
    session.expire(row)
    return row
