"""A database of its own for every test, and the command line in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cli_fakes import FakeSweep
from click.testing import CliRunner

from patune.cli import main
from patune.configs import dispatcher

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import Run
    from click.testing import Result


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of the environment; it does not exist yet."""
    path = tmp_path / "data" / "patune.db"
    monkeypatch.setenv("PATUNE_DB", str(path))
    monkeypatch.delenv("PATUNE_TARGET", raising=False)
    dispatcher.reload()
    return path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "patune.target",
        "patune.sweep_request",
        "patune.stale_sweep",
        "patune.doctor",
        "patune.tuner.verify",
    ):
        monkeypatch.setattr(f"{module}.detect_target", lambda: None)


@pytest.fixture
def run() -> Run:
    """``run("list", "--json")``: the command in this process; an exception that is no message fails the test."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, prog_name="patune", catch_exceptions=False)

    return invoke


@pytest.fixture
def fake_sweep(monkeypatch: pytest.MonkeyPatch) -> FakeSweep:
    fake = FakeSweep()
    monkeypatch.setattr("patune.tuner.sweep.run_sweep", fake)
    return fake


@pytest.fixture
def swept(fake_sweep: FakeSweep, run: Run, database: Path) -> Path:
    """The path of a database with four winners on gfx942."""
    result = run(
        "sweep", "--target", "gfx942", "--qg", "1,8", "--batch", "1,128", "--head-dim", "128"
    )
    assert result.exit_code == 0, result.output
    dispatcher.reload()  # a command of its own process would read the database now
    return database
