"""What every test shares: GPU tests only where there is one, and no test sees the user's own database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect GPU tests where this process sees no sm_90 device."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    from patune.target import detect_target

    target = detect_target()
    if target is not None and target.arch == "sm_90":
        return
    config.hook.pytest_deselected(items=wanted)
    items[:] = [item for item in items if item not in wanted]


@pytest.fixture(autouse=True)
def _own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATUNE_DB", str(tmp_path / "patune.db"))
    monkeypatch.delenv("PATUNE_TARGET", raising=False)
    monkeypatch.setenv("PATUNE_WATCH", "0")
    monkeypatch.setenv("PATUNE_CAPTURE", "0")
