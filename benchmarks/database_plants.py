"""Bugs to plant into the processes that torture the config database, to show that the torture sees them."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.configs.store import Store

STRESS = (
    "forgets",  # a writer hears of a trial that is not stored
    "twice",  # a trial is stored twice
    "half trial",  # a trial's message comes in a transaction of its own
    "import per winner",  # each winner of a pack is committed by itself
    "stale reader",  # a reader that ignores locks and the log
    "impatient",  # nobody waits for a lock
)
KILLS = (
    "acknowledged early",
    "import per winner",
    "migration in pieces",
    "written in place",
    "no copy",
)
EVERY = 5
LOOK_S = 0.1  # between a read and the write that relies on it


def plant(name: str | None, role: str) -> None:
    """Change patune in this process."""
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    {
        None: nothing,
        "forgets": _forgets,
        "twice": _twice,
        "half trial": _half_trial,
        "import per winner": _import_per_winner,
        "stale reader": _stale_reader if role == "reader" else nothing,
        "impatient": _impatient,
        "acknowledged early": _acknowledged_early,
        "migration in pieces": _migration_in_pieces,
        "written in place": _written_in_place,
        "no copy": _no_copy,
    }[name]()


def _around(name: str, around: Callable[..., Any]) -> None:
    """Have a method of Store called through ``around(method, store, ...)``."""
    from patune.configs.store import Store

    method = getattr(Store, name)

    @functools.wraps(method)
    def replaced(self: Store, *args: Any, **how: Any) -> Any:
        return around(method, self, *args, **how)

    setattr(Store, name, replaced)


def _forgets() -> None:
    calls: Counter[str] = Counter()

    def around(method: Any, store: Store, *args: Any, **how: Any) -> Any:
        calls["put_robust"] += 1
        return None if calls["put_robust"] % EVERY == 0 else method(store, *args, **how)

    _around("put_robust", around)


def _twice() -> None:
    calls: Counter[str] = Counter()

    def around(method: Any, store: Store, *args: Any, **how: Any) -> Any:
        calls["record_trial"] += 1
        if calls["record_trial"] % EVERY == 0:
            method(store, *args, **how)
        return method(store, *args, **how)

    _around("record_trial", around)


def _half_trial() -> None:
    import dataclasses

    from patune.configs import rows
    from patune.configs.models import TrialRow

    def around(method: Any, store: Store, *args: Any, result: Any, **how: Any) -> Any:
        bare = dataclasses.replace(result, reason="")
        trial = method(store, *args, result=bare, **how)
        time.sleep(LOOK_S)
        with store.transaction(writes=True) as session:
            session.get_one(TrialRow, trial).message_id = rows.message_of(session, result.reason)
        return trial

    _around("record_trial", around)


def _import_per_winner() -> None:
    def around(method: Any, store: Store, incoming: Any, *args: Any, **how: Any) -> Any:
        merged = method(store, [], *args, **how)
        for winner in incoming:
            merged.winners.extend(method(store, [winner], *args, **how).winners)
            time.sleep(LOOK_S / 20)
        return merged

    _around("merge", around)


def _stale_reader() -> None:
    real = sqlite3.connect

    def connect(database: Any, *args: Any, **how: Any) -> Any:
        if how.get("uri"):
            database = str(database).replace("mode=ro", "mode=ro&immutable=1")
        return real(database, *args, **how)

    _connect_with(connect)


def _impatient() -> None:
    from patune.configs import sqlite

    sqlite.WRITE_WAIT_S = 0.0
    real = sqlite3.connect
    _connect_with(lambda *args, **how: real(*args, **(how | {"timeout": 0.0})))


def _connect_with(connect: Any) -> None:
    sqlite3.connect = connect
    sqlite3.dbapi2.connect = connect  # SQLAlchemy's name of it


def _acknowledged_early() -> None:
    from database_writers import Writer

    real = Writer._do

    def early(self: Writer, op: str, codes: list[int], call: Any, **fields: Any) -> Any:
        if op == "record":
            now = time.monotonic()
            self.log.write(op=op, codes=codes, began=now, ended=now)
        return real(self, op, codes, call, **fields)

    Writer._do = early  # type: ignore[method-assign]


def _migration_in_pieces() -> None:
    from sqlalchemy import Engine, event

    def between(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        driver = connection.connection.dbapi_connection
        if driver.in_transaction and not statement.startswith(("BEGIN", "PRAGMA")):
            driver.execute("COMMIT")
            driver.execute("BEGIN IMMEDIATE")

    event.listen(Engine, "before_cursor_execute", between)


def _written_in_place() -> None:
    def replace(self: Path, target: Path) -> Path:
        data = self.read_bytes()
        with Path(target).open("wb") as file:
            for at in range(0, len(data), max(1, len(data) // 4)):
                file.write(data[at : at + max(1, len(data) // 4)])
                file.flush()
                time.sleep(LOOK_S)
        with contextlib.suppress(OSError):
            self.unlink()
        return Path(target)

    Path.replace = replace  # type: ignore[method-assign, assignment]


def _no_copy() -> None:
    from patune.configs import sqlite

    sqlite._back_up = lambda path, schema: path
