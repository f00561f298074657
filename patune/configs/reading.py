"""Reads what is stored for an architecture: the database through sqlite3 or psycopg, the packs through json. A failure costs a log line."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from patune import settings
from patune.configs.readonly import SCHEMA, connect_readonly, found_schema, older
from patune.configs.table import (
    PROBLEM_FIELDS,
    TARGET_FIELDS,
    Fields,
    Robust,
    Table,
)
from patune.environment import kernel_source_hash
from patune.errors import DatabaseError
from patune.record import canonical_json
from patune.settings import ServerUrl
from patune.target import ARCHS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from patune.settings import DatabasePlace

    Query = Callable[[str, Sequence[object]], list[tuple[Any, ...]]]

LOGGER = logging.getLogger("patune")
SERVING_WAIT_S = 1.0  # for a locked database, at the first lookup; then it answers without

_PROBLEM = ", ".join(f"p.{name}" for name in PROBLEM_FIELDS)
_TARGET = ", ".join(f"d.{name}" for name in TARGET_FIELDS)
_FIRST = ("w.batch", "w.kv_heads", "w.context", "n.environment_id", "n.evidence", "n.created", "coalesce(t.median_us, t.busiest_simd_slots)", "t.knobs")  # fmt: skip
# SQLite joins by printf in half the time of ||; 17 digits, so that no score is rounded.
_SQLITE_LINE = (
    f"printf('%d %d %d %d %s %s %!.17g %s' || char(9) || '%s', {', '.join(_FIRST)}, n.top)"
)
_POSTGRES_LINE = " || ' ' || ".join(_FIRST) + " || chr(9) || n.top"
# One row per problem and device: the database joins the winners' texts. As rows of their own 10,000 winners take 75 ms, not 45 (2026-11).
_WINNERS = """
    SELECT n.target_id, n.problem_id, count(*), {joined}
    FROM patune_winner n
    JOIN patune_trial t ON t.id = n.trial_id
    JOIN patune_workload w ON w.id = n.workload_id
    WHERE n.state <> 'retired' AND n.target_id IN (SELECT id FROM patune_target WHERE arch = ?)
    GROUP BY n.target_id, n.problem_id
"""
SQLITE_WINNERS = _WINNERS.format(joined=f"group_concat({_SQLITE_LINE}, char(10))")
POSTGRES_WINNERS = _WINNERS.format(joined=f"string_agg({_POSTGRES_LINE}, chr(10))")
_BY_ENVIRONMENT = """
    SELECT environment_id, count(*) FROM patune_winner
    WHERE state <> 'retired' AND target_id IN (SELECT id FROM patune_target WHERE arch = ?) GROUP BY environment_id
"""
_ROBUST = f"""
    SELECT {_PROBLEM}, {_TARGET}, r.objective, r.knobs, r.environment_id
    FROM patune_robust r JOIN patune_target d ON d.id = r.target_id JOIN patune_problem p ON p.id = r.problem_id
    WHERE d.arch = ?
"""
_BLOCKS = f"""
    SELECT {_PROBLEM}, b.knobs, b.kernel_source_hash FROM patune_blocklist b JOIN patune_problem p ON p.id = b.problem_id
    WHERE b.arch = ?
"""
_GENERATION = (
    "SELECT (SELECT uuid FROM patune_meta), (SELECT coalesce(max(id), 0) FROM patune_history)"
)
_ENVIRONMENT = ("patune", "triton", "torch", "python", "compiler", "driver", "fp_fusion", "kernel_source_hash")  # fmt: skip


def read_database(place: DatabasePlace | None, arch: str) -> Table:
    """The winners of an architecture; an empty table, and one log line, when the database cannot give any.

    Args:
        place: None where nobody can say where it is, which was logged.
        arch: the architecture.
    """
    if place is None:
        return Table("no database", packed=False)
    try:
        schema = found_schema(place, wait_s=SERVING_WAIT_S)
        if schema == 0:
            LOGGER.info("No config database at %s. To make one, run: patune sweep", place)
        elif schema < SCHEMA:
            LOGGER.warning("Answering without the config database: %s", older(place, schema))
        else:
            return _read(place, arch)
    except DatabaseError as error:
        LOGGER.warning("Answering without the config database: %s", error)
    except (sqlite3.Error, OSError, ValueError) as error:
        LOGGER.warning("Answering without the config database %s: %s", place, error)
    except Exception as error:
        if not type(error).__module__.startswith("psycopg"):
            raise
        from patune.configs import postgres

        assert isinstance(place, ServerUrl), "who else would import psycopg"
        LOGGER.warning("Answering without the config database: %s", postgres.explain(place, error))
    return Table(str(place), packed=False)


def generation_of(place: DatabasePlace, wait_s: float) -> tuple[str | None, int] | None:
    """Which database it is, and the number of the last change of what it serves; None when it cannot be read now.

    (None, 0) is said of a place without a database of this schema, as of a table that was read from none.
    """
    try:
        if found_schema(place, wait_s=wait_s) != SCHEMA:
            return None, 0
        with _connected(place, wait_s) as query:
            uuid, number = query(_GENERATION, ())[0]
            return uuid, number
    except Exception as error:
        LOGGER.debug("The config database %s does not tell its generation: %s", place, error)
        return None


@contextlib.contextmanager
def _connected(place: DatabasePlace, wait_s: float) -> Any:
    """A function that asks, within one transaction that cannot write."""
    if isinstance(place, ServerUrl):
        from patune.configs import postgres

        with contextlib.closing(postgres.connect_readonly(place, wait_s=wait_s)) as server:
            yield lambda text, values: server.execute(text.replace("?", "%s"), values).fetchall()
    else:
        with contextlib.closing(connect_readonly(place, wait_s=wait_s)) as file:
            file.execute("PRAGMA cache_size = -65536")  # rows of one problem lie far apart
            file.execute("BEGIN")
            yield lambda text, values: file.execute(text, values).fetchall()


def _read(place: DatabasePlace, arch: str) -> Table:
    table = Table(str(place), packed=False)
    server = isinstance(place, ServerUrl)
    with _connected(place, SERVING_WAIT_S) as query:
        table.generation = query(_GENERATION, ())[0]
        groups = query(POSTGRES_WINNERS if server else SQLITE_WINNERS, (arch,))
        if groups:
            _add_winners(table, query, groups)
            table.by_environment = dict(query(_BY_ENVIRONMENT, (arch,)))
        robust = query(_ROBUST, (arch,))
        blocks = query(_BLOCKS, (arch,))
        names = ", ".join(_ENVIRONMENT)
        for number, *values in query(f"SELECT id, {names} FROM patune_environment", ()):
            fields = dict(zip(_ENVIRONMENT, values, strict=True))
            fields["fp_fusion"] = bool(fields["fp_fusion"])
            table.environments[number] = MappingProxyType(fields)
    for row in robust:
        problem, device = _plain(row[: len(PROBLEM_FIELDS)]), tuple(row[len(PROBLEM_FIELDS) : -3])
        objective, knobs, environment = row[-3:]
        one = Robust(str(objective), str(knobs), table.environments.get(environment), packed=False)
        table.robust.setdefault(problem, {}).setdefault(device, []).append(one)
    for *fields, knobs, source_hash in blocks:
        _add_block(table, arch, tuple(fields), str(knobs), source_hash)
    return table


def _plain(problem: Sequence[object]) -> Fields:
    """SQLite's 0 and 1 are equal to the truths that they stand for, and hash alike."""
    return tuple(problem)


def _add_winners(table: Table, query: Query, groups: list[tuple[Any, ...]]) -> None:
    devices = {row[0]: tuple(row[1:]) for row in query(f"SELECT d.id, {_TARGET} FROM patune_target d", ())}  # fmt: skip
    problems = {row[0]: _plain(row[1:]) for row in query(f"SELECT p.id, {_PROBLEM} FROM patune_problem p", ())}  # fmt: skip
    for target_id, problem_id, count, text in groups:
        if text is not None and target_id in devices and problem_id in problems:
            table.winners.setdefault(problems[problem_id], {})[devices[target_id]] = text
            table.count += count


def _add_block(table: Table, arch: str, problem: Fields, knobs: str, source_hash: object) -> None:
    if arch in ARCHS and source_hash == kernel_source_hash(ARCHS[arch].family):
        table.blocks.setdefault(problem, []).append(knobs)


def read_packs(folder: Path, arch: str) -> Table:
    """The winners of an architecture in the packs of a folder. A bad pack, or a bad entry, costs a log line."""
    table = Table(f"the packs in {folder}", packed=True)
    try:
        paths = sorted(folder.rglob("*.json"))
    except OSError as error:
        LOGGER.warning("Answering without packs: %s", error)
        return table
    for path in paths:
        try:
            document = json.loads(path.read_bytes())
            parts = [_part(document, n) for n in ("winners", "robust", "blocklist")]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            LOGGER.warning("Answering without a pack: %s is not a pack: %s", path, error)
            continue
        for part, add in zip(parts, (_pack_winner, _pack_robust, _pack_block), strict=True):
            for number, entry in enumerate(part):
                try:
                    add(table, arch, entry)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    LOGGER.warning("Skipped entry %d of the pack %s: %r", number, path, error)
    return table


def _part(document: Any, name: str) -> list[Any]:
    if not isinstance(document, dict) or not isinstance(document.get("winners"), list):
        raise TypeError("it has no list of winners")
    part = document.get(name, [])
    if not isinstance(part, list):
        raise TypeError(f"{name} is no list")
    return part


_PROBLEM_DEFAULTS = {"softcap": False, "fp8_math": False}  # packs of schema 1 have neither


def _problem_of(entry: dict[str, Any]) -> Fields:
    fields = _PROBLEM_DEFAULTS | entry["problem"]
    found = tuple(fields[name] for name in PROBLEM_FIELDS)
    hash(found)
    return found


def _device_of(entry: dict[str, Any]) -> Fields:
    found = tuple(entry["target"][name] for name in TARGET_FIELDS)
    hash(found)
    return found


def _pack_winner(table: Table, arch: str, entry: dict[str, Any]) -> None:
    problem, device = _problem_of(entry), _device_of(entry)
    if device[0] != arch:
        return
    entries = table.winners.setdefault(problem, {}).setdefault(device, [])
    assert isinstance(entries, list), "only databases have texts"
    entries.append(entry)
    table.count += 1


def _pack_robust(table: Table, arch: str, entry: dict[str, Any]) -> None:
    problem, device = _problem_of(entry), _device_of(entry)
    if device[0] == arch:
        environment = MappingProxyType(entry["environment"])
        one = Robust(entry["objective"], canonical_json(entry["knobs"]), environment, packed=True)
        table.robust.setdefault(problem, {}).setdefault(device, []).append(one)


def _pack_block(table: Table, arch: str, entry: dict[str, Any]) -> None:
    if entry["arch"] == arch:
        knobs = canonical_json(entry["knobs"])
        _add_block(table, arch, _problem_of(entry), knobs, entry["kernel_source_hash"])


def place_or_none(database: DatabasePlace | None) -> DatabasePlace | None:
    """The database that was named, else the settings' one; None and a log line when they name none that can be."""
    try:
        return settings.database_place(database)
    except ValueError as error:
        LOGGER.warning("Answering without a config database: %s", error)
        return None
