"""Shared memory: allocations that start poisoned, and views that alias them.

The bytes lie in the logical row-major order of the allocation, whatever its layout: a layout decides where bytes lie and never which
element they are. Only where one allocation is seen as another type do layouts count (:func:`layouts.check_pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import UnknownToEvaluatorError, require
from gluon_evaluator.formats import BITS, bits_of, values_of
from gluon_evaluator.layouts import Inferred, check_pairs, explicit
from gluon_evaluator.values import Tensor
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gluon_evaluator.copies import Copies
    from gluon_evaluator.formats import Array


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Shared:
    """A shared-memory descriptor.

    Attributes:
        bits: view of the allocation's bits.
        begin_b: first byte that the view reaches, in an address space of the workgroup's own.
        copies: what is on its way there.
    """

    bits: Array
    dtype: Any
    layout: Any
    begin_b: int
    copies: Copies

    @property
    def shape(self) -> list[int]:
        return list(self.bits.shape)

    @property
    def end_b(self) -> int:
        return self.begin_b + self.bits.nbytes

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape} at byte {self.begin_b}"

    def index(self, index: Tensor | int) -> Shared:
        """One element of the first axis."""
        at = index.as_int() if isinstance(index, Tensor) else index
        if not 0 <= at < self.bits.shape[0]:
            raise EmulatorError(f"index {at} of shared memory {self}: it has {self.bits.shape[0]}.")
        require(self.bits.flags.c_contiguous, "index of permuted shared memory {}", self)
        part = self.bits[at]
        return replace(self, bits=part, begin_b=self.begin_b + at * part.nbytes)

    def permute(self, order: Sequence[int]) -> Shared:
        axes = tuple(int(axis) for axis in order)
        layout = Inferred("permute", axes, self.layout)
        return replace(self, bits=self.bits.transpose(axes), layout=layout)

    def reshape(self, shape: Sequence[int]) -> Shared:
        sizes = tuple(int(size) for size in shape)
        require(
            np.prod(sizes) == self.bits.size and self.bits.flags.c_contiguous,
            "reshape of shared memory {} to {}",
            self,
            sizes,
        )
        layout = Inferred("reshape", sizes, self.layout)
        return replace(self, bits=self.bits.reshape(sizes), layout=layout)

    def reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        """fp8 as pairs of neighbours: the even one is the low byte."""
        sizes = tuple(int(size) for size in shape)
        if (self.dtype, dtype) != (gl.float8e4nv, gl.int16):
            raise UnknownToEvaluatorError(f"reinterpret {self.dtype} as {dtype}")
        require(
            self.bits.flags.c_contiguous and sizes == (*self.bits.shape[:-1], self.bits.shape[-1] // 2),
            "reinterpret of shared memory {} as {}", self, sizes,
        )  # fmt: skip
        check_pairs(layout, self.layout)
        return replace(self, bits=self.bits.view(BITS[dtype.name]), dtype=dtype, layout=layout)

    _reinterpret = reinterpret  # its name in Triton 3.6

    def read(self) -> Array:
        """The values, once no copy is under way."""
        self.copies.refuse_touching(self, "is read")
        return values_of(self.bits, self.dtype)

    def load(self, layout: Any) -> Tensor:
        values = self.read()
        held = values.copy() if values is self.bits else values
        return Tensor(held, self.dtype, explicit(layout))

    def store(self, value: Tensor) -> None:
        require(
            value.shape == self.shape and value.dtype == self.dtype,
            "store of {!r} to shared memory {}",
            value,
            self,
        )
        self.copies.refuse_touching(self, "is stored to")
        self.bits[...] = bits_of(np.asarray(value.array), self.dtype)
