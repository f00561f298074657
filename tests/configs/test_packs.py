"""Packs: the same winners give the same bytes, imports follow one rule, and bad packs change nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    H100,
    H200,
    KNOBS,
    MI300X,
    PROBLEM,
    WORKLOAD,
    add_trial,
    dump,
    measured,
    winner,
)
from config_strategies import crowded_winners, winners
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs import packs, rows
from patune.configs.packs import export_pack, import_pack, pack_document, pack_text, read_pack
from patune.configs.store import Store
from patune.errors import DocumentError, InvalidValueError
from patune.kernels import feasibility
from patune.problem import Problem, Workload
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from pathlib import Path

    from patune.configs.winner import Winner

# Every example gets files of its own inside of the test's folder.
on_files = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = (f"{i}.json" for i in range(10**9))


@pytest.fixture(autouse=True)
def everything_is_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "is_feasible", lambda knobs, problem, target: None)


def write_pack(folder: Path, *entries: Winner) -> Path:
    path = folder / next(NAMES)
    path.write_text(pack_text(pack_document(list(entries))))
    return path


def fresh_store(folder: Path, empty: Path) -> Store:
    path = folder / f"{next(NAMES)}.db"
    shutil.copy(empty, path)
    return Store.open(path)


def unique(found: list[Winner]) -> list[Winner]:
    return list({w.key: w for w in found}.values())


def test_a_pack_is_canonical(store: Store, tmp_path: Path) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    store.merge([winner(target=H100), winner(target=MI300X)], imported_from="x.json")
    path = tmp_path / "sub" / "pack.json"
    document = export_pack(store, path)
    assert export_pack(store, None) == document
    data = path.read_bytes()
    assert json.loads(data) == document
    assert data.decode() == json.dumps(document, sort_keys=True, indent=2) + "\n"
    assert b"\r" not in data
    assert document["schema"] == 2
    assert [entry["target"]["arch"] for entry in document["winners"]] == [
        "gfx942",
        "sm_90",
        "sm_90",
    ]
    assert not any("imported_from" in entry for entry in document["winners"])
    assert [p.name for p in path.parent.iterdir()] == ["pack.json"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by whom files are


def test_an_export_is_filtered(store: Store) -> None:
    small = Problem(block_size=16, head_dim=64, qg=1)
    store.merge([winner(), winner(problem=small), winner(target=MI300X)], imported_from="x")

    def count(**wanted: Any) -> int:
        return len(export_pack(store, None, **wanted)["winners"])

    assert count() == 3
    assert count(arch="sm_90") == 2
    assert count(arch="sm_90", block_size=16) == count(head_dim=64) == count(qg=1) == 1
    assert export_pack(store, None, arch="gfx950") == {"schema": 2, "winners": []}


def test_an_unwritable_destination_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "pack.json", tmp_path / "folder"):
        with pytest.raises(InvalidValueError, match=f"cannot be written to {path}: "):
            export_pack(store, path)
    assert sorted(p.name for p in tmp_path.iterdir() if "patune" not in p.name) == [
        "file",
        "folder",
    ]


def test_a_failed_export_keeps_the_old_pack(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "packs" / "pack.json"
    export_pack(store, path)
    before = path.read_bytes()
    store.merge([winner()], imported_from="x")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidValueError, match="No space left on device"):
        export_pack(store, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["pack.json"]


@on_files
@given(st.lists(winners(), max_size=5).map(unique))
def test_export_and_import_lose_nothing(
    tmp_path: Path, empty_database: Path, found: list[Winner]
) -> None:
    first, second = tmp_path / next(NAMES), tmp_path / next(NAMES)
    with fresh_store(tmp_path, empty_database) as a, fresh_store(tmp_path, empty_database) as b:
        a.merge(found, imported_from="x")
        export_pack(a, first)
        report = import_pack(b, first)
        assert (report.added, report.replaced, report.kept) == (len(found), 0, 0)
        export_pack(b, second)
        assert first.read_bytes() == second.read_bytes()
        assert {w.imported_from for w in b.winners()} <= {first.name}
        before = dump(b.path)
        again = import_pack(b, first)
        assert (again.added, again.replaced, again.kept) == (0, 0, len(found))
        assert dump(b.path) == before


@on_files
@given(st.lists(crowded_winners(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_imports_in_any_order_leave_the_best(
    tmp_path: Path, empty_database: Path, found: list[Winner], random: Any
) -> None:
    def goodness(w: Winner) -> tuple[int, str, float]:
        return EVIDENCE_RANK[w.evidence], w.created, -w.score

    found = [dataclasses.replace(w, workload=WORKLOAD) for w in found]  # one key, or two
    best = {key: max(goodness(w) for w in found if w.key == key) for key in {w.key for w in found}}
    random.shuffle(found)
    with fresh_store(tmp_path, empty_database) as store:
        for one in found:
            import_pack(store, write_pack(tmp_path, one))
        assert {w.key: goodness(w) for w in store.winners()} == best


def test_the_report_says_what_and_why(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z"
    sizes = [Workload(batch=b, kv_heads=8, context=4096) for b in (1, 2, 3, 4)]
    store.merge([winner(workload=w, created=old) for w in sizes[:2]], imported_from="earlier")
    path = write_pack(
        tmp_path,
        winner(workload=sizes[0], created=new),
        winner(workload=sizes[1], slots=1.0, created=new),
        winner(workload=sizes[2]),
        winner(workload=sizes[3], target=H100),
    )
    monkeypatch.setattr(
        feasibility, "is_feasible", lambda k, p, target: "no H100 today" if target == H100 else None
    )
    before = dump(store.path)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as sweep:
        sweep.execute("BEGIN IMMEDIATE")  # a dry run does not even wait for a writer
        dry = import_pack(store, path, dry_run=True)
    assert dump(store.path) == before
    report = import_pack(store, path)
    assert dry.dry_run
    assert dry.entries == report.entries
    assert [(e.fate, e.reason) for e in report.entries] == [
        ("replaced", f"of {new}, the one here of {old}"),
        ("kept", "emulated against measured here"),
        ("added", "no winner for this key yet"),
        ("skipped", "no H100 today"),
    ]
    assert (report.added, report.replaced, report.kept, report.skipped) == (1, 1, 1, 1)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["entries"][3]["target"] == H100.to_dict()
    assert (document["schema"], document["source"], document["skipped"]) == (1, str(path), 1)
    assert {w.workload: w.imported_from for w in store.winners()} == {
        sizes[0]: path.name,
        sizes[1]: "earlier",
        sizes[2]: path.name,
    }


def test_a_fresher_measured_row_is_never_overwritten(store: Store, tmp_path: Path) -> None:
    promoted = store.promote(add_trial(store, measured(50.0)), default_trial_id=None)
    path = write_pack(tmp_path, winner(median_us=1.0, created="2020-01-01T00:00:00Z"))
    assert import_pack(store, path).kept == 1
    assert store.winners() == [promoted]


def test_an_imported_winner_keeps_its_trial(store: Store, tmp_path: Path) -> None:
    entry = winner()
    import_pack(store, write_pack(tmp_path, entry))
    (trial,) = store.trials(target=H200, problem=PROBLEM, workload=WORKLOAD)
    assert (trial.source, trial.knobs, trial.result.timing) == ("pack", KNOBS, entry.timing)
    assert trial.environment_key == entry.environment.key


def test_a_database_error_in_the_middle_undoes_the_import(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pack(tmp_path, winner(), winner(target=H100), winner(target=MI300X))
    before = dump(store.path)
    add, calls = rows.add_trial, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(*args, **kwargs)

    monkeypatch.setattr(rows, "add_trial", failing)
    with pytest.raises(KeyboardInterrupt):
        import_pack(store, path)
    assert len(calls) == 3
    assert dump(store.path) == before


GOOD = pack_document([winner(target=H100), winner()])
LAST = ("winners", 1)
HOSTILE: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "another schema": (("schema",), 3, "schema=3 is not allowed; allowed: 1 to 2. Run `pip install --upgrade patune`"),
    "a schema that is true": (("schema",), True, "schema=True is not allowed"),
    "a schema in words": (("schema",), "1", "schema='1' is not allowed"),
    "an unknown top field": (("evil",), 1, "unknown field 'evil'; known fields: schema, winners"),
    "winners that are no list": (("winners",), {}, "winners={} is not allowed"),
    "a winner that is no object": (LAST, 5, "winners[1] is not a JSON object"),
    "an unknown field": ((*LAST, "evil"), 1, "winners[1]: Winner: unknown field 'evil'"),
    "an importer": ((*LAST, "imported_from"), "x", "winners[1]: unknown field 'imported_from'"),
    "an unknown problem field": ((*LAST, "problem", "evil"), 1, "Problem: unknown field 'evil'"),
    "an unknown knob": ((*LAST, "knobs", "evil"), 1, "HopperKnobs: unknown field 'evil'"),
    "knobs of another family": ((*LAST, "knobs", "family"), "cdna_mfma", "CdnaKnobs: unknown field"),
    "knobs of no family": ((*LAST, "knobs", "family"), [], "family=[]"),
    "no knobs": ((*LAST, "knobs"), None, "knobs=None"),
    "a page size in words": ((*LAST, "problem", "block_size"), "1024", "block_size='1024'"),
    "a page size that does not exist": ((*LAST, "problem", "block_size"), 1000, "block_size=1000"),
    "a bool for an integer": ((*LAST, "problem", "qg"), True, "qg=True"),
    "an integer for a bool": ((*LAST, "problem", "sinks"), 1, "sinks=1"),
    "a float for an integer": ((*LAST, "workload", "batch"), 128.0, "batch=128.0"),
    "a negative time": ((*LAST, "timing", "median_us"), -1, "median_us=-1"),
    "a bool for a time": ((*LAST, "timing", "median_us"), True, "median_us=True"),
    "not a number": ((*LAST, "timing", "median_us"), float("nan"), "NaN is not JSON"),
    "infinity": ((*LAST, "timing", "median_us"), float("inf"), "Infinity is not JSON"),
    "an integer too large for SQLite": ((*LAST, "workload", "context"), 2**63, "integer 9223372036854775808"),
    "an integer too large for a float": ((*LAST, "timing", "median_us"), 10**400, "allowed: up to 2**63 - 1"),
    "an unknown target": ((*LAST, "target", "arch"), "sm_80", "arch='sm_80'"),
    "a device that garbles the terminal": ((*LAST, "target", "device_name"), "\x1b[2J", "printable"),
    "half a character": ((*LAST, "target", "device_name"), "\ud800", "printable"),
    "a novel": ((*LAST, "environment", "driver"), "x" * 301, "up to 300"),
    "evidence out of nothing": ((*LAST, "evidence"), "default", "evidence='default'"),
    "evidence that is not there": ((*LAST, "timing"), None, "does not agree"),
    "no gate": ((*LAST, "gate_cases"), 0, "gate_cases=0"),
    "a date in the future": ((*LAST, "created"), "9999-01-01T00:00:00Z", "is in the future"),
    "no date": ((*LAST, "created"), None, "created=None"),
    "the same key twice": ((*LAST, "target"), H100.to_dict(), "winners[1] has the key of winners[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_packs_change_nothing(store: Store, tmp_path: Path, name: str) -> None:
    at, value, message = HOSTILE[name]
    document: Any = copy.deepcopy(GOOD)
    place = document
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = value
    path = tmp_path / "pack.json"
    path.write_text(json.dumps(document))
    before = dump(store.path)
    with pytest.raises(DocumentError) as error:
        import_pack(store, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert dump(store.path) == before


RAW = {
    "nothing": (b"", "is not a pack: Expecting value"),
    "not text": (b"\xff\xfe\x00", "is not a pack: 'utf-8' codec"),
    "not JSON": (b"schema: 1\n", "is not a pack: Expecting value"),
    "a list": (b"[]", "its top level is not a JSON object"),
    "a field twice": (
        b'{"schema": 1, "schema": 1, "winners": []}',
        "field 'schema' is there twice",
    ),
    "too deep": (b"[" * 100_000, "is not a pack"),
    "a very long number": (b'{"schema": ' + b"1" * 5000 + b"}", "is not a pack"),
    "no winners": (b'{"schema": 1}', "winners=None is not allowed"),
    "no schema": (b'{"winners": []}', "schema=None is not allowed"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_pack_is_refused(tmp_path: Path, name: str) -> None:
    content, message = RAW[name]
    path = tmp_path / "pack.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError) as error:
        read_pack(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_truncated_packs_are_refused(tmp_path: Path) -> None:
    text = pack_text(GOOD).rstrip()
    path = tmp_path / "pack.json"
    for length in range(0, len(text), 37):
        path.write_text(text[:length])
        with pytest.raises(DocumentError, match="is not a pack"):
            read_pack(path)
    path.write_text(text)
    assert read_pack(path) == [winner(target=H100), winner()]


def test_huge_packs_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pack(tmp_path, winner())
    size = path.stat().st_size
    monkeypatch.setattr(packs, "MAX_PACK_B", size)
    assert read_pack(path) == [winner()]
    monkeypatch.setattr(packs, "MAX_PACK_B", size - 1)
    with pytest.raises(
        DocumentError, match=f"larger than a pack can be; allowed: {size - 1} bytes"
    ):
        read_pack(path)


def test_missing_packs_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "none" / "deeper.json"):
        with pytest.raises(DocumentError, match=f"{path}: there is no such pack file"):
            read_pack(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: list[Any] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [at] * bool(at) + [p for name, child in children for p in places(child, (*at, name))]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(places(GOOD)), json_values)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path: Path, at: tuple[Any, ...], value: Any
) -> None:
    document: Any = copy.deepcopy(GOOD)
    place = document
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = value
    path = tmp_path / "fuzzed.json"
    path.write_text(json.dumps(document))
    try:
        found = read_pack(path)
    except DocumentError:
        return
    assert read_pack(write_pack(tmp_path, *found)) == found
