"""What a pack holds, and its one spelling."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patune.record import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patune.configs.block import Block
    from patune.configs.candidate import Candidate, Candidates
    from patune.configs.winner import RobustWinner, Winner, WinnerKey
    from patune.record import Record

SCHEMA = 4  # what is written; 1 to 3 are read, too
MAX_TEXT = 300  # characters of any one text; the longest of ours, a sha256, has 64
_FLOATS = ("float", "float | None", "tuple[float, ...]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """What a pack file holds.

    Attributes:
        candidates: by a winner's key, best first; winners without any have no entry.
        robust: one per target, problem and objective.
        blocklist: one per architecture, kernel source, problem and knobs.
        schema: of the file that it was read from.
    """

    winners: list[Winner]
    candidates: Candidates = field(default_factory=dict)
    robust: list[RobustWinner] = field(default_factory=list)
    blocklist: list[Block] = field(default_factory=list)
    schema: int = field(default=SCHEMA, compare=False)


def winner_order(winner: Winner) -> tuple[str | int, ...]:
    """What winners are sorted by: their keys."""
    return _values(winner.target, winner.problem, winner.workload)


def robust_order(winner: RobustWinner) -> tuple[str | int, ...]:
    """What robust winners are sorted by: target, problem and objective."""
    return (*_values(winner.target, winner.problem), winner.objective)


def block_order(block: Block) -> tuple[str | int, ...]:
    """What the blocklist is sorted by: architecture, kernel source, problem and knobs."""
    knobs = canonical_json(block.knobs.to_dict())
    return (block.arch, block.kernel_source_hash, *_values(block.problem), knobs)


def _values(*parts: Record) -> tuple[str | int, ...]:
    return tuple(value for part in parts for value in part.to_dict().values())


def pack_document(
    winners: Sequence[Winner],
    candidates: Mapping[WinnerKey, Sequence[Candidate]] | None = None,
    robust: Sequence[RobustWinner] = (),
    blocklist: Sequence[Block] = (),
) -> dict[str, Any]:
    """The pack of these, in the order of their keys, candidates by their scores. Who imported a winner is a fact of a database and stays there."""
    entries = []
    for winner in sorted(winners, key=winner_order):
        entry = _spelled(winner)
        del entry["imported_from"]
        beside = sorted((candidates or {}).get(winner.key, ()), key=lambda c: c.order)
        entries.append(entry | {"candidates": [_spelled(candidate) for candidate in beside]})
    return {
        "schema": SCHEMA,
        "winners": entries,
        "robust": [_spelled(one) for one in sorted(robust, key=robust_order)],
        "blocklist": [
            one.to_dict() | {"reason": plain_line(one.reason)}
            for one in sorted(blocklist, key=block_order)
        ],
    }


def document_of(pack: Pack) -> dict[str, Any]:
    """The document of a pack."""
    return pack_document(pack.winners, pack.candidates, pack.robust, pack.blocklist)


def pack_text(document: dict[str, Any]) -> str:
    """The one spelling of a pack: sorted keys, two blanks, LF, no NaN."""
    return json.dumps(document, sort_keys=True, indent=2, allow_nan=False) + "\n"


def plain_line(text: str) -> str:
    """A text as packs may carry it: one line, printable, of bounded length. Messages of drivers and compilers are anything."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    line = " ".join(line.split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


def _spelled(record: Record) -> dict[str, Any]:
    """The record's document with every number of a float field spelled as one: 50 and 50.0 are the same time, and so are the bytes."""
    document = record.to_dict()
    for name in _float_fields(type(record)):
        value = document[name]
        if isinstance(value, list):
            document[name] = [float(one) + 0.0 for one in value]
        elif value is not None:
            document[name] = float(value) + 0.0  # and -0.0 is 0.0
    for name in _PARTS:
        part = getattr(record, name, None)
        if part is not None:
            document[name] = _spelled(part)
    return document


_PARTS = ("timing", "counted", "speedup")


_FLOAT_FIELDS: dict[type[Record], tuple[str, ...]] = {}


def _float_fields(kind: type[Record]) -> tuple[str, ...]:
    found = _FLOAT_FIELDS.get(kind)
    if found is None:
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]
        found = _FLOAT_FIELDS[kind] = tuple(f.name for f in fields if f.type in _FLOATS)
    return found
