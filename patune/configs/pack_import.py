"""Takes packs into a database, and tells what became of each entry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from patune.configs.pack_files import read_bounded
from patune.configs.pack_parser import parse_pack
from patune.errors import DocumentError
from patune.kernels.knobs import knobs_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from patune.configs.block import Block
    from patune.configs.pack import Pack
    from patune.configs.store import Store
    from patune.configs.winner import RobustWinner, Verdict, Winner

REPORT_SCHEMA = 2
MAX_CLOCK_SKEW = timedelta(days=1)  # a pack "from the future" would win every later comparison

Fate = Literal["added", "replaced", "kept", "skipped"]
FATES: tuple[Fate, ...] = ("added", "replaced", "kept", "skipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedEntry:
    """What became of one winner of a pack, and why."""

    fate: Fate
    reason: str
    winner: Winner


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedRobust:
    """What became of one robust winner of a pack, and why."""

    fate: Fate
    reason: str
    winner: RobustWinner


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedBlock:
    """What became of one entry of a pack's blocklist, and why."""

    fate: Fate
    reason: str
    block: Block


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did; with ``dry_run``, what it would do.

    Attributes:
        source: the pack file.
        public_key: the key that its signature was checked with; None when it was not.
    """

    source: str
    dry_run: bool
    entries: tuple[ImportedEntry, ...]
    robust: tuple[ImportedRobust, ...] = ()
    blocklist: tuple[ImportedBlock, ...] = ()
    public_key: str | None = None

    def _count(self, fate: Fate) -> int:
        return sum(entry.fate == fate for entry in self.entries)

    @property
    def added(self) -> int:
        """Winners of keys that had none."""
        return self._count("added")

    @property
    def replaced(self) -> int:
        """Winners that took another one's place."""
        return self._count("replaced")

    @property
    def kept(self) -> int:
        """Keys whose own winner stays."""
        return self._count("kept")

    @property
    def skipped(self) -> int:
        """Winners that this version's kernels cannot run."""
        return self._count("skipped")

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": REPORT_SCHEMA,
            "source": self.source,
            "public_key": self.public_key,
            "dry_run": self.dry_run,
            **{fate: self._count(fate) for fate in FATES},
            "entries": [
                {
                    "fate": entry.fate,
                    "reason": entry.reason,
                    "target": entry.winner.target.to_dict(),
                    "problem": entry.winner.problem.to_dict(),
                    "workload": entry.winner.workload.to_dict(),
                }
                for entry in self.entries
            ],
            "robust": [
                {
                    "fate": entry.fate,
                    "reason": entry.reason,
                    "target": entry.winner.target.to_dict(),
                    "problem": entry.winner.problem.to_dict(),
                    "objective": entry.winner.objective,
                }
                for entry in self.robust
            ],
            "blocklist": [
                {
                    "fate": entry.fate,
                    "reason": entry.reason,
                    "arch": entry.block.arch,
                    "problem": entry.block.problem.to_dict(),
                    "knobs": knobs_to_dict(entry.block.knobs),
                    "status": entry.block.status,
                }
                for entry in self.blocklist
            ],
        }


def import_pack(
    store: Store, source: Path, *, dry_run: bool = False, public_key: Path | None = None
) -> ImportReport:
    """Take a pack file in, all in one transaction.

    The better kind of evidence stays, then the newer, then the faster. Candidates come in as trials, with a winner
    that is taken in. Of robust winners the newer stays; blocklists are united. What this version's kernels cannot run is skipped.

    Args:
        store: the database.
        source: the pack file.
        dry_run: decide, and write nothing.
        public_key: refuse a pack without a signature of this key beside it, before it is parsed.

    Raises:
        DocumentError: an entry is bad, or the signature; the database is as it was.
        DatabaseError: the database cannot be written; it is as it was.
    """
    pack = checked_pack(source, public_key=public_key)
    return import_parsed(store, pack, source, dry_run=dry_run, public_key=public_key)


def checked_pack(source: Path, *, public_key: Path | None = None) -> Pack:
    """A pack file that may be taken in: signed where that is asked for, and of no later date than now.

    Raises:
        DocumentError: it must not; the message says why.
    """
    data = read_bounded(source)  # once: what was checked is what is parsed
    if public_key is not None:
        from patune.configs.signing import check_signature

        check_signature(source, data, public_key)
    pack = parse_pack(source, data)
    limit = (datetime.now(UTC) + MAX_CLOCK_SKEW).strftime("%Y-%m-%dT%H:%M:%SZ")
    _refuse_future(f"{source}: winners", [one.created for one in pack.winners], limit)
    _refuse_future(f"{source}: robust", [one.created for one in pack.robust], limit)
    _refuse_future(f"{source}: blocklist", [one.created for one in pack.blocklist], limit)
    return pack


def _refuse_future(where: str, dates: Iterable[str], limit: str) -> None:
    for index, created in enumerate(dates):
        if created > limit:
            raise DocumentError(
                f"{where}[{index}]: created={created!r} is in the future; check this machine's clock."
            )


def import_parsed(
    store: Store,
    pack: Pack,
    source: Path,
    *,
    dry_run: bool = False,
    public_key: Path | None = None,
) -> ImportReport:
    """As :func:`import_pack`, of a pack that was read and checked.

    Raises:
        DatabaseError: the database cannot be written; it is as it was.
    """
    from patune.kernels.feasibility import is_feasible

    refused = [is_feasible(w.knobs, w.problem, w.target) for w in pack.winners]
    usable = [w for w, why in zip(pack.winners, refused, strict=True) if why is None]
    candidates = {
        w.key: tuple(
            c
            for c in pack.candidates.get(w.key, ())
            if is_feasible(c.knobs, w.problem, w.target) is None
        )
        for w in usable
    }
    unfit = [is_feasible(w.knobs, w.problem, w.target) for w in pack.robust]
    merged = store.merge(
        usable,
        candidates,
        robust=[w for w, why in zip(pack.robust, unfit, strict=True) if why is None],
        blocks=pack.blocklist,
        imported_from=source.name,
        dry_run=dry_run,
    )
    winners = zip(pack.winners, _fates(refused, merged.winners), strict=True)
    robust = zip(pack.robust, _fates(unfit, merged.robust), strict=True)
    blocks = zip(pack.blocklist, merged.blocks, strict=True)
    return ImportReport(
        source=str(source),
        dry_run=dry_run,
        entries=tuple(ImportedEntry(fate=f, reason=why, winner=w) for w, (f, why) in winners),
        robust=tuple(ImportedRobust(fate=f, reason=why, winner=w) for w, (f, why) in robust),
        blocklist=tuple(ImportedBlock(fate=f, reason=why, block=b) for b, (f, why) in blocks),
        public_key=None if public_key is None else str(public_key),
    )


def _fates(
    refused: Sequence[str | None], verdicts: Sequence[tuple[Verdict, str]]
) -> list[tuple[Fate, str]]:
    """What was refused here and what the store decided, in the order of the pack."""
    decided = iter(verdicts)
    return [("skipped", why) if why is not None else next(decided) for why in refused]
