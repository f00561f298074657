"""A stand-in for torchvision where no build of it fits the installed torch, so that SGLang's config package can be imported.

SGLang's image models import ``torchvision.transforms`` and ``InterpolationMode`` at import time; the attention interfaces reach them through
``sglang.srt.configs``. No test calls either. With a torchvision that imports, this does nothing.
"""

from __future__ import annotations

import importlib
import sys
from enum import Enum
from types import ModuleType


def stand_in_where_missing() -> bool:
    """Put the stand-in into ``sys.modules``; whether that was needed."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        pass
    else:
        return False
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # remembered: transformers must not take the stand-in for the real one
    package, transforms, functional = (
        ModuleType(name)
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    )
    functional.InterpolationMode = Enum("InterpolationMode", ["BICUBIC"])  # type: ignore[attr-defined]
    transforms.functional = functional  # type: ignore[attr-defined]
    transforms.InterpolationMode = functional.InterpolationMode  # type: ignore[attr-defined]
    transforms.__path__ = []
    package.transforms = transforms  # type: ignore[attr-defined]
    package.__path__ = []
    for module in (package, transforms, functional):
        sys.modules[module.__name__] = module
    return True
