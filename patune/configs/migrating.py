"""Runs the migrations on an open connection, in its transaction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlalchemy
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"


def _config(connection: sqlalchemy.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(connection: sqlalchemy.Connection) -> None:
    """Run what was not run yet, from nothing or from any earlier schema."""
    from alembic import command

    command.upgrade(_config(connection), "head")


def stamp(connection: sqlalchemy.Connection) -> None:
    """Record that the tables are the newest: they were made from the models."""
    from alembic import command

    command.stamp(_config(connection), "head")
