"""How the values of a Gluon type are held in numpy, and the bits that they have in memory.

Integers are held as themselves, so they wrap as they do in registers. Every float is held as float32, on the grid of its type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gluon_evaluator.errors import UnknownToEvaluatorError
from patune.emulator.formats import bf16_from_f32, f32_from_bf16, fp8_formats

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

E4M3FN = fp8_formats("gfx950")[0]
# By the types' names: comparing the types themselves takes longer than most of what is computed here.
BITS: dict[str, type[np.generic]] = {
    "int1": np.bool_,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "fp8e4nv": np.uint8,
    "fp16": np.uint16,
    "bf16": np.uint16,
    "fp32": np.float32,
}
FLOATS = ("fp8e4nv", "fp16", "bf16", "fp32")
HELD = BITS | dict.fromkeys(FLOATS, np.float32)
# Byte that fills what nobody wrote: NaN in every float type, 2139062143 as an int32.
FLOAT_POISON, INTEGER_POISON = 0xFF, 0x7F


def held_type(dtype: Any) -> type[np.generic]:
    """The numpy type that values of a Gluon type are held in.

    Raises:
        UnknownToEvaluatorError: a type that the evaluator does not know.
    """
    held = HELD.get(dtype.name)
    if held is None:
        raise UnknownToEvaluatorError(f"type {dtype}")
    return held


def is_float(dtype: Any) -> bool:
    """Whether a Gluon type holds floats."""
    return held_type(dtype) is np.float32


def values_of(bits: Array, dtype: Any) -> Array:
    """The values that bits in memory stand for."""
    if dtype.name == "bf16":
        return f32_from_bf16(bits)
    if dtype.name == "fp8e4nv":
        return E4M3FN.decode(bits)
    if dtype.name == "fp16":
        return bits.view(np.float16).astype(np.float32)
    return bits


def bits_of(values: Array, dtype: Any) -> Array:
    """The bits of values in memory, rounded to nearest even. fp8 saturates, as the conversion that Triton emits does."""
    if dtype.name == "bf16":
        return bf16_from_f32(values).astype(np.uint16)
    if dtype.name == "fp8e4nv":
        return E4M3FN.encode(values, saturate=True).astype(np.uint8)
    if dtype.name == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return values


def cast(values: Array | np.generic, source: Any, target: Any) -> Array:
    """Values of one type as values of another; integers wrap, floats are rounded.

    Raises:
        UnknownToEvaluatorError: float to integer, which no kernel asks for.
    """
    held = held_type(target)
    if is_float(source) and held is not np.float32:
        raise UnknownToEvaluatorError(f"cast of {source} to {target}")
    converted = np.asarray(values).astype(held, copy=False)
    if source.name == target.name or target.name not in FLOATS or target.name == "fp32":
        return converted
    return values_of(bits_of(converted, target), target)


def poisoned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Bits of memory that nobody wrote."""
    fill = FLOAT_POISON if is_float(dtype) else INTEGER_POISON
    bits = np.dtype(BITS[dtype.name])
    return np.full((*shape, bits.itemsize), fill, np.uint8).view(bits)[..., 0]
