"""What differs between two packs: what was added, removed or changed, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from patune.configs.pack import block_order, robust_order, winner_order
from patune.kernels.knobs import knobs_to_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from patune.configs.block import Block
    from patune.configs.pack import Pack
    from patune.configs.winner import RobustWinner, Winner

DIFF_SCHEMA = 1

Change = Literal["added", "removed", "changed"]
CHANGES: tuple[Change, ...] = ("added", "removed", "changed")
EntryT = TypeVar("EntryT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key whose entry is not the same in both.

    Attributes:
        before, after: the winner in each; None where there is none.
        changed: the fields that differ, ``candidates`` among them; empty unless both have one.
    """

    before: Winner | None
    after: Winner | None
    changed: tuple[str, ...] = ()

    @property
    def change(self) -> Change:
        """Seen from the first pack."""
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "changed"

    @property
    def percent(self) -> float | None:
        """By how much the score rose (slower) or fell (faster); None where the two were not scored in the same way."""
        before, after = self.before, self.after
        if before is None or after is None or before.evidence != after.evidence:
            return None
        protocols = {one.timing.protocol if one.timing else None for one in (before, after)}
        if len(protocols) > 1 or before.score == 0:
            return None
        return 100 * (after.score / before.score - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        known = self.before or self.after
        assert known is not None, "one of them is there"
        return {
            "change": self.change,
            "changed": list(self.changed),
            "percent": self.percent,
            "target": known.target.to_dict(),
            "problem": known.problem.to_dict(),
            "workload": known.workload.to_dict(),
            "before": _side(self.before),
            "after": _side(self.after),
        }


def _side(winner: Winner | None) -> dict[str, Any] | None:
    if winner is None:
        return None
    return {
        "knobs": knobs_to_dict(winner.knobs),
        "evidence": winner.evidence,
        "score": winner.score,
        "created": winner.created,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PackDiff:
    """What differs between two packs; empty lists when they say the same.

    Attributes:
        unchanged: winners that are the same in both.
    """

    winners: list[Difference]
    robust: list[tuple[Change, RobustWinner]]
    blocklist: list[tuple[Change, Block]]
    unchanged: int

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not (self.winners or self.robust or self.blocklist)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": DIFF_SCHEMA,
            "equal": self.equal,
            **{name: sum(one.change == name for one in self.winners) for name in CHANGES},
            "unchanged": self.unchanged,
            "winners": [one.to_dict() for one in self.winners],
            "robust": [{"change": change, **one.to_dict()} for change, one in self.robust],
            "blocklist": [{"change": change, **one.to_dict()} for change, one in self.blocklist],
        }


def diff_packs(before: Pack, after: Pack) -> PackDiff:
    """What differs, in the order of the keys. Who imported a winner is no part of a pack."""
    found = []
    unchanged = 0
    for old, new in _pairs(before.winners, after.winners, winner_order):
        fields = _changed_fields(before, old, after, new)
        if old is None or new is None or fields:
            found.append(Difference(before=old, after=new, changed=fields))
        else:
            unchanged += 1
    return PackDiff(
        winners=found,
        robust=list(_changes(before.robust, after.robust, robust_order)),
        blocklist=list(_changes(before.blocklist, after.blocklist, block_order)),
        unchanged=unchanged,
    )


def _changed_fields(
    before: Pack, old: Winner | None, after: Pack, new: Winner | None
) -> tuple[str, ...]:
    if old is None or new is None:
        return ()
    mine, theirs = old.to_dict(), new.to_dict()
    del mine["imported_from"], theirs["imported_from"]
    mine["candidates"] = before.candidates.get(old.key, ())
    theirs["candidates"] = after.candidates.get(new.key, ())
    return tuple(name for name in mine if mine[name] != theirs[name])


def _changes(
    before: Sequence[EntryT], after: Sequence[EntryT], order: Callable[[EntryT], Any]
) -> Iterator[tuple[Change, EntryT]]:
    for old, new in _pairs(before, after, order):
        if new is None:
            assert old is not None, "one of them is there"
            yield "removed", old
        elif old is None:
            yield "added", new
        elif old != new:
            yield "changed", new


def _pairs(
    before: Sequence[EntryT], after: Sequence[EntryT], order: Callable[[EntryT], Any]
) -> Iterator[tuple[EntryT | None, EntryT | None]]:
    old = {order(one): one for one in before}
    new = {order(one): one for one in after}
    for key in sorted(old.keys() | new.keys()):
        yield old.get(key), new.get(key)
