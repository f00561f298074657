"""Builder of the vector ALU instructions that compute each lane from the same lane of their sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patune.emulator.sources import (
    DTYPES,
    SELECTS,
    Context,
    Dpp,
    Source,
    Step,
    row_source,
    source,
    store_pair,
    take_dpp,
)
from patune.emulator.valu_table import FOLDS, TABLE, Function, VectorOp

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import Row
    from patune.emulator.waves import Waves

# A constant shift amount needs no masking, so these are one numpy call with the operands swapped.
_CONSTANT_SHIFTS: dict[str, Function] = {
    "lshlrev_b32": np.left_shift,
    "lshrrev_b32": np.right_shift,
    "ashrrev_i32": np.right_shift,
}
FORMS = ("_e32", "_e64", "_dpp", "_sdwa")


def split_form(mnemonic: str) -> tuple[str, str]:
    """(base name without ``v_``, encoding suffix) of a vector mnemonic."""
    name = mnemonic.removeprefix("v_")
    for form in FORMS:
        if name.endswith(form):
            return name.removesuffix(form), form
    return name, ""


# ---- builder --------------------------------------------------------------------------------------------------------


def build_regular(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """The step of an instruction of :data:`TABLE`.

    Raises:
        EmulatorError: a modifier that nobody has verified for it.
    """
    op = TABLE[name]
    halves = instruction.take_bits("op_sel", len(op.sources) + 1)
    positions = [*range(1, len(op.sources) + 1)]
    if name == "fmac_f32":
        positions[2] = 0  # the destination is the addend
    sources = [
        source(context, instruction, position, letter, halves[i] if letter in "HSh" else 0)
        for i, (position, letter) in enumerate(zip(positions, op.sources, strict=True))
    ]
    if any(half and letter not in "HSh" for half, letter in zip(halves, op.sources + op.result, strict=True)):  # fmt: skip
        raise instruction.refusal("op_sel of a 32-bit operand")
    function = op.function
    if name in FOLDS:
        constants = [_integer(instruction.operand(position)) for position in positions]
        function = FOLDS[name](constants) or function
    amount = instruction.operand(1)
    if name in _CONSTANT_SHIFTS and form != "_sdwa" and _integer(amount) in range(32):
        function = _CONSTANT_SHIFTS[name]
        # numpy has no int32 >> uint32; both views show the same constant
        amount_row = context.plan.row(amount, DTYPES[op.sources[1]])
        sources = [sources[1], row_source(amount_row)]
    if instruction.take_flag("clamp"):
        function = _clamped(instruction, op, function)
    if form == "_dpp":
        return _dpp_step(instruction, context, op, function, sources, take_dpp(instruction))
    return _plain_step(instruction, context, op, function, sources, halves[-1])


def _integer(operand: Operand) -> int | None:
    """The value of an integer constant."""
    is_integer = operand.kind == "constant" and isinstance(operand.value, int)
    return int(operand.value) if is_integer else None


def _clamped(instruction: Instruction, op: VectorOp, function: Function) -> Function:
    if op.result != "f":
        raise instruction.refusal("clamp of an integer or half")
    # NaN clamps to zero (DX10_CLAMP, which the kernels' metadata sets).
    return lambda *a: np.fmin(np.fmax(function(*a), np.float32(0)), np.float32(1))


def _dpp_step(
    instruction: Instruction, context: Context, op: VectorOp, function: Function, sources: list[Source], dpp: Dpp,
) -> Step:  # fmt: skip
    if op.result not in "uif" or op.sources[0] not in "uif":
        raise instruction.refusal("DPP of a 16-bit or 64-bit operation")
    d = context.plan.row(instruction.operand(0), DTYPES[op.result])
    first, rest = sources[0].read, [s.read for s in sources[1:]]
    if dpp.is_permutation and not rest and function is np.positive:
        permute = _masked_dpp(d, first, rest, function, dpp)

        def move(w: Waves) -> None:
            if w.active is True:
                w.rows[d][...] = dpp.permute(w, first(w))
            else:
                permute(w)

        return move
    return _masked_dpp(d, first, rest, function, dpp)


def _masked_dpp(
    d: int, first: Function, rest: list[Callable[[Waves], Row]], function: Function, dpp: Dpp
) -> Step:
    def step(w: Waves) -> None:
        permuted, write = dpp.read(w, first(w))
        value = function(permuted, *(read(w) for read in rest))
        np.copyto(w.rows[d], value, where=write, casting="unsafe")

    return step


def _plain_step(
    instruction: Instruction, context: Context, op: VectorOp, function: Function, sources: list[Source], high: int,
) -> Step:  # fmt: skip
    destination = instruction.operand(0)
    select = instruction.take("dst_sel", "DWORD")
    unused = instruction.take("dst_unused", "UNUSED_PAD")
    if select != "DWORD":
        return _sdwa_step(instruction, context, op, function, sources, str(select), str(unused))
    if op.result in "UI":
        write = store_pair(context, destination)
        reads = [s.read for s in sources]
        return lambda w: write(w, function(*[read(w) for read in reads]))
    if op.result in "HSh":
        return _half_step(context.plan.row(destination, "u2", 1) if high else context.plan.row(destination), function, sources)  # fmt: skip
    d = context.plan.row(destination, DTYPES[op.result])
    if function is np.positive and sources[0].row is not None:
        return _move(d, sources[0].row)
    rows = [s.row for s in sources if s.row is not None]
    if len(rows) == len(sources):
        return _row_step(d, function, rows)
    reads = [s.read for s in sources]
    return lambda w: w.put(d, function(*[read(w) for read in reads]))


def _move(d: int, a: int) -> Step:
    return lambda w: w.put(d, w.rows[a])


def _half_step(d: int, function: Function, sources: list[Source]) -> Step:
    """A 16-bit result: zero-extended into a register, or the upper half alone when ``d`` is a view of that."""
    reads = [s.read for s in sources]
    return lambda w: w.put(d, function(*[read(w) for read in reads]).view(np.uint16))


def _row_step(d: int, function: Function, rows: list[int]) -> Step:
    """All sources are views: the hot path, spelled out per number of sources."""
    if len(rows) == 1:
        (a,) = rows
        if isinstance(function, np.ufunc):

            def step1(w: Waves) -> None:
                r = w.rows
                if w.active is True:
                    function(r[a], out=r[d])
                else:
                    w.put(d, function(r[a]))

            return step1
        return lambda w: w.put(d, function(w.rows[a]))
    if len(rows) == 2:
        a, b = rows
        if isinstance(function, np.ufunc):

            def step(w: Waves) -> None:
                r = w.rows
                if w.active is True:
                    function(r[a], r[b], out=r[d])
                else:
                    w.put(d, function(r[a], r[b]))

            return step
        return lambda w: w.put(d, function(w.rows[a], w.rows[b]))
    a, b, c = rows

    def step3(w: Waves) -> None:
        r = w.rows
        w.put(d, function(r[a], r[b], r[c]))

    return step3


def _sdwa_step(
    instruction: Instruction, context: Context, op: VectorOp, function: Function, sources: list[Source], select: str, unused: str,
) -> Step:  # fmt: skip
    """An SDWA destination: a byte or word of the register; the rest becomes zero or stays."""
    if select not in SELECTS or op.result in "UI":
        raise instruction.refusal(f"destination select {select}")
    size, part = SELECTS[select]
    reads = [s.read for s in sources]
    dtype = np.dtype(DTYPES[op.result])
    unsigned, narrow = np.dtype(f"u{dtype.itemsize}"), np.dtype(f"u{size}")

    def bits(w: Waves) -> Row:
        value = function(*[read(w) for read in reads]).astype(dtype, copy=False)
        return value.view(unsigned).astype(narrow)

    if unused == "UNUSED_PRESERVE":
        d = context.plan.row(instruction.operand(0), narrow.str, part)
        return lambda w: w.put(d, bits(w))
    if unused != "UNUSED_PAD":
        raise instruction.refusal(unused)
    d = context.plan.row(instruction.operand(0))
    shift = np.uint32(8 * narrow.itemsize * part)
    return lambda w: w.put(d, bits(w).astype(np.uint32) << shift)
