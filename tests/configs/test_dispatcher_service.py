"""Lookups in a serving process: bad files cost a log line, warm answers cost nothing, and everything is counted."""

from __future__ import annotations

import dataclasses
import json
import logging
import sqlite3
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CORE,
    DEFAULT,
    H100,
    H200,
    KNOBS,
    MI300X,
    PROBLEM,
    SWEEP,
    WORKLOAD,
    at,
    serve,
    winner,
)

from patune.configs import dispatcher
from patune.configs.dispatcher import lookup, lookup_problem, reload, stats
from patune.configs.store import Store
from patune.errors import InvalidValueError
from patune.problem import Problem

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fresh_dispatcher")


def missing(path: Path) -> str:
    path.unlink()
    return "No config database at"


def foreign(path: Path) -> str:
    path.write_bytes(b"hello" * 1000)
    return "not SQLite at all"


def other_program(path: Path) -> str:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE studies (x)")
    connection.close()
    return "of another program"


def damaged(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    return "is damaged"


def newer(path: Path) -> str:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE patune_meta SET schema = 99")
    connection.close()
    return "newer patune"


def without_a_table(path: Path) -> str:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP TABLE patune_winner")
    connection.close()
    return "no such table: patune_winner"


def folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "is not a file"


@pytest.mark.parametrize(
    "spoil", [missing, foreign, other_program, damaged, newer, without_a_table, folder]
)
def test_a_bad_database_costs_one_log_line(
    database: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    serve(database, winner())
    message = spoil(database)
    reload()
    caplog.clear()
    dispatcher._state = dispatcher._State()
    answer = lookup(**CORE, target="sm_90")
    assert (answer.knobs, answer.source, answer.evidence) == (DEFAULT, "heuristic", "default")
    lookup(**CORE, context=100, target="sm_90")
    lines = [r.getMessage() for r in caplog.records if "No tuned config" not in r.getMessage()]
    assert len(lines) == 1
    assert message in lines[0]
    assert str(database) in lines[0]


def test_threads_may_look_up_while_the_table_turns_over(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(database, winner())
    monkeypatch.setattr(dispatcher, "MAX_WARM", 4)
    monkeypatch.setattr(dispatcher.LOGGER, "disabled", True)
    sources: list[str] = []

    def ask(first: int) -> None:
        for context in range(first, first + 300):
            found = {lookup(**CORE, context=context, target="sm_90").source for _ in range(2)}
            sources.extend(found)
            stats()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(ask, 7_900 + 100 * i) for i in range(4)] + [pool.submit(reload)]:
            done.result()
    contexts = [c for i in range(4) for c in range(7_900 + 100 * i, 8_200 + 100 * i)]
    assert sorted(sources) == sorted("nearest" if c <= 8192 else "heuristic" for c in contexts)


def test_a_locked_database_is_not_waited_for(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve(database, winner())
    monkeypatch.setattr("patune.configs.reading.SERVING_WAIT_S", 0.01)
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("BEGIN EXCLUSIVE")
    dispatcher._state = dispatcher._State()
    assert lookup(**CORE, target="sm_90").source == "heuristic"
    assert "Answering without the config database" in caplog.text
    connection.close()
    reload()
    assert lookup(**CORE, target="sm_90").source == "exact"


def test_a_database_on_a_read_only_disk_is_served(
    shared_folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shared_folder / "patune.db"
    serve(path, winner())
    path.chmod(0o444)
    shared_folder.chmod(0o555)
    monkeypatch.setenv("PATUNE_DB", str(path))
    request.getfixturevalue("unprivileged")
    reload()
    assert lookup(**CORE, target="sm_90").source == "exact"
    assert list(shared_folder.iterdir()) == [path]


def test_closed_folders_are_no_error(
    shared_folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_folder.chmod(0o000)
    monkeypatch.setenv("PATUNE_DB", str(shared_folder / "patune.db"))
    monkeypatch.setattr(dispatcher, "PACKS", shared_folder / "packs")
    request.getfixturevalue("unprivileged")
    reload()
    assert lookup(**CORE, target="sm_90").source == "heuristic"


def test_a_warm_lookup_touches_nothing_but_memory(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(database, winner())
    cold = lookup(**CORE, target="sm_90")
    other = lookup_problem(PROBLEM, WORKLOAD, H200)
    database.unlink()
    for name in ("_cold", "Problem", "Workload", "Search"):
        monkeypatch.delattr(dispatcher, name)
    assert lookup(**CORE, target="sm_90") is cold
    assert lookup_problem(PROBLEM, WORKLOAD, H200) is other
    assert lookup_problem(Problem(**CORE), at(), dataclasses.replace(H200)) is other


def test_answers_cannot_be_changed(database: Path) -> None:
    serve(database, winner())
    answer = lookup(**CORE, target="sm_90")
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.source = "safe"  # type: ignore[misc]
    answer.key["problem"]["qg"] = 99
    answer.to_dict()["knobs"]["num_splits"] = 99
    assert lookup(**CORE, target="sm_90").to_dict()["key"]["problem"]["qg"] == 8
    assert lookup(**CORE, target="sm_90").knobs == KNOBS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1000}, "block_size=1000 is not allowed"),
        ({"head_dim": "128"}, "head_dim='128'"),
        ({"qg": 0}, "qg=0"),
        ({"batch": 0}, "batch=0"),
        ({"context": -5}, "context=-5"),
        ({"kv_quant": "per_token"}, "needs an fp8 cache"),
        ({"target": "sm_80"}, "target='sm_80' is not allowed; allowed: sm_90, gfx942, gfx950"),
    ],
)
def test_invalid_arguments_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError) as error:
        lookup(**(CORE | {"target": "sm_90"} | change))
    assert message in str(error.value)
    assert sum(stats()["lookups"].values()) == 0


def test_a_fallback_is_logged_once_per_problem(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for context in (4096, 4097, 4098):
        lookup(**CORE, context=context, target="sm_90")
        lookup(**CORE, context=context, target="sm_90")
    assert [r.getMessage() for r in caplog.records] == [
        "No tuned config for sm_90 block_size=1024 head_dim=128 qg=8 (NVIDIA H200) "
        "batch=128 kv_heads=8 context=4096: taking the heuristic. "
        f"Run: {SWEEP} --batch 128 --kv-heads 8 --context 4096 --target sm_90"
    ]
    assert caplog.records[0].levelno == logging.INFO
    caplog.clear()
    lookup(**CORE, target="gfx942")
    variant = {"query_length": 2, "kv_layout": "hnd", "windowed": True, "sinks": True}
    fp8 = {"kv_dtype": "fp8_e4m3fn", "softcap": True, "fp8_math": True}
    lookup(**CORE, target="sm_90", **variant, **fp8)
    first, second = (r.getMessage().split("Run: ")[1] for r in caplog.records)
    assert first == f"{SWEEP} --batch 128 --kv-heads 8 --context 4096 --target gfx942"
    assert second == (
        f"{SWEEP} --query-length 2 --kv-dtype fp8_e4m3fn --kv-layout hnd --window --sinks --softcap --fp8-math "
        "--batch 128 --kv-heads 8 --context 4096 --target sm_90"
    )
    serve(database, winner())
    caplog.clear()
    for context in (4095, 4097):
        lookup(**CORE, context=context, target="sm_90")
    (line,) = [r.getMessage() for r in caplog.records]
    assert "context=4095: taking the one of batch=128 kv_heads=8 context=4096. Run: " in line


def test_statistics(database: Path) -> None:
    serve(database, winner())
    for _ in range(3):
        lookup(**CORE, target="sm_90")
    lookup(**CORE, context=5000, target="sm_90")
    for _ in range(2):
        lookup(**(CORE | {"qg": 16}), target="sm_90")
    lookup_problem(PROBLEM, WORKLOAD, MI300X)
    found = stats()
    assert {s: n for s, n in found["lookups"].items() if n} == {
        "exact": 3,
        "nearest": 1,
        "heuristic": 3,
    }
    assert found["misses"] == {
        "sm_90 block_size=1024 head_dim=128 qg=16": 2,
        "gfx942 block_size=1024 head_dim=128 qg=8": 1,
    }
    assert found["db"] == str(database)
    assert found["entries"] == {"db": 1, "packs": 0}
    assert found["load_ms"] > 0
    json.dumps(found)


def test_the_number_of_warm_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "MAX_WARM", 8)
    for context in range(1, 101):
        lookup(**CORE, context=context, target="sm_90")
        lookup(**CORE, context=context, target="sm_90")
        assert sum(map(len, dispatcher._state.warm.values())) <= 8
    assert stats()["lookups"]["heuristic"] == 200
    assert stats()["misses"] == {"sm_90 block_size=1024 head_dim=128 qg=8": 200}


def test_reload_serves_what_was_stored_since(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lookup(**CORE, target="sm_90").source == "heuristic"
    with Store.open(database) as store:
        store.merge([winner()], imported_from="x")
    assert lookup(**CORE, target="sm_90").source == "heuristic"
    reload()
    monkeypatch.setattr("patune.configs.state.read_database", None)  # reload has read it
    assert lookup(**CORE, target="sm_90").source == "exact"
    assert {s: n for s, n in stats()["lookups"].items() if n} == {"exact": 1, "heuristic": 2}


def test_reload_reaches_the_launch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = []
    module = types.SimpleNamespace(forget_steps=lambda: forgotten.append(1))
    monkeypatch.setitem(sys.modules, "patune.kernels.decode", module)
    reload()
    assert forgotten == [1]


def test_the_target_comes_from_the_argument_then_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lookup(**CORE).target == MI300X
    monkeypatch.setenv("PATUNE_TARGET", "sm_90")
    assert lookup(**CORE).target == MI300X  # settings are read once per reload
    reload()
    assert lookup(**CORE).target == H200
    assert lookup(**CORE, target="gfx950").target.arch == "gfx950"
    monkeypatch.setenv("PATUNE_TARGET", "sm_80")
    reload()
    with pytest.raises(InvalidValueError, match="PATUNE_TARGET: target='sm_80' is not allowed"):
        lookup(**CORE)
    assert lookup(**CORE, target="sm_90").target == H200


def test_the_device_that_is_here_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "GPU_NODES", ("/dev/null",))
    monkeypatch.setattr(dispatcher, "resolve_target", lambda arch: H100)
    assert lookup(**CORE).target == H100
    assert lookup(**CORE, target="sm_90").target == H100


def test_a_broken_gpu_is_logged_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(arch: str | None) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(dispatcher, "GPU_NODES", ("/dev/null",))
    monkeypatch.setattr(dispatcher, "resolve_target", broken)
    assert lookup(**CORE, target="sm_90").target == H200
    assert lookup(**CORE).target == MI300X
    assert "Cannot re-initialize CUDA" in caplog.text


def test_arguments_that_cannot_be_hashed_are_refused() -> None:
    for change in ({"qg": []}, {"context": []}, {"target": ["sm_90"]}, {"batch": {}}):
        with pytest.raises(InvalidValueError):
            lookup(**(CORE | {"target": "sm_90"} | change))
