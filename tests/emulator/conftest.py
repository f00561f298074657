from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lockstep_waves import in_order

from patune.emulator import Execution, machine

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Execution]], Execution]:
    """Runs something with one workgroup at a time and with all together; both have to see the same."""

    def run_both(call: Callable[[], Execution]) -> Execution:
        monkeypatch.setattr(machine, "BATCH_WAVES", 1)
        one_by_one = in_order(call())
        monkeypatch.setattr(machine, "BATCH_WAVES", 64)
        together = in_order(call())
        assert together == one_by_one
        return together

    return run_both
