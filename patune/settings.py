"""Environment variables, all of them, read through typed helpers and nowhere else.

| variable | meaning | default |
|---|---|---|
| PATUNE_DB | the config database: a file, or a ``postgresql://`` URL | patune.db in the user's data folder |
| PATUNE_TARGET | architecture that lookups and sweeps are for | the device that is there, else gfx942 |
| PATUNE_STRICT | 1: a lookup that finds nothing tuned for its problem and sizes is an error | 0 |
| PATUNE_KNOBS | knobs that lookups set, whatever is stored: ``num_splits=8,num_stages=2`` | none |
| PATUNE_WATCH | seconds between looks at the database for new configurations; 0 never looks | 5 |
| PATUNE_CAPTURE | folder that untuned keys are written to when a process ends; 0 writes none | ``misses`` beside the database file, else in the user's data folder |
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from patune.errors import reject

DB_FILE = "patune.db"
CAPTURE_FOLDER = "misses"
SERVER_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
DEFAULT_WATCH_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A database on a PostgreSQL server. Its text hides the password.

    Attributes:
        url: with the password, ``postgresql://user:password@host/database``.
    """

    url: str

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        if not parts.password:
            return self.url
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))

    def __repr__(self) -> str:
        return f"ServerUrl({str(self)!r})"


DatabasePlace = Path | ServerUrl


def parse_place(text: str) -> DatabasePlace:
    """A database's place from its text: a file, or the URL of a server.

    Raises:
        InvalidValueError: the URL is of another kind of database.
    """
    scheme, found, _ = text.partition("://")
    if not found:
        return Path(text).expanduser()
    if scheme not in SERVER_SCHEMES:
        raise reject("database", f"{scheme}://", "a file, or a postgresql:// URL")
    return ServerUrl(text)


def database_place(override: str | Path | ServerUrl | None = None) -> DatabasePlace:
    """Where the config database is: the argument, else PATUNE_DB, else the user's data folder (XDG). Nothing is created.

    Raises:
        InvalidValueError: the argument or PATUNE_DB is the URL of another kind of database.
    """
    if isinstance(override, ServerUrl):
        return override
    if override is not None:
        return parse_place(str(override))
    if value := os.environ.get("PATUNE_DB"):
        return parse_place(value)
    return _user_folder() / DB_FILE


def _user_folder() -> Path:
    from platformdirs import user_data_path

    return user_data_path("patune", appauthor=False)


def target_arch() -> str | None:
    """PATUNE_TARGET, or None."""
    return os.environ.get("PATUNE_TARGET") or None


def strict() -> bool:
    """PATUNE_STRICT.

    Raises:
        InvalidValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("PATUNE_STRICT") or "0"
    if value not in ("0", "1"):
        raise reject("PATUNE_STRICT", value, ("0", "1"))
    return value == "1"


def knobs_text() -> str | None:
    """PATUNE_KNOBS, or None; :mod:`patune.configs.overrides` reads it."""
    return os.environ.get("PATUNE_KNOBS") or None


def watch_s() -> float:
    """PATUNE_WATCH: seconds, 0 for never.

    Raises:
        InvalidValueError: it is not such a number.
    """
    value = os.environ.get("PATUNE_WATCH") or str(DEFAULT_WATCH_S)
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not math.isfinite(seconds) or seconds < 0:
        raise reject("PATUNE_WATCH", value, "seconds, 0 or more")
    return seconds


def capture_folder(place: DatabasePlace) -> Path | None:
    """Where untuned keys are written to, for a process that reads this database; None for nowhere. Nothing is created."""
    value = os.environ.get("PATUNE_CAPTURE")
    if value == "0":
        return None
    if value:
        return Path(value).expanduser()
    home = place.absolute().parent if isinstance(place, Path) else _user_folder()
    return home / CAPTURE_FOLDER
