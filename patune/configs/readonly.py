"""Looks at a database file without changing a byte of it; those on a server are :mod:`patune.configs.postgres`'s.

Standard library only: lookups use it. The file is never opened but through SQLite, because closing a second
descriptor of it would drop the locks that this process holds (sqlite.org/howtocorrupt.html, section 2.2).
"""

from __future__ import annotations

import contextlib
import shlex
import sqlite3
from typing import TYPE_CHECKING

from patune.errors import DatabaseError
from patune.settings import ServerUrl

if TYPE_CHECKING:
    from pathlib import Path

    from patune.settings import DatabasePlace

SCHEMA = 4  # what this patune reads and writes; the newest file in migrations/versions
LOCK_WAIT_S = 30.0  # how long a connection waits for another process's lock
SMALLEST_FILE_B = 512  # one SQLite page; anything shorter is no database
ANOTHER_FILE = "Name another file with --db or PATUNE_DB."
START_OVER = (
    "Restore a copy, or move the file away and run `patune sweep` (or `patune import` a pack)."
)


def explain(path: Path, error: BaseException | None) -> str:
    """What an SQLite error means for the person who named ``path``, and what to do."""
    code = getattr(error, "sqlite_errorname", None) or ""
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"{path} stays locked by another process. Try again when that one is done."
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"{path} cannot be opened or written: {error}. {ANOTHER_FILE}"
    if code.startswith("SQLITE_FULL"):
        return f"{path} cannot grow: {error}. Free some space, or name another file with --db or PATUNE_DB."
    if code.startswith("SQLITE_NOTADB"):
        return f"{path} is not a patune database (not SQLite at all); it was left as it is. {ANOTHER_FILE}"
    return f"{path} is damaged: {error}. It was left as it is. {START_OVER}"


def older(place: DatabasePlace, schema: int) -> str:
    """What is said about a database of an older schema by those who may not bring it forward."""
    command = f"patune list --db {shlex.quote(str(place))}"
    return f"{place} has schema {schema} and this patune reads {SCHEMA}; to bring it forward, run: {command}"


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _attach(path: Path, options: str, wait_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}", uri=True, timeout=wait_s, isolation_level=None
    )
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def connect_readonly(path: Path, *, wait_s: float = LOCK_WAIT_S) -> sqlite3.Connection:
    """A connection that cannot write; it also works where the folder is read-only.

    Raises:
        sqlite3.Error: there is no readable SQLite database at ``path``.
    """
    try:
        return _attach(path, "mode=ro", wait_s)
    except sqlite3.OperationalError as error:
        closed = error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY"))
        if not closed or _wal(path).exists():
            raise
        return _attach(path, "mode=ro&immutable=1", wait_s)


def _names(path: Path, wait_s: float) -> set[str]:
    """Names in the schema. A foreign file in WAL mode gets no -wal and -shm litter from the look."""
    if not _wal(path).exists():
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(_attach(path, "mode=ro&immutable=1", wait_s)) as connection,
        ):
            return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    with contextlib.closing(connect_readonly(path, wait_s=wait_s)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def _recorded_schema(path: Path, wait_s: float) -> int:
    with contextlib.closing(connect_readonly(path, wait_s=wait_s)) as connection:
        rows = connection.execute("SELECT schema FROM patune_meta").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], int) or rows[0][0] < 1:
        raise DatabaseError(
            f"{path} is damaged: patune_meta says schema {rows!r}, not one number. It was left as it is. {START_OVER}"
        )
    return rows[0][0]


def _file_schema(path: Path, wait_s: float) -> int:
    try:
        if not path.exists():
            return 0
        is_file, size_b = path.is_file(), path.stat().st_size
    except OSError as error:
        raise DatabaseError(
            f"{path} cannot be looked at: {error.strerror}. {ANOTHER_FILE}"
        ) from error
    if not is_file:
        raise DatabaseError(f"{path} is not a file. {ANOTHER_FILE}")
    if size_b == 0:
        return 0
    if size_b < SMALLEST_FILE_B:
        raise DatabaseError(
            f"{path} is not a patune database (not SQLite at all); it was left as it is. {ANOTHER_FILE}"
        )
    try:
        names = _names(path, wait_s)
        if not names:
            return 0
        if "patune_meta" not in names:
            raise DatabaseError(
                f"{path} is an SQLite database of another program (it has {min(names)!r} and no 'patune_meta'); "
                f"it was left as it is. {ANOTHER_FILE}"
            )
        schema = _recorded_schema(path, wait_s)
    except sqlite3.Error as error:
        raise DatabaseError(explain(path, error)) from error
    if schema > SCHEMA:
        raise DatabaseError(f"{newer(path, schema)} {ANOTHER_FILE}")
    return schema


def newer(place: DatabasePlace, schema: int) -> str:
    """What is said about a database of a newer schema."""
    return (
        f"{place} was written by a newer patune: it has schema {schema}, this one knows up to {SCHEMA}. "
        "It was left as it is. Run `pip install --upgrade patune`."
    )


def found_schema(place: DatabasePlace, *, wait_s: float = LOCK_WAIT_S) -> int:
    """The schema number of the patune database at ``place``; 0 when nothing is there yet.

    Raises:
        DatabaseError: it is something else, is damaged, was written by a newer patune, or its server cannot be reached.
    """
    if isinstance(place, ServerUrl):
        from patune.configs import postgres

        return postgres.found_schema(place, wait_s=wait_s)
    return _file_schema(place, wait_s)
