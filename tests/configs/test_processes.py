"""Several processes on one database: they make it together, write together, and may be killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from config_samples import ENVIRONMENT, KEY, KNOBS, PROBLEM, add_trial, measured, raw

from patune.configs.reading import read_database
from patune.configs.store import Store
from patune.settings import DatabasePlace, ServerUrl
from patune.trial import TrialResult

HERE = Path(__file__).parent
PREPARE = """
import sys
from config_samples import *
from patune.configs.store import Store
place, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
"""
WRITER = (
    PREPARE
    + """
with Store.open(place) as store:
    run = store.begin_run(target=H200, environment=ENVIRONMENT, sampler="auto", seed=0, command=name)
    for i in range({trials}):
        trial = store.record_trial(run, problem=PROBLEM, workload=WORKLOAD, knobs=KNOBS,
                                   result=measured(i + 1.0), source=name)
        print(trial, flush=True)
        if i % 5 == 0:
            store.promote(trial, default_trial_id=None)
    store.end_run(run)
"""
)
IN_FLIGHT = (
    PREPARE
    + """
from patune.configs import rows
add = rows.add_trial
def hang(*args, **kwargs):
    add(*args, **kwargs)
    print("in flight", flush=True)
    sys.stdin.readline()
rows.add_trial = hang
add_trial(Store.open(place), measured())
"""
)


def start(script: str, place: DatabasePlace, name: str) -> subprocess.Popen[str]:
    text = place.url if isinstance(place, ServerUrl) else str(place)
    return subprocess.Popen(
        [sys.executable, "-c", script, text, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )


def go(process: subprocess.Popen[str]) -> None:
    """Wait until the process has its imports, then let it run."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def is_sound(path: DatabasePlace) -> bool:
    if isinstance(path, ServerUrl):
        return True  # a server keeps its constraints without exception
    with closing(sqlite3.connect(path)) as connection:
        broken = connection.execute("PRAGMA foreign_key_check").fetchall()
        return broken == [] and connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.fixture(params=["sqlite", "postgresql"])
def new(request: pytest.FixtureRequest, tmp_path: Path) -> DatabasePlace:
    """Where there are no tables yet."""
    if request.param == "sqlite":
        return tmp_path / "new" / "patune.db"
    found: ServerUrl = request.getfixturevalue("server_place")
    return found


def test_processes_make_one_database_and_write_at_once(new: DatabasePlace) -> None:
    path = new
    names = ["a", "b", "c", "d"]
    processes = [start(WRITER.format(trials=25), path, name) for name in names]
    for process in processes:
        go(process)
    outputs = [process.communicate() for process in processes]
    assert [errors for _, errors in outputs] == [""] * 4
    printed = [int(line) for out, _ in outputs for line in out.split()]
    assert sorted(printed) == list(range(1, 101))
    with Store.open(path) as store:
        stored = store.trials(**KEY)
        assert [trial.id for trial in stored] == list(range(1, 101))
        for name in names:
            medians = [t.result.score for t in stored if t.source == name]
            assert medians == [i + 1.0 for i in range(25)]
        assert {trial.environment_key for trial in stored} == {ENVIRONMENT.key}
        assert len(store.winners()) == 1
    assert is_sound(path)


def test_a_killed_writer_loses_no_finished_trial(place: DatabasePlace) -> None:
    database = place
    writer = start(WRITER.format(trials=100_000), database, "killed")
    go(writer)
    assert writer.stdout is not None
    printed = [int(writer.stdout.readline()) for _ in range(12)]
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate()
    printed += [int(line) for line in rest.split("\n")[:-1]]
    assert writer.returncode == -signal.SIGKILL
    if isinstance(database, Path):
        assert database.with_name("patune.db-wal").exists()
        assert read_database(database, "sm_90").count == 1
    with Store.open(database) as store:
        stored = [trial.id for trial in store.trials(**KEY)]
        assert stored[: len(printed)] == printed
        assert len(stored) - len(printed) in (0, 1)  # one may have been stored and not printed
        assert add_trial(store, measured()) > stored[-1]
    assert is_sound(database)


def test_a_trial_in_flight_vanishes_and_unlocks(place: DatabasePlace) -> None:
    database = place
    writer = start(IN_FLIGHT, database, "hanging")
    go(writer)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "in flight\n"
    with Store.open(database) as store:
        assert store.trials(**KEY) == []  # readers are not blocked
        writer.kill()
        writer.communicate()
        kept = add_trial(store, measured())
        assert [trial.id for trial in store.trials(**KEY)] == [kept]
    assert is_sound(database)


FAILING = (
    PREPARE
    + """
with Store.open(place) as store:
    for i in range(10):
        add_trial(store, TrialResult(status="crash", reason=f"message {i}"), source=name)
        store.block(i % 3 + 1)
"""
)


def test_processes_share_their_messages_and_blocks(place: DatabasePlace) -> None:
    database = place
    with Store.open(database) as store:
        for i in range(3):
            knobs = replace(KNOBS, num_splits=i + 1)
            add_trial(store, TrialResult(status="hang", reason=f"message {i}"), knobs=knobs)
    processes = [start(FAILING, database, name) for name in ("a", "b", "c")]
    for process in processes:
        go(process)
    assert [process.communicate() for process in processes] == [("", "")] * 3
    with Store.open(database) as store:
        assert len(store.trials(**KEY)) == 33
        where = {"arch": "sm_90", "kernel_source_hash": ENVIRONMENT.kernel_source_hash}
        blocked = store.blocked(**where, problem=PROBLEM)
        texts = raw(store, "SELECT text FROM patune_message")
    assert {k.num_splits: r.reason for k, r in blocked.items()} == {
        i + 1: f"message {i}" for i in range(3)
    }
    assert sorted(texts) == [(f"message {i}",) for i in range(10)]
    assert is_sound(database)
