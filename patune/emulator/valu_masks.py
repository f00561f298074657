"""Vector ALU instructions around lane masks: comparisons, selects, carries, and moves between lanes and scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patune.emulator.assembly import EXEC
from patune.emulator.sources import Context, Step, source, store_pair
from patune.emulator.waves import lanes_of, masks_of

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import Row
    from patune.emulator.valu_table import Function
    from patune.emulator.waves import Waves

_LANE_BITS = np.uint32(63)

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
    d = _mask_destination(instruction, context, 0)
    a, b = (source(context, instruction, i, letter) for i in (1, 2))
    if a.row is None or b.row is None:
        return lambda w: _set_mask(w, d, compare(a.read(w), b.read(w)))
    row_a, row_b = a.row, b.row
    return lambda w: _set_mask(w, d, compare(w.rows[row_a], w.rows[row_b]))


def _mask_destination(instruction: Instruction, context: Context, position: int) -> int:
    """View of the scalar pair that a lane mask goes to."""
    operand = instruction.operand(position)
    if context.plan.pair_index(operand) == EXEC // 2:
        raise instruction.refusal("a mask written to EXEC")
    return context.plan.scalar(operand, "u8")


def _mask_source(context: Context, instruction: Instruction, position: int) -> int:
    """View of the scalar pair of a lane mask."""
    return context.plan.scalar_at(context.plan.pair_index(instruction.operand(position)), "u8")


def _set_mask(w: Waves, pair: int, lanes: Row) -> None:
    if w.active is not True:
        lanes = lanes & w.active
    elif lanes.shape != w.shape:  # both sources scalar
        lanes = np.broadcast_to(lanes, w.shape)
    w.rows[pair][...] = masks_of(lanes)


def build_select(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cndmask_b32: the second source where the mask is set, else the first."""
    if form == "_dpp":
        raise instruction.refusal()
    operands = [instruction.operand(i) for i in (1, 2)]
    letter = "f" if any(o.negate or o.absolute for o in operands) else "u"
    sources = [source(context, instruction, i, letter) for i in (1, 2)]
    mask = _mask_source(context, instruction, 3)
    d = context.plan.row(instruction.operand(0), "f4" if letter == "f" else "u4")
    if instruction.take("dst_sel", "DWORD") != "DWORD" or instruction.take("dst_unused", "UNUSED_PAD") != "UNUSED_PAD":  # fmt: skip
        raise instruction.refusal("destination select")
    no, yes = (s.read for s in sources)

    def step(w: Waves) -> None:
        chosen = w.rows[mask]
        as_bytes = chosen.tobytes()
        if as_bytes == w.all_lanes:
            w.put(d, yes(w))
        elif as_bytes == w.no_lanes:
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
    d, carry = plan.row(instruction.operand(0)), _mask_destination(instruction, context, 1)
    a, b = (source(context, instruction, i, "u").read for i in ((3, 2) if reverse else (2, 3)))
    incoming = _mask_source(context, instruction, 4) if carry_in else None

    def step(w: Waves) -> None:
        total = a(w).astype(np.int64) + sign * b(w).astype(np.int64)
        if incoming is not None:
            total = total + sign * lanes_of(w.rows[incoming]).astype(np.int64)
        w.put(d, total & 0xFFFF_FFFF)
        _set_mask(w, carry, (total >> 32) != 0)

    return step


def build_mad64(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_mad_u64_u32, v_mad_i64_i32: 32 x 32 + 64 bits; the carry mask of the unsigned form is the 64-bit overflow."""
    unsigned, no_lanes = name == "mad_u64_u32", np.zeros(1, np.bool_)
    letter, wide = ("u", np.uint64) if unsigned else ("i", np.int64)
    write, carry = store_pair(context, instruction.operand(0)), _mask_destination(instruction, context, 1)  # fmt: skip
    a, b = (source(context, instruction, i, letter).read for i in (2, 3))
    c = source(context, instruction, 4, "U").read

    def step(w: Waves) -> None:
        addend = c(w)
        total = (a(w).astype(wide) * b(w)).view(np.uint64) + addend
        write(w, total)
        _set_mask(w, carry, total < addend if unsigned else no_lanes)

    return step


def build_div_scale(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_div_scale_f32: no scaling, and no correction wanted from v_div_fmas; v_div_fixup divides exactly."""
    d, mask = context.plan.row(instruction.operand(0), "f4"), _mask_destination(instruction, context, 1)  # fmt: skip
    read = source(context, instruction, 2, "f").read

    def step(w: Waves) -> None:
        w.put(d, read(w))
        w.rows[mask][...] = 0

    return step


# ---- lanes and scalars ----------------------------------------------------------------------------------------------


def build_read_lane(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_readlane_b32, v_readfirstlane_b32: one lane to a scalar, whatever EXEC says."""
    plan = context.plan
    d = plan.scalar_at(plan.scalar_index(instruction.operand(0)))
    plan.vector_index(instruction.operand(1))  # not a scalar
    source_row = plan.row(instruction.operand(1))
    if name == "readlane_b32":
        lane = plan.scalar(instruction.operand(2))

        def read(w: Waves) -> None:
            w.rows[d][...] = w.rows[source_row][(*w.own, w.rows[lane] & _LANE_BITS)]

        return read

    def read_first(w: Waves) -> None:
        if w.active is True:
            w.rows[d][...] = w.rows[source_row][..., 0]
        else:  # argmax: the first lane that is on, or lane 0
            w.rows[d][...] = w.rows[source_row][(*w.own, w.active.argmax(-1))]

    return read_first


def build_write_lane(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_writelane_b32: a scalar to one lane, whatever EXEC says."""
    context.plan.vector_index(instruction.operand(0))  # not a scalar
    row = context.plan.row(instruction.operand(0))
    value, lane = (context.plan.scalar(instruction.operand(i)) for i in (1, 2))

    def step(w: Waves) -> None:
        place: tuple[Row, ...] = (*w.own, w.rows[lane] & _LANE_BITS)
        w.rows[row][place] = w.rows[value]

    return step


def build_permlane_swap(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_permlane16_swap_b32, v_permlane32_swap_b32: odd lane groups of the first register <-> even groups of the second."""
    group = 16 if name.startswith("permlane16") else 32
    odd_of_a, even_of_b = (
        _lane_groups(context, instruction.operand(i), group, odd) for i, odd in ((0, 1), (1, 0))
    )

    def step(w: Waves) -> None:
        if w.active is not True:
            raise instruction.refusal("under a partial EXEC")
        upper, lower = w.rows[odd_of_a], w.rows[even_of_b]
        kept = upper.copy()
        upper[...] = lower
        lower[...] = kept

    return step


def _lane_groups(context: Context, operand: Operand, group: int, odd: int) -> int:
    """View of every other group of lanes of a register: [waves, groups, lanes of a group]."""
    at = context.plan.vector_index(operand)
    return context.plan.view(
        ("groups", at, group, odd),
        lambda v, s: v[at].reshape(*v.shape[1:-1], -1, 2, group)[..., odd, :],
    )


def build_compare_exec(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cmpx_*: a comparison that also becomes EXEC."""
    compare = build_compare(instruction, context, name.replace("cmpx", "cmp"), form)
    d = context.plan.scalar(instruction.operand(0), "u8")

    def step(w: Waves) -> None:
        compare(w)
        w.exec[...] = w.rows[d]
        w.refresh_exec()

    return step
