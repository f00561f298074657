"""Where the operands of a program live: the numpy views of the registers that its instructions work on.

The registers of some waves are two uint32 arrays: vector registers [rows, waves, 64] and scalar registers [waves, 130]. ``waves``
stands for one axis, or for two (workgroups, waves of each) where the waves are not evenly spaced in the batch.
Every operand that an instruction names becomes a view of one of the two, made once per set of waves that runs in lockstep:
``w.rows[i]``. A scalar operand of a vector instruction is a [waves, 1] view and a constant has no axes at all; numpy broadcasts
both, so an instruction does not care which file an operand lives in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from patune.emulator.assembly import EXEC, SCC, Operand
from patune.errors import EmulatorError

Row = npt.NDArray[Any]
Lanes = npt.NDArray[np.bool_]
MakeView = Callable[[npt.NDArray[np.uint32], npt.NDArray[np.uint32]], Row]

LANES = 64
MASK32 = 0xFFFF_FFFF
POISON = 0xFFC0_DEAD  # what unwritten vector registers hold: a float32 NaN and an address far outside of every buffer
SCALARS = (
    130  # entries of a wave's scalar registers: up to SCC, and one more to keep 64-bit pairs whole
)

LANE_NUMBER = np.arange(LANES)
LANE_NUMBER.setflags(write=False)


class RegisterPlan:
    """Collects the views that a program's instructions need, while they are built.

    Attributes:
        vgprs: rows before the accumulation registers (``.amdhsa_accum_offset``).
        vector_rows: rows that the program allocates (``.amdhsa_next_free_vgpr``).
        views: how each view is made from (vector registers [rows, waves, 64], scalar registers [waves, 130]).
    """

    def __init__(self, vgprs: int, vector_rows: int) -> None:
        self.vgprs = vgprs
        self.vector_rows = vector_rows
        self.views: list[MakeView] = []
        self._known: dict[tuple[object, ...], int] = {}

    # ---- where an operand lives ---------------------------------------------------------------------------------

    def vector_index(self, operand: Operand, rows: int = 1) -> int:
        """First row of a VGPR or AGPR operand.

        Raises:
            EmulatorError: not a vector register, or one beyond what the program allocates.
        """
        if not operand.in_vector_file:
            raise EmulatorError(f"operand {operand.text}: a vector register is needed.")
        accumulator = operand.kind == "accumulator"
        first = operand.index + (self.vgprs if accumulator else 0)
        limit = self.vector_rows if accumulator else min(self.vgprs, self.vector_rows)
        if first + rows > limit:
            raise EmulatorError(
                f"operand {operand.text}: the program allocates {self.vector_rows} vector registers, "
                f"{self.vgprs} of them before the accumulation registers."
            )
        return first

    def scalar_index(self, operand: Operand) -> int:
        """Number of a scalar register.

        Raises:
            EmulatorError: not a scalar register.
        """
        if operand.kind != "scalar":
            raise EmulatorError(f"operand {operand.text}: scalar registers are needed.")
        return operand.index

    def pair_index(self, operand: Operand) -> int:
        """Number of an aligned pair of scalar registers.

        Raises:
            EmulatorError: an odd register; 64-bit scalars are aligned.
        """
        index = self.scalar_index(operand)
        if index % 2:
            raise EmulatorError(
                f"operand {operand.text}: 64-bit scalars start at an even register."
            )
        return index // 2

    # ---- views --------------------------------------------------------------------------------------------------

    def view(self, key: tuple[object, ...], make: MakeView) -> int:
        """Index in ``w.rows`` of the view that ``make`` builds; ``key`` names it."""
        if key not in self._known:
            self._known[key] = len(self.views)
            self.views.append(make)
        return self._known[key]

    def constant(self, operand: Operand, dtype: str, part: int = 0) -> int:
        """A constant as an array without axes, which is numpy's fast path for broadcasting."""
        dtype_b = np.dtype(dtype).itemsize
        width: Literal[16, 32, 64] = 64 if dtype_b == 8 else 16 if dtype_b == 2 else 32
        bits = operand.constant_bits(width)
        elements = np.array([bits], f"u{max(4, dtype_b)}").view(dtype)
        value = np.array(elements[part])
        return self.view(("c", dtype, bits, part), lambda v, s: value)

    def scalar(self, operand: Operand, dtype: str = "u4") -> int:
        """View of one scalar register, or of an aligned pair for dtypes of 8 bytes: [waves]; constants have no axes.

        Raises:
            EmulatorError: not a scalar register or constant.
        """
        if operand.kind == "constant":
            return self.constant(operand, dtype)
        if operand.kind != "scalar":
            raise EmulatorError(f"operand {operand.text}: a scalar register or constant is needed.")
        wide = np.dtype(dtype).itemsize == 8
        return self.scalar_at(self.pair_index(operand) if wide else operand.index, dtype)

    def scalar_at(self, index: int, dtype: str = "u4") -> int:
        """View of one entry of the scalar registers, counted in units of the dtype: [waves]."""
        return self.view(("s", dtype, index), lambda v, s: s.view(dtype)[..., index])

    def row(self, operand: Operand, dtype: str = "u4", part: int | None = None) -> int:
        """View of one register: [waves, 64] (vector), [waves, 1] (scalar), or without axes (constant).

        Args:
            operand: the register or constant.
            dtype: numpy dtype of 4 bytes; or of 2 or 1 bytes, then ``part`` says which half or byte.
            part: element of the dtype's size inside of the register.
        """
        offset, step = (0 if part is None else part), 4 // np.dtype(dtype).itemsize
        if operand.in_vector_file:
            at = self.vector_index(operand)
            return self.view(
                ("v", dtype, at, offset), lambda v, s: v.view(dtype)[at, ..., offset::step]
            )
        if operand.kind == "constant":
            return self.constant(operand, dtype, offset)
        at = self.scalar_index(operand) * step + offset
        return self.view(("sr", dtype, at), lambda v, s: s.view(dtype)[..., at : at + 1])

    def rows(self, operand: Operand, count: int, dtype: str = "u4") -> int:
        """View of ``count`` consecutive vector registers, [count, waves, 64]."""
        at = self.vector_index(operand, count)
        return self.view(("r", dtype, at, count), lambda v, s: v.view(dtype)[at : at + count])

    def scalar_pair_row(self, operand: Operand, dtype: str = "u8") -> int:
        """View of an aligned scalar pair as one 64-bit source of a vector instruction: [waves, 1], or without axes."""
        if operand.kind == "constant":
            return self.constant(operand, dtype)
        at = self.pair_index(operand)
        return self.view(("sr", dtype, at), lambda v, s: s.view(dtype)[..., at : at + 1])

    def pair_halves(self, operand: Operand, low: int, high: int, dtype: str = "f4") -> int:
        """View of a packed 64-bit operand as [2 or 1, waves, 64 or 1]: which register each half of the operation reads."""
        if operand.kind == "constant":
            return self.constant(operand, dtype)
        pick = _pick(low, high)
        if operand.kind == "scalar":
            at = operand.index
            return self.view(
                ("ps", dtype, at, low, high),
                lambda v, s: rows_first(s.view(dtype)[..., at : at + 2])[pick][..., None],
            )
        at = self.vector_index(operand, 2)
        return self.view(
            ("pv", dtype, at, low, high), lambda v, s: v.view(dtype)[at : at + 2][pick]
        )

    def word_halves(self, operand: Operand, low: int, high: int, dtype: str = "f2") -> int:
        """View of a packed 32-bit operand as [waves, 64 or 1, 2 or 1]: which 16-bit half each half of the operation reads."""
        if operand.kind == "constant":  # the same half twice, see the builders
            return self.constant(operand, dtype, low)
        pick = _pick(low, high)
        if operand.kind == "scalar":
            at = 2 * operand.index
            return self.view(
                ("hs", dtype, at, low, high),
                lambda v, s: s.view(dtype)[..., None, at : at + 2][..., pick],
            )
        at = self.vector_index(operand)
        return self.view(
            ("hv", dtype, at, low, high),
            lambda v, s: v.view(dtype)[at].reshape(*v.shape[1:], 2)[..., pick],
        )

    def scalars(self, operand: Operand, count: int) -> int:
        """View of ``count`` consecutive scalar registers, [waves, count]."""
        at = self.scalar_index(operand)
        return self.view(("ss", at, count), lambda v, s: s[..., at : at + count])


def rows_first(array: Row) -> Row:
    """Last axis to the front: from elements of lanes to registers."""
    return array.transpose(array.ndim - 1, *range(array.ndim - 1))


def rows_last(array: Row) -> Row:
    """First axis to the end: from registers to elements of lanes."""
    return array.transpose(*range(1, array.ndim), 0)


def scalar_template() -> npt.NDArray[np.uint32]:
    """What the scalar registers of a fresh wave hold: poison, and EXEC with all lanes on."""
    template = np.full(SCALARS, POISON, np.uint32)
    template[[SCC, SCC + 1]] = 0
    template[[EXEC, EXEC + 1]] = MASK32
    return template


def _pick(low: int, high: int) -> slice:
    """The slice of two elements that reads element ``low`` first and ``high`` second (one element where they agree)."""
    if low == high:
        return slice(low, low + 1)
    return slice(0, 2) if low < high else slice(None, None, -1)
