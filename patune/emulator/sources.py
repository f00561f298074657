"""Reading the sources of vector instructions: plain views where possible, small readers for modifiers, SDWA and DPP."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patune.emulator.registers import (
    LANE_NUMBER,
    LANES,
    Lanes,
    RegisterPlan,
    Row,
    rows_first,
    rows_last,
)
from patune.emulator.waves import Waves

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.formats import Fp8Format

Step = Callable[[Waves], None]
Reader = Callable[[Waves], Row]


def nothing(w: Waves) -> None:
    """The step of an instruction that changes no value: timing and caches."""


# One letter per operand type of the instruction tables.
DTYPES = {
    "u": "u4", "i": "i4", "f": "f4",  # 32 bits
    "H": "u2", "S": "i2", "h": "f2",  # 16 bits: unsigned, signed, half
    "U": "u8", "I": "i8",  # 64 bits: a register pair
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What a builder needs besides its instruction.

    Attributes:
        plan: collects the register views of the program.
        arch: gfx942 or gfx950.
        fp8, bf8: the 8-bit floats of the architecture.
    """

    plan: RegisterPlan
    arch: str
    fp8: Fp8Format
    bf8: Fp8Format


class Source(NamedTuple):
    """One source operand: ``row`` where it is a plain view, and ``read``, which always works."""

    row: int | None
    read: Reader


def row_source(row: int) -> Source:
    """A source that is a view of the registers."""
    return Source(row, lambda w: w.rows[row])


def source(
    context: Context, instruction: Instruction, position: int, letter: str, half: int = 0
) -> Source:
    """The source at an operand position, its modifiers applied.

    Args:
        context: of the program.
        instruction: the line; an SDWA select of the operand is taken from it.
        position: operand position, the destination is 0.
        letter: type of :data:`DTYPES`.
        half: which 16 bits a 16-bit type reads (op_sel).
    """
    operand = instruction.operand(position)
    select = instruction.take(f"src{position - 1}_sel", "DWORD")
    if letter in "UI":
        result = _pair_source(context, operand, DTYPES[letter])
    elif select != "DWORD":
        result = _selected(context, instruction, operand, letter, str(select))
    else:
        dtype = DTYPES[letter]
        result = row_source(context.plan.row(operand, dtype, half if dtype[1] == "2" else None))
    if operand.sign_extend and select == "DWORD":
        raise instruction.refusal("sext() without a select")
    if operand.negate or operand.absolute:
        if letter not in "fh":
            raise instruction.refusal("sign modifier on an integer operand")
        result = Source(None, _with_sign(result.read, operand))
    return result


def _with_sign(read: Reader, operand: Operand) -> Reader:
    if operand.absolute and operand.negate:
        return lambda w: np.negative(np.absolute(read(w)))
    if operand.absolute:
        return lambda w: np.absolute(read(w))
    return lambda w: np.negative(read(w))


def pair_reader(plan: RegisterPlan, operand: Operand, dtype: str = "u8") -> Reader:
    """Reads a vector register pair as 64-bit values [waves, 64]."""
    at = plan.vector_index(operand, 2)
    interleaved = plan.view(("t", at), lambda v, s: rows_last(v[at : at + 2]))
    return lambda w: np.ascontiguousarray(w.rows[interleaved]).view(dtype)[..., 0]


def _pair_source(context: Context, operand: Operand, dtype: str) -> Source:
    """A 64-bit source: scalars are viewed in place, vector registers have to be interleaved."""
    if operand.in_vector_file:
        return Source(None, pair_reader(context.plan, operand, dtype))
    return row_source(context.plan.scalar_pair_row(operand, dtype))


SELECTS = {
    **{f"BYTE_{i}": ("1", i) for i in range(4)},
    **{f"WORD_{i}": ("2", i) for i in range(2)},
}


def _selected(
    context: Context, instruction: Instruction, operand: Operand, letter: str, select: str
) -> Source:
    """An SDWA source: a byte or word of the register, extended to the width of the operation."""
    if select not in SELECTS:
        raise instruction.refusal(f"select {select}")
    size, part = SELECTS[select]
    if size == "2" and DTYPES[letter][1] == "2":
        return row_source(context.plan.row(operand, DTYPES[letter], part))
    sign, dtype = ("i" if operand.sign_extend else "u"), DTYPES[letter]
    row, wide = context.plan.row(operand, sign + size, part), sign + dtype[1]
    return Source(None, lambda w: w.rows[row].astype(wide).view(dtype))


def store_pair(context: Context, operand: Operand) -> Callable[[Waves, Row], None]:
    """A writer of 64-bit results, which may broadcast to [waves, 64], to a register pair."""
    rows = context.plan.rows(operand, 2)

    def write(w: Waves, value: Row) -> None:
        words = np.empty((*w.shape, 2), np.uint32)
        words.view(np.uint64)[..., 0] = value
        w.put(rows, rows_first(words))

    return write


# ---- DPP: the first source comes from another lane ------------------------------------------------------------------

_ROW = LANE_NUMBER // 16
_IN_ROW = LANE_NUMBER % 16
_ALL = np.ones(LANES, np.bool_)


def _dpp_lanes(control: str, value: str) -> tuple[Row, Row]:
    """(source lane, source exists) of each lane for one DPP control."""
    if control == "quad_perm":
        order = np.array([int(item) for item in value.strip("[]").split(",")])
        return (LANE_NUMBER & ~3) + order[LANE_NUMBER & 3], _ALL
    if control == "row_mirror":
        return _ROW * 16 + 15 - _IN_ROW, _ALL
    if control == "row_half_mirror":
        return (LANE_NUMBER & ~7) + 7 - (LANE_NUMBER & 7), _ALL
    amount = int(value)
    if control == "row_shr":
        return LANE_NUMBER - amount, amount <= _IN_ROW
    if control == "row_shl":
        return LANE_NUMBER + amount, _IN_ROW + amount < 16
    if control == "row_ror":
        return _ROW * 16 + (_IN_ROW - amount) % 16, _ALL
    if control == "row_newbcast":
        return _ROW * 16 + amount, _ALL
    # row_bcast: lane 15 of a row goes to the next row, lane 31 to the upper half
    if amount == 15:
        return _ROW * 16 - 1, _ROW >= 1
    return (LANE_NUMBER & ~31) - 1, LANE_NUMBER >= 32


_DPP_CONTROLS = re.compile(
    r"^(quad_perm|row_mirror|row_half_mirror|row_shr|row_shl|row_ror|row_newbcast|row_bcast)$"
)


@dataclass(frozen=True, slots=True, eq=False)
class Dpp:
    """A lane permutation of the first source and the lanes that it writes.

    Attributes:
        lanes: source lane of each lane.
        exists: lanes whose source lane exists.
        enabled: lanes that row_mask and bank_mask leave on.
        zero_fill: bound_ctrl: a lane without a source reads zero instead of staying unwritten.
    """

    lanes: Row
    exists: Lanes
    enabled: Lanes
    zero_fill: bool

    def read(self, w: Waves, value: Row) -> tuple[Row, Lanes]:
        """(permuted source, lanes to write) under EXEC."""
        exists = self.exists if w.active is True else self.exists & w.active[..., self.lanes]
        write = self.enabled if w.active is True else self.enabled & w.active
        if not self.zero_fill:
            write = write & exists
        return np.where(exists, self.permute(w, value), value.dtype.type(0)), write

    def permute(self, w: Waves, value: Row) -> Row:
        """Each lane's source lane, whether it exists or not."""
        return w.full(value).take(self.lanes, axis=-1)

    @property
    def is_permutation(self) -> bool:
        """Every lane has a source and is written."""
        return bool(self.exists.all() and self.enabled.all())


def take_dpp(instruction: Instruction) -> Dpp:
    """Take the DPP control and masks from an instruction."""
    controls = [name for name in instruction.modifiers if _DPP_CONTROLS.match(name)]
    if len(controls) != 1:
        raise instruction.refusal("DPP control")
    lanes, exists = _dpp_lanes(controls[0], instruction.take(controls[0]) or "")
    row_mask = instruction.take_int("row_mask", 0xF)
    bank_mask = instruction.take_int("bank_mask", 0xF)
    enabled = ((row_mask >> _ROW) & 1).astype(np.bool_) & ((bank_mask >> (_IN_ROW // 4)) & 1).astype(np.bool_)  # fmt: skip
    zero_fill = instruction.take_flag("bound_ctrl")
    return Dpp(np.where(exists, lanes, 0), np.asarray(exists), enabled, zero_fill)
