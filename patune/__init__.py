"""patune: proven launch configurations for paged-attention decode kernels.

Importing this touches no GPU and no database, and none of torch, triton, optuna or sqlalchemy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from patune.configs.dispatcher import lookup, stats
    from patune.kernels.decode import paged_attention_decode

__all__ = ["Problem", "Target", "Workload", "lookup", "paged_attention_decode", "stats"]
__version__ = "0.1.0"

_LAZY = {
    "lookup": "patune.configs.dispatcher",
    "stats": "patune.configs.dispatcher",
    "paged_attention_decode": "patune.kernels.decode",
}


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, then keep them as ordinary attributes."""
    if name not in _LAZY:
        raise AttributeError(f"module 'patune' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
