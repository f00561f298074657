"""Matrix instructions: v_mfma_f32_{16x16,32x32}xK on half, bfloat16 and 8-bit floats.

D[M, N] = A[M, K] B[K, N] + C[M, N]. Lane g * M + i holds row i of A (column i of B) for the k of group g. Which k a register
and half stand for is the same permutation for A and B, so it cancels; products and sums are float32 in numpy's order,
where the hardware has an order (and internal precision) of its own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from patune.emulator.registers import LANES

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import RegisterPlan, Row
    from patune.emulator.sources import Context, Step
    from patune.emulator.waves import Waves

_SHAPE = re.compile(r"^mfma_f32_(16x16|32x32)x(\d+)_(\w+)$")
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "fp8": 1, "bf8": 1}
# 8-bit formats of v_mfma_f32_*_f8f6f4 by the value of cbsz (A) and blgp (B); the 4- and 6-bit ones are not verified
_HALF, _UPPER_HALF = np.uint32(16), np.uint32(0xFFFF_0000)
_F8F6F4 = {0: "fp8", 1: "bf8"}


def _types(instruction: Instruction, suffix: str) -> tuple[str, str]:
    """Element types of A and B."""
    if suffix == "f8f6f4":
        codes = instruction.take_int("cbsz"), instruction.take_int("blgp")
        if not set(codes) <= set(_F8F6F4):
            raise instruction.refusal("4- and 6-bit floats")
        return _F8F6F4[codes[0]], _F8F6F4[codes[1]]
    first, _, second = suffix.partition("_")
    return first, second or first


class _Operand:
    """One matrix operand: a view of its registers, and how they are widened to float32.

    Both operands become [k, row of A or column of B] with k = (register, element of the register, group of lanes): whole registers
    are copied. A's rows come in the order in which the accumulator registers hold result rows, so the product is copied likewise.
    """

    def __init__(
        self, plan: RegisterPlan, operand: Operand, shape: tuple[int, int], type_name: str, fp8: Row, *, is_a: bool
    ) -> None:  # fmt: skip
        size, depth = shape
        self._elements = 4 // _ELEMENT_BYTES[type_name]
        registers = depth * size // LANES // self._elements
        self._view = plan.rows(operand, registers)
        self._lanes = _accumulator_order(size) if is_a else None
        self._key = ("matrix", is_a)
        self._matrix = (depth, size)
        self._type = type_name
        self._table = fp8

    def widen(self, w: Waves) -> Row:
        """The float32 matrices of the waves, one after the other: [n, k, row or column]."""
        words = w.rows[self._view]
        if self._lanes is not None:
            words = words.take(self._lanes, axis=-1)
        shape = (*w.shape[:-1], len(words), self._elements, LANES)
        wide, bits = w.buffer(self._key, shape)
        source = _last_but_one(words)  # [waves, register, lane]
        if self._type == "bf16":  # the upper half of a float32
            np.left_shift(source, _HALF, out=bits[..., 0, :])
            np.bitwise_and(source, _UPPER_HALF, out=bits[..., 1, :])
        else:
            parts = np.ascontiguousarray(source).view("f2" if self._type == "f16" else "u1")
            by_element = parts.reshape(*source.shape, self._elements).swapaxes(-1, -2)
            wide[...] = by_element if self._type == "f16" else self._table[by_element]
        return wide.reshape(-1, *self._matrix)


def _accumulator_order(size: int) -> Row:
    """Lanes with the rows of A from (block, group of lanes, register of the block) to (block, register, group) in each group of k."""
    groups = LANES // size
    rows = np.arange(size).reshape(-1, groups, 4).swapaxes(1, 2).reshape(-1)
    return (np.arange(groups)[:, None] * size + rows).reshape(-1)


def _last_but_one(array: Row) -> Row:
    """First axis moved next to the last."""
    n = array.ndim
    return array.transpose(*range(1, n - 1), 0, n - 1)


def build_mfma(instruction: Instruction, context: Context, name: str) -> Step:
    """The step of a matrix instruction.

    Raises:
        EmulatorError: a shape, type or modifier that has not been verified.
    """
    match = _SHAPE.match(name)
    if match is None:
        raise instruction.refusal()
    size, depth = int(match[1][:2]), int(match[2])
    types = _types(instruction, match[3])
    if not set(types) <= set(_ELEMENT_BYTES):
        raise instruction.refusal()
    registers = size * depth // LANES * _ELEMENT_BYTES[types[0]] // 4
    a, b, c = (instruction.operand(i) for i in (1, 2, 3))
    if a.count != registers or b.count != registers:
        raise instruction.refusal("operand size")
    tables = {"bf8": context.bf8.values}
    left, right = (
        _Operand(context.plan, operand, (size, depth), kind, tables.get(kind, context.fp8.values), is_a=is_a)
        for operand, kind, is_a in ((a, types[0], True), (b, types[1], False))
    )  # fmt: skip
    rows = size * size // LANES
    d = context.plan.rows(instruction.operand(0), rows, "f4")
    view_c = context.plan.row(c, "f4") if c.kind == "constant" else context.plan.rows(c, rows, "f4")

    def step(w: Waves) -> None:
        product, _ = w.buffer("product", (w.count, size, size))
        np.matmul(left.widen(w).swapaxes(1, 2), right.widen(w), out=product)
        in_registers = product.reshape(*w.shape[:-1], rows, LANES)
        n = in_registers.ndim
        np.add(in_registers.transpose(n - 2, *range(n - 2), n - 1), w.rows[view_c], out=w.rows[d])

    return step
