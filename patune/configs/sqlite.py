"""The config database as an SQLite file: made, brought forward, and set up for several processes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import event

from patune.configs import migrating
from patune.configs.readonly import (
    ANOTHER_FILE,
    LOCK_WAIT_S,
    SCHEMA,
    START_OVER,
    connect_readonly,
    explain,
    found_schema,
)
from patune.errors import DatabaseError

if TYPE_CHECKING:
    from pathlib import Path

LOGGER = logging.getLogger("patune")
CHECKED_FILE_B = (
    64 * 2**20
)  # larger files are opened without a full check; 132 MB take 75 ms (2026-11, one core)
WAL_RETRY_S = 0.02
WRITE_WAIT_S = 60.0  # how long a writer waits for the others
NAP_S = (0.001, 0.01)


def _connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = (
        None  # transactions begin where _begin says, not where pysqlite guesses
    )
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _begin(connection: sqlalchemy.Connection) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None, "a connection that begins is open"
    if connection.get_execution_options().get("patune_writes", False):
        _begin_writing(driver)
    else:
        driver.execute("BEGIN")


def _begin_writing(driver: sqlite3.Connection) -> None:
    """Wait for the write lock in short naps of random length.

    SQLite's own waiting ends in naps of 0.1 s, and whoever holds the lock takes it again meanwhile: of 16 processes that wrote without a pause for
    75 s on 2 cores, five waited in vain for 30 s (2026-11). With these naps a wait that long does not happen by chance.
    """
    deadline = time.monotonic() + WRITE_WAIT_S
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(*NAP_S))
    finally:
        driver.execute(f"PRAGMA busy_timeout = {int(LOCK_WAIT_S * 1e3)}")


def _engine(path: Path, **options: Any) -> sqlalchemy.Engine:
    engine = sqlalchemy.create_engine(
        sqlalchemy.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": LOCK_WAIT_S},
        **options,
    )
    event.listen(engine, "connect", _connect)
    event.listen(engine, "begin", _begin)
    return engine


def _use_wal(path: Path) -> None:
    """Readers and the writer do not block each other. The mode stays in the file.

    SQLite does not wait for locks here, so this does.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as connection:
                (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
                if mode != "wal":
                    connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(WAL_RETRY_S)


def _free_name(path: Path, stem: str) -> Path:
    """A name for a copy that no earlier copy has: ``.schema1.bak``, else ``.schema1.2.bak`` and so on."""
    names = itertools.chain([stem], (f"{stem}.{n}" for n in itertools.count(2)))
    copies = (path.with_name(f"{path.name}.{name}.bak") for name in names)
    return next(copy for copy in copies if not os.path.lexists(copy))


def _back_up(path: Path, schema: int) -> Path:
    """Copy the database beside itself, through SQLite: a copy of the file alone would lack what is in its log."""
    backup = _free_name(path, f"schema{schema}")
    part = path.with_name(f".{backup.name}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            with (
                contextlib.closing(connect_readonly(path)) as source,
                contextlib.closing(sqlite3.connect(part)) as copy,
            ):
                source.backup(copy)
            part.replace(backup)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DatabaseError(
            f"{path} was left as it is: {backup}, the copy to make first, cannot be written: {error.strerror}."
        ) from error
    return backup


def _without_foreign_keys(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA foreign_keys = OFF")


def _check_foreign_keys(path: Path, connection: sqlalchemy.Connection) -> None:
    row = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    if row is not None:
        raise DatabaseError(
            f"{path} is damaged: row {row[1]} of {row[0]} refers to a row of {row[2]} that is not there. "
            f"It was left as it is. {START_OVER}"
        )


def migrate(path: Path) -> None:
    """One transaction from whatever schema is there to the newest; a second process waits, then finds it done.

    Tables that others refer to are made anew, so foreign keys are off meanwhile and checked before the commit
    (sqlite.org/lang_altertable.html, section 7). A database with an older schema is copied first.
    """
    engine = _engine(path)
    event.listen(engine, "connect", _without_foreign_keys)
    try:
        with engine.execution_options(patune_writes=True).begin() as connection:
            schema = found_schema(path)  # again: nobody but us can change it from here on
            backup = _back_up(path, schema) if 0 < schema < SCHEMA else None
            migrating.upgrade(connection)
            _check_foreign_keys(path, connection)
    finally:
        engine.dispose()
    if backup is not None:
        LOGGER.warning(
            "%s was brought from schema %d to %d; a copy of how it was is %s",
            *(path, schema, SCHEMA, backup),
        )


def check(path: Path) -> None:
    """Refuse a file whose pages or rows do not hold together."""
    if path.stat().st_size > CHECKED_FILE_B:
        return
    with contextlib.closing(connect_readonly(path)) as connection:
        rows: list[Any] = connection.execute("PRAGMA quick_check(1)").fetchall()
    if rows != [("ok",)]:
        raise DatabaseError(explain(path, sqlite3.DatabaseError(rows[0][0])))


def open_engine(path: Path, schema: int) -> sqlalchemy.Engine:
    """The engine of a file of this schema, the newest or an older one; 0 makes the tables.

    Raises:
        DatabaseError: the file is damaged, or cannot be made.
        sqlite3.Error: it cannot be written.
    """
    if schema:
        check(path)
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(
                f"{path} cannot be made: {error.strerror}. {ANOTHER_FILE}"
            ) from error
    _use_wal(path)
    if schema < SCHEMA:
        migrate(path)
    return _engine(path)


def open_readonly_engine(path: Path) -> sqlalchemy.Engine:
    """The engine of the file as it is: no connection of it can write, and the folder may be read-only.

    Raises:
        DatabaseError: the file is damaged.
        sqlite3.Error: it cannot be read.
    """
    check(path)
    return _engine(path, creator=lambda: connect_readonly(path))


def size_b(path: Path) -> int:
    """Bytes of the file and of its log."""
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def shrink(engine: sqlalchemy.Engine) -> None:
    """Give the room of deleted rows back to the disk.

    Raises:
        sqlite3.Error: another process holds the file.
    """
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("VACUUM")
        connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()
