"""patune: proven launch configurations for paged-attention decode kernels.

Importing this touches no GPU and no database, and none of torch, triton, optuna or sqlalchemy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from patune.configs.capture import flush_misses
    from patune.configs.dispatcher import fingerprint, lookup, pin, reload, stats, unpin
    from patune.configs.overrides import override
    from patune.kernels.decode import paged_attention_decode
    from patune.warming import warmup

__all__ = [
    "Problem",
    "Target",
    "Workload",
    "fingerprint",
    "flush_misses",
    "lookup",
    "override",
    "paged_attention_decode",
    "pin",
    "reload",
    "stats",
    "unpin",
    "warmup",
]
__version__ = "0.1.0"

_LAZY = {
    "fingerprint": "patune.configs.dispatcher",
    "flush_misses": "patune.configs.capture",
    "lookup": "patune.configs.dispatcher",
    "override": "patune.configs.overrides",
    "pin": "patune.configs.dispatcher",
    "reload": "patune.configs.dispatcher",
    "stats": "patune.configs.dispatcher",
    "unpin": "patune.configs.dispatcher",
    "warmup": "patune.warming",
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
