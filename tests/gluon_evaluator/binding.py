"""Kernels as Python functions: the code under ``@gluon.jit`` with every global name bound to what stands for it in numpy."""

from __future__ import annotations

import dis
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import UnknownToEvaluatorError
from gluon_evaluator.operations import OPERATIONS, maximum, minimum, run_time_range
from gluon_evaluator.values import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYOUTS = (
    gl.BlockedLayout,
    gl.DistributedLinearLayout,
    gl.DotOperandLayout,
    gl.NVMMADistributedLayout,
    gl.NVMMASharedLayout,
    gl.SharedLinearLayout,
    gl.SliceLayout,
    gl.SwizzledSharedLayout,
)
# values that mean the same inside and outside of a kernel
PLAIN = (int, float, str, gl.dtype, *LAYOUTS)


@gluon.constexpr_function
def _evaluated_by_the_compiler() -> None:
    """An example of its kind: Triton exports the decorator and not the type."""


ConstexprFunction = type(_evaluated_by_the_compiler)


def _either(of_numbers: Callable[..., Any], of_tensors: Callable[..., Any]) -> Callable[..., Any]:
    """Python's ``min`` and ``max``: of constants they are Python's own."""

    def function(left: Any, right: Any) -> Any:
        tensors = isinstance(left, Tensor) or isinstance(right, Tensor)
        return (of_tensors if tensors else of_numbers)(left, right)

    return function


BUILTINS: dict[str, Any] = {
    "range": run_time_range,
    "min": _either(min, minimum),
    "max": _either(max, maximum),
    "float": float,
}


class Namespace:
    """A module of Triton's, as kernels see it."""

    def __init__(self, module: ModuleType, binder: Binder) -> None:
        self._module = module
        self._binder = binder

    def __getattr__(self, name: str) -> Any:
        """Called once per name: the answer is kept."""
        if not hasattr(self._module, name):
            raise UnknownToEvaluatorError(f"{self._module.__name__}.{name}")
        bound = self._binder.bound(f"{self._module.__name__}.{name}", getattr(self._module, name))
        setattr(self, name, bound)
        return bound


class Binder:
    """Binds kernels to a table of functions, each once."""

    def __init__(self, functions: dict[Any, Callable[..., Any]]) -> None:
        self._functions = OPERATIONS | functions
        self._bound: dict[Any, Any] = {}

    def kernel(self, kernel: Any) -> FunctionType:
        """The function under ``@gluon.jit``, rebound, with all that it calls."""
        function = kernel.fn
        if function not in self._bound:
            if function.__closure__:
                raise UnknownToEvaluatorError(f"a closure of {function.__name__}")
            names = {
                name: self._global(name, function) for name in _global_names(function.__code__)
            }
            rebound = FunctionType(
                function.__code__,
                {**names, "__builtins__": {}},
                function.__name__,
                function.__defaults__,
            )
            rebound.__kwdefaults__ = function.__kwdefaults__
            self._bound[function] = rebound
        return self._bound[function]

    def _global(self, name: str, function: FunctionType) -> Any:
        if name in function.__globals__:
            return self.bound(name, function.__globals__[name])
        if name in BUILTINS:
            return BUILTINS[name]
        raise UnknownToEvaluatorError(f"{name} in {function.__name__}")

    def bound(self, name: str, value: Any) -> Any:
        """What stands for a value that a kernel names.

        Raises:
            UnknownToEvaluatorError: nothing does.
        """
        if isinstance(value, gl.constexpr):
            value = value.value
        if isinstance(value, PLAIN) or value in LAYOUTS:
            return value
        if isinstance(value, ModuleType):
            return self._namespace(value)
        if callable(value) and value in self._functions:
            return self._functions[value]
        if isinstance(value, ConstexprFunction):
            return value  # evaluated at compile time, by Python
        if isinstance(value, triton.JITFunction) and value.fn.__module__.split(".")[0] != "triton":
            return self.kernel(value)
        raise UnknownToEvaluatorError(name)

    def _namespace(self, module: ModuleType) -> Namespace:
        if module not in self._bound:
            self._bound[module] = Namespace(module, self)
        return self._bound[module]


def _global_names(code: CodeType) -> Iterator[str]:
    """Names that code looks up outside of itself, those of nested code included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
