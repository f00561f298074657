"""Scalar ALU and program control: Python integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from patune.emulator.assembly import EXEC, SCC, VCC
from patune.emulator.registers import MASK32, MASK64

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction
    from patune.emulator.registers import Wave
    from patune.emulator.sources import Context, Step

Condition = Callable[["Wave"], bool]
Integer = Callable[..., int]
SccRule = Literal["nonzero", "carry", "overflow", "keep"]


def signed32(value: int) -> int:
    """Two's complement reading of 32 bits."""
    return value - (1 << 32) if value & 0x8000_0000 else value


def signed64(value: int) -> int:
    """Two's complement reading of 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _bit_field(value: int, control: int, bits: int) -> int:
    """s_bfe: offset in the low bits of the control, width from bit 16 on."""
    return (value >> (control & (bits - 1))) & ((1 << (control >> 16 & 0x7F)) - 1)


def _bit_field_signed(value: int, control: int, bits: int) -> int:
    field, width = _bit_field(value, control, bits), control >> 16 & 0x7F
    return field - (1 << width) if width and field >> (width - 1) & 1 else field


# Results are cut to the destination's width by the builder. "nonzero": SCC says whether the result is not zero;
# "carry": whether it left the unsigned range; "overflow": whether the signed one; "keep": SCC stays.
_UNARY32: dict[str, tuple[SccRule, Integer]] = {
    "mov_b32": ("keep", lambda a: a),
    "not_b32": ("nonzero", lambda a: ~a),
    "abs_i32": ("nonzero", lambda a: abs(signed32(a))),
    "brev_b32": ("keep", lambda a: int(f"{a:032b}"[::-1], 2)),
    "sext_i32_i8": ("keep", lambda a: ((a & 0xFF) ^ 0x80) - 0x80),
    "sext_i32_i16": ("keep", lambda a: ((a & 0xFFFF) ^ 0x8000) - 0x8000),
    "ff1_i32_b32": ("keep", lambda a: (a & -a).bit_length() - 1),
    "flbit_i32_b32": ("keep", lambda a: 32 - a.bit_length() if a else -1),
    "bcnt1_i32_b32": ("nonzero", lambda a: a.bit_count()),
}
_BINARY32: dict[str, tuple[SccRule, Integer]] = {
    "add_u32": ("carry", lambda a, b: a + b),
    "sub_u32": ("carry", lambda a, b: a - b),
    "add_i32": ("overflow", lambda a, b: signed32(a) + signed32(b)),
    "sub_i32": ("overflow", lambda a, b: signed32(a) - signed32(b)),
    "mul_i32": ("keep", lambda a, b: a * b),
    "mul_hi_u32": ("keep", lambda a, b: a * b >> 32),
    "mul_hi_i32": ("keep", lambda a, b: signed32(a) * signed32(b) >> 32),
    "and_b32": ("nonzero", lambda a, b: a & b),
    "or_b32": ("nonzero", lambda a, b: a | b),
    "xor_b32": ("nonzero", lambda a, b: a ^ b),
    "andn2_b32": ("nonzero", lambda a, b: a & ~b),
    "orn2_b32": ("nonzero", lambda a, b: a | ~b),
    "nand_b32": ("nonzero", lambda a, b: ~(a & b)),
    "nor_b32": ("nonzero", lambda a, b: ~(a | b)),
    "xnor_b32": ("nonzero", lambda a, b: ~(a ^ b)),
    "lshl_b32": ("nonzero", lambda a, b: a << (b & 31)),
    "lshr_b32": ("nonzero", lambda a, b: a >> (b & 31)),
    "ashr_i32": ("nonzero", lambda a, b: signed32(a) >> (b & 31)),
    "bfe_u32": ("nonzero", lambda a, b: _bit_field(a, b, 32)),
    "bfe_i32": ("nonzero", lambda a, b: _bit_field_signed(a, b, 32)),
    "bfm_b32": ("keep", lambda a, b: ((1 << (a & 31)) - 1) << (b & 31)),
    "pack_ll_b32_b16": ("keep", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16),
    **{f"lshl{n}_add_u32": ("carry", lambda a, b, n=n: (a << n) + b) for n in (1, 2, 3, 4)},
}  # fmt: skip
_UNARY64: dict[str, tuple[SccRule, Integer]] = {
    "mov_b64": ("keep", lambda a: a),
    "not_b64": ("nonzero", lambda a: ~a),
}
_BINARY64: dict[str, tuple[SccRule, Integer]] = {
    "and_b64": ("nonzero", lambda a, b: a & b),
    "or_b64": ("nonzero", lambda a, b: a | b),
    "xor_b64": ("nonzero", lambda a, b: a ^ b),
    "andn2_b64": ("nonzero", lambda a, b: a & ~b),
    "orn2_b64": ("nonzero", lambda a, b: a | ~b),
    "nand_b64": ("nonzero", lambda a, b: ~(a & b)),
    "nor_b64": ("nonzero", lambda a, b: ~(a | b)),
    "xnor_b64": ("nonzero", lambda a, b: ~(a ^ b)),
}
# The second source is 32 bits wide.
_SHIFT64: dict[str, tuple[SccRule, Integer]] = {
    "lshl_b64": ("nonzero", lambda a, b: a << (b & 63)),
    "lshr_b64": ("nonzero", lambda a, b: a >> (b & 63)),
    "ashr_i64": ("nonzero", lambda a, b: signed64(a) >> (b & 63)),
    "bfe_u64": ("nonzero", lambda a, b: _bit_field(a, b, 64)),
    "bfe_i64": ("nonzero", lambda a, b: _bit_field_signed(a, b, 64)),
}
# The immediate is a signed 16-bit integer.
_IMMEDIATE: dict[str, tuple[SccRule, Integer]] = {
    "movk_i32": ("keep", lambda old, k: k),
    "addk_i32": ("overflow", lambda old, k: signed32(old) + k),
    "mulk_i32": ("keep", lambda old, k: signed32(old) * k),
}
_SAVEEXEC: dict[str, Integer] = {
    "and": lambda a, e: a & e,
    "or": lambda a, e: a | e,
    "xor": lambda a, e: a ^ e,
    "andn1": lambda a, e: ~a & e,
    "andn2": lambda a, e: a & ~e,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
# No effect on values: timing and caches. s_waitcnt is with the memory instructions, it makes direct-to-LDS loads land.
_IGNORED = {"nop", "setprio", "sleep", "icache_inv", "dcache_wb", "dcache_inv", "code_end"}

BRANCHES: dict[str, Condition] = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.s[SCC],
    "s_cbranch_scc1": lambda w: bool(w.s[SCC]),
    "s_cbranch_vccz": lambda w: not w.q[VCC // 2],
    "s_cbranch_vccnz": lambda w: bool(w.q[VCC // 2]),
    "s_cbranch_execz": lambda w: not w.q[EXEC // 2],
    "s_cbranch_execnz": lambda w: bool(w.q[EXEC // 2]),
}


def build_scalar(instruction: Instruction, context: Context) -> Step:
    """The step of a scalar instruction that is not a branch.

    Raises:
        EmulatorError: the instruction has not been verified.
    """
    step = _build(instruction, context, instruction.mnemonic.removeprefix("s_"))
    if instruction.operands and not instruction.mnemonic.startswith(("s_cmp", "s_bitcmp")):
        destination = instruction.operands[0]
        if destination.startswith("exec"):
            return _then_refresh_exec(step)
    return step


def _then_refresh_exec(step: Step) -> Step:
    def stepped(w: Wave) -> None:
        step(w)
        w.refresh_exec()

    return stepped


def _build(instruction: Instruction, context: Context, name: str) -> Step:
    plan = context.plan
    if name in _IGNORED:
        return lambda w: None
    if name == "setreg_imm32_b32":
        return _mode(instruction)
    if name.startswith(("cmp_", "cmpk_", "bitcmp")):
        return _compare(instruction, context, name)
    if name.endswith("_saveexec_b64"):
        return _saveexec(instruction, context, name)
    if name in _IMMEDIATE:
        rule, function = _IMMEDIATE[name]
        immediate = _signed16(int(instruction.operands[1], 0))
        d = plan.scalar(instruction.operand(0))
        return _step32(d, rule, lambda w: function(w.s[d], immediate))
    if name in _UNARY32 or name in _BINARY32 or name == "bcnt1_i32_b64":
        return _alu32(instruction, context, name)
    if name in _UNARY64 or name in _BINARY64 or name in _SHIFT64:
        return _alu64(instruction, context, name)
    return _stateful(instruction, context, name)


def _signed16(value: int) -> int:
    return (value & 0x7FFF) - (value & 0x8000)


def _step32(d: int, rule: SccRule, value: Callable[[Wave], int]) -> Step:
    def keep(w: Wave) -> None:
        w.s[d] = value(w) & MASK32

    def nonzero(w: Wave) -> None:
        w.s[d] = result = value(w) & MASK32
        w.s[SCC] = result != 0

    def carry(w: Wave) -> None:
        result = value(w)
        w.s[d] = result & MASK32
        w.s[SCC] = not 0 <= result <= MASK32

    def overflow(w: Wave) -> None:
        result = value(w)
        w.s[d] = result & MASK32
        w.s[SCC] = not -(1 << 31) <= result < 1 << 31

    return {"keep": keep, "nonzero": nonzero, "carry": carry, "overflow": overflow}[rule]


def _alu32(instruction: Instruction, context: Context, name: str) -> Step:
    plan = context.plan
    d = plan.scalar(instruction.operand(0))
    if name == "bcnt1_i32_b64":
        pair = plan.scalar_pair(instruction.operand(1))
        return _step32(d, "nonzero", lambda w: w.q[pair].bit_count())
    a = plan.scalar(instruction.operand(1))
    if name in _UNARY32:
        rule, function = _UNARY32[name]
        return _step32(d, rule, lambda w: function(w.s[a]))
    rule, function = _BINARY32[name]
    b = plan.scalar(instruction.operand(2))
    return _step32(d, rule, lambda w: function(w.s[a], w.s[b]))


def _alu64(instruction: Instruction, context: Context, name: str) -> Step:
    plan = context.plan
    d, a = (plan.scalar_pair(instruction.operand(i)) for i in (0, 1))
    if name in _UNARY64:
        rule, unary = _UNARY64[name]
        value: Callable[[Wave], int] = lambda w: unary(w.q[a])  # noqa: E731
    elif name in _BINARY64:
        rule, binary = _BINARY64[name]
        b = plan.scalar_pair(instruction.operand(2))
        value = lambda w: binary(w.q[a], w.q[b])  # noqa: E731
    else:
        rule, shift = _SHIFT64[name]
        amount = plan.scalar(instruction.operand(2))
        value = lambda w: shift(w.q[a], w.s[amount])  # noqa: E731

    def step(w: Wave) -> None:
        w.q[d] = result = value(w) & MASK64
        if rule == "nonzero":
            w.s[SCC] = result != 0

    return step


def _compare(instruction: Instruction, context: Context, name: str) -> Step:
    plan = context.plan
    if name in ("bitcmp0_b32", "bitcmp1_b32"):
        wanted = int(name[6])
        a, b = (plan.scalar(instruction.operand(i)) for i in (0, 1))

        def bit(w: Wave) -> None:
            w.s[SCC] = (w.s[a] >> (w.s[b] & 31)) & 1 == wanted

        return bit
    kind, condition, type_name = name.split("_")
    if condition not in _COMPARE:
        raise instruction.refusal()
    compare = _COMPARE[condition]
    if type_name == "u64" and kind == "cmp":
        pair_a, pair_b = (plan.scalar_pair(instruction.operand(i)) for i in (0, 1))

        def wide(w: Wave) -> None:
            w.s[SCC] = compare(w.q[pair_a], w.q[pair_b])

        return wide
    if type_name not in ("u32", "i32"):
        raise instruction.refusal()
    convert: Integer = signed32 if type_name == "i32" else int
    a = plan.scalar(instruction.operand(0))
    if kind == "cmpk":
        value = int(instruction.operands[1], 0)
        immediate = _signed16(value) if type_name == "i32" else value & 0xFFFF

        def against_immediate(w: Wave) -> None:
            w.s[SCC] = compare(convert(w.s[a]), immediate)

        return against_immediate
    b = plan.scalar(instruction.operand(1))

    def step(w: Wave) -> None:
        w.s[SCC] = compare(convert(w.s[a]), convert(w.s[b]))

    return step


def _saveexec(instruction: Instruction, context: Context, name: str) -> Step:
    kind = name.removesuffix("_saveexec_b64")
    if kind not in _SAVEEXEC:
        raise instruction.refusal()
    function = _SAVEEXEC[kind]
    d, a = (context.plan.scalar_pair(instruction.operand(i)) for i in (0, 1))

    def step(w: Wave) -> None:
        old = w.q[EXEC // 2]
        new = function(w.q[a], old) & MASK64
        w.q[d] = old
        w.q[EXEC // 2] = new
        w.s[SCC] = new != 0
        w.refresh_exec()

    return step


def _stateful(instruction: Instruction, context: Context, name: str) -> Step:
    """Instructions that read SCC or their destination."""
    plan = context.plan
    if name == "cselect_b64":
        pair, yes, no = (plan.scalar_pair(instruction.operand(i)) for i in range(3))

        def select64(w: Wave) -> None:
            w.q[pair] = w.q[yes if w.s[SCC] else no]

        return select64
    if name not in ("cselect_b32", "cmov_b32", "addc_u32", "subb_u32", "min_i32", "max_i32", "min_u32", "max_u32", "bitset0_b32", "bitset1_b32"):  # fmt: skip
        raise instruction.refusal()
    d, a = (plan.scalar(instruction.operand(i)) for i in (0, 1))
    if name == "cmov_b32":
        return lambda w: w.s.__setitem__(d, w.s[a if w.s[SCC] else d])
    if name.startswith("bitset"):
        if name == "bitset1_b32":
            return _step32(d, "keep", lambda w: w.s[d] | 1 << (w.s[a] & 31))
        return _step32(d, "keep", lambda w: w.s[d] & ~(1 << (w.s[a] & 31)))
    b = plan.scalar(instruction.operand(2))
    if name == "cselect_b32":
        return lambda w: w.s.__setitem__(d, w.s[a if w.s[SCC] else b])
    if name == "addc_u32":
        return _step32(d, "carry", lambda w: w.s[a] + w.s[b] + w.s[SCC])
    if name == "subb_u32":
        return _step32(d, "carry", lambda w: w.s[a] - w.s[b] - w.s[SCC])
    convert: Integer = signed32 if name.endswith("i32") else int
    smallest = name.startswith("min")

    def extreme(w: Wave) -> None:
        x, y = convert(w.s[a]), convert(w.s[b])
        first = x < y if smallest else x >= y
        w.s[d] = (x if first else y) & MASK32
        w.s[SCC] = first

    return extreme


def _mode(instruction: Instruction) -> Step:
    """s_setreg_imm32_b32 of MODE.FP16_OVFL, the only mode bit that changes a value here."""
    if instruction.operands[0] != "hwreg(HW_REG_MODE,23,1)":
        raise instruction.refusal("hardware register")
    value = bool(int(instruction.operands[1], 0))

    def step(w: Wave) -> None:
        w.fp16_overflow = value

    return step
