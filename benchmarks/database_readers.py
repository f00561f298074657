"""A process that reads the config database while others write, and takes offence at anything that is half there.

What only the writers' logs can tell, whether a read was fresh and whole, it notes for the check afterwards.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import database_values as values
from database_values import ENVIRONMENTS, KEYS, PROBLEMS, STRIDE, TARGETS
from sqlalchemy import text

from patune.configs import dispatcher
from patune.configs.store import Store
from patune.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from database_writers import Log

    from patune.settings import DatabasePlace

HABITS = {
    "listing": 30, "winners": 20, "lookups": 15, "top": 8, "robust": 8, "blocked": 6,
    "imports": 8, "dangling": 5, "snapshot": 4, "reopen": 6,
}  # fmt: skip
NOT_THERE_YET = "There is no config database"
SHOWN_IMPORTS = 20
LONGEST_PAUSE_S = 0.2  # without it 8 readers of 16 writers leave these no processor: 5 writes a second on two shared cores
PAUSE_IN_A_SNAPSHOT_S = 0.01
IMPORTS = f"""
    SELECT r.command, count(t.id) FROM patune_run r LEFT JOIN patune_trial t ON t.run_id = r.id
    WHERE r.sampler = 'import' GROUP BY r.command ORDER BY max(r.id) DESC LIMIT {SHOWN_IMPORTS}
"""
# Rows that refer to what is not there: (what, query).
DANGLING = {
    "winners without their trial": """
        SELECT count(*) FROM patune_winner w LEFT JOIN patune_trial t ON t.id = w.trial_id
        AND t.target_id = w.target_id AND t.problem_id = w.problem_id AND t.workload_id = w.workload_id
        AND t.status = w.status AND t.evidence = w.evidence WHERE t.id IS NULL""",
    "trials without their message": """
        SELECT count(*) FROM patune_trial t LEFT JOIN patune_message m ON m.id = t.message_id
        WHERE m.id IS NULL AND t.status NOT IN ('ok', 'slow')""",
    "trials without their run": """
        SELECT count(*) FROM patune_trial t LEFT JOIN patune_run r ON r.id = t.run_id
        AND r.target_id = t.target_id AND r.environment_id = t.environment_id WHERE r.id IS NULL""",
    "blocks without their trial": """
        SELECT count(*) FROM patune_blocklist b LEFT JOIN patune_trial t ON t.id = b.trial_id
        AND t.status = b.status WHERE t.id IS NULL""",
    "messages that are there twice": """
        SELECT count(*) - count(DISTINCT text) FROM patune_message""",
    "problems that are there twice": """
        SELECT (SELECT count(*) FROM patune_problem)
        - (SELECT count(*) FROM (SELECT DISTINCT block_size, head_dim, qg, sinks FROM patune_problem) AS p)""",
}  # fmt: skip


class _Warnings(logging.Handler):
    """A lookup never raises: that it went on without the database is a log line."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(problem=f"logged: {record.getMessage()}")


class Reader:
    """Draws what to read next from its seed."""

    def __init__(self, place: DatabasePlace, log: Log, *, number: int, seed: int) -> None:
        self.place = place
        self.log = log
        self.random = random.Random(f"reader {number} {seed}")
        self.store: Store | None = None
        self.seen_winners: set[int] = set()
        self.seen_robust: set[str] = set()
        self.seen_measured: set[int] = set()
        self.blocked: dict[tuple[str, int], int] = {}

    def run(self, until: float) -> None:
        """Read until a moment of the monotonic clock."""
        names, weights = list(HABITS), list(HABITS.values())
        while time.monotonic() < until:
            if self.store is None and not self._open():
                continue
            name = self.random.choices(names, weights)[0]
            began = time.monotonic()
            try:
                fields = getattr(self, f"_{name}")()
                self.log.write(read=name, began=began, ended=time.monotonic(), **(fields or {}))
            except Exception as error:
                self.log.problem(name, error)
            time.sleep(self.random.uniform(0.0, LONGEST_PAUSE_S))
        if self.store is not None:
            self.store.close()

    def _open(self) -> bool:
        """In the first moments there may be no database."""
        try:
            self.store = Store.read(self.place)
        except DatabaseError as error:
            if not str(error).startswith(NOT_THERE_YET):
                self.log.problem("first open", error)
            time.sleep(0.01)
            return False
        return True

    def _reopen(self) -> None:
        assert self.store is not None
        self.store.close()
        how: Callable[..., Store] = self.random.choice((Store.read, Store.open))
        self.store = how(self.place)

    def _listing(self) -> dict[str, Any]:
        assert self.store is not None
        index = self.random.randrange(len(KEYS))
        target, problem, workload = KEYS[index]
        stored = self.store.trials(target=target, problem=problem, workload=workload)
        codes: dict[int, list[int]] = defaultdict(list)
        for trial in stored:
            code = values.check_trial(trial, KEYS[index])
            codes[code // STRIDE].append(code % STRIDE)
        for writer, found in codes.items():
            if len(set(found)) != len(found):
                raise ValueError(f"a trial of writer {writer} is there twice in a listing")
        return {"key": index, "seen": {w: [len(found), max(found)] for w, found in codes.items()}}

    def _winners(self) -> dict[str, Any]:
        assert self.store is not None
        winners = self.store.winners()
        standing = [values.check_winner(winner) for winner in winners]
        keys = [one.key for one in standing]
        if len(set(keys)) != len(keys):
            raise ValueError("a key has two winners")
        if gone := self.seen_winners - set(keys):
            raise ValueError(f"winners are gone: {sorted(gone)}")
        measured = {one.key for one in standing if one.measured}
        if gone := self.seen_measured - measured:
            raise ValueError(f"measured winners gave way to emulated ones: {sorted(gone)}")
        self.seen_winners |= set(keys)
        self.seen_measured |= measured
        for found in self.store.runners_up(winners).values():
            if [c.score for c in found] != sorted(c.score for c in found):
                raise ValueError("runners-up are out of order")
        return {"codes": {one.key: one.code for one in standing}}

    def _lookups(self) -> dict[str, Any]:
        dispatcher.reload()
        ranks = []
        for target, problem, workload in KEYS:
            answer = dispatcher.lookup_problem(problem, workload, target)
            exact = answer.source == "exact"
            ranks.append(0 if not exact else 2 if answer.evidence == "measured" else 1)
        return {"ranks": ranks}

    def _top(self) -> None:
        assert self.store is not None
        key = self.random.choice(KEYS)
        target, problem, workload = key
        found = self.store.top(target=target, problem=problem, workload=workload)
        for trial in found:
            values.check_trial(trial, key)
        for evidence in ("measured", "emulated"):
            scores = [t.result.score for t in found if t.result.evidence == evidence]
            if scores != sorted(s for s in scores if s is not None):
                raise ValueError(f"the top is out of order: {scores}")

    def _robust(self) -> dict[str, Any]:
        assert self.store is not None
        found = {values.robust_place(w): values.check_robust(w) for w in self.store.robust()}
        if gone := self.seen_robust - set(found):
            raise ValueError(f"robust winners are gone: {sorted(gone)}")
        self.seen_robust |= set(found)
        return {"codes": found}

    def _blocked(self) -> None:
        assert self.store is not None
        target, index = self.random.choice(TARGETS), self.random.randrange(len(PROBLEMS))
        blocked = self.store.blocked(
            arch=target.arch,
            kernel_source_hash=ENVIRONMENTS[0].kernel_source_hash,
            problem=PROBLEMS[index],
        )
        for result in blocked.values():
            if not result.reason.endswith(f"of {result.status}: λ > 0"):
                raise ValueError(f"a block without its message: {result}")
        place = (target.arch, index)
        if len(blocked) < self.blocked.get(place, 0):
            raise ValueError(f"blocks of {place} are gone")
        self.blocked[place] = len(blocked)

    def _imports(self) -> dict[str, Any]:
        assert self.store is not None
        with self.store.transaction(writes=False) as session:
            return {"imports": {row[0]: row[1] for row in session.execute(text(IMPORTS))}}

    def _dangling(self) -> None:
        assert self.store is not None
        check_dangling(self.store)

    def _snapshot(self) -> None:
        """A transaction that reads sees one state, however long it takes."""
        assert self.store is not None
        count = text("SELECT count(*), max(id) FROM patune_trial")
        with self.store.transaction(writes=False) as session:
            first = session.execute(count).one()
            time.sleep(PAUSE_IN_A_SNAPSHOT_S)
            second = session.execute(count).one()
        if first != second:
            raise ValueError(f"a transaction saw two states: {first}, then {second}")


def check_dangling(store: Store) -> None:
    """Look for rows without what they refer to, past the constraints.

    Raises:
        ValueError: there is such a row.
    """
    for what, query in DANGLING.items():
        with store.transaction(writes=False) as session:
            if count := session.execute(text(query)).scalar_one():
                raise ValueError(f"{count} {what}")


def read(
    place: DatabasePlace, log: Log, *, number: int, seed: int, start: float, until: float
) -> None:
    """What a reading process does, from the moment that all begin at."""
    os.environ |= {
        "PATUNE_DB": str(getattr(place, "url", place)),
        "PATUNE_WATCH": "0",
        "PATUNE_CAPTURE": "0",
    }
    logging.getLogger("patune").addHandler(_Warnings(log))
    time.sleep(max(0.0, start - time.monotonic()))
    Reader(place, log, number=number, seed=seed).run(until)
