from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patune.configs import dispatcher
from patune.configs.store import Store
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without rows, to be copied: a migration takes 0.15 s."""
    path = tmp_path_factory.mktemp("template") / "patune.db"
    Store.open(path).close()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    path = tmp_path / "patune.db"
    shutil.copy(empty_database, path)
    return path


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    with Store.open(database) as opened:
        yield opened


@pytest.fixture
def fresh_dispatcher(
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Path:
    """The dispatcher without anything loaded, on an empty database and no packs, every log line kept; gives the packs' folder."""
    caplog.set_level(logging.INFO, logger="patune")
    packs = tmp_path / "packs"
    packs.mkdir()
    monkeypatch.setenv("PATUNE_DB", str(database))
    monkeypatch.delenv("PATUNE_TARGET", raising=False)
    monkeypatch.setattr(dispatcher, "PACKS", packs)
    monkeypatch.setattr(dispatcher, "resolve_target", lambda arch: Target.named(arch or "gfx942"))
    monkeypatch.setattr(dispatcher, "_state", dispatcher._State())
    return packs


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can reach: pytest's own ones are closed to them. Ask for it before ``unprivileged``."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Root may write anywhere: become nobody for the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
