"""What sets knobs for this thread or task, whatever is stored: :mod:`patune.configs.overrides` puts it here, for the launch path to see.

Equal values are equal overrides, so entering the same one again finds what was resolved for it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

forced: ContextVar[Hashable] = ContextVar("patune_forced", default=None)
