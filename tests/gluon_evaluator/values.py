"""Tensors in registers: a numpy array, its Gluon type, and its layout. Scalars have no layout."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import RefusedProgramError, UnknownToEvaluatorError, require
from gluon_evaluator.formats import cast, held_type, is_float
from gluon_evaluator.layouts import Inferred, common, expanded
from gluon_evaluator.promotion import NUMBERS, TYPES, Number, computed_in, number_type
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gluon_evaluator.formats import Array

    Ufunc = Callable[[Any, Any], Any]


class TensorType(NamedTuple):
    """What kernels read of a tensor's type."""

    element_ty: Any
    shape: list[int]
    layout: Any


class Tensor:
    """A tensor or a scalar at run time."""

    __slots__ = ("array", "dtype", "layout")
    __hash__ = None

    def __init__(self, array: Array | np.generic, dtype: Any, layout: Any = None) -> None:
        self.array = array
        self.dtype = dtype
        self.layout = layout

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape, self.layout)

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape}, {self.layout})"

    def __bool__(self) -> bool:
        require(not self.shape, "the truth of a tensor of shape {}", self.shape)
        return bool(self.array)

    def as_int(self) -> int:
        """For the evaluator itself. There is no ``__index__``: a run-time value is no compile-time one."""
        require(not self.shape and not is_float(self.dtype), "{!r} as an integer", self)
        return int(self.array)

    def to(self, dtype: Any) -> Tensor:
        if dtype.name == self.dtype.name:
            return self
        return Tensor(cast(self.array, self.dtype, dtype), dtype, self.layout)

    def expand_dims(self, axis: int) -> Tensor:
        layout = expanded(self.layout, axis)
        return Tensor(np.expand_dims(self.array, axis), self.dtype, layout)

    def __getitem__(self, key: tuple[slice | None, ...]) -> Tensor:
        return with_new_axes(self, key)

    def permute(self, *order: Any) -> Tensor:
        axes = _integers(order)
        require(sorted(axes) == list(range(len(self.shape))), "permute {} by {}", self.shape, axes)
        layout = Inferred("permute", axes, self.layout)
        return Tensor(self.array.transpose(axes), self.dtype, layout)

    def reshape(self, *shape: Any) -> Tensor:
        sizes = _integers(shape)
        require(np.prod(sizes) == self.array.size, "reshape {} to {}", self.shape, sizes)
        layout = Inferred("reshape", sizes, self.layout)
        return Tensor(self.array.reshape(sizes), self.dtype, layout)

    def __neg__(self) -> Tensor:
        return 0 - self


def _integers(given: Sequence[Any]) -> tuple[int, ...]:
    """``f((1, 0))`` and ``f(1, 0)`` are both allowed."""
    listed = given[0] if len(given) == 1 and not hasattr(given[0], "__index__") else given
    return tuple(int(x) for x in listed)


def with_new_axes(value: Any, key: Any) -> Any:
    """``value[:, None]``: the only indexing that registers have."""
    for axis, item in enumerate(key if isinstance(key, tuple) else (key,)):
        if item is None:
            value = value.expand_dims(axis)
        else:
            require(item == slice(None), "index {!r} of a tensor", item)
    return value


def as_tensor(value: Tensor | Number) -> Tensor:
    """A number as the scalar that Triton makes of it."""
    if isinstance(value, Tensor):
        return value
    dtype = number_type(value)
    return Tensor(held_type(dtype)(value), dtype)


def _operand(value: Tensor | Number, dtype: Any) -> Any:
    """The numpy operand of an operation in ``dtype``."""
    if not isinstance(value, Tensor):
        return _constant(value, dtype.name)
    if value.dtype.name == dtype.name:
        return value.array
    return cast(value.array, value.dtype, dtype)


@functools.lru_cache(maxsize=None, typed=True)
def _constant(number: Number, name: str) -> Any:
    own = as_tensor(number)
    return cast(own.array, own.dtype, TYPES[name])[()]


def broadcast_shape(what: str, *values: Any) -> tuple[int, ...]:
    """The shape of an elementwise result.

    Raises:
        RefusedProgramError: shapes that do not go together.
    """
    result: list[int] = []
    for value in values:
        shape = value.shape
        if shape == result or not shape:
            continue
        pairs = list(zip(result, shape, strict=False))
        if result and (
            len(result) != len(shape) or any(a != b and 1 not in (a, b) for a, b in pairs)
        ):
            raise RefusedProgramError(
                f"{what} of shapes {' and '.join(str(v.shape) for v in values)}"
            )
        result = [max(pair) for pair in pairs] if result else shape
    return tuple(result)


def binary(name: str, ufunc: Ufunc, left: Any, right: Any, *, divides: bool = False) -> Tensor:
    """An elementwise operation, computed and rounded in the type that Triton computes it in."""
    dtype = computed_in(left, right, divides=divides)
    if dtype.name == "int1" and name not in ("and", "or"):
        raise UnknownToEvaluatorError(f"{name} of {gl.int1}")
    layout = _common_layout(name, left, right)
    result = ufunc(_operand(left, dtype), _operand(right, dtype))
    if dtype.name in ("fp16", "bf16"):
        result = cast(result, gl.float32, dtype)
    return Tensor(result, dtype, layout)


def _compared(name: str, ufunc: Ufunc, left: Any, right: Any) -> Tensor:
    dtype = computed_in(left, right)
    layout = _common_layout(name, left, right)
    return Tensor(ufunc(_operand(left, dtype), _operand(right, dtype)), gl.int1, layout)


def _common_layout(name: str, left: Any, right: Any) -> Any:
    if not isinstance(right, Tensor):
        return left.layout
    if not isinstance(left, Tensor):
        return right.layout
    if left.array.shape != right.array.shape:
        broadcast_shape(name, left, right)
    return common(name, left, right)


def _integers_only(name: str, ufunc: Ufunc) -> Ufunc:
    def checked(left: Any, right: Any) -> Any:
        if left.dtype.kind not in "ib":
            raise UnknownToEvaluatorError(f"{name} of floats")
        return ufunc(left, right)

    return checked


def _remainder(left: Any, right: Any) -> Any:
    if not right.all():
        raise EmulatorError("division of an integer by zero.")
    return np.fmod(left, right)


def _quotient(left: Any, right: Any) -> Any:
    """Towards zero, as the hardware divides; numpy rounds down."""
    return (left - _remainder(left, right)) // right


def _divided(left: Any, right: Any) -> Tensor:
    if not is_float(computed_in(left, right)):
        raise UnknownToEvaluatorError("/ of integers")
    return binary("truediv", np.divide, left, right, divides=True)


ARITHMETIC: dict[str, Ufunc] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "floordiv": _integers_only("//", _quotient),
    "mod": _integers_only("%", _remainder),
    "and": _integers_only("&", np.bitwise_and),
    "or": _integers_only("|", np.bitwise_or),
}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _is_operand(value: Any) -> bool:
    return isinstance(value, (Tensor, *NUMBERS))


def _method(compute: Callable[[Any, Any], Tensor], *, reflected: bool = False) -> Any:
    """Pointers answer for themselves: with them the operator is not implemented here."""

    def method(self: Tensor, other: Any) -> Any:
        if not _is_operand(other):
            return NotImplemented
        return compute(other, self) if reflected else compute(self, other)

    return method


def _define_operators() -> None:
    def compute_by(rule: Callable[..., Tensor], name: str, ufunc: Ufunc) -> Any:
        return lambda left, right: rule(name, ufunc, left, right)

    computed = {name: compute_by(binary, name, ufunc) for name, ufunc in ARITHMETIC.items()}
    for name, compute in {**computed, "truediv": _divided}.items():
        setattr(Tensor, f"__{name}__", _method(compute))
        setattr(Tensor, f"__r{name}__", _method(compute, reflected=True))
    for name in COMPARISONS:
        compute = compute_by(_compared, name, getattr(operator, name))
        setattr(Tensor, f"__{name}__", _method(compute))


_define_operators()
