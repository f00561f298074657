"""Packs: the same winners give the same bytes, imports follow one rule, and bad packs change nothing."""

from __future__ import annotations

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
from config_strategies import crowded_winners
from config_strategies import packs as whole_packs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs import rows
from patune.configs.packs import (
    export_pack,
    import_pack,
    load_pack,
    pack_document,
    pack_text,
)
from patune.configs.store import Store
from patune.errors import InvalidValueError
from patune.kernels import feasibility
from patune.problem import Problem, Workload
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from pathlib import Path

    from patune.configs.candidate import Candidates
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
    assert document["schema"] == 4
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
    assert export_pack(store, None, arch="gfx950") == {
        "schema": 4,
        "winners": [],
        "robust": [],
        "blocklist": [],
    }


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
@given(whole_packs())
def test_export_and_import_lose_nothing(
    tmp_path: Path, empty_database: Path, whole: tuple[list[Winner], Candidates]
) -> None:
    first, second = tmp_path / next(NAMES), tmp_path / next(NAMES)
    found, candidates = whole
    with fresh_store(tmp_path, empty_database) as a, fresh_store(tmp_path, empty_database) as b:
        a.merge(found, candidates, imported_from="x")
        export_pack(a, first)
        assert load_pack(first).candidates == candidates
        report = import_pack(b, first)
        assert (report.added, report.replaced, report.kept) == (len(found), 0, 0)
        export_pack(b, second)
        assert first.read_bytes() == second.read_bytes()
        assert {w.imported_from for w in b.winners()} <= {first.name}
        before = dump(b.place)
        again = import_pack(b, first)
        assert (again.added, again.replaced, again.kept) == (0, 0, len(found))
        assert dump(b.place) == before


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
    before = dump(store.place)
    with closing(sqlite3.connect(store.place, isolation_level=None)) as sweep:
        sweep.execute("BEGIN IMMEDIATE")  # a dry run does not even wait for a writer
        dry = import_pack(store, path, dry_run=True)
    assert dump(store.place) == before
    report = import_pack(store, path)
    assert dry.dry_run
    assert dry.entries == report.entries
    assert [(e.fate, e.reason) for e in report.entries] == [
        ("skipped", "no H100 today"),
        ("replaced", f"of {new}, the one here of {old}"),
        ("kept", "emulated against measured here"),
        ("added", "no winner for this key yet"),
    ]
    assert (report.added, report.replaced, report.kept, report.skipped) == (1, 1, 1, 1)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["entries"][0]["target"] == H100.to_dict()
    assert (document["schema"], document["source"], document["skipped"]) == (2, str(path), 1)
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
    before = dump(store.place)
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
    assert dump(store.place) == before
