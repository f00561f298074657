"""Reads packs, which are untrusted: bounded in size, depth and number, checked field by field, and refused wholly for one bad field.

No SQLAlchemy: lookups read the shipped packs.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from patune.configs.block import Block
from patune.configs.candidate import Candidate, check_candidates
from patune.configs.pack import MAX_TEXT, SCHEMA, Pack
from patune.configs.winner import RobustWinner, Winner
from patune.errors import DocumentError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ADDED = {  # field -> schema, per part of a winner; packs of an older one get the record's default
    "": {"speedup": 3, "candidates": 3},
    "problem": {"softcap": 2, "fp8_math": 2},
    "timing": {"low_us": 3, "high_us": 3, "protocol": 3},
}
SECTIONS = {"winners": 1, "robust": 4, "blocklist": 4}  # list -> schema
MAX_ENTRIES = 10_000  # of one list; 32 MiB hold 5,800 winners with five candidates each
# Commas and opening brackets of a file. Our packs have one in 33 bytes; 32 MiB of `[],` would take 1 GiB of memory.
MAX_ITEMS = 2_000_000
MAX_DEPTH = 6  # a timing of a candidate of a winner
MAX_INTEGER = 2**63 - 1  # what an SQLite column holds
MAX_MESSAGE = 1000  # characters of an error: a hostile value is not repeated in full

EntryT = TypeVar("EntryT")


def parse_pack(source: Path | str, data: bytes) -> Pack:
    """The pack that these bytes are.

    Args:
        source: where they are from, for messages.
        data: the file's content.

    Raises:
        DocumentError: they are not a pack of a schema up to this one; the message names the entry and the field.
    """
    try:
        return _parsed(data)
    except InvalidValueError as error:
        text = str(error)
        if len(text) > MAX_MESSAGE:
            text = text[: MAX_MESSAGE // 2] + " ... " + text[-MAX_MESSAGE // 2 :]
        raise DocumentError(f"{source}{text}") from error


def _parsed(data: bytes) -> Pack:
    schema, document = _document(data)
    pack = Pack(winners=[], schema=schema)
    seen: dict[object, int] = {}
    for index, entry in enumerate(document["winners"]):
        where = f": winners[{index}]"
        winner, candidates = _winner(where, entry, schema)
        _refuse_twice(seen, winner.key, "winners", index)
        pack.winners.append(winner)
        if candidates:
            pack.candidates[winner.key] = candidates
    for index, entry in enumerate(document["robust"]):
        robust = _record(f": robust[{index}]", entry, RobustWinner.from_dict)
        key = robust.target, robust.problem, robust.objective
        _refuse_twice(seen, key, "robust", index)
        pack.robust.append(robust)
    for index, entry in enumerate(document["blocklist"]):
        block = _record(f": blocklist[{index}]", entry, Block.from_dict)
        _refuse_twice(seen, block.key, "blocklist", index)
        pack.blocklist.append(block)
    return pack


def _document(data: bytes) -> tuple[int, dict[str, list[Any]]]:
    """The schema, and the lists of entries; every value in them is of a type and size that the records can be asked about."""
    items = data.count(b",") + data.count(b"[") + data.count(b"{")
    if items > MAX_ITEMS:
        raise DocumentError(f" has {items} values; allowed: up to {MAX_ITEMS} in a pack.")
    try:
        document = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise DocumentError(f" is not a pack: {error}.") from error
    if not isinstance(document, dict):
        raise DocumentError(" is not a pack: its top level is not a JSON object.")
    plain: set[str] = set()
    for name, value in document.items():
        if not isinstance(value, list):
            _check_values(f": {name[:MAX_TEXT]!r}", [name, value], plain, 2)
            continue
        _check_values("", [name], plain, 2)
        if len(value) > MAX_ENTRIES:
            raise DocumentError(f": {name} has {len(value)} entries; allowed: up to {MAX_ENTRIES}.")
        for index, entry in enumerate(value):
            _check_values(f": {name}[{index}]", [entry], plain, 3)
    return _sections(document)


def _sections(document: dict[str, Any]) -> tuple[int, dict[str, list[Any]]]:
    schema = document.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        hint = " Run `pip install --upgrade patune`." if newer else ""
        raise DocumentError(f": schema={schema!r} is not allowed; allowed: 1 to {SCHEMA}.{hint}")
    known = ["schema", *(name for name, since in SECTIONS.items() if since <= schema)]
    if unknown := sorted(set(document) - set(known)):
        raise DocumentError(f": unknown field {unknown[0]!r}; known fields: {', '.join(known)}.")
    for name in known[1:]:
        entries = document.get(name)
        if not isinstance(entries, list):
            raise DocumentError(f": {name}={entries!r} is not allowed; allowed: a list.")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DocumentError(f": {name}[{index}] is not a JSON object.")
    return schema, {name: document.get(name, []) for name in SECTIONS}


def _winner(where: str, entry: dict[str, Any], schema: int) -> tuple[Winner, tuple[Candidate, ...]]:
    if "imported_from" in entry:
        raise DocumentError(f"{where}: unknown field 'imported_from'; the database notes that.")
    _refuse_later_fields(where, entry, schema)

    def parse(entry: dict[str, Any]) -> tuple[Winner, tuple[Candidate, ...]]:
        fields = dict(entry)
        found = fields.pop("candidates", [])
        winner = Winner.from_dict(fields)
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise DocumentError(f"candidates={found!r} is not allowed; allowed: a list of objects.")
        candidates = tuple(Candidate.from_dict(one) for one in found)
        check_candidates(winner, candidates)
        return winner, candidates

    return _record(where, entry, parse)


def _record(where: str, entry: dict[str, Any], parse: Callable[[dict[str, Any]], EntryT]) -> EntryT:
    try:
        return parse(entry)
    except InvalidValueError as error:
        raise DocumentError(f"{where}: {error}") from error


def _refuse_twice(seen: dict[object, int], key: object, name: str, index: int) -> None:
    first = seen.setdefault((name, key), index)
    if first != index:
        raise DocumentError(
            f": {name}[{index}] has the key of {name}[{first}]; allowed: one of each."
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twice[:MAX_TEXT]!r} is there twice")
    return fields


def _refuse_later_fields(where: str, entry: dict[str, Any], schema: int) -> None:
    if schema >= 3:
        return
    for part, added in ADDED.items():
        fields = entry.get(part) if part else entry
        for name, since in added.items():
            if schema < since and isinstance(fields, dict) and name in fields:
                kind = part.title() if part else "Winner"
                raise DocumentError(
                    f"{where}: {kind}: unknown field {name!r} in a pack of schema {schema}; allowed: from schema {since} on."
                )


def _check_values(where: str, values: list[Any], plain: set[str], depth: int) -> None:
    """Refuse what the records do not look at: texts that would garble a terminal, numbers without a column to hold them, depth.

    ``plain`` holds texts that were looked at before: most texts of a pack are field names.
    """
    level = values
    while level:
        if depth > MAX_DEPTH + 1:
            raise DocumentError(f"{where}: values are nested deeper than {MAX_DEPTH} levels.")
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is str:
                if value not in plain:
                    _check_text(where, value)
                    plain.add(value)
            elif kind is dict:
                if not plain.issuperset(value):
                    below += value
                below += value.values()
            elif kind is list:
                below += value
            elif kind is int and abs(value) > MAX_INTEGER:
                raise DocumentError(
                    f"{where}: integer {value!r} is not allowed; allowed: up to 2**63 - 1."
                )
            elif kind is float and not math.isfinite(value):
                raise DocumentError(f"{where}: a number is infinite; allowed: finite numbers.")
        level = below
        depth += 1


def _check_text(where: str, text: str) -> None:
    if len(text) > MAX_TEXT or not text.isprintable():
        raise DocumentError(
            f"{where}: text {text[:40]!r} is not allowed; allowed: up to {MAX_TEXT} printable characters."
        )
