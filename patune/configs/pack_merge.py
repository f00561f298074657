"""Makes one pack of several, by the rule that imports follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.configs.pack import Pack
from patune.configs.winner import Verdict, compare, compare_robust

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from patune.configs.block import Block, BlockKey
    from patune.configs.winner import RobustWinner, Winner, WinnerKey

MERGE_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A winner that met one of the same key, and what became of it.

    Attributes:
        source: the pack that it is from.
    """

    source: str
    fate: Verdict
    reason: str
    winner: Winner

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "source": self.source,
            "fate": self.fate,
            "reason": self.reason,
            "target": self.winner.target.to_dict(),
            "problem": self.winner.problem.to_dict(),
            "workload": self.winner.workload.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedPack:
    """Several packs as one.

    Attributes:
        conflicts: keys that more than one pack has, in the order of the packs; entries that are the same are none.
    """

    pack: Pack
    conflicts: list[Conflict]


def merge_packs(packs: Iterable[tuple[Path, Pack]]) -> MergedPack:
    """One pack of several, in their order: the better kind of evidence stays, then the newer, then the faster.

    A winner keeps its own candidates. Of robust winners the newer stays; blocklists are united, and the earlier entry stays.
    """
    winners: dict[WinnerKey, Winner] = {}
    candidates = {}
    robust: dict[object, RobustWinner] = {}
    blocks: dict[BlockKey, Block] = {}
    conflicts = []
    for source, pack in packs:
        for winner in pack.winners:
            standing = winners.get(winner.key)
            verdict, why = compare(winner, standing)
            if verdict != "kept":
                winners[winner.key] = winner
                candidates[winner.key] = pack.candidates.get(winner.key, ())
            if standing is not None and standing != winner:
                conflict = Conflict(source=str(source), fate=verdict, reason=why, winner=winner)
                conflicts.append(conflict)
        for one in pack.robust:
            place = one.target, one.problem, one.objective
            if compare_robust(one, robust.get(place))[0] != "kept":
                robust[place] = one
        for block in pack.blocklist:
            blocks.setdefault(block.key, block)
    merged = Pack(
        winners=list(winners.values()),
        candidates={key: beside for key, beside in candidates.items() if beside},
        robust=list(robust.values()),
        blocklist=list(blocks.values()),
    )
    return MergedPack(pack=merged, conflicts=conflicts)
