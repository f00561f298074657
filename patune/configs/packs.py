"""Packs: winners, what came next, robust winners and the blocklist in a JSON file, to ship to other machines.

A pack from elsewhere is untrusted: it is bounded in size, checked field by field, and taken in wholly or not at all.
Reading one needs no SQLAlchemy, so lookups read the shipped ones.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from patune.configs.candidate import Candidate
from patune.configs.pack import (
    SCHEMA,
    Pack,
    document_of,
    pack_document,
    pack_text,
)
from patune.configs.pack_files import check_destination, read_bounded, write_whole
from patune.configs.pack_import import (
    ImportedEntry,
    ImportReport,
    checked_pack,
    import_pack,
    import_parsed,
)
from patune.configs.pack_parser import parse_pack
from patune.errors import DocumentError

if TYPE_CHECKING:
    from pathlib import Path

    from patune.configs.block import Block
    from patune.configs.store import Store
    from patune.configs.winner import RobustWinner, Winner
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload

__all__ = [
    "SCHEMA",
    "Candidate",
    "ImportReport",
    "ImportedEntry",
    "Pack",
    "checked_pack",
    "document_of",
    "export_pack",
    "import_pack",
    "import_parsed",
    "load_pack",
    "pack_document",
    "pack_text",
    "packed_candidates",
    "parse_pack",
    "read_pack",
    "stored_pack",
    "write_pack",
]

LOGGER = logging.getLogger("patune")
KEPT_PACKS = 64  # parsed packs that packed_candidates keeps; the shipped one takes 0.5 MB


def stored_pack(
    store: Store,
    *,
    arch: str | None = None,
    block_size: int | None = None,
    head_dim: int | None = None,
    qg: int | None = None,
) -> Pack:
    """What a database serves and what came next, its robust winners and its blocklist; all, or of an architecture and of problems."""
    wanted = {"block_size": block_size, "head_dim": head_dim, "qg": qg}

    def matches(of: str, problem: Problem) -> bool:
        core = all(v is None or getattr(problem, name) == v for name, v in wanted.items())
        return core and arch in (None, of)

    winners = store.winners(arch=arch, **wanted)
    robust: list[RobustWinner] = store.robust()
    blocks: list[Block] = store.blocks(arch=arch)
    return Pack(
        winners=winners,
        candidates=store.runners_up(winners),
        robust=[one for one in robust if matches(one.target.arch, one.problem)],
        blocklist=[one for one in blocks if matches(one.arch, one.problem)],
    )


def export_pack(
    store: Store,
    destination: Path | None,
    *,
    arch: str | None = None,
    block_size: int | None = None,
    head_dim: int | None = None,
    qg: int | None = None,
) -> dict[str, Any]:
    """What is stored as a pack, written to ``destination`` unless that is None.

    The same content gives the same bytes. A reader sees the old file or the new one, never half of it.

    Raises:
        InvalidValueError: the destination cannot be written.
        DocumentError: an entry of the database is not one that a pack can carry; nothing was written.
    """
    pack = stored_pack(store, arch=arch, block_size=block_size, head_dim=head_dim, qg=qg)
    document = document_of(pack)
    write_pack(document, destination)
    return document


def write_pack(document: dict[str, Any], destination: Path | None) -> bytes:
    """The bytes of a pack, written to ``destination`` unless that is None. What nobody could read is not written.

    Raises:
        InvalidValueError: the destination cannot be written.
        DocumentError: an entry is not one that a pack can carry.
    """
    if destination is not None:
        check_destination(destination)
    data = pack_text(document).encode()
    parse_pack("The pack would be refused wherever it is read", data)
    if destination is not None:
        write_whole(destination, data)
    return data


def read_pack(source: Path) -> list[Winner]:
    """The winners of a pack file.

    Raises:
        DocumentError: as :func:`load_pack`.
    """
    return load_pack(source).winners


def load_pack(source: Path) -> Pack:
    """What a pack file holds.

    Raises:
        DocumentError: the file is not a pack of a schema up to this one; the message names the entry and the field.
    """
    return parse_pack(source, read_bounded(source))


def packed_candidates(*, arch: str, problem: Problem, workload: Workload) -> list[Knobs]:
    """What the shipped packs have for a key, of every device of the architecture: winners first, then their candidates.

    A pack is parsed once, until its file changes. One that cannot be read costs a log line.
    """
    from patune.configs import dispatcher

    winners: list[Knobs] = []
    others: list[Knobs] = []
    for path in sorted(dispatcher.PACKS.rglob("*.json")):
        try:
            facts = path.stat()
            found = _by_key(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)
        except (OSError, DocumentError) as error:
            LOGGER.warning("Going on without a pack: %s", error)
            continue
        for winner, beside in found.get((arch, problem, workload), ()):
            winners.append(winner)
            others += beside
    return list(dict.fromkeys(winners + others))


_Found = dict[tuple[str, "Problem", "Workload"], list[tuple["Knobs", list["Knobs"]]]]


@functools.lru_cache(maxsize=KEPT_PACKS)
def _by_key(path: Path, _mtime_ns: int, _size: int, _inode: int) -> _Found:
    """A pack's knobs by key. Parsing takes 15 ms for 32 winners (a busy core), and a sweep asks for every key."""
    pack = load_pack(path)
    found: _Found = {}
    for winner in pack.winners:
        beside = [candidate.knobs for candidate in pack.candidates.get(winner.key, ())]
        place = winner.target.arch, winner.problem, winner.workload
        found.setdefault(place, []).append((winner.knobs, beside))
    return found
