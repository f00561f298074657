"""The config database on a PostgreSQL server: connections, its schema number, and what its errors mean.

psycopg only: lookups use it, without SQLAlchemy. No message has a password in it.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from typing import TYPE_CHECKING, Any

from patune.configs.readonly import LOCK_WAIT_S, SCHEMA, newer
from patune.errors import DatabaseError

if TYPE_CHECKING:
    from types import ModuleType

    import psycopg

    from patune.settings import ServerUrl

INSTALL = "pip install 'patune[postgresql]'"
ANOTHER = "Name another database with --db or PATUNE_DB."
START_OVER = (
    "Restore a copy, or name an empty database and run `patune sweep` (or `patune import` a pack)."
)
APPLICATION = "patune"  # what pg_stat_activity calls our connections
# Tables of the schema that unqualified names go to. Views are no sign of another program: extensions put some there.
TABLES = """
    SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p', 'f')
"""
# By the beginning of the SQLSTATE (postgresql.org/docs/current/errcodes-appendix.html).
ADVICE = {
    "28": "The user or the password is refused ({error}). Check both in the URL, or in ~/.pgpass.",
    "3D": "There is no such database on the server ({error}). To make it, run: createdb NAME",
    "42501": "The user may not do this ({error}). Ask the database's owner for CREATE on the schema and the database.",
    "25006": "It can be read and not written: it was opened readonly, or the server is a standby ({error}).",
    "55P03": "It stays locked by another process. Try again when that one is done.",
    "57014": "The server gave up waiting ({error}). Try again.",
    "53": "The server lacks room or connections ({error}). Try again when it has some.",
    "57": "The server is stopping or starting ({error}). Try again.",
    "08": "The connection broke ({error}). Try again.",
    "XX": "It is damaged: {error}. It was left as it is. " + START_OVER,
    "42P01": "It is damaged: {error}. It was left as it is. " + START_OVER,
    "42703": "It is damaged: {error}. It was left as it is. " + START_OVER,
}
# Before there is a connection the driver has no SQLSTATE, only the server's words.
REFUSALS = {
    "password authentication failed": "28",
    "no pg_hba.conf entry": "28",
    "no password": "28",
}


def driver() -> ModuleType:
    """Psycopg.

    Raises:
        DatabaseError: it is not installed.
    """
    try:
        import psycopg
    except ImportError as error:
        raise DatabaseError(
            f"A database on a PostgreSQL server needs psycopg ({error}). Run: {INSTALL}"
        ) from error
    return psycopg


def _state(error: BaseException | None, text: str) -> str:
    state = getattr(error, "sqlstate", None)
    if state:
        return str(state)
    if "database" in text and "does not exist" in text:
        return "3D000"
    return next((found for words, found in REFUSALS.items() if words in text), "")


def explain(place: ServerUrl, error: BaseException | None) -> str:
    """What an error of the server or the driver means for the person who named ``place``, and what to do."""
    text = place.scrub(" ".join(str(error).split()))
    state = _state(error, text)
    for length in (5, 2):
        if advice := ADVICE.get(state[:length]):
            return f"{place}: {advice.format(error=text)}"
    if state:
        return f"{place}: {text}"
    return (
        f"{place} cannot be reached: {text}. Check the address, and that the server runs. {ANOTHER}"
    )


@contextlib.contextmanager
def _explained(place: ServerUrl) -> Any:
    try:
        yield
    except driver().Error as error:
        raise DatabaseError(explain(place, error)) from error


def connect(place: ServerUrl, *, wait_s: float = LOCK_WAIT_S) -> psycopg.Connection[Any]:
    """A connection that waits this long for the server, and for locks of others.

    Raises:
        DatabaseError: psycopg is not installed.
        psycopg.Error: there is no connection.
    """
    url = place.url.replace("postgresql+psycopg://", "postgresql://", 1)
    milliseconds = math.ceil(wait_s * 1000)
    connection: psycopg.Connection[Any] = driver().connect(
        url,
        client_encoding="utf8",
        connect_timeout=max(1, math.ceil(wait_s)),
        fallback_application_name=APPLICATION,
        tcp_user_timeout=milliseconds,  # of a network that swallows what is sent
        keepalives_idle=max(1, math.ceil(wait_s)),
        autocommit=True,
    )
    try:
        # Not in the URL's options: a search_path may be there.
        connection.execute(f"SET lock_timeout = {milliseconds}")
        connection.autocommit = False
    except BaseException:
        connection.close()
        raise
    return connection


def connect_readonly(place: ServerUrl, wait_s: float = LOCK_WAIT_S) -> psycopg.Connection[Any]:
    """A connection whose every transaction reads, and sees one state throughout.

    Raises:
        DatabaseError: psycopg is not installed.
        psycopg.Error: there is no connection.
    """
    connection = connect(place, wait_s=wait_s)
    try:
        connection.autocommit = True
        connection.execute("SET default_transaction_read_only = on")
        connection.autocommit = False
    except BaseException:
        connection.close()
        raise
    connection.read_only = True
    connection.isolation_level = driver().IsolationLevel.REPEATABLE_READ
    return connection


def found_schema(place: ServerUrl, *, wait_s: float = LOCK_WAIT_S) -> int:
    """The schema number of the patune database on a server; 0 when its schema has no tables yet.

    Raises:
        DatabaseError: it is another program's, damaged, of a newer patune, or cannot be reached; or psycopg is not installed.
    """
    with _explained(place), contextlib.closing(connect_readonly(place, wait_s)) as connection:
        return schema_of(place, connection)


def schema_of(place: ServerUrl, connection: psycopg.Connection[Any]) -> int:
    """As :func:`found_schema`, over a connection that is open: in its transaction.

    Raises:
        DatabaseError: the database is another program's, damaged, or of a newer patune.
        psycopg.Error: the server does not answer.
    """
    if connection.execute("SELECT current_schema()").fetchall() == [(None,)]:
        raise DatabaseError(
            f"{place}: no schema of its search_path exists, or this user may not use it. {ANOTHER}"
        )
    names = {name for (name,) in connection.execute(TABLES)}
    if not names:
        return 0
    if "patune_meta" not in names:
        raise DatabaseError(
            f"{place} is another program's: it has tables (such as {min(names)!r}) and no 'patune_meta'; "
            "it was left as it is. Make a database for patune (createdb NAME), or a schema: "
            f"{shlex.quote('postgresql://.../NAME?options=-csearch_path%3DSCHEMA')}."
        )
    rows = connection.execute("SELECT schema FROM patune_meta").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], int) or rows[0][0] < 1:
        numbers = [number for (number,) in rows]
        raise DatabaseError(
            f"{place} is damaged: patune_meta says schema {numbers!r}, not one number. It was left as it is. {START_OVER}"
        )
    schema: int = rows[0][0]
    if schema > SCHEMA:
        raise DatabaseError(f"{newer(place, schema)} {ANOTHER}")
    return schema
