"""A database on a server is brought forward in one transaction with its copy, or stays as it is."""

from __future__ import annotations

import shutil
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    add_trial,
    dump,
    measured,
    run_on_server,
)

from patune.configs import database as database_module
from patune.configs import migrating, postgres, postgres_engine, readonly
from patune.configs.store import Store
from patune.errors import DatabaseError
from patune.settings import ServerUrl

if TYPE_CHECKING:
    from pathlib import Path


def run_sql(place: ServerUrl, *statements: str) -> list[tuple[Any, ...]]:
    return run_on_server(place.url, *statements)


SCHEMA_5 = """
from alembic import op

revision = "schema_5"
down_revision = "schema_4"

def upgrade():
    op.execute("ALTER TABLE patune_winner ADD COLUMN colour TEXT")
    op.execute("ALTER TABLE patune_miss RENAME TO old_miss")
    op.execute("CREATE TABLE patune_miss (LIKE old_miss INCLUDING CONSTRAINTS)")
    op.execute("DROP TABLE old_miss")
    op.execute("UPDATE patune_meta SET schema = 5")
"""


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A patune with one more schema; gives its migrations."""
    planted = tmp_path / "migrations"
    shutil.copytree(migrating.MIGRATIONS, planted)
    script = planted / "versions" / "schema_5.py"
    script.write_text(SCHEMA_5)
    monkeypatch.setattr(migrating, "MIGRATIONS", planted)
    for module in (readonly, postgres, postgres_engine, database_module):
        monkeypatch.setattr(module, "SCHEMA", 5)
    return script


def copied(place: ServerUrl, schema: str) -> list[str]:
    return dump(ServerUrl(f"{place.url}&options=-csearch_path%3D{schema}"))


def test_an_older_schema_comes_forward_after_a_copy(
    server_database: ServerUrl, next_version: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_sql(server_database, "CREATE TABLE notes (text text)", "INSERT INTO notes VALUES ('mine')")
    run_sql(server_database, "CREATE SCHEMA patune_schema4_bak")  # an earlier copy: it is kept
    with closing(postgres.connect(server_database)) as connection:
        assert postgres.schema_of(server_database, connection) == 4
    fill(server_database)
    before = [line for line in dump(server_database) if not line.startswith("notes")]
    with pytest.raises(
        DatabaseError, match=r"has schema 4 and this patune reads 5; to bring it forward, run"
    ):
        Store.open(server_database, forward=False)
    with pytest.raises(DatabaseError, match=r"has schema 4 and this patune reads 5"):
        Store.read(server_database)
    with Store.open(server_database) as store:
        assert len(store.winners()) == 1
        assert add_trial(store, measured()) == 3
    assert copied(server_database, "patune_schema4_2_bak") == before
    assert copied(server_database, "patune_schema4_bak") == []
    assert run_sql(server_database, "SELECT colour FROM patune_winner") == [(None,)]
    assert run_sql(server_database, "SELECT version_num FROM patune_alembic_version") == [
        ("schema_5",)
    ]
    assert (
        "was brought from schema 4 to 5; a copy of how it was is its schema patune_schema4_2_bak"
        in caplog.text
    )
    Store.open(server_database).close()
    assert (
        len(run_sql(server_database, "SELECT 1 FROM pg_namespace WHERE nspname LIKE '%_bak'")) == 2
    )
    assert next_version.exists()


def fill(place: ServerUrl) -> None:
    """What the version before leaves: the models of now are those of its schema."""
    engine = postgres_engine._engine(place)
    store = Store(place, engine)
    add_trial(store, measured(60.0))
    store.promote(add_trial(store, measured()), default_trial_id=None)
    store.close()


def test_a_failed_migration_changes_nothing(server_database: ServerUrl, next_version: Path) -> None:
    fill(server_database)
    before = dump(server_database)
    next_version.write_text(SCHEMA_5.replace("UPDATE patune_meta", "UPDATE nowhere"))
    with pytest.raises(DatabaseError, match=r"has schema 4; this patune brings it to 5. .*nowhere"):
        Store.open(server_database)
    assert dump(server_database) == before
    assert run_sql(server_database, "SELECT 1 FROM pg_namespace WHERE nspname LIKE '%_bak'") == []


def test_processes_bring_one_database_forward_at_once(
    server_database: ServerUrl, next_version: Path
) -> None:
    fill(server_database)
    opened: list[int] = []

    def open_it() -> None:
        with Store.open(server_database) as store:
            opened.append(len(store.winners()))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [1] * 4
    assert (
        len(run_sql(server_database, "SELECT 1 FROM pg_namespace WHERE nspname LIKE '%_bak'")) == 1
    )
    assert next_version.exists()
