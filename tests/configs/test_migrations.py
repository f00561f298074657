"""Files of earlier versions are brought forward with all that they hold, after a copy, or stay as they are."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CDNA_KNOBS,
    CORE,
    H200,
    KEY,
    KNOBS,
    OTHER_KNOBS,
    PROBLEM,
    WORKLOAD,
    add_trial,
    dump,
    measured,
)
from old_databases import (
    ENDED,
    OLD_SCHEMAS,
    TABLES,
    TABLES_SINCE_3,
    expected_now,
    make_empty,
    make_old,
    rows_of,
    said,
)
from test_database import run_sql, schema_of
from test_processes import WRITER, go, is_sound, start

from patune.configs import dispatcher, migrating, sqlite
from patune.configs.dispatcher import lookup, lookup_problem
from patune.configs.readonly import SCHEMA, found_schema
from patune.configs.store import Store
from patune.errors import DatabaseError
from patune.problem import Problem
from patune.trial import FIRST_PROTOCOL, TrialResult

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=OLD_SCHEMAS)
def schema(request: pytest.FixtureRequest) -> int:
    """Every schema that came before."""
    found: int = request.param
    return found


@pytest.fixture
def old(tmp_path: Path, schema: int) -> Path:
    """A database of an earlier schema with rows in every table."""
    path = tmp_path / "old" / "patune.db"
    path.parent.mkdir()
    make_old(path, schema, KNOBS, OTHER_KNOBS, CDNA_KNOBS)
    assert all(rows_of(path, table) for table in TABLES)
    return path


def test_every_earlier_schema_is_tried() -> None:
    assert tuple(range(1, SCHEMA)) == OLD_SCHEMAS


def backup_of(path: Path) -> Path:
    (name,) = (n for n in folder(path) if n.endswith(".bak"))
    return path.with_name(name)


def folder(path: Path) -> set[str]:
    """Names beside a database, without the log that SQLite makes and removes."""
    return {p.name for p in path.parent.iterdir()} - {"patune.db-wal", "patune.db-shm"}


def refused(path: Path, message: str, **how: Any) -> None:
    """Opening is refused, and the file holds what it held."""
    before, schema = dump(path), found_schema(path)
    with pytest.raises(DatabaseError, match=message):
        Store.open(path, **how)
    assert dump(path) == before
    assert found_schema(path) == schema


def test_every_row_is_kept_and_says_what_is_new(old: Path, schema: int) -> None:
    expected, reasons = expected_now(old), said(old)
    later = {table: rows_of(old, table) for table in TABLES_SINCE_3} if schema >= 3 else None
    Store.open(old).close()
    assert said(old) == reasons
    found = {table: rows_of(old, table) for table in TABLES}
    for row in found["trial"]:
        row.pop("message_id")
    assert found == expected
    assert [row["id"] for row in found["problem"]] == [5, 7, 9]
    assert rows_of(old, "alembic_version") == [{"version_num": f"schema_{SCHEMA}"}]
    if later:
        assert {table: rows_of(old, table) for table in TABLES_SINCE_3} == later
    else:
        assert rows_of(old, "blocklist") == rows_of(old, "robust") == []
    assert rows_of(old, "miss") == []


def test_its_history_begins_with_its_winners(old: Path) -> None:
    Store.open(old).close()
    keys = [
        (row["id"], row["event"], row["trial_id"], row["score"]) for row in rows_of(old, "history")
    ]
    assert keys == [(1, "promoted", 13, 50.0), (2, "imported", 17, 1000.0)]
    with Store.open(old) as store:
        assert store.generation() == 2
        (event,) = store.history(**KEY)
    assert (event.event, event.knobs, event.evidence, event.score) == (
        "promoted",
        ALONE,
        "measured",
        50.0,
    )
    assert (event.created, event.reason) == ("2026-11-22T10:43:00Z", "before there was a history")
    assert (event.previous_knobs, event.workload) == (None, WORKLOAD)
    assert event.environment is not None
    assert event.environment.triton == "3.9.0"


def test_messages_are_kept_once(old: Path) -> None:
    reasons = [reason for reason in said(old).values() if reason]
    Store.open(old).close()
    messages = rows_of(old, "message")
    assert [row["text"] for row in messages] == list(dict.fromkeys(reasons))
    assert len(messages) == len(reasons) - 1  # one of them is there twice
    for row in messages:
        assert row["sha256"] == hashlib.sha256(row["text"].encode()).hexdigest()
    with Store.open(old) as store:
        add_trial(store, TrialResult(status="crash", reason=reasons[0]))
    assert rows_of(old, "message") == messages


def test_old_statuses_are_read_by_their_new_names(old: Path, schema: int) -> None:
    problem = replace(PROBLEM, kv_dtype="fp8_e4m3fn", kv_quant="per_token", kv_layout="hnd")
    with Store.open(old) as store:
        trials = {t.id: t for t in store.trials(target=H200, problem=problem, workload=WORKLOAD)}
        found = [(id, trials[id].result.status, trials[id].result.reason) for id, *_ in ENDED]
        assert found == [(id, now, reason) for id, _, reason, now in ENDED]
        timings = [t.result.timing for t in store.trials(**KEY)]
    first = [(None, None, FIRST_PROTOCOL)] * 2
    third = [(median, 1e6, "graph-cold-2") for median in (60.0, 55.0, 50.0)]
    found_timings = [(t.low_us, t.high_us, t.protocol) for t in timings if t]
    assert found_timings == (third if schema >= 3 else first)


def test_a_database_brought_forward_is_like_a_new_one(old: Path, empty_database: Path) -> None:
    Store.open(old).close()
    assert schema_of(old) == schema_of(empty_database)
    with closing(sqlite3.connect(old)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        keys = connection.execute("PRAGMA foreign_key_list(patune_trial)").fetchall()
        parents = {(parent, child) for _, _, parent, child, *_ in keys}
        assert ("patune_problem", "problem_id") in parents
        keys = connection.execute("PRAGMA foreign_key_list(patune_winner)").fetchall()
        assert {parent for _, _, parent, *_ in keys if parent.startswith("patune_trial")} == {
            "patune_trial"
        }


ALONE = replace(KNOBS, overlap_launch=False)  # schema 1 had no overlapped launch: measured in turn


def test_its_winners_are_served_and_it_takes_new_trials(
    old: Path, schema: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(old) as store:
        (amd, best) = store.winners()
        assert (best.problem, best.workload, best.knobs) == (PROBLEM, WORKLOAD, ALONE)
        assert (best.problem.softcap, best.problem.fp8_math) == (False, False)
        alone = replace(OTHER_KNOBS, overlap_launch=False)
        assert (best.default_knobs, best.speedup_over_default) == (alone, 1.2)
        assert (amd.target.arch, amd.knobs, amd.imported_from) == (
            "gfx942",
            CDNA_KNOBS,
            "mi300x.json",
        )
        statuses = ["ok", "ok", "ok", "wrong"] if schema >= 3 else ["ok", "ok"]
        assert [t.result.status for t in store.trials(**KEY)] == statuses
        assert add_trial(store, measured()) == 18
        capped = replace(PROBLEM, softcap=True)
        store.promote(
            add_trial(store, measured(), problem=capped, knobs=OTHER_KNOBS), default_trial_id=None
        )
    assert [row["softcap"] for row in rows_of(old, "problem")] == [0, 0, 0, 1]
    monkeypatch.setenv("PATUNE_DB", str(old))
    dispatcher.reload()
    assert lookup(**CORE, target="sm_90").knobs == ALONE
    answer = lookup(**CORE, softcap=True, target="sm_90")
    assert (answer.knobs, answer.source) == (OTHER_KNOBS, "exact")
    assert lookup_problem(capped, WORKLOAD, H200).knobs == OTHER_KNOBS


AFTERWARDS = {
    "a problem that trials refer to is deleted": (
        "DELETE FROM patune_problem WHERE id = 5", "FOREIGN KEY"),
    "a trial of no problem": (
        "UPDATE patune_trial SET problem_id = 99 WHERE id = 14", "FOREIGN KEY"),
    "the same problem twice": (
        "INSERT INTO patune_problem SELECT 99, block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, "
        "kv_layout, windowed, sinks, softcap, fp8_math FROM patune_problem WHERE id = 5", "UNIQUE"),
    "half a cap": ("UPDATE patune_problem SET softcap = 0.5", "ck_patune_problem_softcap"),
    "fp8 twice": ("UPDATE patune_problem SET fp8_math = 2", "ck_patune_problem_fp8_math"),
    "an old name of a status": (
        "UPDATE patune_trial SET status = 'unstable' WHERE id = 14", "ck_patune_trial_status"),
    "a winning trial that is deleted": ("DELETE FROM patune_trial WHERE id = 13", "FOREIGN KEY"),
    "a message that trials refer to is deleted": ("DELETE FROM patune_message WHERE id = 1", "FOREIGN KEY"),
    "a cap that is not said": ("UPDATE patune_problem SET softcap = NULL", "NOT NULL"),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTERWARDS)
def test_it_refuses_what_a_new_one_refuses(old: Path, name: str) -> None:
    statement, constraint = AFTERWARDS[name]
    Store.open(old).close()
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError, match=constraint):
            connection.execute(statement)


def test_it_enforces_foreign_keys_in_the_process_that_migrated(old: Path) -> None:
    with Store.open(old) as store, store.transaction(writes=False) as session:
        assert session.connection().exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_copy_is_made_first_and_named(
    old: Path, schema: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = dump(old)
    Store.open(old).close()
    assert folder(old) == {"patune.db", f"patune.db.schema{schema}.bak"}
    assert dump(backup_of(old)) == before
    assert found_schema(backup_of(old)) == schema
    assert [record.getMessage() for record in caplog.records] == [
        f"{old} was brought from schema {schema} to {SCHEMA}; a copy of how it was is {backup_of(old)}"
    ]
    caplog.clear()
    Store.open(old).close()
    assert caplog.text == ""


def test_the_copy_has_what_is_still_in_the_log(old: Path) -> None:
    with closing(sqlite3.connect(old, isolation_level=None)) as other:
        other.execute("UPDATE patune_run SET command = 'in the log' WHERE id = 2")
        assert old.with_name("patune.db-wal").stat().st_size > 0
        Store.open(old).close()
    commands = [row["command"] for row in rows_of(backup_of(old), "run")]
    assert commands == ["in the log", "patune sweep"]
    assert [row["command"] for row in rows_of(old, "run")] == commands


def test_a_second_process_finds_it_done_and_leaves_the_copy(old: Path) -> None:
    Store.open(old).close()
    copied = dump(backup_of(old))
    before = dump(old)
    sqlite.migrate(old)  # what a process does that saw schema 1 a moment ago
    assert dump(backup_of(old)) == copied
    assert dump(old) == before


def test_processes_bring_one_database_forward_at_once(old: Path, schema: int) -> None:
    before = dump(old)
    processes = [start(WRITER.format(trials=3), old, name) for name in ("a", "b", "c")]
    for process in processes:
        go(process)
    outputs = [process.communicate() for process in processes]
    printed = sorted(int(line) for out, _ in outputs for line in out.split())
    assert printed == list(range(18, 27))
    assert [errors.count("\n") for _, errors in sorted(outputs, key=lambda o: o[1])] == [0, 0, 1]
    assert f"{old} was brought from schema {schema} to {SCHEMA}" in "".join(
        errors for _, errors in outputs
    )
    assert dump(backup_of(old)) == before
    assert is_sound(old)


def test_an_empty_database_of_an_earlier_schema_comes_forward(tmp_path: Path, schema: int) -> None:
    path = tmp_path / "patune.db"
    make_empty(path, f"schema_{schema}")
    with Store.open(path, create=False) as store:
        assert store.winners() == []
        assert add_trial(store, measured()) == 1


def test_who_may_not_write_is_told_what_to_run(old: Path, schema: int) -> None:
    message = f"{old} has schema {schema} and this patune reads {SCHEMA}; to bring it forward, run: patune list --db {old}"
    refused(old, message, forward=False)
    assert folder(old) == {"patune.db"}


def test_a_failed_migration_changes_nothing(
    old: Path, schema: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "migrations"
    shutil.copytree(migrating.MIGRATIONS, broken)
    script = broken / "versions" / f"schema_{SCHEMA}.py"
    script.write_text(script.read_text().replace("UPDATE patune_meta", "UPDATE nowhere"))
    monkeypatch.setattr(migrating, "MIGRATIONS", broken)
    refused(
        old,
        f"{old} has schema {schema}; this patune brings it to {SCHEMA}. .*no such table: nowhere",
    )
    monkeypatch.undo()
    with Store.open(old) as store:
        assert len(store.winners()) == 2


def test_a_broken_reference_is_found_before_the_commit(old: Path) -> None:
    run_sql(old, "UPDATE patune_trial SET problem_id = 99 WHERE id = 14")
    refused(old, "is damaged: row 14 of patune_trial refers to a row of patune_problem that is not")


def test_without_room_for_a_copy_nothing_is_changed(old: Path, schema: int) -> None:
    backup = old.with_name(f"patune.db.schema{schema}.bak")
    part = old.with_name(f".{backup.name}.part")
    part.mkdir()  # where the copy is written first
    (part / "file").touch()
    refused(old, f"{old} was left as it is: {backup}, the copy to make first, cannot be")
    assert folder(old) == {"patune.db", part.name}


def test_a_copy_never_takes_an_earlier_ones_place(old: Path, schema: int) -> None:
    names = [f"patune.db.schema{schema}{n}.bak" for n in ("", ".2", ".3")]
    old.with_name(names[0]).write_text("the user's")
    old.with_name(names[1]).symlink_to(old.with_name("nowhere"))
    before = dump(old)
    Store.open(old).close()
    assert folder(old) == {"patune.db", *names}
    assert old.with_name(names[0]).read_text() == "the user's"
    assert dump(old.with_name(names[2])) == before


def test_a_second_migration_keeps_the_first_ones_copy(tmp_path: Path) -> None:
    path = tmp_path / "old" / "patune.db"
    path.parent.mkdir()
    for schema in OLD_SCHEMAS:
        path.unlink(missing_ok=True)
        make_old(path, schema, KNOBS, OTHER_KNOBS, CDNA_KNOBS)
        Store.open(path).close()
    copies = [path.with_name(f"patune.db.schema{schema}.bak") for schema in OLD_SCHEMAS]
    assert [found_schema(copy) for copy in copies] == list(OLD_SCHEMAS)


def test_an_old_file_that_cannot_be_written_says_so(
    schema: int, shared_folder: Path, request: pytest.FixtureRequest
) -> None:
    path = shared_folder / "patune.db"
    make_old(path, schema, KNOBS, OTHER_KNOBS, CDNA_KNOBS)
    path.chmod(0o444)
    request.getfixturevalue("unprivileged")
    message = f"{path} has schema {schema}; this patune brings it to {SCHEMA}. .*cannot be opened or written: .*--db"
    with pytest.raises(DatabaseError, match=message):
        Store.open(path)
    assert list(shared_folder.iterdir()) == [path]


@pytest.mark.usefixtures("fresh_dispatcher")
def test_lookups_leave_an_old_database_to_a_command_that_may_write(
    old: Path, schema: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATUNE_DB", str(old))
    before = old.read_bytes(), folder(old)
    assert lookup(**CORE, target="sm_90").source == "heuristic"
    assert lookup_problem(Problem(**CORE, softcap=True), WORKLOAD, H200).source == "heuristic"
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == [
        f"Answering without the config database: {old} has schema {schema} and this patune reads {SCHEMA}; "
        f"to bring it forward, run: patune list --db {old}"
    ]
    assert (old.read_bytes(), folder(old)) == before
    Store.open(old).close()
    dispatcher.reload()
    assert lookup(**CORE, target="sm_90").source == "exact"
