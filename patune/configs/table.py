"""What is stored for an architecture, in memory: one immutable table of the database, one of the packs.

Configurations stay text until a lookup of their problem comes: reading 10,000 of them must not hold up the first token.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from patune.errors import PatuneError
from patune.kernels.knobs import Knobs, knobs_from_dict
from patune.problem import Problem, Workload
from patune.record import canonical_json, check_number, check_text
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LOGGER = logging.getLogger("patune")
PROBLEM_FIELDS = tuple(field.name for field in dataclasses.fields(Problem))
NEAREST_FACTOR = 2  # a neighbour is at most this factor away in walks, and in context
TARGET_FIELDS = ("arch", "device_name", "compute_units")

Fields = tuple[object, ...]  # of a problem, or of a target, in the order of their declaration
# What one source has of one problem on one device: the database's rows as one text, a line each; a pack's entries as they are.
Raw = str | list[dict[str, Any]]


class Entry(NamedTuple):
    """One stored configuration, and what came next beside it.

    Attributes:
        knobs: canonical JSON.
        score: microseconds or issue slots.
        others: JSON of [[score, knobs], ...] scored as these were; :func:`others_of` reads it.
        environment: that they were tuned in; None when nobody knows.
        packed: of a pack, not of the user's database.
    """

    target: Target
    workload: Workload
    knobs: str
    evidence: str
    created: str
    score: float
    others: str
    environment: Mapping[str, Any] | None
    packed: bool


class Robust(NamedTuple):
    """Knobs for several workloads of a problem at once."""

    objective: str
    knobs: str
    environment: Mapping[str, Any] | None
    packed: bool


def problem_fields(problem: Problem) -> Fields:
    """What a stored configuration has to share with the request, whatever device and sizes."""
    return tuple(getattr(problem, name) for name in PROBLEM_FIELDS)


def target_fields(target: Target) -> Fields:
    """A device, as tables name it."""
    return target.arch, target.device_name, target.compute_units


@functools.lru_cache(maxsize=4096)
def knobs_of(text: str) -> Knobs:
    """The knobs of a text: entries of many sizes share few.

    Raises:
        ValueError, TypeError: it is none of this version's.
    """
    return knobs_from_dict(json.loads(text))


class Group:
    """The configurations of one problem on one device, found by their sizes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._by_size: dict[tuple[int, int], list[Entry]] = {}
        for entry in self.entries:
            size = entry.workload.walks, entry.workload.context
            self._by_size.setdefault(size, []).append(entry)
        self._sizes = sorted(self._by_size)

    def same(self, workload: Workload) -> list[Entry]:
        """Those of the same walks and context."""
        return self._by_size.get((workload.walks, workload.context), [])

    def near(self, workload: Workload) -> list[Entry]:
        """Those within the factor, of walks and of context."""
        walks, context = workload.walks, workload.context
        first = bisect.bisect_left(self._sizes, (-(-walks // NEAREST_FACTOR), 0))
        found: list[Entry] = []
        for size in self._sizes[first:]:
            if size[0] > NEAREST_FACTOR * walks:
                break
            if max(size[1], context) <= NEAREST_FACTOR * min(size[1], context):
                found += self._by_size[size]
        return found


class Table:
    """What one source stores for one architecture. Not changed after it was made, but for what is parsed the first time it is asked for.

    Attributes:
        origin: what messages call it.
        count: winners.
        environments: fields by the number that entries have.
        by_environment: winners by that number.
        generation: of the database; (None, 0) without one.
    """

    def __init__(self, origin: str, *, packed: bool) -> None:
        self.origin = origin
        self.packed = packed
        self.count = 0
        self.generation: tuple[str | None, int] = (None, 0)
        self.environments: dict[int, Mapping[str, Any]] = {}
        self.by_environment: dict[int, int] = {}
        self.winners: dict[Fields, dict[Fields, Raw]] = {}  # problem -> device -> entries
        self.robust: dict[Fields, dict[Fields, list[Robust]]] = {}
        self.blocks: dict[Fields, list[str]] = {}  # problem -> knobs, for the present kernel source
        self._groups: dict[tuple[Fields, Fields], Group] = {}

    def devices(self, problem: Fields) -> list[Fields]:
        """Devices that something of the problem is stored for, in a fixed order."""
        return sorted(self.winners.get(problem, ()), key=repr)

    def group(self, problem: Fields, device: Fields) -> Group:
        """The stored configurations of a problem on a device."""
        key = problem, device
        found = self._groups.get(key)
        if found is None:
            raw = self.winners.get(problem, {}).get(device)
            found = Group(()) if raw is None else Group(self._parsed(raw, device))
            if raw is not None:  # two threads may both get here: they write the same
                self._groups[key] = found
        return found

    def blocked(self, problem: Fields) -> frozenset[Knobs]:
        """Knobs that must not be run for a problem."""
        texts = self.blocks.get(problem)
        if not texts:
            return frozenset()
        found = set()
        for text in texts:
            try:
                found.add(knobs_of(text))
            except (ValueError, TypeError):
                continue  # another version's knobs cannot be served either
        return frozenset(found)

    def _parsed(self, raw: Raw, device: Fields) -> Iterable[Entry]:
        try:
            target = Target(**dict(zip(TARGET_FIELDS, device, strict=True)))  # type: ignore[arg-type]
        except (PatuneError, TypeError) as error:
            self._skipped(error)
            return
        for part in raw.split("\n") if isinstance(raw, str) else raw:
            try:
                if isinstance(part, str):
                    yield self._of_line(part, target)
                else:
                    yield self._of_pack(part, target)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                self._skipped(error)

    def _skipped(self, error: Exception) -> None:
        LOGGER.warning("Skipped a winner of %s: %r", self.origin, error)

    def _of_line(self, line: str, target: Target) -> Entry:
        batch, kv_heads, context, environment, evidence, created, score, rest = line.split(" ", 7)
        knobs, _, others = rest.partition("\t")
        return Entry(
            target=target,
            workload=Workload(batch=int(batch), kv_heads=int(kv_heads), context=int(context)),
            knobs=knobs,
            evidence=evidence,
            created=created,
            score=_score(float(score)),
            others=others,
            environment=self.environments.get(int(environment)),
            packed=False,
        )

    def _of_pack(self, entry: dict[str, Any], target: Target) -> Entry:
        for name in ("evidence", "created"):
            check_text(name, entry[name])
        return Entry(
            target=target,
            workload=Workload.from_dict(entry["workload"]),
            knobs=canonical_json(entry["knobs"]),
            evidence=entry["evidence"],
            created=entry["created"],
            score=_score(packed_score(entry)),
            others=canonical_json(
                [[packed_score(c), c["knobs"]] for c in entry.get("candidates", ())]
            ),
            environment=MappingProxyType(entry["environment"]),
            packed=True,
        )


def packed_score(entry: dict[str, Any]) -> object:
    """The score of a pack's winner or candidate."""
    if entry.get("timing") is not None:
        return entry["timing"]["median_us"]
    return entry["counted"]["busiest_simd_slots"]


def _score(value: object) -> float:
    check_number("score", value, low=0.0)
    return float(value)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def others_of(text: str) -> tuple[tuple[float, str], ...]:
    """The scores and knobs of an entry's others; none, and a log line, where they cannot be read."""
    try:
        return tuple((_score(score), canonical_json(knobs)) for score, knobs in json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        LOGGER.warning("Going on without the other configurations %.80s: %r", text, error)
        return ()


class Tables(NamedTuple):
    """What answers come from."""

    database: Table
    packs: Table
