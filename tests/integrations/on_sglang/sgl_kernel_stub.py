"""A stand-in for ``sgl_kernel``, SGLang's compiled kernels, where it is not installed beside a GPU.

With a GPU, SGLang's quantisation and activation modules take names from it at import time, and the attention interfaces reach those modules.
Nothing that the tests run calls one: every name here raises when it is called. With a ``sgl_kernel`` that is installed, this does nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "sgl_kernel"
MODULES = (NAME, f"{NAME}.elementwise", f"{NAME}.quantization")


class _Refusing(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> NoReturn:
            raise NotImplementedError(f"{self.__name__}.{name} is not here: tests have a stand-in.")

        return refuse


def stand_in_where_missing() -> bool:
    """Put the stand-in into ``sys.modules`` where a GPU makes SGLang ask for it; whether that was needed."""
    import torch

    if not torch.cuda.is_available() or importlib.util.find_spec(NAME) is not None:
        return False
    for name in MODULES:
        module = _Refusing(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == NAME)
        module.__path__ = []
        sys.modules[name] = module
    return True
