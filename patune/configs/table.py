"""Stored configurations in memory, and which of them answers a workload."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sqlite3
from typing import TYPE_CHECKING, NamedTuple

from patune.configs.readonly import SCHEMA, connect_readonly, found_schema, older
from patune.errors import DatabaseError, PatuneError
from patune.problem import Problem, Workload
from patune.record import canonical_json
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from patune.target import Target

LOGGER = logging.getLogger("patune")
SERVING_WAIT_S = 1.0  # for a locked database, at the first lookup; then it answers without
NEAREST_FACTOR = 2  # a neighbour is at most this factor away in walks, and in context

PROBLEM_FIELDS = tuple(field.name for field in dataclasses.fields(Problem))
TARGET_FIELDS = ("arch", "device_name", "compute_units")
QUERY = f"""
    SELECT {", ".join(f"t.{f}" for f in TARGET_FIELDS)}, {", ".join(f"p.{f}" for f in PROBLEM_FIELDS)},
        w.batch, w.kv_heads, w.context, r.knobs, n.evidence, n.created
    FROM patune_winner n
    JOIN patune_target t ON t.id = n.target_id
    JOIN patune_problem p ON p.id = n.problem_id
    JOIN patune_workload w ON w.id = n.workload_id
    JOIN patune_trial r ON r.id = n.trial_id
    WHERE t.arch = ? AND n.state <> 'retired'
    ORDER BY n.id
"""

Key = tuple[object, ...]


class Entry(NamedTuple):
    """One stored configuration.

    Its knobs stay text until a lookup wants them: reading 5,040 entries takes 0.1 s, parsing them 0.2 s more (2026-11).
    """

    workload: Workload
    knobs: str
    evidence: str
    created: str


Table = dict[Key, list[Entry]]


def key_of(target: Target, problem: Problem) -> Key:
    """What a stored configuration has to share with the request, whatever the sizes."""
    return (
        target.arch,
        target.device_name,
        target.compute_units,
        *(getattr(problem, name) for name in PROBLEM_FIELDS),
    )


def entries_in(table: Table) -> int:
    """How many configurations the table has."""
    return sum(len(entries) for entries in table.values())


def read_database(path: Path, arch: str) -> Table:
    """The winners of an architecture; an empty table, and one log line, when the database cannot give any."""
    try:
        schema = found_schema(path, wait_s=SERVING_WAIT_S)
        if schema == 0:
            LOGGER.info("No config database at %s. To make one, run: patune sweep", path)
            return {}
        if schema < SCHEMA:
            LOGGER.warning("Answering without the config database: %s", older(path, schema))
            return {}
        with contextlib.closing(connect_readonly(path, wait_s=SERVING_WAIT_S)) as connection:
            rows = connection.execute(QUERY, (arch,)).fetchall()
    except DatabaseError as error:
        LOGGER.warning("Answering without the config database: %s", error)
        return {}
    except (sqlite3.Error, OSError) as error:
        LOGGER.warning("Answering without the config database %s: %s", path, error)
        return {}
    return _grouped(path, rows)


def _grouped(path: Path, rows: Iterable[tuple[object, ...]]) -> Table:
    table: Table = {}
    width = len(TARGET_FIELDS) + len(PROBLEM_FIELDS)
    for row in rows:
        batch, kv_heads, context, knobs, evidence, created = row[width:]
        try:
            workload = Workload(batch=batch, kv_heads=kv_heads, context=context)  # type: ignore[arg-type]
        except PatuneError as error:
            LOGGER.warning("Skipped a winner of %s: %s", path, error)
            continue
        entry = Entry(workload, str(knobs), str(evidence), str(created))
        table.setdefault(row[:width], []).append(entry)
    return table


def read_packs(folder: Path, arch: str) -> Table:
    """The winners of an architecture in the packs of a folder. A bad pack costs a log line."""
    try:
        paths = sorted(folder.rglob("*.json"))
    except OSError as error:
        LOGGER.warning("Answering without packs: %s", error)
        return {}
    if not paths:
        return {}
    from patune.configs.packs import read_pack
    from patune.kernels.knobs import knobs_to_dict

    table: Table = {}
    for path in paths:
        try:
            winners = read_pack(path)
        except PatuneError as error:
            LOGGER.warning("Answering without a pack: %s", error)
            continue
        for winner in winners:
            if winner.target.arch == arch:
                knobs = canonical_json(knobs_to_dict(winner.knobs))
                entry = Entry(winner.workload, knobs, winner.evidence, winner.created)
                table.setdefault(key_of(winner.target, winner.problem), []).append(entry)
    return table


def distance_of(workload: Workload, stored: Workload) -> tuple[float, float]:
    """Powers of two between a request and a stored workload: (walks, context), positive when the request is larger."""
    return (
        math.log2(workload.walks / stored.walks),
        math.log2(workload.context / stored.context),
    )


def candidates(entries: list[Entry], workload: Workload) -> Iterator[tuple[Entry, bool]]:
    """The configurations that may answer, best first, each with whether its sizes are exactly those asked for.

    The same walks and context come before any neighbour: the better evidence first, the very same batch before others.
    Neighbours come by distance, the better evidence first among equals. The newer decides what is still equal.
    """
    newest = sorted(entries, key=lambda e: (e.created, e.knobs), reverse=True)
    ranked = sorted(newest, key=lambda e: -EVIDENCE_RANK.get(e.evidence, 0))
    exact = [e for e in ranked if _same(e, workload)]
    exact.sort(
        key=lambda e: (-EVIDENCE_RANK.get(e.evidence, 0), e.workload.batch != workload.batch)
    )
    for entry in exact:
        yield entry, True
    near = [e for e in ranked if not _same(e, workload) and _near(e, workload)]
    near.sort(key=lambda e: math.hypot(*distance_of(workload, e.workload)))
    for entry in near:
        yield entry, False


def _near(entry: Entry, workload: Workload) -> bool:
    pairs = (
        (entry.workload.walks, workload.walks),
        (entry.workload.context, workload.context),
    )
    return all(max(pair) <= NEAREST_FACTOR * min(pair) for pair in pairs)


def _same(entry: Entry, workload: Workload) -> bool:
    return entry.workload.walks == workload.walks and entry.workload.context == workload.context
