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
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from patune.errors import reject

DB_FILE = "patune.db"
CAPTURE_FOLDER = "misses"
SERVER_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
DEFAULT_WATCH_S = 5.0


_USER = re.compile(r"^([^:]*://[^:/?#@]*):.*@", re.DOTALL)
_PARAMETER = re.compile(r"([?&](?:ssl)?password=)[^&#]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A database on a PostgreSQL server. Its text hides the password.

    Attributes:
        url: with the password, ``postgresql://user:password@host/database``.

    Raises:
        InvalidValueError: the user or the password has a character that ends them in a URL.
    """

    url: str

    def __post_init__(self) -> None:
        rest = self.url.partition("://")[2]
        host = re.split(r"[/?#]", rest, maxsplit=1)[0]
        ends = rest.partition("?")[0].count("@")  # of user and password
        hidden = "@" not in host and (ends or (":" in host and "@" in rest))
        if ends > 1 or hidden:
            raise reject(
                "database",
                str(self),
                "a URL whose user and password have @ / ? # % percent-encoded, as %40 %2F %3F %23 %25",
            )

    def __str__(self) -> str:
        return hide_password(self.url)

    def __repr__(self) -> str:
        return f"ServerUrl({str(self)!r})"

    def scrub(self, text: str) -> str:
        """A text about the database, such as a driver's error, with no password in it."""
        text = text.replace(self.url, str(self))
        written = set(_secrets(self.url))
        plain = {unquote(secret) for secret in written}
        for secret in sorted(written | plain | {quote(s) for s in plain}, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def hide_password(text: str) -> str:
    """A server's URL, or an option that has one, with ``***`` for the password; any other text as it is."""
    return _PARAMETER.sub(r"\1***", _USER.sub(r"\1:***@", text)) if "://" in text else text


def _secrets(url: str) -> list[str]:
    """The passwords in a URL, as they are written there."""
    user = re.match(r"^[^:]*://[^:/?#@]*:(.+)@", url, re.DOTALL)
    parameters = re.findall(r"[?&](?:ssl)?password=([^&#]+)", url, re.IGNORECASE)
    return [*([user[1]] if user else []), *parameters]


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


def absolute_place(override: str | Path | ServerUrl | None = None) -> DatabasePlace:
    """As :func:`database_place`, a file by its absolute path.

    Raises:
        InvalidValueError: as there.
    """
    place = database_place(override)
    return place.absolute() if isinstance(place, Path) else place


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
