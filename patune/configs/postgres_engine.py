"""The config database on a PostgreSQL server: its tables made or brought forward, and one writer at a time as with a file."""

from __future__ import annotations

import itertools
import logging
import uuid
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import event

from patune import __version__
from patune.configs import migrating, postgres
from patune.configs.constraints import Base
from patune.configs.models import MetaRow
from patune.configs.postgres import START_OVER, TABLES
from patune.configs.readonly import LOCK_WAIT_S, SCHEMA
from patune.configs.winner import utc_now
from patune.errors import DatabaseError

if TYPE_CHECKING:
    import psycopg

    from patune.settings import ServerUrl

LOGGER = logging.getLogger("patune")
VERSION_TABLE = "patune_alembic_version"
WRITER = 0x706174756E65  # "patune": the advisory lock of who writes, one per database
READS = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
WRITES = f"SELECT pg_advisory_xact_lock({WRITER})"


def _begin(connection: sqlalchemy.Connection) -> None:
    # Writers see what the one before committed, statement by statement: waiting for the lock must not fix what they see.
    writes = connection.get_execution_options().get("patune_writes", False)
    connection.exec_driver_sql(WRITES if writes else READS)


def _engine(place: ServerUrl, *, readonly: bool = False) -> sqlalchemy.Engine:
    def connection() -> psycopg.Connection[Any]:
        connect = postgres.connect_readonly if readonly else postgres.connect
        return connect(place, wait_s=LOCK_WAIT_S)

    postgres.driver()
    # libpq reads the URL, not SQLAlchemy. Sweeps may not ask for minutes: a connection that broke meanwhile is replaced.
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=connection, pool_pre_ping=True
    )
    event.listen(engine, "begin", _begin)
    return engine


def _raw(connection: sqlalchemy.Connection) -> psycopg.Connection[Any]:
    found: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
    return found


def _check_tables(place: ServerUrl, connection: sqlalchemy.Connection) -> None:
    """Refuse a database that lacks tables, or whose number is not that of its migrations."""
    names = {name for (name,) in connection.exec_driver_sql(TABLES)}
    if missing := sorted({*Base.metadata.tables, VERSION_TABLE} - names):
        raise DatabaseError(
            f"{place} is damaged: it has no table {missing[0]!r}. It was left as it is. {START_OVER}"
        )
    schema = postgres.schema_of(place, _raw(connection))
    if schema != SCHEMA:
        raise DatabaseError(
            f"{place} is damaged: it says schema {schema}, and nothing brings that to {SCHEMA}. "
            f"It was left as it is. {START_OVER}"
        )


def _create(place: ServerUrl, connection: sqlalchemy.Connection) -> None:
    encoding = _raw(connection).info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise DatabaseError(
            f"{place} has encoding {encoding}; allowed: UTF8. To make another, run: createdb -E UTF8 -T template0 NAME"
        )
    Base.metadata.create_all(connection)
    about = {"schema": SCHEMA, "uuid": str(uuid.uuid4())}
    made = {"created_by": f"patune {__version__}", "created": utc_now()}
    connection.execute(sqlalchemy.insert(MetaRow).values(**about, **made))
    migrating.stamp(connection)


def _back_up(connection: sqlalchemy.Connection, schema: int) -> str:
    """Copy our tables into a schema of their own; its name. References between the copies are not made."""
    taken = {name for (name,) in connection.exec_driver_sql("SELECT nspname FROM pg_namespace")}
    stem = f"patune_schema{schema}"
    names = itertools.chain([f"{stem}_bak"], (f"{stem}_{n}_bak" for n in itertools.count(2)))
    backup = next(name for name in names if name not in taken)
    connection.exec_driver_sql(f"CREATE SCHEMA {backup}")
    for (table,) in connection.exec_driver_sql(TABLES).fetchall():
        if table.startswith("patune_"):
            # Without defaults: they would tie the copy to the sequences of the tables that a migration may drop.
            like = f"LIKE {table} INCLUDING CONSTRAINTS INCLUDING INDEXES"
            connection.exec_driver_sql(f"CREATE TABLE {backup}.{table} ({like})")
            connection.exec_driver_sql(f"INSERT INTO {backup}.{table} SELECT * FROM {table}")
    return backup


def _migrate(place: ServerUrl, engine: sqlalchemy.Engine) -> None:
    """One transaction, the copy included, from whatever is there; a second process waits, then finds it done."""
    backup = None
    with engine.execution_options(patune_writes=True).begin() as connection:
        schema = postgres.schema_of(place, _raw(connection))  # again: nobody but us can change it
        if schema == 0:
            _create(place, connection)
        elif schema < SCHEMA:
            backup = _back_up(connection, schema)
            migrating.upgrade(connection)
        _check_tables(place, connection)
    if backup is not None:
        LOGGER.warning(
            "%s was brought from schema %d to %d; a copy of how it was is its schema %s",
            *(place, schema, SCHEMA, backup),
        )


def open_engine(place: ServerUrl, schema: int) -> sqlalchemy.Engine:
    """The engine of a database of this schema, the newest or an older one; 0 makes the tables.

    Raises:
        DatabaseError: the database is damaged, or not in UTF-8; or psycopg is not installed.
        DBAPIError: the server refuses.
    """
    engine = _engine(place)
    try:
        if schema < SCHEMA:
            _migrate(place, engine)
        else:
            with engine.begin() as connection:
                _check_tables(place, connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def open_readonly_engine(place: ServerUrl) -> sqlalchemy.Engine:
    """The engine of the database as it is: no connection of it can write.

    Raises:
        DatabaseError: the database is damaged; or psycopg is not installed.
        DBAPIError: the server refuses.
    """
    engine = _engine(place, readonly=True)
    try:
        with engine.begin() as connection:
            _check_tables(place, connection)
    except BaseException:
        engine.dispose()
        raise
    return engine
