"""Vector ALU instructions around lane masks: comparisons, selects, carries, and moves between lanes and scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patune.emulator.assembly import EXEC
from patune.emulator.registers import LANE_NUMBER, LANES, MASK64, lanes_of, mask_of
from patune.emulator.sources import Context, Step, source

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction
    from patune.emulator.registers import Row, Wave
    from patune.emulator.valu_table import Function

COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # the rest exists for floats only: ordered "less or greater", and the negations that are true for NaN
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMPARED = {
    "u16": "H", "i16": "S", "f16": "h", "u32": "u", "i32": "i", "f32": "f", "u64": "U", "i64": "I",
}  # fmt: skip
_INTEGER_ONLY = {"ne"}
_FLOAT_ONLY = {"lg", "neq", "nlt", "nle", "ngt", "nge", "nlg", "o", "u"}


def build_compare(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cmp_*: a lane mask in a scalar pair; inactive lanes give zero."""
    _, condition, type_name = name.split("_")
    if type_name not in _COMPARED or condition not in COMPARISONS or form == "_dpp":
        raise instruction.refusal()
    letter = _COMPARED[type_name]
    if condition in (_INTEGER_ONLY if letter in "fh" else _FLOAT_ONLY):
        raise instruction.refusal()
    compare = COMPARISONS[condition]
    if condition in ("o", "u") and instruction.operands[1] == instruction.operands[2]:
        compare = np.equal if condition == "o" else np.not_equal  # the usual NaN test, in one call
    d = context.plan.scalar_pair(instruction.operand(0))
    a, b = (source(context, instruction, i, letter) for i in (1, 2))
    if a.row is None or b.row is None:
        return lambda w: _set_mask(w, d, compare(a.read(w), b.read(w)))
    row_a, row_b = a.row, b.row
    return lambda w: _set_mask(w, d, compare(w.rows[row_a], w.rows[row_b]))


def _set_mask(w: Wave, pair: int, lanes: Row) -> None:
    if w.active is not True:
        lanes = lanes & w.active
    elif len(lanes) == 1:  # both sources scalar
        lanes = np.broadcast_to(lanes, LANES)
    w.q[pair] = mask_of(lanes)


def build_select(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cndmask_b32: the second source where the mask is set, else the first."""
    if form == "_dpp":
        raise instruction.refusal()
    operands = [instruction.operand(i) for i in (1, 2)]
    letter = "f" if any(o.negate or o.absolute for o in operands) else "u"
    sources = [source(context, instruction, i, letter) for i in (1, 2)]
    mask = context.plan.scalar_pair(instruction.operand(3))
    d = context.plan.row(instruction.operand(0), "f4" if letter == "f" else "u4")
    if instruction.take("dst_sel", "DWORD") != "DWORD" or instruction.take("dst_unused", "UNUSED_PAD") != "UNUSED_PAD":  # fmt: skip
        raise instruction.refusal("destination select")
    no, yes = (s.read for s in sources)

    def step(w: Wave) -> None:
        chosen = w.q[mask]
        if chosen == MASK64:
            w.put(d, yes(w))
        elif chosen == 0:
            w.put(d, no(w))
        else:
            w.put(d, np.where(lanes_of(chosen), yes(w), no(w)))

    return step


_CARRY: dict[str, tuple[int, bool, bool]] = {
    # name: sign of the second source, reversed, carry in
    "add_co_u32": (1, False, False),
    "addc_co_u32": (1, False, True),
    "sub_co_u32": (-1, False, False),
    "subb_co_u32": (-1, False, True),
    "subrev_co_u32": (-1, True, False),
}


def build_carry(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_add_co_u32 and relatives: 32-bit sum or difference with a carry mask."""
    sign, reverse, carry_in = _CARRY[name]
    if form == "_dpp" or form == "_sdwa":
        raise instruction.refusal()
    plan = context.plan
    d, carry = plan.row(instruction.operand(0)), plan.scalar_pair(instruction.operand(1))
    a, b = (source(context, instruction, i, "u").read for i in ((3, 2) if reverse else (2, 3)))
    incoming = plan.scalar_pair(instruction.operand(4)) if carry_in else None

    def step(w: Wave) -> None:
        total = a(w).astype(np.int64) + sign * b(w).astype(np.int64)
        if incoming is not None:
            total = total + sign * lanes_of(w.q[incoming]).astype(np.int64)
        w.put(d, total & 0xFFFF_FFFF)
        _set_mask(w, carry, (total >> 32) != 0)

    return step


def build_mad64(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_mad_u64_u32, v_mad_i64_i32: 32 x 32 + 64 bits; the carry mask of the unsigned form is the 64-bit overflow."""
    unsigned = name == "mad_u64_u32"
    letter, wide = ("u", np.uint64) if unsigned else ("i", np.int64)
    plan = context.plan
    d, carry = plan.rows(instruction.operand(0), 2), plan.scalar_pair(instruction.operand(1))
    a, b = (source(context, instruction, i, letter).read for i in (2, 3))
    c = source(context, instruction, 4, "U").read

    def step(w: Wave) -> None:
        addend = c(w)
        total = np.broadcast_to((a(w).astype(wide) * b(w)).view(np.uint64) + addend, LANES)
        overflow = total < addend if unsigned else np.zeros(LANES, np.bool_)
        w.put(d, np.ascontiguousarray(total).view(np.uint32).reshape(LANES, 2).T)
        _set_mask(w, carry, overflow)

    return step


def build_div_scale(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_div_scale_f32: no scaling, and no correction wanted from v_div_fmas; v_div_fixup divides exactly."""
    d, mask = context.plan.row(instruction.operand(0), "f4"), context.plan.scalar_pair(instruction.operand(1))  # fmt: skip
    read = source(context, instruction, 2, "f").read

    def step(w: Wave) -> None:
        w.put(d, read(w))
        w.q[mask] = 0

    return step


# ---- lanes and scalars ----------------------------------------------------------------------------------------------


def build_read_lane(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_readlane_b32, v_readfirstlane_b32: one lane to a scalar, whatever EXEC says."""
    d = context.plan.scalar(instruction.operand(0))
    at = context.plan.vector_index(instruction.operand(1))
    if name == "readlane_b32":
        lane = context.plan.scalar(instruction.operand(2))

        def read(w: Wave) -> None:
            w.s[d] = w.vector.item(at, w.s[lane] & 63)

        return read

    def read_first(w: Wave) -> None:
        mask = w.q[EXEC // 2]
        w.s[d] = w.vector.item(at, (mask & -mask).bit_length() - 1 if mask else 0)

    return read_first


def build_write_lane(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_writelane_b32: a scalar to one lane, whatever EXEC says."""
    at = context.plan.vector_index(instruction.operand(0))
    value, lane = (context.plan.scalar(instruction.operand(i)) for i in (1, 2))

    def step(w: Wave) -> None:
        w.vector[at, w.s[lane] & 63] = w.s[value]

    return step


def build_permlane_swap(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_permlane16_swap_b32, v_permlane32_swap_b32: odd lane groups of the first register <-> even groups of the second."""
    a, b = (context.plan.row(instruction.operand(i)) for i in (0, 1))
    group = 16 if name.startswith("permlane16") else 32
    odd = (LANE_NUMBER // group) % 2 == 1

    def step(w: Wave) -> None:
        if w.active is not True:
            raise instruction.refusal("under a partial EXEC")
        first, second = w.rows[a], w.rows[b]
        upper = first[odd]
        first[odd] = second[~odd]
        second[~odd] = upper

    return step


def build_compare_exec(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cmpx_*: a comparison that also becomes EXEC."""
    compare = build_compare(instruction, context, name.replace("cmpx", "cmp"), form)
    d = context.plan.scalar_pair(instruction.operand(0))

    def step(w: Wave) -> None:
        compare(w)
        w.q[EXEC // 2] = w.q[d]
        w.refresh_exec()

    return step
