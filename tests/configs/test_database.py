"""Making, migrating and refusing database files."""

from __future__ import annotations

import re
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy
from alembic.config import Config
from alembic.script import ScriptDirectory
from config_samples import add_trial, measured

from patune import __version__
from patune.configs import migrating
from patune.configs import sqlite as sqlite_module
from patune.configs.models import Base
from patune.configs.readonly import SCHEMA, found_schema
from patune.configs.store import Store
from patune.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Callable


def run_sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def schema_of(path: Path) -> dict[str, list[str]]:
    """What sqlite_master says per table and index: its columns and constraints, in any order and spacing."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        flat = {name: re.sub(r"\s+", " ", sql.replace('"', "")) for name, sql in rows}
    parts = {name: re.sub(r" ?([()]) ?", r"\1", sql).split(", ") for name, sql in flat.items()}
    return {name: sorted(part.strip() for part in found) for name, found in parts.items()}


def test_migrations_make_what_the_models_say(empty_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.db"
    Base.metadata.create_all(sqlalchemy.create_engine(f"sqlite:///{path}"))
    migrated = schema_of(empty_database)
    assert migrated.pop("patune_alembic_version")
    assert migrated == schema_of(path)
    assert all(name.startswith(("patune_", "ix_patune_")) for name in migrated)


def test_a_new_database_says_what_it_is(empty_database: Path) -> None:
    with closing(sqlite3.connect(empty_database)) as connection:
        ((schema, uuid, created_by, created),) = connection.execute("SELECT * FROM patune_meta")
        (version,) = connection.execute("SELECT * FROM patune_alembic_version").fetchone()
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert (schema, created_by, version) == (SCHEMA, f"patune {__version__}", f"schema_{SCHEMA}")
    assert len(uuid) == 36
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", created)
    assert found_schema(empty_database) == SCHEMA


def test_migrations_are_one_line_that_goes_forward() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrating.MIGRATIONS))
    revisions = list(ScriptDirectory.from_config(config).walk_revisions())
    assert [r.revision for r in reversed(revisions)] == [f"schema_{n + 1}" for n in range(SCHEMA)]
    assert not any(hasattr(r.module, "downgrade") for r in revisions)


def test_connections_are_set_up_for_several_processes(store: Store) -> None:
    with store.transaction(writes=True) as session:
        values = {
            name: session.execute(sqlalchemy.text(f"PRAGMA {name}")).scalar()
            for name in ("foreign_keys", "synchronous", "busy_timeout", "journal_mode")
        }
    assert values == {
        "foreign_keys": 1,
        "synchronous": 1,
        "busy_timeout": 30_000,
        "journal_mode": "wal",
    }


def test_parents_and_file_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b c%d" / "patune.db"
    Store.open(path).close()
    assert found_schema(path) == SCHEMA


def test_a_missing_database_is_not_created_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a" / "patune.db"
    with pytest.raises(DatabaseError, match=rf"no config database at {path}. Run `patune sweep`"):
        Store.open(path, create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made_by", ["touch", "a killed creation"])
def test_an_empty_file_becomes_a_database(tmp_path: Path, made_by: str) -> None:
    path = tmp_path / "patune.db"
    path.touch()
    if made_by != "touch":
        run_sql(path, "PRAGMA journal_mode = WAL")
        assert path.stat().st_size > 0
    with pytest.raises(DatabaseError, match="no config database"):
        Store.open(path, create=False)
    with Store.open(path) as store:
        assert add_trial(store, measured()) == 1
    with Store.open(path, create=False) as store:
        assert add_trial(store, measured()) == 2


def text(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def optuna_study(path: Path) -> None:
    run_sql(path, "CREATE TABLE studies (x)", "CREATE TABLE alembic_version (version_num)")


def foreign_wal(path: Path) -> None:
    run_sql(path, "PRAGMA journal_mode = WAL", "CREATE TABLE books (title)")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8192:40960] = b"\xa5" * 32768
    path.write_bytes(content)


FOREIGN = {
    "text": (text(b"# my notes\n" * 100), "not a patune database .not SQLite at all"),
    "a word": (text(b"hello"), "not a patune database .not SQLite at all"),
    "a line end": (text(b"\n"), "not a patune database .not SQLite at all"),
    "json": (text(b'{"schema": 1}' * 100), "not a patune database .not SQLite at all"),
    "an empty page": (text(b"\0" * 4096), "not a patune database .not SQLite at all"),
    "an optuna study": (optuna_study, "of another program .it has 'alembic_version'"),
    "a foreign database in WAL mode": (foreign_wal, "of another program .it has 'books'"),
}
OURS_BUT = {
    "truncated": (truncated, "is damaged: "),
    "overwritten": (overwritten, "is damaged: "),
    "without its number": (lambda p: run_sql(p, "DELETE FROM patune_meta"), r"schema \[\]"),
    "with two numbers": (
        lambda p: run_sql(p, "INSERT INTO patune_meta VALUES (99, '', '', '')"),
        "not one number",
    ),
    "with schema 0": (lambda p: run_sql(p, "UPDATE patune_meta SET schema = 0"), "not one number"),
    "newer": (
        lambda p: run_sql(p, "UPDATE patune_meta SET schema = 99"),
        f"newer patune: it has schema 99, this one knows up to {SCHEMA}.*pip install --upgrade patune",
    ),
}


def refused(path: Path, message: str) -> None:
    """Opening is refused with the path and the reason, and changes neither the file nor its folder."""
    before = path.read_bytes(), path.stat().st_mtime_ns
    for create in (True, False):
        with pytest.raises(DatabaseError, match=message) as error:
            Store.open(path, create=create)
        assert str(path) in str(error.value)
        assert "t was left as it " in str(error.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_left_alone(tmp_path: Path, name: str) -> None:
    make, message = FOREIGN[name]
    path = tmp_path / "notes.db"
    make(path)
    refused(path, message)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.db"]


@pytest.mark.parametrize("name", OURS_BUT)
def test_damaged_and_newer_files_are_left_alone(database: Path, name: str) -> None:
    with Store.open(database) as store:
        for _ in range(20):
            add_trial(store, measured())
    spoil, message = OURS_BUT[name]
    spoil(database)
    refused(database, message)


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(
        DatabaseError, match=f"{tmp_path} is not a file. Name another file with --db"
    ):
        Store.open(tmp_path)


def test_a_path_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "patune.db"
    with pytest.raises(DatabaseError, match=f"{path} cannot be made: .*--db or PATUNE_DB"):
        Store.open(path)


def test_an_unwritable_folder_is_named(tmp_path: Path, unprivileged: None) -> None:
    for path in (Path("/proc/patune.db"), Path("/patune-test/deep/patune.db")):
        with pytest.raises(DatabaseError, match=f"{path} cannot be .*--db or PATUNE_DB"):
            Store.open(path)


def test_a_read_only_file_can_be_read_and_not_written(
    shared_folder: Path, request: pytest.FixtureRequest
) -> None:
    path = shared_folder / "patune.db"
    with Store.open(path) as store:
        promoted = store.promote(add_trial(store, measured()), default_trial_id=None)
    path.chmod(0o444)
    shared_folder.chmod(0o777)
    request.getfixturevalue("unprivileged")
    with Store.open(path) as store:
        assert store.winners() == [promoted]
        with pytest.raises(DatabaseError, match=f"{path} cannot be opened or written: .*--db"):
            add_trial(store, measured())


def test_a_lock_that_stays_is_explained(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "LOCK_WAIT_S", 0.01)
    with Store.open(database) as store, closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match=f"{database} stays locked by another process"):
            add_trial(store, measured())
        other.rollback()
        assert add_trial(store, measured()) == 1


def test_a_full_disk_is_explained(store: Store) -> None:
    with store.transaction(writes=True) as session:
        pages = session.execute(sqlalchemy.text("PRAGMA page_count")).scalar()
        session.execute(sqlalchemy.text(f"PRAGMA max_page_count = {pages}"))

    def fill() -> None:
        for _ in range(200):
            add_trial(store, measured(), source="x" * 4096)

    with pytest.raises(DatabaseError, match=f"{store.place} cannot grow: .*--db or PATUNE_DB"):
        fill()


def test_a_failed_migration_leaves_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "migrations"
    shutil.copytree(migrating.MIGRATIONS, broken)
    script = broken / "versions" / "schema_1.py"
    script.write_text(script.read_text().replace("INSERT INTO patune_meta", "INSERT INTO nowhere"))
    monkeypatch.setattr(migrating, "MIGRATIONS", broken)
    path = tmp_path / "patune.db"
    with pytest.raises(DatabaseError, match="no such table: nowhere"):
        Store.open(path)
    monkeypatch.undo()
    assert found_schema(path) == 0
    with Store.open(path) as store:
        assert add_trial(store, measured()) == 1


def test_alembic_configures_no_logging(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Store.open(tmp_path / "patune.db").close()
    assert capfd.readouterr() == ("", "")
    assert "patune.configs.migrations" not in sys.modules
