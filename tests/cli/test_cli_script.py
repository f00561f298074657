"""The installed `patune` script, as a shell runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import patune

SCRIPT = Path(sys.executable).with_name("patune")
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="patune is not installed beside this Python"
)


def shell(*arguments: str, database: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PATUNE_DB": str(database)},
    )


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "patune", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"patune {patune.__version__}\n"


def test_version_lookup_and_errors(database: Path) -> None:
    assert shell("--version", database=database).stdout == f"patune {patune.__version__}\n"

    key = ("--block-size", "1024", "--head-dim", "128", "--qg", "8", "--target", "gfx942")
    found = shell("lookup", *key, "--json", database=database)
    assert found.returncode == 0
    assert json.loads(found.stdout)["source"] == "heuristic"

    bad = shell("sweep", "--qg", "65", database=database)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: qg=65 is not allowed")
    assert "\x1b[" not in bad.stderr  # colours are for terminals
    assert not database.parent.exists()
