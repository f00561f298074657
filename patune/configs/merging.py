"""Winners of a pack taken into the database, in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.configs import promotion, rows
from patune.configs.winner import Verdict, compare, utc_now

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.orm import Session

    from patune.configs.candidate import Candidate
    from patune.configs.models import RunRow
    from patune.configs.winner import Winner, WinnerKey
    from patune.environment import Environment
    from patune.target import Target


def merge(
    session: Session,
    incoming: Sequence[Winner],
    candidates: Mapping[WinnerKey, Sequence[Candidate]],
    *,
    imported_from: str,
    dry_run: bool,
) -> list[tuple[Verdict, str]]:
    """Decide per winner by :func:`patune.configs.winner.compare`, and take in what is better; a dry run only decides."""
    verdicts = []
    runs: dict[tuple[Target, Environment], RunRow] = {}
    for winner in incoming:
        verdict, why = compare(winner, rows.served(session, *winner.key))
        verdicts.append((verdict, why))
        if verdict == "kept" or dry_run:
            continue
        home = (winner.target, winner.environment)
        if home not in runs:
            command = f"patune import {imported_from}"
            runs[home] = rows.add_run(session, *home, sampler="import", seed=0, command=command)
            runs[home].ended = utc_now()
        beside = candidates.get(winner.key, ())
        promotion.take_in(session, runs[home], winner, beside, imported_from=imported_from)
    return verdicts
