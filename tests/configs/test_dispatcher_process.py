"""The dispatcher of a process that lives long: changes of the database, threads, forks, pins, overrides, knobs that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CDNA_KNOBS,
    CORE,
    DEFAULT,
    H200,
    KNOBS,
    MI300X,
    OTHER_KNOBS,
    PROBLEM,
    SWEEP,
    WORKLOAD,
    at,
    robust_winner,
    serve,
    winner,
)

from patune.configs import dispatcher, overrides, watch
from patune.configs.answer import Answer
from patune.configs.dispatcher import lookup, lookup_problem, reload, stats
from patune.configs.packs import pack_document, pack_text
from patune.configs.store import Store
from patune.environment import current_environment
from patune.errors import InvalidValueError, MissError
from patune.kernels.defaults import safe_knobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fresh_dispatcher")
H = {"target": "sm_90"}
COMMAND = f"{SWEEP} --batch 128 --kv-heads 8 --context 4096 --target sm_90"


@pytest.fixture
def no_watch_left() -> Iterator[None]:
    watch.forget()
    yield
    watch.stop()


def until(done: Callable[[], bool]) -> None:
    """Wait for another thread; the test's own runner ends a wait that never ends."""
    while not done():
        time.sleep(0.002)


def in_child(work: Callable[[], Any]) -> Any:
    """What a forked child computes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def add(database: Path, *found: Any) -> None:
    with Store.open(database) as store:
        store.merge(found, imported_from="x")


def test_a_change_of_the_database_is_seen(
    database: Path, monkeypatch: pytest.MonkeyPatch, no_watch_left: None
) -> None:
    monkeypatch.setenv("PATUNE_WATCH", "0.01")
    assert lookup(**CORE, **H).source == "heuristic"
    add(database, winner())
    until(lambda: lookup(**CORE, **H).source == "exact")
    add(database, winner(knobs=OTHER_KNOBS, created="2026-11-23T10:42:00Z"))
    until(lambda: lookup(**CORE, **H).knobs == OTHER_KNOBS)


def test_without_a_watch_nothing_is_seen(database: Path, no_watch_left: None) -> None:
    before = set(threading.enumerate())  # that of an earlier test may be ending
    assert lookup(**CORE, **H).source == "heuristic"
    assert "patune-watch" not in {thread.name for thread in set(threading.enumerate()) - before}
    add(database, winner())
    assert lookup(**CORE, **H).source == "heuristic"


def test_a_look_reads_only_what_changed(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(database, winner())
    lookup(**CORE, **H)
    reads: list[int] = []
    monkeypatch.setattr(dispatcher, "refresh", lambda: reads.append(1))
    watcher = watch.Watcher(1.0)
    for _ in range(3):
        watcher.look()
    assert reads == []
    database.touch()  # its time changes, what it serves does not
    watcher.look()
    assert reads == []
    add(database, winner(workload=at(context=64)))
    watcher.look()
    assert reads == [1]


def test_stale_configurations_are_told_once(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = current_environment(MI300X)
    old = dataclasses.replace(here, triton="3.5.1", compiler="llvm of triton 3.5.1")
    fields = {"target": MI300X, "slots": 5.0, "knobs": CDNA_KNOBS}
    add(
        database,
        winner(**fields, environment=here),
        winner(**fields, environment=old, workload=at(context=64)),
    )
    answer = lookup(**CORE, target="gfx942")
    assert (answer.staleness, [c for c in answer.changes if c.kind == "reverify"]) == ("fresh", [])
    stale = lookup(**CORE, context=64, target="gfx942")
    assert stale.staleness == "reverify"
    assert str(stale.changes[0]) == f"triton 3.5.1 -> {here.triton}"
    watcher = watch.Watcher(1.0)
    caplog.clear()
    watcher.look()
    watcher.look()
    assert [r.getMessage() for r in caplog.records] == [
        f"1 of 2 configurations for gfx942 were tuned with triton 3.5.1 -> {here.triton}, "
        f"compiler llvm of triton 3.5.1 -> {here.compiler}; they are served. Run: patune verify --adopt"
    ]


def test_a_child_has_the_table_and_its_own_counts(
    database: Path, monkeypatch: pytest.MonkeyPatch, no_watch_left: None
) -> None:
    monkeypatch.setenv("PATUNE_WATCH", "0.01")
    serve(database, winner())
    for _ in range(3):
        lookup(**CORE, **H)
        lookup(**CORE, context=64, **H)

    def child() -> Any:
        first = stats()["lookups"]
        source = lookup(**CORE, **H).source
        watched = sum(t.name == "patune-watch" for t in threading.enumerate())
        add(database, winner(knobs=OTHER_KNOBS, created="2026-11-23T10:42:00Z"))
        until(lambda: lookup(**CORE, **H).knobs == OTHER_KNOBS)
        return sum(first.values()), len(dispatcher.missed()), source, watched

    assert in_child(child) == [0, 0, "exact", 1]
    assert stats()["lookups"]["exact"] == 3
    assert list(dispatcher.missed().values()) == [3]


def test_forks_while_other_threads_reload_and_look_up(database: Path) -> None:
    serve(database, winner())
    ended = threading.Event()

    def churn(work: Callable[[], object]) -> None:
        while not ended.is_set():
            work()

    works = (reload, lambda: lookup(**CORE, **H), stats, lambda: dispatcher.pin(()))
    threads = [threading.Thread(target=churn, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:

        def child() -> str:
            reload()
            return lookup(**CORE, **H).source

        assert [in_child(child) for _ in range(10)] == ["exact"] * 10
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_lookups_during_reloads_are_whole(database: Path) -> None:
    """Knobs and their sizes are always of one table, whichever it is."""
    other = database.with_name("other.db")
    with Store.open(database) as store:
        store.merge([winner(workload=at(context=4000))], imported_from="x")
    with Store.open(other) as store:
        store.merge([winner(workload=at(context=4200), knobs=OTHER_KNOBS)], imported_from="x")
    pairs = set()
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answer = lookup(**CORE, **H)
            pairs.add((answer.source, answer.knobs, answer.stored_workload))

    reload(database)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(40):
        reload((other, database)[n % 2])
    ended.set()
    for thread in threads:
        thread.join()
    assert pairs <= {
        ("nearest", KNOBS, at(context=4000)),
        ("nearest", OTHER_KNOBS, at(context=4200)),
    }


def test_knobs_that_fail_are_given_up(
    database: Path, fresh_dispatcher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serve(database, winner())
    (fresh_dispatcher / "a.json").write_text(pack_text(pack_document([winner(knobs=OTHER_KNOBS)])))
    reload()
    assert lookup(**CORE, **H).knobs == KNOBS
    caplog.clear()
    answer = dispatcher.give_up(PROBLEM, WORKLOAD, H200, KNOBS, "CompileError: no")
    assert (answer.source, answer.knobs) == ("pack", OTHER_KNOBS)
    dispatcher.give_up(PROBLEM, WORKLOAD, H200, KNOBS, "CompileError: no")
    (line,) = [r.getMessage() for r in caplog.records]
    assert "num_splits" in line
    assert "CompileError: no. Run: " + COMMAND in line
    assert lookup(**CORE, **H).knobs == OTHER_KNOBS
    reload()
    assert lookup(**CORE, **H).knobs == OTHER_KNOBS
    assert (
        lookup_problem(PROBLEM, WORKLOAD, dataclasses.replace(H200, compute_units=9)).knobs == KNOBS
    )
    dispatcher.give_up(PROBLEM, WORKLOAD, H200, OTHER_KNOBS, "x")
    assert dispatcher.give_up(PROBLEM, WORKLOAD, H200, DEFAULT, "x").source == "safe"
    safe = safe_knobs(PROBLEM, H200)
    assert dispatcher.give_up(PROBLEM, WORKLOAD, H200, safe, "x").knobs == safe


def test_pins_come_first(database: Path) -> None:
    serve(database, winner(knobs=OTHER_KNOBS))
    document = lookup(**CORE, **H).to_dict()
    serve(database, winner(created="2026-11-23T10:42:00Z"))
    assert lookup(**CORE, **H).knobs == KNOBS
    before = dispatcher.fingerprint("sm_90")
    dispatcher.pin([json.loads(json.dumps(document))])
    answer = lookup(**CORE, **H)
    assert (answer.source, answer.knobs, answer.stored_workload) == (
        "pinned",
        OTHER_KNOBS,
        WORKLOAD,
    )
    assert dispatcher.fingerprint("sm_90") != before
    reload()
    assert lookup(**CORE, **H).source == "pinned"
    assert lookup(**CORE, context=4095, **H).source == "nearest"
    dispatcher.unpin()
    assert lookup(**CORE, **H).source == "exact"
    assert dispatcher.fingerprint("sm_90") == before
    with pytest.raises(InvalidValueError, match="no answer of a lookup"):
        dispatcher.pin([{"schema": 2, "source": "exact", "evidence": "measured"}])


def test_an_override_is_of_its_block_and_thread(database: Path) -> None:
    serve(database, winner())
    assert lookup(**CORE, **H).source == "exact"
    elsewhere: list[str] = []
    with overrides.override(num_splits=7):
        answer = lookup(**CORE, **H)
        assert (answer.source, answer.knobs) == (
            "override",
            dataclasses.replace(KNOBS, num_splits=7),
        )
        thread = threading.Thread(
            target=lambda: elsewhere.extend(lookup(**CORE, **H).source for _ in range(3))
        )
        thread.start()
        thread.join()
        reload()
        assert lookup(**CORE, **H).source == "override"
    assert elsewhere == ["exact"] * 3
    assert lookup(**CORE, **H).source == "exact"
    assert dispatcher._state.warm is dispatcher._state.kept


def test_knobs_of_the_environment(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve(database, winner())
    plain = dispatcher.fingerprint("sm_90")
    monkeypatch.setenv("PATUNE_KNOBS", "num_splits=7")
    reload()
    assert [lookup(**CORE, **H).knobs.num_splits for _ in range(2)] == [7, 7]
    assert dispatcher.fingerprint("sm_90") != plain
    monkeypatch.setenv("PATUNE_KNOBS", "waves_per_eu=2")
    reload()
    assert lookup(**CORE, **H).source == "exact"
    assert "An override is left out for sm_90" in caplog.text
    monkeypatch.setenv("PATUNE_KNOBS", "nonsense")
    reload()
    assert lookup(**CORE, **H).source == "exact"
    assert "Answering without the override: PATUNE_KNOBS" in caplog.text


def test_strict_makes_a_miss_an_error_every_time(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve(database, winner())
    monkeypatch.setenv("PATUNE_STRICT", "1")
    reload()
    assert lookup(**CORE, **H).source == "exact"
    assert lookup(**CORE, context=4097, **H).source == "nearest"
    for _ in range(2):
        with pytest.raises(MissError, match="--context 64 --target sm_90"):
            lookup(**CORE, context=64, **H)
    assert list(dispatcher.missed().values()) == [2]
    monkeypatch.setenv("PATUNE_STRICT", "perhaps")
    reload()
    assert lookup(**CORE, context=64, **H).source == "heuristic"
    assert "Lookups are not strict: PATUNE_STRICT='perhaps'" in caplog.text


def test_misses_are_counted_by_power_of_two() -> None:
    for context in range(2049, 2149):
        lookup(**CORE, context=context, **H)
        lookup(**CORE, context=context, **H)
    lookup(**CORE, batch=3, **H)
    assert dispatcher.missed() == {
        (H200, PROBLEM, at(context=4096), "heuristic"): 200,
        (H200, PROBLEM, at(batch=4), "heuristic"): 1,
    }
    reload()
    assert sum(dispatcher.missed().values()) == 201
    dispatcher.suspend_capture()
    assert dispatcher.missed() == {}


def test_the_robust_configuration_answers_for_other_sizes(database: Path) -> None:
    with Store.open(database) as store:
        store.put_robust(robust_winner(objective="mean", knobs=OTHER_KNOBS))
    reload()
    answer = lookup(**CORE, context=64, **H)
    assert (answer.source, answer.knobs, answer.evidence) == ("robust", OTHER_KNOBS, "measured")
    with Store.open(database) as store:
        store.put_robust(robust_winner())
    reload()
    assert lookup(**CORE, context=64, **H).knobs == KNOBS


def test_the_fingerprint_is_of_content(database: Path, fresh_dispatcher: Path) -> None:
    other = database.with_name("other.db")
    one, two = winner(), winner(workload=at(context=64))
    Store.open(other).close()
    add(database, one)
    add(database, two)
    add(other, two)
    add(other, one)
    found = []
    for path in (database, other):
        reload(path)
        found.append(dispatcher.fingerprint(H200))
    assert found[0] == found[1]
    assert dispatcher.fingerprint("gfx942") != found[0]
    dispatcher.give_up(PROBLEM, WORKLOAD, H200, KNOBS, "x")
    assert dispatcher.fingerprint("sm_90") != found[0]
    (fresh_dispatcher / "a.json").write_text(pack_text(pack_document([one])))
    found.append(dispatcher.fingerprint("sm_90"))
    reload(other)
    assert dispatcher.fingerprint("sm_90") != found[-1]


def test_an_answer_in_words(database: Path) -> None:
    serve(database, winner(), winner(workload=at(context=2048), knobs=OTHER_KNOBS))
    near = dispatcher.explain(lookup(**CORE, context=4000, **H))
    assert "source: nearest: they do best over what is stored near these sizes" in near
    assert "chosen from: batch=128 kv_heads=8 context=4096; batch=128" in near
    assert (
        "exact, pack: nothing is stored for the same batch x KV heads and the same context" in near
    )
    assert "changed since: kernel_source_hash 555555555555 -> " in near
    assert COMMAND.replace("4096", "4000") in near
    dispatcher.give_up(PROBLEM, WORKLOAD, H200, KNOBS, "CompileError: no")
    after = dispatcher.explain(lookup(**CORE, **H))
    assert "failed in this process: CompileError: no" in after


def test_answers_go_through_pickle_and_json(database: Path) -> None:
    serve(database, winner(), winner(workload=at(context=2048)))
    for context in (4096, 4000, 64):
        answer = lookup(**CORE, context=context, **H)
        assert pickle.loads(pickle.dumps(answer)) == answer
        assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer
