"""Global memory: pointers into the tensors that a kernel was launched with. Every access is held against the argument it starts from.

A buffer is the argument's own memory, in storage order: nothing is copied, so that it may be as large and as sparse as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import UnknownToEvaluatorError, require
from gluon_evaluator.formats import BITS, bits_of, cast, is_float, poisoned, values_of
from gluon_evaluator.layouts import common, expanded
from gluon_evaluator.values import Tensor, as_tensor, broadcast_shape, with_new_axes
from patune.errors import EmulatorError
from patune.tuner.executors import as_array

if TYPE_CHECKING:
    import torch

    from gluon_evaluator.formats import Array
    from gluon_evaluator.promotion import Number


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """The memory of one argument."""

    name: str
    bits: Array
    dtype: Any

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Buffer:
        """The memory between a CPU tensor's first and last element."""
        torch_name = str(tensor.dtype).removeprefix("torch.")
        by_name = {"float8_e4m3fn": gl.float8e4nv, "bfloat16": gl.bfloat16, "float16": gl.float16,
                   "float32": gl.float32, "int32": gl.int32, "int64": gl.int64}  # fmt: skip
        if torch_name not in by_name:
            raise UnknownToEvaluatorError(f"{name} of type {tensor.dtype}")
        dtype = by_name[torch_name]
        return cls(name, as_array(tensor).view(BITS[dtype.name]), dtype)

    def checked(self, access: str, offsets: Array, mask: Array | None) -> Array:
        """The offsets, with 0 where the mask is off.

        Raises:
            EmulatorError: an offset outside of the argument, under a mask that is on.
        """
        kept = offsets if mask is None else np.where(mask, offsets, 0)
        low, high = kept.min(), kept.max()
        if low < 0 or high >= len(self.bits):
            raise EmulatorError(
                f"{access} of {self.name} at element offset {low if low < 0 else high}: "
                f"the argument spans {len(self.bits)} elements."
            )
        return kept


class Pointer:
    """A pointer, or a tensor of pointers: a buffer and element offsets, which are 64-bit."""

    __slots__ = ("buffer", "layout", "offsets")

    def __init__(self, buffer: Buffer, offsets: Any, layout: Any = None) -> None:
        self.buffer = buffer
        self.offsets = np.asarray(offsets, np.int64)
        self.layout = layout

    @property
    def shape(self) -> list[int]:
        return list(self.offsets.shape)

    @property
    def dtype(self) -> Any:
        return gl.pointer_type(self.buffer.dtype)

    def __add__(self, other: Tensor | Number) -> Pointer:
        offset = as_tensor(other)
        require(not is_float(offset.dtype), "{} + {!r}", self.buffer.name, offset)
        broadcast_shape("pointer arithmetic", self, offset)
        layout = common("pointer arithmetic", self, offset)
        return Pointer(self.buffer, self.offsets + offset.array, layout)

    __radd__ = __add__

    def expand_dims(self, axis: int) -> Pointer:
        return Pointer(self.buffer, np.expand_dims(self.offsets, axis), expanded(self.layout, axis))

    def __getitem__(self, key: Any) -> Pointer:
        return with_new_axes(self, key)


def _mask(access: str, pointer: Pointer, mask: Tensor | bool | None) -> Array | None:
    """The mask of an access as an array; None where it is on everywhere, whatever it is."""
    if mask is None:
        return None
    mask = as_tensor(mask)
    require(mask.dtype == gl.int1, "a mask of {}", mask.dtype)
    common(access, pointer, mask)
    shape = broadcast_shape(access, pointer, mask)
    require(
        shape == pointer.offsets.shape, "{} of {} masked by {}", access, pointer.shape, mask.shape
    )
    return None if np.all(mask.array) else np.asarray(mask.array)


def gather(access: str, pointer: Pointer, mask: Tensor | bool | None) -> tuple[Array, Array | None]:
    """The bits that a pointer points to, and where they count."""
    kept = _mask(access, pointer, mask)
    return pointer.buffer.bits.take(pointer.buffer.checked(access, pointer.offsets, kept)), kept


def load(
    pointer: Pointer, mask: Tensor | bool | None = None, other: Tensor | Number | None = None
) -> Tensor:
    """``gl.load``. Without ``other``, lanes that are masked off get poison: Gluon does not say what they get."""
    dtype = pointer.buffer.dtype
    bits, kept = gather("load", pointer, mask)
    values = values_of(bits, dtype)
    if kept is not None:
        if other is None:
            fill = values_of(poisoned((), dtype), dtype)
        else:
            filler = as_tensor(other)
            require(not filler.shape, "a load's other is a scalar here")
            fill = cast(filler.array, filler.dtype, dtype)
        values = np.where(kept, values, fill)
    return Tensor(values, dtype, pointer.layout)


def store(pointer: Pointer, value: Tensor | Number, mask: Tensor | bool | None = None) -> None:
    """``gl.store``: the value is cast to what the pointer points to."""
    dtype = pointer.buffer.dtype
    value = as_tensor(value).to(dtype)
    common("store", pointer, value)
    require(
        broadcast_shape("store", pointer, value) == pointer.offsets.shape,
        "store of {} to {}",
        value.shape,
        pointer.shape,
    )
    kept = _mask("store", pointer, mask)
    offsets = pointer.buffer.checked("store", pointer.offsets, kept)
    bits = np.broadcast_to(bits_of(np.asarray(value.array), dtype), offsets.shape)
    if kept is not None:
        kept = np.broadcast_to(kept, offsets.shape)
        offsets, bits = offsets[kept], bits[kept]
    pointer.buffer.bits[offsets] = bits
