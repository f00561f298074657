"""What processes are killed at, and what has to be there afterwards: trials, imports, migrations, exports."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import database_values as values
from database_check import Problems, check_database, check_sound, history_of, read_log
from database_stops import NO_STOP, SORTS, Ended, Span, measure, run
from database_values import KEYS, STRIDE
from database_writers import Log, Writer

from patune.configs.readonly import SCHEMA, found_schema
from patune.configs.store import Store
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.problem import Workload

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "configs"))  # old_databases

from old_databases import OLD_SCHEMAS, make_old

__all__ = ["OLD_SCHEMAS", "Export", "Import", "Migration", "Scene", "Trials"]

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from database_check import Line

    from patune.configs.winner import Winner

LIVES = 5  # of writers one after the other on one database
STEPS = 15  # of a life
WINNERS, STANDING, NEWER = 60, 30, 10  # in a pack; of those, here already; of those, newer here
OLD, PACKED, NEW = "2024-01-01T00:00:00Z", "2024-02-01T00:00:00Z", "2024-03-01T00:00:00Z"
OLD_TRIALS = 3000
TIMES = ("created", "started", "ended")  # columns that no second run has again


def quiet(arguments: list[str]) -> Callable[[], None]:
    """The command, as `patune` runs it, without its words."""

    def work() -> None:
        from patune.cli import main

        words = io.StringIO()
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            code = main(arguments, standalone_mode=False)
        if code:
            raise RuntimeError(f"exit code {code}: {words.getvalue()}")

    return work


def dump(path: Path) -> list[str]:
    """Everything that a database holds."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def litter(folder: Path) -> list[str]:
    """What a run leaves beside a file that nobody needs."""
    return sorted(p.name for p in folder.iterdir() if ".part" in p.name)


class Scene:
    """A piece of work that is killed again and again.

    Attributes:
        name: in the report.
        outcomes: what was found after the kills, by how often.
    """

    name = ""
    sorts: tuple[str, ...] = SORTS

    def __init__(self, folder: Path, problems: Problems, plant: Callable[[], None]) -> None:
        self.folder = folder
        self.problems = problems
        self.plant = plant
        self.outcomes: Counter[str] = Counter()
        self.span: Span | None = None

    def prepare(self) -> Path:
        """Make everything ready for the work; the folder that it is in."""
        raise NotImplementedError

    def work(self) -> None:
        """What is killed."""
        raise NotImplementedError

    def check(self, ended: Ended) -> None:
        """Look at what is left."""
        raise NotImplementedError

    def begin(self) -> None:
        """Forget what measuring left."""

    def strike(self, source: random.Random) -> list[tuple[str, Ended]]:
        """One run of the work, ended at a moment that is drawn."""
        if self.span is None:
            span = measure(self._planted, self.prepare)
            self.begin()
            self.span = span
        sort = source.choice(self.sorts)
        folder = self.prepare()
        ended, _ = run(self._planted, folder, self.span.draw(source, sort))
        if ended.code and not ended.killed:
            self.problem("failed", ended.error)
        self.check(ended)
        return [(sort, ended)]

    def _planted(self) -> None:
        self.plant()
        self.work()

    def problem(self, sort: str, words: str) -> None:
        self.problems.add(f"{self.name}: {sort}", words)

    def sound(self, path: Path) -> None:
        """SQLite finds nothing wrong with it."""
        found = Problems()
        check_sound(path, found)
        for words in found.told:
            self.problem("unsound", words)

    def again(self, work: Callable[[], None]) -> None:
        """The next run of the command is not in the way of what the killed one left."""
        ended, _ = run(work, self.folder, NO_STOP)
        if ended.code:
            self.problem("the next run failed", ended.error)


class Trials(Scene):
    """A sweep's writes. The database goes on from life to life; the first of them makes it."""

    name = "trials"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.life, self.databases = -1, 0
        self.lines: list[Line] = []
        self.acknowledged = 0

    def begin(self) -> None:
        self.life = -1

    @property
    def _log(self) -> Path:
        return self.home / f"log-{self.life}"

    def prepare(self) -> Path:
        self.life += 1
        if self.life % LIVES == 0 or self.span is None:
            self.home = self.folder / f"trials-{self.databases}"
            self.home.mkdir()
            self.databases, self.lines = self.databases + 1, []
        return self.home

    def work(self) -> None:
        log = Log(self._log)
        Writer(self.home / "patune.db", log, number=self.life, seed=0).run(steps=STEPS)

    def check(self, ended: Ended) -> None:
        lines = read_log(self._log)
        self.lines += lines
        acknowledged = sum("op" in line for line in lines)
        self.acknowledged += acknowledged
        begun = bool(lines) and "begin" in lines[-1]
        self.outcomes["in an operation" if begun else "between operations"] += ended.killed
        for line in lines:
            if "problem" in line:
                self.problem("reached the writer", line["problem"])
        path = self.home / "patune.db"
        if not found_schema(path):
            self.outcomes["no database yet"] += 1
            if acknowledged:
                self.problem("lost", "the database")
            return
        found = Problems()
        check_database(path, history_of(self.lines), found, killed=True)
        for words in found.told:
            self.problem("wrong", words)
        if (self.life + 1) % LIVES == 0:
            shutil.rmtree(self.home)


def winners(count: int, created: str, *, first: int = 0, writer: int = 0) -> list[Winner]:
    """Winners of as many sizes."""
    found = []
    for i in range(first, first + count):
        winner = values.pack_winner(writer * STRIDE + i, created)
        found.append(
            dataclasses.replace(winner, workload=Workload(batch=i + 1, kv_heads=8, context=4096))
        )
    return found


def fill(path: Path, found: list[Winner]) -> None:
    """A database with these winners, each with candidates."""
    candidates = {
        w.key: tuple(values.pack_candidate(round(w.score) - 1 + n * len(KEYS)) for n in (1, 2))
        for w in found
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with Store.open(path) as store:
        store.merge(found, candidates, imported_from="base")


def state(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """What a database has, but for when it came."""
    found = {}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'patune_%' ORDER BY name"
        ).fetchall()
        for (table,) in tables:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            kept = [c for c in columns if table == "patune_winner" or c not in TIMES]
            found[table] = connection.execute(
                f"SELECT {', '.join(kept)} FROM {table} ORDER BY 1"
            ).fetchall()
    return found


class Import(Scene):
    """`patune import` of a pack: some of its winners are new, some take a place, some do not."""

    name = "import"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.home = self.folder / "import"
        self.base, self.pack = self.home / "base.db", self.home / "pack.json"
        self.path = self.home / "now" / "patune.db"
        fill(self.home / "source.db", winners(WINNERS, PACKED, writer=1))
        quiet(["export", str(self.pack), "--db", str(self.home / "source.db")])()
        older, newer = winners(STANDING - NEWER, OLD), winners(NEWER, NEW, first=STANDING - NEWER)
        fill(self.base, older + newer)
        self.prepare()
        self.before = state(self.path)
        self.work()
        self.after = state(self.path)
        assert self.before != self.after

    def prepare(self) -> Path:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        shutil.copy(self.base, self.path)
        return self.path.parent

    def work(self) -> None:
        quiet(["import", str(self.pack), "--db", str(self.path)])()

    def check(self, ended: Ended) -> None:
        self.sound(self.path)
        now = state(self.path)
        if now not in (self.before, self.after) or (ended.code == 0 and now != self.after):
            counts = {table: len(rows) for table, rows in now.items()}
            self.problem("half", f"{counts} after {ended}")
        self.outcomes["in" if now == self.after else "out" if now == self.before else "half"] += (
            ended.killed
        )
        self.again(self.work)
        if now == self.before and state(self.path) != self.after:
            self.problem("the next run", "did not bring the pack's winners")


class Migration(Scene):
    """The first opening of a file of an earlier schema."""

    def __init__(self, schema: int, *args: Any) -> None:
        super().__init__(*args)
        self.schema, self.name = schema, f"migration from {schema}"
        self.home = self.folder / f"schema-{schema}"
        self.base, self.path = self.home / "base.db", self.home / "now" / "patune.db"
        self.home.mkdir()
        knobs = {"partition_tokens": 128, "num_stages": 2, "num_warps": 4}
        make_old(
            self.base,
            schema,
            HopperKnobs(num_splits=4, **knobs),  # type: ignore[arg-type]
            HopperKnobs(num_splits=8, **knobs),  # type: ignore[arg-type]
            CdnaKnobs(num_splits=4, **knobs),  # type: ignore[arg-type]
        )
        _multiply(self.base)
        self.before = dump(self.base)
        self.prepare()
        run(self.work, self.path.parent, NO_STOP)
        self.after = dump(self.path)
        assert found_schema(self.path) == SCHEMA

    def prepare(self) -> Path:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        shutil.copy(self.base, self.path)
        return self.path.parent

    def work(self) -> None:
        Store.open(self.path).close()

    def check(self, ended: Ended) -> None:
        schema = found_schema(self.path)
        copies = list(self.path.parent.glob("*.bak"))
        parts = litter(self.path.parent)
        self.sound(self.path)
        expected = {self.schema: self.before, SCHEMA: self.after}.get(schema)
        if dump(self.path) != expected:
            self.problem("half", f"schema {schema} after {ended}")
        if schema == SCHEMA and not copies:
            self.problem("no copy", f"after {ended}")
        for copy in copies:
            if found_schema(copy) != self.schema or dump(copy) != self.before:
                self.problem("broken copy", f"{copy.name} after {ended}")
        what = "new schema" if schema == SCHEMA else f"old schema, {len(copies)} copies"
        self.outcomes[what + (", half a copy beside" if parts else "")] += ended.killed
        self.again(self.work)
        if dump(self.path) != self.after:
            self.problem("the next run", "did not bring it forward")
        if left := litter(self.path.parent):
            self.problem("left behind", f"{left}")


def _multiply(path: Path) -> None:
    """Many more trials like the ones that are there, so that a migration takes a while."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        columns = [
            row[1]
            for row in connection.execute("PRAGMA table_info(patune_trial)")
            if row[1] != "id"
        ]
        names = ", ".join(columns)
        (count,) = connection.execute("SELECT count(*) FROM patune_trial").fetchone()
        connection.execute("BEGIN")
        for _ in range(OLD_TRIALS // count):
            connection.execute(
                f"INSERT INTO patune_trial ({names}) SELECT {names} FROM patune_trial ORDER BY id LIMIT {count}"
            )
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class Export(Scene):
    """`patune export` to where a pack is already."""

    name = "export"
    sorts = ("time", "calls", "events", "bytes", "bytes")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.home = self.folder / "export"
        self.path, self.pack = self.home / "patune.db", self.home / "now" / "pack.json"
        fill(self.home / "old.db", winners(STANDING, OLD, writer=1))
        fill(self.path, winners(WINNERS, PACKED, writer=2))
        self.pack.parent.mkdir()
        quiet(["export", str(self.pack), "--db", str(self.home / "old.db")])()
        self.old = self.pack.read_bytes()
        self.prepare()
        self.work()
        self.new = self.pack.read_bytes()
        assert self.old != self.new

    def prepare(self) -> Path:
        shutil.rmtree(self.pack.parent, ignore_errors=True)
        self.pack.parent.mkdir()
        self.pack.write_bytes(self.old)
        return self.pack.parent

    def work(self) -> None:
        quiet(["export", str(self.pack), "--db", str(self.path)])()

    def check(self, ended: Ended) -> None:
        now = self.pack.read_bytes() if self.pack.exists() else b""
        if now not in (self.old, self.new) or (ended.code == 0 and now != self.new):
            self.problem(
                "half",
                f"{len(now)} bytes instead of {len(self.old)} or {len(self.new)} after {ended}",
            )
        what = "new file" if now == self.new else "old file"
        self.outcomes[what + (", half a one beside" if litter(self.pack.parent) else "")] += (
            ended.killed
        )
        self.sound(self.path)
        self.again(self.work)
        if self.pack.read_bytes() != self.new:
            self.problem("the next run", "did not write the pack")
