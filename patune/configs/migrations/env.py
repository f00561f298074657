"""Run by alembic: migrates the database of the connection that patune.configs.database hands over."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="patune_alembic_version",  # optuna refuses a file with a foreign alembic_version
)
with context.begin_transaction():
    context.run_migrations()
