"""What the dispatcher knows between two reloads, and what of it a process keeps for good."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from patune import settings
from patune.configs.answer import MISSES, SCHEMA, SOURCES, Answer, Tally
from patune.configs.layers import View
from patune.configs.reading import place_or_none, read_database, read_packs
from patune.configs.table import Tables
from patune.configs.wording import core_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from patune.configs.answer import Source
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.settings import DatabasePlace
    from patune.target import Target

    Missed = dict[tuple[Target, Problem, Workload, Source], Tally]

LOGGER = logging.getLogger("patune")
MAX_MISSED = 10_000  # keys that misses are counted by; the rest is counted by layer only
MAX_TOLD = 10_000  # log lines that are remembered, so as not to be repeated

OuterKey = tuple[object, ...]  # fields of the problem, KV heads, batch, target
Warm = dict[OuterKey, dict[int, Answer]]  # then by context


class Process:
    """What outlives a reload: counts, pins, what failed."""

    def __init__(self) -> None:
        self.by_source: dict[Source, Tally] = {source: Tally() for source in SOURCES}
        self.missed: Missed = {}
        self.pins: dict[tuple[Target, Problem, Workload], Answer] = {}
        self.failed: dict[tuple[Target, Problem], dict[Knobs, str]] = {}
        self.told: set[tuple[object, ...]] = set()
        self.overrides = 0  # entered and not left, in all threads
        self.captures = True

    def first_time(self, *what: object) -> bool:
        """Whether this was not logged yet."""
        if what in self.told:
            return False
        if len(self.told) >= MAX_TOLD:
            self.told.clear()
        self.told.add(what)
        return True

    def tally(self, answer: Answer) -> Tally:
        """Where calls that get this answer are counted: with its layer, or by key when it is a miss."""
        if answer.source not in MISSES:
            return self.by_source[answer.source]
        from patune.configs import capture

        key = answer.target, answer.problem, capture.bucket(answer.workload), answer.source
        found = self.missed.get(key)
        if found is None:
            if len(self.missed) >= MAX_MISSED:
                return self.by_source[answer.source]
            if self.captures:
                capture.arm()
            found = self.missed.setdefault(key, Tally())
        return found

    def calls_missed(self) -> dict[tuple[Target, Problem, Workload, Source], int]:
        """Calls by key that nothing was tuned for; none where nobody captures them."""
        if not self.captures:
            return {}
        return {key: tally.calls for key, tally in list(self.missed.items()) if tally.calls}

    def forget_counts(self) -> None:
        """In a forked child: what the parent counted is the parent's to report."""
        for tally in (*self.by_source.values(), *self.missed.values()):
            tally.calls = 0


class State:
    """Everything between two reloads, so that a reload is one assignment. Building one reads nothing.

    Attributes:
        warm: what the hot path reads; empty while an override holds anywhere.
        kept: the warm answers; the same dict when none does.
    """

    def __init__(
        self,
        process: Process | None = None,
        place: DatabasePlace | None = None,
        *,
        strict: bool | None = None,
    ) -> None:
        self.process = Process() if process is None else process
        self.kept: Warm = {}
        self.warm: Warm = self.kept
        self.size = 0
        self.named = place
        self.place: DatabasePlace | None = place
        self.tables: dict[str, Tables] = {}
        self.load_s = 0.0
        self.targets: dict[str | None, Target] = {}
        self.problems: dict[Problem, Problem] = {}
        self.contexts: dict[int, int] = {}
        self.strict = _strict() if strict is None else strict

    def successor(self) -> State:
        """The same tables, nothing warm: for when something else that decides answers has changed."""
        fresh = State(self.process, self.named, strict=self.strict)
        fresh.place, fresh.tables, fresh.load_s = self.place, self.tables, self.load_s
        fresh.targets = self.targets
        return fresh

    def ready(self) -> State:
        """The state itself, its hot path open or closed as overrides are; the caller holds the lock under which they come and go."""
        self.warm = {} if self.process.overrides else self.kept
        return self

    def read(self, arch: str, packs: Path) -> Tables:
        """Read the stored configurations of an architecture. Callers see to it that one thread does so at a time."""
        started = time.perf_counter()
        self.place = place_or_none(self.named)
        found = Tables(read_database(self.place, arch), read_packs(packs, arch))
        self.load_s += time.perf_counter() - started
        self.tables = {**self.tables, arch: found}
        return found

    def view(self, tables: Tables) -> View:
        """What the layers see."""
        process = self.process
        return View(
            tables=tables,
            pins=process.pins,
            failed=process.failed,
            first_time=process.first_time,
        )

    def keep(self, key: OuterKey, context: int, answer: Answer, most: int) -> None:
        """Make an answer warm; when there are too many, drop them all."""
        if self.size >= most:
            self.kept.clear()
            self.contexts.clear()
            self.size = 0
        # One number object for all keys of a context: of 100,000 keys in random order, a lookup misses the CPU's cache once less.
        one = self.contexts.setdefault(context, context)
        self.kept.setdefault(key, {})[one] = answer
        self.size += 1

    def known(self, problem: Problem) -> Problem:
        """One value per problem, for all answers to share."""
        return self.problems.setdefault(problem, problem)

    def without(self, gone: Callable[[OuterKey], bool]) -> State:
        """A successor that keeps what is warm, but for some."""
        fresh = self.successor()
        for key, answers in list(self.kept.items()):
            if not gone(key):
                fresh.kept[key] = answers
        fresh.size = sum(map(len, fresh.kept.values()))
        return fresh

    def summary(self) -> dict[str, Any]:
        """Counts since the process began, and what was loaded from where."""
        lookups: dict[str, int] = {s: t.calls for s, t in self.process.by_source.items()}
        misses: Counter[str] = Counter()
        for (target, problem, _, source), tally in list(self.process.missed.items()):
            lookups[source] += tally.calls
            misses[core_text(target=target, problem=problem)] += tally.calls
        loaded = list(self.tables.values())
        return {
            "schema": SCHEMA,
            "lookups": lookups,
            "misses": {core: calls for core, calls in misses.most_common() if calls},
            "db": str(self.place or place_or_none(self.named) or "none"),
            "entries": {
                "db": sum(tables.database.count for tables in loaded),
                "packs": sum(tables.packs.count for tables in loaded),
            },
            "load_ms": round(self.load_s * 1e3, 3),
        }


def _strict() -> bool:
    try:
        return settings.strict()
    except ValueError as error:
        LOGGER.warning("Lookups are not strict: %s", error)
        return False
