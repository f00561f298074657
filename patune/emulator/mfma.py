"""Matrix instructions: v_mfma_f32_{16x16,32x32}xK on half, bfloat16 and 8-bit floats.

D[M, N] = A[M, K] B[K, N] + C[M, N]. Lane g * M + i holds row i of A (column i of B) for the k of group g. Which k a register
and half stand for is the same permutation for A and B, so it cancels; products and sums are float32 in numpy's order,
where the hardware has an order (and internal precision) of its own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import RegisterPlan, Row, Wave
    from patune.emulator.sources import Context, Step

_SHAPE = re.compile(r"^mfma_f32_(16x16|32x32)x(\d+)_(\w+)$")
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "fp8": 1, "bf8": 1}
# 8-bit formats of v_mfma_f32_*_f8f6f4 by the value of cbsz (A) and blgp (B); the 4- and 6-bit ones are not verified
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
    """One matrix operand: a view of its registers and the float32 buffer that they are widened into.

    The buffer's layout is chosen so that the product needs no rearranging: A's rows come in the order in which the accumulator
    registers hold result rows, and B's k in the order of A's.
    """

    def __init__(
        self, plan: RegisterPlan, operand: Operand, shape: tuple[int, int], type_name: str, fp8: Row, *, is_a: bool
    ) -> None:  # fmt: skip
        size, depth = shape
        width, groups = _ELEMENT_BYTES[type_name], 64 // size
        elements = 4 // width
        registers = depth // groups // elements
        at, blocks = plan.vector_index(operand, registers), size // (4 * groups)

        def make(v: Row, s: Row) -> Row:
            block = v[at : at + registers].view("f2" if type_name == "f16" else f"u{width}")
            if not is_a:  # [register, group, element, column]
                return block.reshape(registers, groups, size, elements).transpose(0, 1, 3, 2)
            # row = (block, group of the accumulator, register of the block) -> [block, register, group | register, group, element]
            split = block.reshape(registers, groups, blocks, groups, 4, elements)
            return split.transpose(2, 4, 3, 0, 1, 5)

        self.view = plan.view(("mfma", at, shape, type_name, is_a), make)
        side = (blocks, 4, groups) if is_a else ()
        inner = (registers, groups, elements) if is_a else (registers, groups, elements, size)
        self._buffer = np.zeros((*side, *inner), np.float32)
        self.matrix = self._buffer.reshape(size, depth) if is_a else self._buffer.reshape(depth, size)  # fmt: skip
        # A bfloat16 is the upper half of a float32; the lower halves of the buffer stay zero.
        self._upper = self._buffer.view(np.uint16)[..., 1::2] if type_name == "bf16" else None
        self._half = type_name == "f16"
        self._table = fp8

    def widen(self, values: Row) -> None:
        """Fill the matrix from the register view."""
        if self._upper is not None:
            self._upper[...] = values
        elif self._half:
            self._buffer[...] = values
        else:
            self._buffer[...] = self._table[values]


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
    registers = size * depth // 64 * _ELEMENT_BYTES[types[0]] // 4
    a, b, c = (instruction.operand(i) for i in (1, 2, 3))
    if a.count != registers or b.count != registers:
        raise instruction.refusal("operand size")
    tables = {"bf8": context.bf8.values}
    left, right = (
        _Operand(context.plan, operand, (size, depth), kind, tables.get(kind, context.fp8.values), is_a=is_a)
        for operand, kind, is_a in ((a, types[0], True), (b, types[1], False))
    )  # fmt: skip
    rows = size * size // 64
    view_a, view_b, d = left.view, right.view, context.plan.rows(instruction.operand(0), rows, "f4")
    view_c = context.plan.row(c, "f4") if c.kind == "constant" else context.plan.rows(c, rows, "f4")
    product = np.empty((size, size), np.float32)
    in_registers = product.reshape(rows, 64)

    def step(w: Wave) -> None:
        r = w.rows
        left.widen(r[view_a])
        right.widen(r[view_b])
        np.dot(left.matrix, right.matrix, out=product)
        np.add(in_registers, r[view_c], out=r[d])

    return step
