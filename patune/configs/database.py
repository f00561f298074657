"""Opens the config database, a file or one on a server, and runs what is one transaction of it."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from patune import settings
from patune.configs import sqlite
from patune.configs.readonly import SCHEMA, explain, found_schema, older
from patune.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import sqlalchemy

    from patune.settings import DatabasePlace, ServerUrl

LOGGER = logging.getLogger("patune")


@contextlib.contextmanager
def explained(place: DatabasePlace, why: str = "") -> Iterator[None]:
    """Turn the database's errors into ones that name it and say what to do. A broken constraint is our bug: it passes.

    Args:
        place: the database.
        why: a sentence to begin with, and a blank.

    Raises:
        DatabaseError: the database cannot be read or written.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise DatabaseError(why + _explain(place, error.orig)) from error
    except sqlite3.Error as error:
        raise DatabaseError(why + explain(place, error)) from error  # type: ignore[arg-type]  # a file's


def _explain(place: DatabasePlace, error: BaseException | None) -> str:
    if isinstance(place, Path):
        return explain(place, error)
    from patune.configs import postgres

    return postgres.explain(place, error)


def _refuse_missing(place: DatabasePlace) -> NoReturn:
    raise DatabaseError(
        f"There is no config database at {place}. Run `patune sweep` to make one, or name one with --db or PATUNE_DB."
    )


def _refuse_older(place: DatabasePlace, schema: int) -> NoReturn:
    raise DatabaseError(f"{older(place, schema)}. It was left as it is.")


def open_engine(place: DatabasePlace, *, create: bool, forward: bool) -> sqlalchemy.Engine:
    """The engine of the database at ``place``, its schema the newest.

    Args:
        place: the file or the server.
        create: make a missing file, or the tables in an empty database of a server.
        forward: bring one of an older schema forward.

    Raises:
        DatabaseError: it is not ours, damaged, newer, or cannot be written; or it is missing and not to be made.
    """
    schema = found_schema(place)
    if schema == 0 and not create:
        _refuse_missing(place)
    why = ""
    if 0 < schema < SCHEMA:
        if not forward:
            _refuse_older(place, schema)
        why = f"{place} has schema {schema}; this patune brings it to {SCHEMA}. "
    with explained(place, why):
        if isinstance(place, Path):
            return sqlite.open_engine(place, schema)
        from patune.configs import postgres_engine

        return postgres_engine.open_engine(place, schema)


def open_readonly_engine(place: DatabasePlace) -> sqlalchemy.Engine:
    """The engine of the database at ``place`` as it is: no connection of it can write.

    Raises:
        DatabaseError: it is missing, not ours, damaged, newer, or of an older schema, which only a writer brings forward.
    """
    schema = found_schema(place)
    if schema == 0:
        _refuse_missing(place)
    if schema < SCHEMA:
        _refuse_older(place, schema)
    with explained(place):
        if isinstance(place, Path):
            return sqlite.open_readonly_engine(place)
        from patune.configs import postgres_engine

        return postgres_engine.open_readonly_engine(place)


class Database:
    """An open config database; a context manager. Each process opens its own.

    Attributes:
        place: the file, or the server's URL. Its text is fit for messages: it has no password.
    """

    place: DatabasePlace

    def __init__(self, place: DatabasePlace, engine: sqlalchemy.Engine) -> None:
        self.place = place
        self._engine = engine
        self._pid = os.getpid()

    @classmethod
    def open(
        cls,
        place: Path | str | ServerUrl | None = None,
        *,
        create: bool = True,
        forward: bool = True,
    ) -> Self:
        """Open the database, make it when it is missing, bring its schema forward.

        Args:
            place: a file or a server's URL; None for what ``PATUNE_DB`` names, else the user's data folder.
            create: make a missing file, or the tables in an empty database of a server.
            forward: bring an older schema forward, after a copy of all was made beside it; else refuse it.

        Raises:
            DatabaseError: it is not ours, damaged, of a newer patune, not to be reached, or not writable; nothing was changed.
        """
        found = settings.absolute_place(place)
        return cls(found, open_engine(found, create=create, forward=forward))

    @classmethod
    def read(cls, place: Path | str | ServerUrl | None = None) -> Self:
        """Open the database so that nothing can be written: no schema is brought forward, and a read-only folder will do.

        Args:
            place: as in :meth:`open`.

        Raises:
            DatabaseError: it is missing, not ours, damaged, of another schema, or not to be reached; nothing was changed.
        """
        found = settings.absolute_place(place)
        return cls(found, open_readonly_engine(found))

    def close(self) -> None:
        """Close the connections. The last process to do so folds a file's log into the file."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise DatabaseError(
                f"{self.place} was opened by process {self._pid} and is used by its fork {os.getpid()}; "
                "no connection survives that. Open a Store in each process."
            )

    @contextlib.contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Session]:
        """A transaction: committed at the end, undone by an error. One writes at a time; readers see what was committed before.

        Raises:
            DatabaseError: the database cannot be read or written, or was opened before a fork.
        """
        self._check_process()
        engine = self._engine.execution_options(patune_writes=writes)
        with explained(self.place), Session(engine, autoflush=False) as session, session.begin():
            yield session

    def shrink(self) -> int:
        """Give the room of deleted rows back to the disk; the bytes that a file became smaller by, 0 while others use it."""
        if not isinstance(self.place, Path):
            return 0  # a server uses it again by itself
        before_b = sqlite.size_b(self.place)
        try:
            with explained(self.place):
                sqlite.shrink(self._engine)
        except DatabaseError as error:
            LOGGER.info("The file keeps its size: %s", error)
        return max(0, before_b - sqlite.size_b(self.place))
