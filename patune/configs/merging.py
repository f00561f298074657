"""What a pack changes in a database, and which of two entries stays: one transaction, which :meth:`patune.configs.store.Store.merge` opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

from patune.configs import blocklist, promotion, robust, rows
from patune.configs.models import BlockRow, ProblemRow, TargetRow, WinnerRow
from patune.configs.winner import Verdict, compare, compare_robust, utc_now
from patune.environment import Environment
from patune.problem import Workload
from patune.record import digest
from patune.target import Target
from patune.trial import TrialResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.orm import Session

    from patune.configs.block import Block
    from patune.configs.candidate import Candidate
    from patune.configs.models import RunRow
    from patune.configs.winner import RobustWinner, Winner, WinnerKey

NOT_RECORDED = "not recorded"  # versions of the machine where a pack's fault was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What became of each entry and why, in the order in which they were given."""

    winners: list[tuple[Verdict, str]]
    robust: list[tuple[Verdict, str]]
    blocks: list[tuple[Verdict, str]]


class Merger:
    """Takes a pack's entries into one transaction's session.

    Attributes:
        name: the pack's name, for the rows.
        dry_run: decide, and write nothing.
    """

    def __init__(self, session: Session, *, imported_from: str, dry_run: bool) -> None:
        self.session = session
        self.name = rows.plain_text(imported_from)
        self.dry_run = dry_run
        self._runs: dict[tuple[Target, Environment], RunRow] = {}

    def _run(self, target: Target, environment: Environment) -> RunRow:
        """The import's run of a device and an environment."""
        home = (target, environment)
        if home not in self._runs:
            command = f"patune import {self.name}"
            run = rows.add_run(self.session, *home, sampler="import", seed=0, command=command)
            run.ended = utc_now()
            self._runs[home] = run
        return self._runs[home]

    def winner(self, incoming: Winner, candidates: Sequence[Candidate]) -> tuple[Verdict, str]:
        """Take a winner in, with what came next, unless the standing one is better."""
        verdict, why = compare(incoming, rows.served(self.session, *incoming.key))
        if verdict != "kept" and not self.dry_run:
            run = self._run(incoming.target, incoming.environment)
            promotion.take_in(self.session, run, incoming, candidates, imported_from=self.name)
        return verdict, why

    def robust(self, incoming: RobustWinner) -> tuple[Verdict, str]:
        """Take a robust winner in, unless the standing one is as new."""
        verdict, why = compare_robust(incoming, self._standing_robust(incoming))
        if verdict != "kept" and not self.dry_run:
            robust.put(self.session, incoming)
        return verdict, why

    def _standing_robust(self, incoming: RobustWinner) -> RobustWinner | None:
        stored = robust.stored(self.session, incoming.target, incoming.problem)
        return next((one for one in stored if one.objective == incoming.objective), None)

    def block(self, incoming: Block) -> tuple[Verdict, str]:
        """Put an entry on the blocklist, unless it is there. Its fault becomes a trial, which the entry refers to."""
        problem = rows.find(self.session, ProblemRow, incoming.problem)
        knobs_hash = digest(incoming.to_dict()["knobs"])
        served = 0
        if problem is not None:
            place = {
                "arch": incoming.arch,
                "kernel_source_hash": incoming.kernel_source_hash,
                "problem_id": problem.id,
                "knobs_hash": knobs_hash,
            }
            if self.session.scalars(select(BlockRow.id).filter_by(**place)).first() is not None:
                return "kept", "on the blocklist here already"
            served = self._served(incoming, problem.id)
        if not self.dry_run:
            self._add_block(incoming)
        why = f"{incoming.status}, confirmed on another machine"
        if served:
            why += f"; served here for {served} key{'s' if served > 1 else ''}, which other knobs answer from now on"
        return "added", why

    def _served(self, block: Block, problem_id: int) -> int:
        """For how many keys the knobs are served now."""
        query = (
            select(WinnerRow)
            .join(WinnerRow.target)
            .where(TargetRow.arch == block.arch, WinnerRow.problem_id == problem_id)
            .where(WinnerRow.state != "retired")
        )
        found = rows.readable(self.session.scalars(query), rows.stored_winner)
        return sum(winner.knobs == block.knobs for winner in found)

    def _add_block(self, block: Block) -> None:
        environment = Environment(
            patune=NOT_RECORDED,
            triton=NOT_RECORDED,
            torch=NOT_RECORDED,
            python=NOT_RECORDED,
            compiler=NOT_RECORDED,
            driver=NOT_RECORDED,
            fp_fusion=True,
            kernel_source_hash=block.kernel_source_hash,
        )
        trial = rows.add_trial(
            self.session,
            self._run(Target.named(block.arch), environment),
            block.problem,
            Workload(batch=1, kv_heads=1, context=block.problem.block_size),
            block.knobs,
            TrialResult(status=block.status, reason=block.reason),
            source="pack",
        )
        blocklist.block(self.session, trial)
        self.session.flush()
        row = self.session.scalars(select(BlockRow).filter_by(trial_id=trial.id)).one()
        row.created = block.created  # when it was seen there, not when it came here
        self.session.flush()


def merge(
    session: Session,
    incoming: Sequence[Winner],
    candidates: Mapping[WinnerKey, Sequence[Candidate]] | None = None,
    *,
    robust: Sequence[RobustWinner] = (),
    blocks: Sequence[Block] = (),
    imported_from: str,
    dry_run: bool = False,
) -> Merged:
    """Take a pack's entries in, in the session's transaction; says of each what became of it and why.

    The rules are :func:`patune.configs.winner.compare` and :func:`patune.configs.winner.compare_robust`; blocklists are united.
    The candidates of a winner's key become trials when it is taken in. A dry run decides and writes nothing.
    """
    merger = Merger(session, imported_from=imported_from, dry_run=dry_run)
    # The blocklist first: what it says about the winners here is then the same in a dry run.
    blocked = [merger.block(one) for one in blocks]
    return Merged(
        winners=[merger.winner(one, (candidates or {}).get(one.key, ())) for one in incoming],
        robust=[merger.robust(one) for one in robust],
        blocks=blocked,
    )
