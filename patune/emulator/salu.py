"""Scalar ALU and program control: one number per wave, so an instruction is numpy on [waves] arrays."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patune.emulator.assembly import EXEC, SCC, VCC
from patune.emulator.sources import DTYPES, nothing

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction
    from patune.emulator.registers import RegisterPlan, Row
    from patune.emulator.sources import Context, Step
    from patune.emulator.waves import Waves

Function = Callable[..., Any]
Condition = Callable[["Waves"], "Row"]
_U32, _U64, _I32, _I64 = np.uint32, np.uint64, np.int32, np.int64


class ScalarOp(NamedTuple):
    """What an instruction computes.

    Attributes:
        sources: letters of :data:`patune.emulator.sources.DTYPES` for the operands after the destination; then ``d`` for the
            destination's old value and ``c`` for SCC, which are no operands.
        result: letter of the result, which is cut to its width.
        function: of the sources.
        scc: SCC of (result, sources) as a boolean; None where SCC stays.
    """

    sources: str
    result: str
    function: Function
    scc: Function | None = None


# ---- functions that are more than an expression ---------------------------------------------------------------------


def _nonzero(result: Row, *_: Row) -> Row:
    flags: Row = result.astype(np.bool_)
    return flags


def _signed_overflow(result: Row, a: Row, b: Row) -> Row:
    """A sum whose sign differs from the sign that both terms have."""
    return np.less((a ^ result) & (b ^ result), 0)


def _bit_field(a: Row, control: Row, bits: int) -> Row:
    """s_bfe: offset in the low bits of the control, width from bit 16 on."""
    offset = (control & _U32(bits - 1)).astype(_U64)
    field: Row = (a.astype(_U64) >> offset) & _ones(_field_width(control))
    return field


def _bit_field_signed(a: Row, control: Row, bits: int) -> Row:
    sign = (_U64(1) << _field_width(control)) >> _U64(1)
    field: Row = (_bit_field(a, control, bits) ^ sign) - sign
    return field


def _field_width(control: Row) -> Row:
    return ((control >> _U32(16)) & _U32(0x7F)).astype(_U64)


def _ones(width: Row) -> Row:
    """The lowest ``width`` bits; numpy shifts everything out from 64 on."""
    return (_U64(1) << width) - _U64(1)


def _reverse_bits(a: Row) -> Row:
    for distance, low in ((1, 0x5555_5555), (2, 0x3333_3333), (4, 0x0F0F_0F0F)):
        mask = _U32(low)
        a = ((a & mask) << _U32(distance)) | ((a >> _U32(distance)) & mask)
    return np.asarray(a).byteswap()


def _bit_length(a: Row) -> Row:
    return np.frexp(a.astype(np.float64))[1]


def _count_ones(a: Row) -> Row:
    return np.bitwise_count(a).astype(_U32)


def _shift_and_add(n: int) -> ScalarOp:
    return ScalarOp(
        "uu", "u", lambda a, b: (a << _U32(n)) + b,
        lambda r, a, b: ((a.astype(_U64) << _U64(n)) + b) >> _U64(32) != 0,
    )  # fmt: skip


def _wide(a: Row) -> Row:
    return a.astype(_I64)


# ---- tables ---------------------------------------------------------------------------------------------------------

_OPS: dict[str, ScalarOp] = {
    # one source
    "mov_b32": ScalarOp("u", "u", np.positive),
    "mov_b64": ScalarOp("U", "U", np.positive),
    "not_b32": ScalarOp("u", "u", np.invert, _nonzero),
    "not_b64": ScalarOp("U", "U", np.invert, _nonzero),
    "abs_i32": ScalarOp("i", "i", np.abs, _nonzero),
    "brev_b32": ScalarOp("u", "u", _reverse_bits),
    "sext_i32_i8": ScalarOp("i", "i", lambda a: (a << 24) >> 24),
    "sext_i32_i16": ScalarOp("i", "i", lambda a: (a << 16) >> 16),
    "ff1_i32_b32": ScalarOp("u", "i", lambda a: np.where(a == 0, -1, _bit_length(a & (~a + _U32(1))) - 1)),
    "flbit_i32_b32": ScalarOp("u", "i", lambda a: np.where(a == 0, -1, 32 - _bit_length(a))),
    "bcnt1_i32_b32": ScalarOp("u", "u", _count_ones, _nonzero),
    "bcnt1_i32_b64": ScalarOp("U", "u", _count_ones, _nonzero),
    # sums and products
    "add_u32": ScalarOp("uu", "u", np.add, lambda r, a, b: r < a),
    "sub_u32": ScalarOp("uu", "u", np.subtract, lambda r, a, b: a < b),
    "addc_u32": ScalarOp("uuc", "u", lambda a, b, c: a + b + c, lambda r, a, b, c: _wide(a) + b + c > 0xFFFF_FFFF),
    "subb_u32": ScalarOp("uuc", "u", lambda a, b, c: a - b - c, lambda r, a, b, c: _wide(a) - b - c < 0),
    "add_i32": ScalarOp("ii", "i", np.add, _signed_overflow),
    "sub_i32": ScalarOp("ii", "i", np.subtract, lambda r, a, b: ((a ^ b) & (a ^ r)) < 0),
    "mul_i32": ScalarOp("uu", "u", np.multiply),
    "mul_hi_u32": ScalarOp("uu", "u", lambda a, b: (a.astype(_U64) * b) >> _U64(32)),
    "mul_hi_i32": ScalarOp("ii", "i", lambda a, b: (_wide(a) * b) >> 32),
    **{f"lshl{n}_add_u32": _shift_and_add(n) for n in (1, 2, 3, 4)},
    "min_i32": ScalarOp("ii", "i", np.minimum, lambda r, a, b: a < b),
    "min_u32": ScalarOp("uu", "u", np.minimum, lambda r, a, b: a < b),
    "max_i32": ScalarOp("ii", "i", np.maximum, lambda r, a, b: a >= b),
    "max_u32": ScalarOp("uu", "u", np.maximum, lambda r, a, b: a >= b),
    # bit logic
    **{f"{name}_b{bits}": ScalarOp(2 * letter, letter, function, _nonzero) for bits, letter in ((32, "u"), (64, "U")) for name, function in (
        ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor),
        ("andn2", lambda a, b: a & ~b), ("orn2", lambda a, b: a | ~b), ("nand", lambda a, b: ~(a & b)),
        ("nor", lambda a, b: ~(a | b)), ("xnor", lambda a, b: ~(a ^ b)),
    )},
    "pack_ll_b32_b16": ScalarOp("uu", "u", lambda a, b: (a & _U32(0xFFFF)) | (b << _U32(16))),
    "bitset0_b32": ScalarOp("ud", "u", lambda a, d: d & ~(_U32(1) << (a & _U32(31)))),
    "bitset1_b32": ScalarOp("ud", "u", lambda a, d: d | (_U32(1) << (a & _U32(31)))),
    # bit fields; the control is 32 bits wide
    "bfe_u32": ScalarOp("uu", "u", lambda a, b: _bit_field(a, b, 32), _nonzero),
    "bfe_i32": ScalarOp("uu", "u", lambda a, b: _bit_field_signed(a, b, 32), _nonzero),
    "bfe_u64": ScalarOp("Uu", "U", lambda a, b: _bit_field(a, b, 64), _nonzero),
    "bfe_i64": ScalarOp("Uu", "U", lambda a, b: _bit_field_signed(a, b, 64), _nonzero),
    "bfm_b32": ScalarOp("uu", "u", lambda a, b: ((_U32(1) << (a & _U32(31))) - _U32(1)) << (b & _U32(31))),
    # selects
    "cselect_b32": ScalarOp("uuc", "u", lambda a, b, c: np.where(c, a, b)),
    "cselect_b64": ScalarOp("UUc", "U", lambda a, b, c: np.where(c, a, b)),
    "cmov_b32": ScalarOp("udc", "u", lambda a, d, c: np.where(c, a, d)),
}  # fmt: skip
# (letter of the value, function): the amount is 32 bits wide, and the hardware uses its low 5 or 6 bits.
_SHIFTS: dict[str, tuple[str, Function]] = {
    "lshl_b32": ("u", np.left_shift),
    "lshr_b32": ("u", np.right_shift),
    "ashr_i32": ("i", np.right_shift),
    "lshl_b64": ("U", np.left_shift),
    "lshr_b64": ("U", np.right_shift),
    "ashr_i64": ("I", np.right_shift),
}
# The operand is a signed 16-bit immediate.
_IMMEDIATE: dict[str, ScalarOp] = {
    "movk_i32": ScalarOp("i", "i", np.positive),
    "addk_i32": ScalarOp("id", "i", np.add, _signed_overflow),
    "mulk_i32": ScalarOp("id", "i", np.multiply),
}
_SAVEEXEC: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "andn1": lambda a, e: ~a & e,
    "andn2": lambda a, e: a & ~e,
}
_COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "lg": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_BIT_COMPARE = {"bitcmp0_b32": 0, "bitcmp1_b32": 1}
# No effect on values: timing and caches. s_waitcnt is with the memory instructions, it makes direct-to-LDS loads land.
_IGNORED = {"nop", "setprio", "sleep", "icache_inv", "dcache_wb", "dcache_inv", "code_end"}
# Conditional branches: (dtype of the scalar, its entry, taken where it is not zero).
_CONDITIONS: dict[str, tuple[str, int, bool]] = {
    "s_cbranch_scc0": ("u4", SCC, False),
    "s_cbranch_scc1": ("u4", SCC, True),
    "s_cbranch_vccz": ("u8", VCC // 2, False),
    "s_cbranch_vccnz": ("u8", VCC // 2, True),
    "s_cbranch_execz": ("u8", EXEC // 2, False),
    "s_cbranch_execnz": ("u8", EXEC // 2, True),
}
BRANCHES = {"s_branch", *_CONDITIONS}


# ---- builders -------------------------------------------------------------------------------------------------------


def build_condition(mnemonic: str, plan: RegisterPlan) -> Condition | None:
    """Which waves take a branch, [waves] booleans; None for the branch that all take."""
    if mnemonic == "s_branch":
        return None
    dtype, entry, when_set = _CONDITIONS[mnemonic]
    row = plan.scalar_at(entry, dtype)
    compare = np.not_equal if when_set else np.equal
    return lambda w: compare(w.rows[row], 0)


def build_scalar(instruction: Instruction, context: Context) -> Step:
    """The step of a scalar instruction that is not a branch.

    Raises:
        EmulatorError: the instruction has not been verified.
    """
    step = _build(instruction, context.plan, instruction.mnemonic.removeprefix("s_"))
    if instruction.operands and not instruction.mnemonic.startswith(("s_cmp", "s_bitcmp")):
        destination = instruction.operands[0]
        if destination.startswith("exec"):
            return _then_refresh_exec(step)
    return step


def _then_refresh_exec(step: Step) -> Step:
    def stepped(w: Waves) -> None:
        step(w)
        w.refresh_exec()

    return stepped


def _build(instruction: Instruction, plan: RegisterPlan, name: str) -> Step:
    if name in _IGNORED:
        return nothing
    if name == "setreg_imm32_b32":
        return _mode(instruction)
    if name.startswith(("cmp_", "cmpk_", "bitcmp")):
        return _compare(instruction, plan, name)
    if name.endswith("_saveexec_b64"):
        return _saveexec(instruction, plan, name)
    if name in _SHIFTS:
        return _shift(instruction, plan, *_SHIFTS[name])
    op = _OPS.get(name) or _IMMEDIATE.get(name)
    if op is None:
        raise instruction.refusal()
    sources = []
    for position, letter in enumerate(op.sources, 1):
        if letter == "c":
            sources.append(plan.scalar_at(SCC))
        elif letter == "d":
            sources.append(plan.scalar(instruction.operand(0), DTYPES[op.result]))
        elif name in _IMMEDIATE:
            sources.append(_immediate(plan, _signed16(int(instruction.operands[position], 0))))
        else:
            sources.append(plan.scalar(instruction.operand(position), DTYPES[letter]))
    return _alu_step(instruction, plan, op, sources)


def _shift(instruction: Instruction, plan: RegisterPlan, letter: str, function: Function) -> Step:
    dtype, amount = np.dtype(DTYPES[letter]), instruction.operand(2)
    used = 8 * dtype.itemsize - 1
    value = plan.scalar(instruction.operand(1), dtype.str)
    if amount.kind == "constant":
        n = _immediate(plan, amount.constant_bits(32) & used, dtype.str)
        op = ScalarOp(2 * letter, letter, function, _nonzero)
    else:
        n = plan.scalar(amount)
        op = ScalarOp(
            letter + "u", letter, lambda a, n: function(a, (n & _U32(used)).astype(dtype)), _nonzero
        )
    return _alu_step(instruction, plan, op, [value, n])


def _alu_step(
    instruction: Instruction, plan: RegisterPlan, op: ScalarOp, sources: list[int]
) -> Step:
    function, scc = op.function, op.scc
    plan.scalar_index(instruction.operand(0))
    d, scc_row = plan.scalar(instruction.operand(0), DTYPES[op.result]), plan.scalar_at(SCC)
    if scc is None:
        if len(sources) == 1:
            (only,) = sources
            if function is np.positive:
                return lambda w: w.rows[d].__setitem__(..., w.rows[only])
            return lambda w: w.rows[d].__setitem__(..., function(w.rows[only]))
        return lambda w: w.rows[d].__setitem__(..., function(*[w.rows[i] for i in sources]))

    def step(w: Waves) -> None:
        r = w.rows
        values = [r[i] for i in sources]
        result = function(*values)
        flag = scc(result, *values)  # before the write: the destination may be a source
        r[d][...] = result
        r[scc_row][...] = flag

    return step


def _signed16(value: int) -> int:
    return (value & 0x7FFF) - (value & 0x8000)


def _immediate(plan: RegisterPlan, value: int, dtype: str = "i4") -> int:
    number = np.array(value, dtype)
    return plan.view(("k", dtype, value), lambda v, s: number)


def _compare(instruction: Instruction, plan: RegisterPlan, name: str) -> Step:
    scc = plan.scalar_at(SCC)
    if name in _BIT_COMPARE:
        wanted = _U32(_BIT_COMPARE[name])
        a, b = (plan.scalar(instruction.operand(i)) for i in (0, 1))

        def bit(w: Waves) -> None:
            w.rows[scc][...] = ((w.rows[a] >> (w.rows[b] & _U32(31))) & _U32(1)) == wanted

        return bit
    match = re.match(r"^(cmp|cmpk)_(eq|lg|lt|le|gt|ge)_(u32|i32|u64)$", name)
    if match is None or match[1] + match[3] == "cmpku64":
        raise instruction.refusal()
    compare, dtype = _COMPARE[match[2]], {"u32": "u4", "i32": "i4", "u64": "u8"}[match[3]]
    a = plan.scalar(instruction.operand(0), dtype)
    if match[1] == "cmpk":
        value = int(instruction.operands[1], 0)
        b = _immediate(plan, _signed16(value) if dtype == "i4" else value & 0xFFFF, dtype)
    else:
        b = plan.scalar(instruction.operand(1), dtype)

    def step(w: Waves) -> None:
        w.rows[scc][...] = compare(w.rows[a], w.rows[b])

    return step


def _saveexec(instruction: Instruction, plan: RegisterPlan, name: str) -> Step:
    kind = name.removesuffix("_saveexec_b64")
    if kind not in _SAVEEXEC:
        raise instruction.refusal()
    function = _SAVEEXEC[kind]
    d, a = (plan.scalar(instruction.operand(i), "u8") for i in (0, 1))
    plan.pair_index(instruction.operand(0))
    scc = plan.scalar_at(SCC)

    def step(w: Waves) -> None:
        old = w.exec.copy()
        new = function(w.rows[a], old)  # before the write: the destination may be the source
        w.rows[d][...] = old
        w.exec[...] = new
        w.rows[scc][...] = np.not_equal(new, 0)
        w.refresh_exec()

    return step


def _mode(instruction: Instruction) -> Step:
    """s_setreg_imm32_b32 of MODE.FP16_OVFL, the only mode bit that changes a value here."""
    if instruction.operands[0] != "hwreg(HW_REG_MODE,23,1)":
        raise instruction.refusal("hardware register")
    value = bool(int(instruction.operands[1], 0))

    def step(w: Waves) -> None:
        w.fp16_overflow[...] = value

    return step
