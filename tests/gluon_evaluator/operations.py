"""The elementwise, shape and reduction functions of ``gluon.language``: what needs no more than its operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import UnknownToEvaluatorError, require
from gluon_evaluator.formats import cast, held_type
from gluon_evaluator.layouts import Inferred, common, explicit, reduced
from gluon_evaluator.promotion import Number, computed_in
from gluon_evaluator.values import Tensor, as_tensor, binary, broadcast_shape
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gluon_evaluator.memory import Pointer


def static_assert(condition: bool, message: str = "") -> None:
    require(bool(condition), "static_assert: {}", message)


def static_range(*bounds: int) -> range:
    require(all(isinstance(bound, int) for bound in bounds), "static_range of {}", bounds)
    return range(*bounds)


def run_time_range(*bounds: Tensor | int) -> Iterator[Tensor]:
    """``range`` in a kernel: the loop variable is a run-time integer."""
    scalars = [as_tensor(bound) for bound in bounds]
    dtype = gl.int64 if any(s.dtype.name == "int64" for s in scalars) else gl.int32
    held = held_type(dtype)
    return (Tensor(held(i), dtype) for i in range(*(scalar.as_int() for scalar in scalars)))


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    require(end > start and not (end - start) & (end - start - 1), "arange({}, {})", start, end)
    return Tensor(np.arange(start, end, dtype=np.int32), gl.int32, explicit(layout))


def full(shape: Sequence[int], value: Tensor | Number, dtype: Any, layout: Any = None) -> Tensor:
    scalar = as_tensor(value)
    require(not scalar.shape, "full of a tensor of shape {}", scalar.shape)
    filled = np.full([int(n) for n in shape], cast(scalar.array, scalar.dtype, dtype))
    return Tensor(filled, dtype, explicit(layout))


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


def where(
    condition: Tensor | Number, chosen: Tensor | Number, otherwise: Tensor | Number
) -> Tensor:
    condition = as_tensor(condition)  # of a loop's start value that no round has replaced
    require(condition.dtype == gl.int1, "where of {}", condition.dtype)
    dtype = computed_in(chosen, otherwise)
    values = [as_tensor(x).to(dtype) for x in (chosen, otherwise)]
    broadcast_shape("where", condition, *values)
    layout = common("where", condition, *values)
    return Tensor(np.where(condition.array, *(v.array for v in values)), dtype, layout)


def _extreme(name: str, ufunc: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
    """A NaN loses against a number, as in hardware."""

    def function(left: Tensor | Number, right: Tensor | Number) -> Tensor:
        operands = as_tensor(left), as_tensor(right)
        if any(operand.dtype.name in ("fp16", "bf16") for operand in operands):
            raise UnknownToEvaluatorError(f"{name} of 16-bit floats")
        return binary(name, ufunc, *operands)

    return function


maximum = _extreme("maximum", np.fmax)
minimum = _extreme("minimum", np.fmin)


def _of_float32(name: str, ufunc: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    def function(value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.dtype != gl.float32:
            raise UnknownToEvaluatorError(f"{name} of {value!r}")
        return Tensor(ufunc(value.array), gl.float32, value.layout)

    return function


def _rounded_once(ufunc: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """By way of float64: numpy's own float32 exp2 is off at 127, where the hardware is exact (numpy 2.4 with AVX-512)."""
    return lambda array: ufunc(array.astype(np.float64)).astype(np.float32)


def _reduction(name: str, reduce: Callable[..., Any]) -> Callable[[Tensor, int], Tensor]:
    def function(value: Tensor, axis: int) -> Tensor:
        if value.dtype != gl.float32:
            raise UnknownToEvaluatorError(f"{name} of {value!r}")
        require(0 <= axis < len(value.shape), "{} of {} over axis {}", name, value.shape, axis)
        layout = reduced(value.layout, axis, len(value.shape))
        return Tensor(reduce(value.array, axis=axis), gl.float32, layout)

    return function


def expand_dims(value: Tensor | Pointer, axis: int) -> Tensor | Pointer:
    return value.expand_dims(axis)


def permute(value: Tensor, *order: Any) -> Tensor:
    return value.permute(*order)


def join(left: Tensor, right: Tensor) -> Tensor:
    """Two tensors along a new last axis."""
    require(left.shape == right.shape and left.dtype == right.dtype, "join {!r}, {!r}", left, right)
    layout = Inferred("join", (), common("join", left, right))
    return Tensor(np.stack([left.array, right.array], axis=-1), left.dtype, layout)


def broadcast(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    layout = common("broadcast", left, right)
    shape = broadcast_shape("broadcast", left, right)
    first, second = (
        Tensor(np.broadcast_to(value.array, shape), value.dtype, layout) for value in (left, right)
    )
    return first, second


def convert_layout(value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    """The same values in another layout. Whether that moves data between threads (``assert_trivial``) is the compiler's to check."""
    require(bool(value.shape), "convert_layout of a scalar")
    return Tensor(value.array, value.dtype, explicit(layout))


def max_constancy(value: Tensor, runs: Sequence[int]) -> Tensor:
    """A promise that the value repeats in runs, by which the compiler merges accesses: it has to hold.

    Raises:
        EmulatorError: it does not.
    """
    if len(value.shape) != 1 or len(runs) != 1:
        raise UnknownToEvaluatorError(f"max_constancy of {value.shape} by {runs}")
    length = value.array.shape[0]
    run = min(int(runs[0]), length)
    first = np.repeat(value.array[::run], run)[:length]
    if not np.array_equal(first, value.array):
        raise EmulatorError(f"max_constancy({run}) is promised for values that do not repeat.")
    return value


OPERATIONS: dict[Any, Callable[..., Any]] = {
    gl.static_assert: static_assert,
    gl.static_range: static_range,
    gl.arange: arange,
    gl.full: full,
    gl.zeros: zeros,
    gl.where: where,
    gl.maximum: maximum,
    gl.minimum: minimum,
    gl.abs: _of_float32("abs", np.abs),
    gl.floor: _of_float32("floor", np.floor),
    gl.exp2: _of_float32("exp2", _rounded_once(np.exp2)),
    gl.log2: _of_float32("log2", _rounded_once(np.log2)),
    gl.max: _reduction("max", np.fmax.reduce),
    gl.sum: _reduction("sum", np.sum),
    gl.expand_dims: expand_dims,
    gl.permute: permute,
    gl.join: join,
    gl.broadcast: broadcast,
    gl.convert_layout: convert_layout,
    gl.max_constancy: max_constancy,
}
