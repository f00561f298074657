"""Keys that serving processes asked for and nobody had tuned: JSON documents of them, and the order in which to tune them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import DocumentError, InvalidValueError
from patune.kernels.feasibility import unsupported
from patune.problem import Problem, Workload
from patune.record import check_choice, check_int, check_text
from patune.target import Target
from patune.tuner.progress import Key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from patune.configs.store import Store

SCHEMAS = (1, 2)
MOST_BYTES = 16_000_000  # 50,000 keys: nobody tunes more, and a wrong file should not fill memory
DOCUMENT_FIELDS = {1: ("schema", "misses"), 2: ("schema", "capture", "misses")}
MISS_FIELDS = {
    1: ("problem", "workload", "calls"),
    2: ("target", "problem", "workload", "source", "calls"),
}
SUFFIX = ".json"
# What tuning saves of a call, in times of the best, by the layer that answered: means over the recorded pools of an H200 (2026-11-22;
# benchmarks/miss_gain.py). The heuristic was made for such keys: expect more of it elsewhere. AMD: not measured, taken to be the same.
GAINS = {"other_device": 0.146, "heuristic": 0.039, "safe": 7.283}
MOST_SIZE = 2**31 - 1  # of a batch or a context: larger than any cache
MOST_CALLS = 2**62  # what a database adds up must fit 63 bits
UNKNOWN_SOURCE = "heuristic"  # of a document that does not name it


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A key that was looked up in vain.

    Attributes:
        calls: how often.
        source: the layer that answered, one of :data:`GAINS`.
        target: the device that asked; None where the document does not name it.
    """

    key: Key
    calls: int
    source: str = UNKNOWN_SOURCE
    target: Target | None = None

    @property
    def weight(self) -> float:
        """The GPU time that tuning is expected to save, in the time that a byte of K and V takes: calls x bytes x gain of the source."""
        return self.calls * self.key.workload.kv_bytes(self.key.problem) * GAINS[self.source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """One file of a serving process.

    Attributes:
        name: its uuid; a capture is taken in once.
    """

    name: str
    misses: tuple[Miss, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What there is to tune on a target, and what was left out.

    Attributes:
        keys: by expected saving, the largest first.
        files: that were taken into the database; in a dry run, that would be.
        refused: files that are no captures, with the reason; they stay where they are.
        elsewhere: keys that other devices asked for.
        unsupported: keys that no kernel of the target computes.
    """

    keys: tuple[Key, ...]
    files: int
    refused: tuple[tuple[Path, str], ...]
    elsewhere: int
    unsupported: int

    @property
    def note(self) -> str:
        """A sentence per thing that was left out; empty when nothing was."""
        said = [f"Left {path}: {reason}" for path, reason in self.refused]
        if self.elsewhere:
            said.append(f"Keys that other devices asked for: {self.elsewhere}. Sweep there.")
        if self.unsupported:
            said.append(
                f"Keys that no kernel of the target computes: {self.unsupported}. They are left out."
            )
        return "\n".join(said)


def pending(folder: Path) -> tuple[Path, ...]:
    """The captures that wait in a folder, by name; none where there is no such folder."""
    try:
        return tuple(sorted(p for p in folder.iterdir() if p.suffix == SUFFIX and p.is_file()))
    except OSError:
        return ()


def wanted(store: Store | None, folder: Path | None, target: Target, *, take: bool) -> Wanted:
    """The keys that serving processes on ``target`` asked for in vain and that are not tuned yet.

    Args:
        store: the database; None where there is none yet.
        folder: of captures; None for no folder.
        target: the device that is tuned for.
        take: put the captures into the database and delete their files, not only read them.
    """
    refused, found, files = [], [], 0
    for path in pending(folder) if folder is not None else ():
        try:
            capture = read_capture(path)
        except DocumentError as error:
            refused.append((path, str(error)))
            continue
        files += 1
        if take and store is not None:
            store.add_capture(capture.name, map(_row, capture.misses))
            path.unlink(missing_ok=True)  # another sweep may have taken it in, too: it counts once
        else:
            found += [(_row(miss), miss) for miss in capture.misses]
    rows = [row for row, _ in found] + (list(store.misses()) if store else [])
    tuned = {winner.key for winner in store.winners(arch=target.arch)} if store else set()
    rows = [row for row in rows if tuple(row[:3]) not in tuned]
    here = [row for row in rows if row[0] == target]
    able = [row for row in here if unsupported(row[1], target) is None]
    return Wanted(
        keys=tuple(by_saving(_miss_of(*row) for row in able)),
        files=files,
        refused=tuple(refused),
        elsewhere=len({row[:3] for row in rows if row[0] != target}),
        unsupported=len({row[:3] for row in here}) - len({row[:3] for row in able}),
    )


def by_saving(misses: Iterable[Miss]) -> Iterator[Key]:
    """Each key once, the one with the largest expected saving first."""
    savings: dict[Key, float] = {}
    for miss in misses:
        savings[miss.key] = savings.get(miss.key, 0.0) + miss.weight
    yield from sorted(savings, key=lambda key: -savings[key])


def read_capture(path: Path) -> Capture:
    """A file that a serving process wrote.

    Raises:
        DocumentError: it is no such file; the message names the place and the field.
    """
    document = _read(path, str(path))
    misses = parse_misses(document, str(path))
    if not isinstance(document, dict) or document["schema"] == 1:
        raise DocumentError(f"{path}: schema=1 names no capture; give such a file to --from.")
    return Capture(name=document["capture"], misses=misses)


def _row(miss: Miss) -> tuple[Target, Problem, Workload, str, int]:
    assert miss.target is not None, "captures name the target"
    return miss.target, miss.key.problem, miss.key.workload, miss.source, miss.calls


def _miss_of(target: Target, problem: Problem, workload: Workload, source: str, calls: int) -> Miss:
    known = source if source in GAINS else UNKNOWN_SOURCE
    key = Key(problem=problem, workload=workload)
    return Miss(key=key, calls=calls, source=known, target=target)


def read_misses(path: Path) -> tuple[Miss, ...]:
    """The misses of a document, each key once, the one with the largest expected saving first.

    Raises:
        DocumentError: the file cannot be read, is too large, or is no such document; the message names the place and the field.
    """
    return parse_misses(_read(path, f"--from {path}"), str(path))


def _read(path: Path, name: str) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"{name}: {error.strerror or error}.") from None
    if len(data) > MOST_BYTES:
        raise DocumentError(
            f"{name} is larger than {MOST_BYTES // 1_000_000} MB, the most that a document of misses may be."
        )
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{name} is no JSON: {error}.") from None
    return document


def parse_misses(document: object, name: str) -> tuple[Miss, ...]:
    """:func:`read_misses` of a document that is read already; ``name`` is what messages call it.

    Raises:
        DocumentError: it is no such document.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(document, dict) and "schema" in document:
        if type(schema) is not int or schema not in SCHEMAS:
            allowed = ", ".join(map(str, SCHEMAS))
            raise DocumentError(f"{name}: schema={schema!r} is not allowed; allowed: {allowed}.")
    else:
        schema = 1
    fields = _fields(document, DOCUMENT_FIELDS[schema], name)
    entries = fields["misses"]
    if not isinstance(entries, list) or not entries:
        raise DocumentError(f"{name}: misses has to be a list with at least one miss.")
    calls: dict[tuple[Key, str, Target | None], int] = {}
    try:
        check_text("capture", fields.get("capture", "none"))
    except InvalidValueError as error:
        raise DocumentError(f"{name}: {error}") from None
    for number, entry in enumerate(entries):
        miss = _miss(entry, schema, f"{name}: misses[{number}]")
        told = (miss.key, miss.source, miss.target)
        calls[told] = calls.get(told, 0) + miss.calls
    misses = (Miss(key=k, calls=n, source=s, target=t) for (k, s, t), n in calls.items())
    return tuple(sorted(misses, key=lambda miss: -miss.weight))


def _miss(entry: object, schema: int, place: str) -> Miss:
    fields = _fields(entry, MISS_FIELDS[schema], place)
    for part in ("target", "problem", "workload"):
        if part in fields and not isinstance(fields[part], dict):
            raise DocumentError(f"{place}: {part} has to be an object, seen {fields[part]!r}.")
    try:
        check_int("calls", fields["calls"], low=1, high=MOST_CALLS)
        source = fields.get("source", UNKNOWN_SOURCE)
        check_choice("source", source, tuple(GAINS))
        workload = Workload.from_dict(fields["workload"])
        for name, size in workload.to_dict().items():
            check_int(name, size, low=1, high=MOST_SIZE)
        return Miss(
            key=Key(problem=Problem.from_dict(fields["problem"]), workload=workload),
            calls=fields["calls"],
            source=source,
            target=Target.from_dict(fields["target"]) if "target" in fields else None,
        )
    except InvalidValueError as error:
        raise DocumentError(f"{place}: {error}") from None


def _fields(value: object, names: tuple[str, ...], place: str) -> dict[str, Any]:
    """The object, which has to have these fields and no others."""
    if not isinstance(value, dict):
        raise DocumentError(f"{place} has to be an object with {', '.join(names)}.")
    if unknown := sorted(set(value) - set(names)):
        raise DocumentError(
            f"{place}: unknown field {unknown[0]!r}; known fields: {', '.join(names)}."
        )
    if missing := [name for name in names if name not in value]:
        raise DocumentError(
            f"{place}: field {missing[0]!r} is missing; known fields: {', '.join(names)}."
        )
    return value
