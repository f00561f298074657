"""Vector ALU instructions on two values per lane, mixed precision, three-input logic, byte permutes and 8-bit floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patune.emulator.formats import bf16_from_f32, f16_bits_from_f32
from patune.emulator.registers import rows_first, rows_last
from patune.emulator.sources import Context, Reader, Step, row_source, source, store_pair
from patune.emulator.valu_table import Function, fused_multiply_add

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import Row
    from patune.emulator.waves import Waves

_SHIFT_MASK = np.uint16(15)

PACKED_F32: dict[str, Function] = {
    "pk_add_f32": np.add,
    "pk_mul_f32": np.multiply,
    "pk_fma_f32": fused_multiply_add,
}
PACKED_16: dict[str, tuple[str, Function]] = {
    "pk_add_f16": ("f2", np.add),
    "pk_mul_f16": ("f2", np.multiply),
    "pk_fma_f16": ("f2", lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float16)),
    "pk_max_f16": ("f2", np.fmax),
    "pk_min_f16": ("f2", np.fmin),
    "pk_add_u16": ("u2", np.add),
    "pk_sub_u16": ("u2", np.subtract),
    "pk_mul_lo_u16": ("u2", np.multiply),
    "pk_mad_u16": ("u2", lambda a, b, c: a * b + c),
    "pk_min_u16": ("u2", np.minimum),
    "pk_max_u16": ("u2", np.maximum),
    "pk_lshlrev_b16": ("u2", lambda a, b: b << (a & _SHIFT_MASK)),
    "pk_lshrrev_b16": ("u2", lambda a, b: b >> (a & _SHIFT_MASK)),
    "pk_ashrrev_i16": ("i2", lambda a, b: b >> (a & np.int16(15))),
}
MIXED = {"fma_mix_f32", "fma_mixlo_f16", "fma_mixhi_f16"}


def _check_constant(instruction: Instruction, operand: Operand, selects: tuple[int, int]) -> None:
    # Which bits the upper half of a packed operation reads of a constant is not something that compiled code relies on:
    # LLVM selects the low half twice.
    if operand.kind == "constant" and operand.value != 0 and selects != (0, 0):
        raise instruction.refusal("op_sel of a constant")


def build_packed_f32(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_pk_{add,mul,fma}_f32: both halves as the two rows of one numpy call."""
    count = len(instruction.operands) - 1
    low, high = instruction.take_bits("op_sel", count), instruction.take_bits("op_sel_hi", count, 1)
    negate_low, negate_high = (instruction.take_bits(f"neg_{half}", count) for half in ("lo", "hi"))
    function, plan = PACKED_F32[name], context.plan
    reads: list[Reader] = []
    for i in range(count):
        operand = instruction.operand(i + 1)
        if operand.is_modified:
            raise instruction.refusal("source modifier")
        _check_constant(instruction, operand, (low[i], high[i]))
        view = plan.pair_halves(operand, low[i], high[i])
        reads.append(_signed_reader(view, negate_low[i], negate_high[i]))
    d = plan.rows(instruction.operand(0), 2, "f4")
    if isinstance(function, np.ufunc) and not any(negate_low + negate_high):
        a, b = (plan.pair_halves(instruction.operand(i + 1), low[i], high[i]) for i in (0, 1))

        def step(w: Waves) -> None:
            r = w.rows
            if w.active is True:
                function(r[a], r[b], out=r[d])
            else:
                w.put(d, function(r[a], r[b]))

        return step
    return lambda w: w.put(d, function(*[read(w) for read in reads]))


def _signed_reader(view: int, negate_low: int, negate_high: int) -> Reader:
    if not negate_low and not negate_high:
        return lambda w: w.rows[view]
    if negate_low and negate_high:
        return lambda w: np.negative(w.rows[view])
    signs = np.array([-1 if negate_low else 1, -1 if negate_high else 1], np.float32)
    return lambda w: rows_first(rows_last(w.rows[view]) * signs)


def build_packed_move(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_pk_mov_b32: the low result is register op_sel[0] of the first source, the high one register op_sel[1] of the second."""
    if "op_sel" not in instruction.modifiers:
        raise instruction.refusal("without op_sel")
    picks = instruction.take_bits("op_sel", 2)
    sources = [instruction.operand(i) for i in (1, 2)]
    if any(s.is_modified or s.kind == "constant" for s in sources):
        raise instruction.refusal("source modifier or constant")
    views = [
        context.plan.pair_halves(s, pick, pick, "u4")
        for s, pick in zip(sources, picks, strict=True)
    ]
    d = context.plan.rows(instruction.operand(0), 2)

    def step(w: Waves) -> None:
        w.put(d, np.stack([w.full(w.rows[view][0]) for view in views]))

    return step


def build_move_pair(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_mov_b64: a register pair."""
    operand, plan = instruction.operand(1), context.plan
    if operand.is_modified or form in ("_dpp", "_sdwa"):
        raise instruction.refusal()
    if not operand.in_vector_file:
        read = row_source(plan.scalar_pair_row(operand)).read
        write = store_pair(context, instruction.operand(0))
        return lambda w: write(w, read(w))
    d, view = (plan.rows(instruction.operand(i), 2) for i in (0, 1))
    return lambda w: w.put(d, w.rows[view])


def build_packed_16(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_pk_* on 16-bit halves."""
    count = len(instruction.operands) - 1
    low, high = instruction.take_bits("op_sel", count), instruction.take_bits("op_sel_hi", count, 1)
    negate_low, negate_high = (instruction.take_bits(f"neg_{half}", count) for half in ("lo", "hi"))
    dtype, function = PACKED_16[name]
    if dtype != "f2" and any(negate_low + negate_high):
        raise instruction.refusal("sign modifier on an integer")
    reads: list[Reader] = []
    for i in range(count):
        operand = instruction.operand(i + 1)
        if operand.is_modified:
            raise instruction.refusal("source modifier")
        _check_constant(instruction, operand, (low[i], high[i]))
        view = context.plan.word_halves(operand, low[i], high[i], dtype)
        signs = np.array([-1 if negate_low[i] else 1, -1 if negate_high[i] else 1], np.float16)
        if np.all(signs == 1):
            reads.append(lambda w, view=view: w.rows[view])  # type: ignore[misc]
        else:
            reads.append(lambda w, view=view, signs=signs: w.rows[view] * signs)  # type: ignore[misc]
    d = context.plan.row(instruction.operand(0))

    def step(w: Waves) -> None:
        value = np.broadcast_to(function(*[read(w) for read in reads]), (*w.shape, 2))
        w.put(d, np.ascontiguousarray(value).view(np.uint32)[..., 0])

    return step


def build_mixed(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_fma_mix*: each source is float32, or a half where op_sel_hi says so; the result is float32 or one half."""
    is_half, which = instruction.take_bits("op_sel_hi", 3), instruction.take_bits("op_sel", 3)
    reads = [
        source(context, instruction, i + 1, "h" if is_half[i] else "f", which[i]).read
        for i in range(3)
    ]
    plan, destination = context.plan, instruction.operand(0)

    def result(w: Waves) -> Row:
        a, b, c = (read(w).astype(np.float32, copy=False) for read in reads)
        return fused_multiply_add(a, b, c).astype(np.float32)

    if name == "fma_mix_f32":
        d = plan.row(destination, "f4")
        return lambda w: w.put(d, result(w))
    d = plan.row(destination, "f2", 0 if name == "fma_mixlo_f16" else 1)
    return lambda w: w.put(d, result(w))


def build_logic3(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_bitop3: bit i of the table is the result where the three source bits read as i, first source highest."""
    table = instruction.take_int("bitop3")
    reads = [source(context, instruction, i, "u").read for i in (1, 2, 3)]
    d = context.plan.row(instruction.operand(0))
    kept = np.uint32(0xFFFF if name.endswith("b16") else 0xFFFF_FFFF)
    terms = [i for i in range(8) if table >> i & 1]

    def step(w: Waves) -> None:
        a, b, c = (read(w) for read in reads)
        pools = ((~a, a), (~b, b), (~c, c))
        value = np.zeros(w.shape, np.uint32)
        for i in terms:
            value |= pools[0][i >> 2] & pools[1][i >> 1 & 1] & pools[2][i & 1]
        w.put(d, value & kept)

    return step


# v_perm_b32 selectors that move whole halves, as compiled code uses them: 16 bits of the selector -> (from the first source, half).
_HALVES = {0x0100: (False, 0), 0x0302: (False, 1), 0x0504: (True, 0), 0x0706: (True, 1)}


def build_permute(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_perm_b32: each selector byte picks one of the 8 bytes of {a, b}, a sign (8..11), 0x00 (12) or 0xFF (above)."""
    plan = context.plan
    a, b, selector = (instruction.operand(i) for i in (1, 2, 3))
    rows = [plan.row(operand) for operand in (a, b, selector)]
    d = plan.row(instruction.operand(0))
    if selector.in_vector_file or "constant" in (a.kind, b.kind):
        return lambda w: w.put(d, permute_bytes(w.shape, *[w.rows[row] for row in rows]))
    at = plan.scalar(selector)
    halves = {pick: plan.row(a if pick[0] else b, "u2", pick[1]) for pick in _HALVES.values()}

    def step(w: Waves) -> None:
        r = w.rows
        selectors = set(r[at].reshape(-1).tolist())
        bits = selectors.pop()
        low, high = _HALVES.get(bits & 0xFFFF), _HALVES.get(bits >> 16)
        if (
            low is None or high is None or selectors
        ):  # another selector, or not the same one in all waves
            w.put(d, permute_bytes(w.shape, *[r[row] for row in rows]))
            return
        merged = np.empty((*w.shape, 2), np.uint16)
        merged[..., 0], merged[..., 1] = r[halves[low]], r[halves[high]]
        w.put(d, merged.view(np.uint32)[..., 0])

    return step


def permute_bytes(shape: tuple[int, ...], a: Row, b: Row, selector: Row) -> Row:
    """v_perm_b32 of any selector; the sources may broadcast to the shape [..., 64]."""
    pool = np.empty((*shape, 2), np.uint32)
    pool[..., 0], pool[..., 1] = b, a
    data = pool.view(np.uint8)
    signs = (data[..., 1::2].view(np.int8) >> 7).view(np.uint8)
    constants = np.broadcast_to(np.array([0, 0xFF], np.uint8), (*shape, 2))
    choices = np.concatenate([data, signs, constants], axis=-1)
    picks = np.broadcast_to(selector, shape).copy().view(np.uint8).reshape(*shape, 4)
    picked = np.take_along_axis(choices, np.minimum(picks, 13).astype(np.int64), -1)
    return picked.view(np.uint32)[..., 0]


# ---- 8-bit floats ---------------------------------------------------------------------------------------------------


def build_from_fp8(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cvt_pk_f32_{fp8,bf8}, v_cvt_f32_{fp8,bf8}, v_cvt_scalef32_pk_{f32,bf16,f16}_{fp8,bf8}."""
    table = (context.fp8 if name.endswith("fp8") else context.bf8).values
    half = instruction.take_bits("op_sel", 3)[0]
    if name.startswith("cvt_scalef32"):
        _check_unit_scale(instruction, 2)
    read = source(context, instruction, 1, "u").read
    d = instruction.operand(0)
    if name.startswith("cvt_f32"):
        if half:
            raise instruction.refusal("op_sel")
        row = context.plan.row(d, "f4")
        return lambda w: w.put(row, table[read(w) & np.uint32(0xFF)])
    shift = np.uint32(16 * half)

    def pair(w: Waves) -> tuple[Row, Row]:
        codes = w.full(read(w) >> shift)
        return table[codes & np.uint32(0xFF)], table[(codes >> np.uint32(8)) & np.uint32(0xFF)]

    if "pk_f32" in name:
        rows = context.plan.rows(d, 2, "f4")
        return lambda w: w.put(rows, np.stack(pair(w)))
    encode: Function = bf16_from_f32 if "pk_bf16" in name else f16_bits_from_f32
    row = context.plan.row(d)

    def step(w: Waves) -> None:
        low, high = pair(w)
        w.put(row, encode(low) | (encode(high) << np.uint32(16)))

    return step


def build_to_fp8(instruction: Instruction, context: Context, name: str, form: str) -> Step:
    """v_cvt_pk_{fp8,bf8}_f32, v_cvt_scalef32_pk_{fp8,bf8}_f32: two codes into one half of the destination."""
    target = context.fp8 if "fp8" in name else context.bf8
    scaled = name.startswith("cvt_scalef32")
    # The destination half is the op_sel bit after the sources: third of two sources, fourth of three.
    high = instruction.take_bits("op_sel", 4)[3 if scaled else 2]
    if scaled:
        _check_unit_scale(instruction, 3)
    a, b = (source(context, instruction, i, "f").read for i in (1, 2))
    d = context.plan.row(instruction.operand(0), "u2", high)

    def step(w: Waves) -> None:
        low, up = (w.full(read(w)) for read in (a, b))
        clamp = w.fp16_overflow[..., None]
        codes = target.encode(low, saturate=clamp)
        w.put(d, codes | (target.encode(up, saturate=clamp) << np.uint32(8)))

    return step


def _check_unit_scale(instruction: Instruction, position: int) -> None:
    scale = instruction.operand(position)
    if scale.kind != "constant" or scale.value != 1.0 or not isinstance(scale.value, float):
        raise instruction.refusal("scale other than 1.0")
