"""Slices of the torture of the config database (benchmarks/database_stress.py, database_kills.py), and bugs that it has to see."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import database_values as values  # noqa: E402
from database_check import (  # noqa: E402
    Problems,
    ReadCheck,
    Register,
    Write,
    check_counts,
    check_database,
    history_of,
    read_log,
)
from database_kills import SHARES  # noqa: E402
from database_plants import KILLS, STRESS  # noqa: E402
from database_readers import HABITS, Reader, check_dangling  # noqa: E402
from database_stops import SORTS  # noqa: E402
from database_writers import Log, Writer  # noqa: E402
from old_databases import OLD_SCHEMAS  # noqa: E402

from patune.configs.store import Store  # noqa: E402

WRITER = 3
SEEDS = 4  # a planted bug shows when the processes meet at the right moment, which depends on the machine's load


def script(name: str, *arguments: object, code: int | None) -> dict[str, Any]:
    """The document of a run of one of the scripts, in a process without this one's threads: it forks."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert code in (None, done.returncode), done.stderr + done.stdout[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database and the log of its writer, who wrote until everything was done at least once."""
    folder = tmp_path_factory.mktemp("written")
    Writer(folder / "patune.db", Log(folder / "log"), number=WRITER, seed=5).run(steps=60)
    found = read_log(folder / "log")
    done = {line["op"] for line in found if "op" in line}
    assert done == {"begin_run", "end_run", "record", "promote", "block", "robust", "merge", "open"}
    assert [line for line in found if "problem" in line] == []
    return folder


@pytest.fixture
def database(written: Path, tmp_path: Path) -> Path:
    """A copy of what was written."""
    path = tmp_path / "patune.db"
    shutil.copy(written / "patune.db", path)
    return path


@pytest.fixture
def lines(written: Path) -> list[dict[str, Any]]:
    """What the writer was told."""
    return read_log(written / "log")


def judged(database: Path, lines: list[dict[str, Any]]) -> dict[str, int]:
    problems = Problems()
    history = history_of(lines)
    check_database(database, history, problems)
    check_counts(history, problems)
    return dict(problems.counts)


def of(lines: list[dict[str, Any]], op: str) -> dict[str, Any]:
    """The last line of an operation."""
    return next(line for line in reversed(lines) if line.get("op") == op)


def test_what_was_acknowledged_is_there(database: Path, lines: list[dict[str, Any]]) -> None:
    assert judged(database, lines) == {}
    reader = Reader(database, Log(Path(os.devnull)), number=0, seed=0)
    with Store.read(database) as reader.store:
        listings = [reader._listing() for _ in range(50)]
        read = reader._winners(), reader._robust(), reader._imports()
    problems = Problems()
    check = ReadCheck(history_of(lines), problems)
    later = {"began": lines[-1]["ended"] + 1, "ended": lines[-1]["ended"] + 2}
    every = [("listing", fields) for fields in listings]
    every += zip(("winners", "robust", "imports"), read, strict=True)
    for name, fields in every:
        check.check(json.loads(json.dumps({"read": name, **fields, **later})))
    assert problems.told == []
    assert {key for fields in listings for key in fields["seen"]} == {WRITER}


# What is done to the log: each stands for a database that is wrong in just that way.
def _more(lines: list[dict[str, Any]]) -> None:
    record = of(lines, "record")
    code = record["codes"][0] + 10**4
    lines.append({**record, "codes": [code]})


def _fewer(lines: list[dict[str, Any]]) -> None:
    record = next(line for line in lines if line.get("op") == "record" and _fails(line))
    lines[:] = [line for line in lines if record["codes"] != line.get("codes")]


def _fails(line: dict[str, Any]) -> bool:
    return values.result_of(line["codes"][0]).status == "wrong"


def _other_id(lines: list[dict[str, Any]]) -> None:
    of(lines, "record")["id"] += 1000


def _kept_in_part(lines: list[dict[str, Any]]) -> None:
    merge = of(lines, "merge")
    lines.append({**merge, "name": "another", "codes": [c + 48 * 500 for c in merge["codes"]]})


def _overwritten(lines: list[dict[str, Any]]) -> None:
    robust = of(lines, "robust")
    later = {"began": lines[-1]["ended"] + 1, "ended": lines[-1]["ended"] + 2}
    lines.append({**robust, **later, "codes": [robust["codes"][0] + 2 * 24 * 24]})


def _unended(lines: list[dict[str, Any]]) -> None:
    lines.append({**of(lines, "end_run"), "run": 10**6})


def _unblocked(lines: list[dict[str, Any]]) -> None:
    block = of(lines, "block")
    blocked = {tuple(line["codes"]) for line in lines if line.get("op") == "block"}
    free = next(
        line["codes"]
        for line in lines
        if line.get("op") == "record"
        and values.result_of(line["codes"][0]).status in values.FAULTS
        and tuple(line["codes"]) not in blocked
    )
    lines.append({**block, "codes": free})


def _miscounted(lines: list[dict[str, Any]]) -> None:
    promote = next(
        line
        for line in lines
        if line.get("op") == "promote" and line["standing"] == line["codes"][0]
    )
    promote["trials"] -= 1


@pytest.mark.parametrize(
    ("change", "sorts"),
    [
        (_more, {"lost"}),
        (_fewer, {"never acknowledged"}),
        (_other_id, {"other id"}),
        (_kept_in_part, {"lost", "half an import", "lost update"}),
        (_overwritten, {"lost update"}),
        (_unended, {"lost"}),
        (_unblocked, {"lost"}),
        (_miscounted, {"overlooked"}),
    ],
)
def test_a_database_that_differs_from_the_log_is_seen(
    database: Path, lines: list[dict[str, Any]], change: Any, sorts: set[str]
) -> None:
    change(lines)
    found = judged(database, lines)
    assert found
    assert set(found) <= sorts | {"overlooked"}, found
    assert sorts & set(found)


@pytest.mark.parametrize(
    ("statement", "sort"),
    [
        ("UPDATE patune_trial SET message_id = NULL WHERE status = 'wrong'", "half there"),
        ("UPDATE patune_trial SET replays = 31 WHERE source = 'pack'", "half there"),
        ("UPDATE patune_winner SET default_knobs = NULL, default_score = NULL, speedup = NULL, "
         "speedup_low = NULL, speedup_high = NULL", "half there"),
        ("UPDATE patune_robust SET regrets = '[9.0]'", "lost update"),
        ("DELETE FROM patune_blocklist", "lost"),
        ("DELETE FROM patune_winner", "lost update"),
        ("DELETE FROM patune_trial WHERE source = 'search' AND status = 'wrong'", "lost"),
        ("UPDATE patune_run SET command = 'patune import never'", "never acknowledged"),
        ("UPDATE patune_run SET ended = NULL WHERE id = 1", "lost"),
    ],
)  # fmt: skip
def test_a_change_to_the_database_is_seen(
    database: Path, lines: list[dict[str, Any]], statement: str, sort: str
) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
        connection.commit()
    assert sort in judged(database, lines)


def test_a_torn_reference_is_seen(database: Path, lines: list[dict[str, Any]]) -> None:
    with closing(sqlite3.connect(database)) as connection:  # without foreign keys: SQLite's default
        connection.execute("DELETE FROM patune_message WHERE id = 1")
        connection.commit()
    with Store.read(database) as store, pytest.raises(ValueError, match="without their message"):
        check_dangling(store)
    found = judged(database, lines)
    assert {"half there", "unsound"} <= set(found)


def test_a_register_knows_what_a_read_can_have_seen() -> None:
    register = Register()
    register.add([Write(1, 1.0, 2.0), Write(2, 3.0, 4.0), Write(3, 3.5, 6.0)])
    cases = {
        (None, 0.0, 0.5): None,
        (None, 1.5, 1.7): None,
        (None, 2.5, 2.7): "nothing is there",
        (1, 2.5, 2.7): None,
        (1, 3.2, 3.3): None,  # the second is under way
        (1, 4.5, 4.6): "back, or a later write is lost",
        (2, 4.5, 4.6): None,
        (2, 0.5, 2.9): "from the future",
        (3, 3.6, 3.7): None,
        (2, 7.0, 7.1): None,  # it overlapped the third: either may have been last
        (3, 7.0, 7.1): None,
        (9, 7.0, 7.1): "never acknowledged",
    }
    for (code, began, ended), why in cases.items():
        found = register.refuse(code, began, ended)
        assert (found is None) == (why is None), (code, began, found)
        assert why is None or (found is not None and why in found)


LISTINGS = {
    "all that was told of": ({"3": [2, 9]}, 5.0, 5.1, None),
    "and what is under way": ({"3": [4, 40]}, 6.5, 6.6, None),
    "too little": ({"3": [1, 2]}, 5.0, 5.1, "stale or uncommitted read"),
    "nothing": ({}, 5.0, 5.1, "stale or uncommitted read"),
    "what has not begun": ({"3": [4, 40]}, 5.0, 5.1, "stale or uncommitted read"),
    "half of a merge": ({"3": [3, 16]}, 6.5, 6.6, "half a write was seen"),
    "another one than the first": ({"3": [1, 9]}, 2.5, 3.5, "half a write was seen"),
    "of nobody": ({"3": [2, 9], "5": [1, 1]}, 5.0, 5.1, "stale or uncommitted read"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_of_whole_writes_that_were_there(name: str) -> None:
    seen, began, ended, sort = LISTINGS[name]
    history = history_of([])
    # Two trials, then a merge of a winner and its candidate.
    order = [(2, 1.0, 2.0), (9, 3.0, 4.0), (16, 6.0, 7.0), (40, 6.0, 7.0)]
    history.orders[0, 3] = order
    problems = Problems()
    ReadCheck(history, problems)._listing(0, seen, began, ended)
    assert problems.counts == ({sort: 1} if sort else {})


@pytest.mark.parametrize("sort", SORTS)
def test_a_process_ends_at_its_moment(tmp_path: Path, sort: str) -> None:
    at = {"time": 1.0, "steps": 20_000, "calls": 200_000, "events": 400, "bytes": 300_000}[sort]
    done = subprocess.run(
        [sys.executable, "-c", ENDING, sort, str(at), str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "True"]


ENDING = """
import sys
from pathlib import Path
from database_stops import Stop, run
from database_writers import Log, Writer
sort, at, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
def work():
    Writer(folder / "patune.db", Log(folder / "log"), number=0, seed=0).run(steps=10_000)
ended, counts = run(work, folder, Stop(sort, at))
print(ended.killed, counts == [] and ended.stage != "before everything")
"""


@pytest.mark.slow
def test_a_small_stress_finds_nothing() -> None:
    document = script("database_stress", "--seconds", 6, "--writers", 6, "--readers", 3, code=0)
    assert document["wrong"] == {}
    assert document["problems"] == []
    assert document["trials"] > 20
    assert document["reads"] > 20
    assert set(document["reading"]) <= set(HABITS)
    assert document["worst_write_ms"] > 0


@pytest.mark.slow
def test_some_kills_find_nothing() -> None:
    kills = Counter({"trials": 10, "import": 6, "migration": 9, "export": 6})
    assert set(kills) == set(SHARES) - {"sweep"}  # tests/tuner/test_fault_campaign.py kills sweeps
    for scene, count in kills.items():
        document = script("database_kills", "--kills", count, "--scene", scene, code=0)
        assert document["problems"] == []
        assert document["killed"] == count


@pytest.mark.slow
@pytest.mark.parametrize("plant", STRESS)
def test_the_stress_sees_a_planted_bug(plant: str) -> None:
    how = ("--seconds", 6, "--writers", 4, "--readers", 2, "--plant", plant)
    documents = (
        script("database_stress", "--seed", seed, *how, code=None) for seed in range(SEEDS)
    )
    assert any(document["wrong"] for document in documents)


STRUCK_BY = {
    "acknowledged early": ("trials", 15, {"trials: wrong"}),
    "import per winner": ("import", 6, {"import: half"}),
    "migration in pieces": (
        "migration",
        8,
        {f"migration from {schema}: half" for schema in OLD_SCHEMAS},
    ),
    "written in place": ("export", 20, {"export: half"}),
    "no copy": ("migration", 10, {f"migration from {schema}: no copy" for schema in OLD_SCHEMAS}),
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", KILLS)
def test_the_kills_see_a_planted_bug(plant: str) -> None:
    scene, count, sorts = STRUCK_BY[plant]
    seen: set[str] = set()
    for seed in range(SEEDS):  # where the kills fall depends on the machine's load
        document = script(
            *("database_kills", "--kills", count, "--seed", seed, "--scene", scene),
            *("--plant", plant),
            code=None,
        )
        seen |= set(document["wrong"])
        if sorts & seen:
            return
    raise AssertionError(f"{plant} was not seen, only {seen}")
