"""The type that a binary operation computes in, by Triton's rules."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import UnknownToEvaluatorError, require
from gluon_evaluator.formats import BITS, FLOATS

Number = bool | int | float
NUMBERS = (bool, int, float)
TYPES: dict[str, Any] = {
    dtype.name: dtype
    for dtype in (gl.int1, gl.int16, gl.int32, gl.int64, gl.float8e4nv, gl.float16, gl.bfloat16, gl.float32)
}  # fmt: skip
LIMITS = {f"int{bits}": (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in (16, 32, 64)}
INT32_MIN, INT32_MAX = LIMITS["int32"]
INT64_MIN, INT64_MAX = LIMITS["int64"]
UINT32_MAX = (1 << 32) - 1
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers


def number_type(number: Number) -> Any:
    """The type that Triton gives a constant.

    Raises:
        UnknownToEvaluatorError: an unsigned or 64-bit float type.
    """
    if isinstance(number, bool):
        return gl.int1
    if isinstance(number, float):
        if number in (0.0, math.inf, -math.inf) or FLOAT32_MIN <= abs(number) <= FLOAT32_MAX:
            return gl.float32
    elif INT32_MIN <= number <= INT32_MAX:
        return gl.int32
    elif INT64_MIN <= number <= INT64_MAX and not INT32_MAX < number <= UINT32_MAX:
        return gl.int64
    raise UnknownToEvaluatorError(f"the constant {number!r}")


def argument_type(number: Number) -> Any:
    """The type that Triton gives a run-time argument: what does not fit 32 bits has 64, and floats have 32.

    Raises:
        UnknownToEvaluatorError: a number beyond that.
    """
    if isinstance(number, float):
        return gl.float32
    if isinstance(number, bool) or not INT64_MIN <= number <= INT64_MAX:
        raise UnknownToEvaluatorError(f"the argument {number!r}")
    return gl.int32 if INT32_MIN <= number <= INT32_MAX else gl.int64


def _kind(name: str) -> int:
    return 0 if name == "int1" else 2 if name in FLOATS else 1


@functools.cache
def _of_names(left: str, right: str, *, divides: bool) -> str:
    """The name of the type that tensors of two types are computed in."""
    names = {left, right}
    if _kind(left) == 2 or _kind(right) == 2:
        if "fp8e4nv" in names:
            raise UnknownToEvaluatorError("arithmetic on fp8e4nv")
        if divides or "fp32" in names:
            return "fp32"
        return "fp16" if "fp16" in names else "bf16" if names == {"bf16"} else "fp32"
    return max(left, right, key=lambda name: np.dtype(BITS[name]).itemsize)


def computed_in(left: Any, right: Any, *, divides: bool = False) -> Any:
    """The type that two operands, tensors or Python numbers, are cast to first.

    Raises:
        RefusedProgramError: a constant that the type cannot hold.
    """
    for number, operand in ((right, left), (left, right)):
        if isinstance(number, NUMBERS):
            other = number_type(operand) if isinstance(operand, NUMBERS) else operand.dtype
            return TYPES[_with_number(other.name, number, divides=divides)]
    return TYPES[_of_names(left.dtype.name, right.dtype.name, divides=divides)]


@functools.lru_cache(maxsize=None, typed=True)  # 1 and 1.0 are different constants
def _with_number(other: str, number: Number, *, divides: bool) -> str:
    """A number of no higher kind takes the tensor's type, whatever its width."""
    own = number_type(number).name
    if _kind(own) > _kind(other):
        return _of_names(own, other, divides=divides)
    name = _of_names(other, other, divides=divides)
    if _kind(name) == 1:
        low, high = LIMITS[name]
        require(low <= number <= high, "constant {} for a tensor of {}", number, name)
    return name
