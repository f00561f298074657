"""Environment variables, all of them, read through typed helpers and nowhere else.

| variable | meaning | default |
|---|---|---|
| PATUNE_DB | path of the config database | patune.db in the user's data folder |
| PATUNE_TARGET | architecture that lookups and sweeps are for | the device that is there, else gfx942 |
"""

from __future__ import annotations

import os
from pathlib import Path

DB_FILE = "patune.db"


def database_path(override: str | Path | None = None) -> Path:
    """Where the config database is: the argument, else PATUNE_DB, else the user's data folder (XDG). Nothing is created."""
    if override is not None:
        return Path(override).expanduser()
    if value := os.environ.get("PATUNE_DB"):
        return Path(value).expanduser()
    from platformdirs import user_data_path

    return user_data_path("patune", appauthor=False) / DB_FILE


def target_arch() -> str | None:
    """PATUNE_TARGET, or None."""
    return os.environ.get("PATUNE_TARGET") or None
