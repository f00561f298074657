"""Shared memory instructions (ds_*): loads, stores, and the lane permutations that use the same unit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from patune.emulator.registers import LANE_NUMBER, Row, rows_first
from patune.emulator.vmem import Access, register_reader, register_writer

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.sources import Context, Step
    from patune.emulator.waves import Waves

_NAME = re.compile(r"^ds_(read|write)(2?)(st64)?_([bui])(8|16|32|64|96|128)(?:_(d16_hi|d16))?$")


def build_ds(instruction: Instruction, context: Context) -> Step:
    """The step of a ``ds_`` instruction.

    Raises:
        EmulatorError: the instruction, or a modifier of it, has not been verified.
    """
    name = instruction.mnemonic
    if name in ("ds_bpermute_b32", "ds_permute_b32"):
        return _permute(instruction, context, pull=name == "ds_bpermute_b32")
    if name == "ds_swizzle_b32":
        return _swizzle(instruction, context)
    if name in ("ds_read_b64_tr_b16", "ds_read_b64_tr_b8"):
        return _transposing_read(instruction, context, element_b=2 if name.endswith("b16") else 1)
    match = _NAME.match(name)
    if match is None:
        raise instruction.refusal()
    direction, two, stride64, letter, bits, part = match.groups()
    width_b = int(bits) // 8
    if two:
        unit = width_b * (64 if stride64 else 1)
        offsets = [instruction.take_int(f"offset{i}") * unit for i in (0, 1)]
    else:
        offsets = [instruction.take_int("offset")]
    access = Access(width_b=width_b, signed=letter == "i", part=part)
    build = _read if direction == "read" else _write
    return build(instruction, context, access, offsets)


def _shifted(operand: Operand, registers: int) -> Operand:
    """The operand that starts some registers later."""
    return replace(operand, index=operand.index + registers, count=operand.count - registers)


def _read(instruction: Instruction, context: Context, access: Access, offsets: list[int]) -> Step:
    plan, width_b, text = context.plan, access.width_b, instruction.text
    address = plan.row(instruction.operand(1))
    d = instruction.operand(0)
    writes = [
        register_writer(plan, _shifted(d, i * (width_b // 4)) if i else d, access)
        for i in range(len(offsets))
    ]
    if len(offsets) == 1:
        (offset,), (write,) = offsets, writes

        def step(w: Waves) -> None:
            write(w, w.batch.lds.load(w, w.rows[address], offset, width_b, text))

        return step

    def step2(w: Waves) -> None:
        # Both loads before the first write: a destination may be the address register.
        loaded = [w.batch.lds.load(w, w.rows[address], offset, width_b, text) for offset in offsets]
        for write, values in zip(writes, loaded, strict=True):
            write(w, values)

    return step2


def _write(instruction: Instruction, context: Context, access: Access, offsets: list[int]) -> Step:
    plan, text = context.plan, instruction.text
    address = plan.row(instruction.operand(0))
    reads = [register_reader(plan, instruction.operand(i + 1), access) for i in range(len(offsets))]
    pairs = list(zip(reads, offsets, strict=True))

    def step(w: Waves) -> None:
        for read, offset in pairs:
            w.batch.lds.store(w, w.rows[address], offset, read(w), text)

    return step


def _transposing_read(instruction: Instruction, context: Context, element_b: int) -> Step:
    """ds_read_b64_tr_*: the elements that 16 lanes load, in lane order, are n rows of 16; lane c gets column c."""
    plan, text = context.plan, instruction.text
    address, offset = plan.row(instruction.operand(1)), instruction.take_int("offset")
    rows = plan.rows(instruction.operand(0), 2)
    n, dtype = 8 // element_b, f"u{element_b}"

    def step(w: Waves) -> None:
        if w.active is not True:
            raise instruction.refusal("under a partial EXEC")
        loaded = w.batch.lds.load(w, w.rows[address], offset, 8, text)
        block = loaded.view(dtype).reshape(-1, n, 16)  # [16 lanes of a wave, row, column]
        turned = np.ascontiguousarray(block.transpose(0, 2, 1)).view(np.uint32)
        w.rows[rows][...] = rows_first(turned.reshape(*w.shape, 2))

    return step


def _permute(instruction: Instruction, context: Context, *, pull: bool) -> Step:
    """ds_bpermute_b32 (each lane names its source), ds_permute_b32 (each lane names its destination)."""
    plan = context.plan
    d, address, value = (plan.row(instruction.operand(i)) for i in range(3))
    offset = np.uint32(instruction.take_int("offset"))

    def places_named(w: Waves) -> Row:
        """The lanes as positions in a flat row of all waves."""
        named: Row = w.rows[address] + offset if offset else w.rows[address]
        return ((named >> np.uint32(2)) & np.uint32(63)) + w.first_lane

    def pulled(w: Waves) -> None:
        places = places_named(w)
        values = w.rows[value].reshape(-1)[places]
        if w.active is not True:
            values[~w.active.reshape(-1)[places]] = 0
        w.put(d, values)

    def pushed(w: Waves) -> None:
        values = np.zeros(w.shape, np.uint32)
        values.reshape(-1)[w.compress(places_named(w))] = w.compress(w.rows[value])
        w.put(d, values)

    return pulled if pull else pushed


def _swizzle_lanes(instruction: Instruction, pattern: str) -> Row:
    """Source lane of each lane for one of LLVM's swizzle macros."""
    match = re.fullmatch(r'swizzle\(([A-Z_]+),"?([\d,01pi]+)"?\)', pattern)
    if match is None:
        raise instruction.refusal("swizzle pattern")
    macro, value = match.groups()
    lanes: Row
    if (
        macro == "BITMASK_PERM"
    ):  # one rule per bit of the lane number in its half: 0, 1, p(reserve), i(nvert)
        lanes = LANE_NUMBER & 32
        for bit, rule in enumerate(reversed(value)):
            kept = (LANE_NUMBER >> bit) & 1
            value = {"0": 0 * kept, "1": 0 * kept + 1, "p": kept, "i": 1 - kept}[rule]
            lanes = lanes | value << bit
        return lanes
    numbers = [int(item) for item in value.split(",")]
    if macro == "SWAP":
        lanes = LANE_NUMBER ^ numbers[0]
    elif macro == "REVERSE":
        lanes = LANE_NUMBER ^ (numbers[0] - 1)
    elif macro == "BROADCAST":
        lanes = (LANE_NUMBER & ~(numbers[0] - 1)) + numbers[1]
    elif macro == "QUAD_PERM":
        lanes = (LANE_NUMBER & ~3) + np.array(numbers)[LANE_NUMBER & 3]
    else:
        raise instruction.refusal("swizzle pattern")
    return lanes


def _swizzle(instruction: Instruction, context: Context) -> Step:
    """ds_swizzle_b32: a lane permutation given by the instruction."""
    lanes = _swizzle_lanes(instruction, instruction.take("offset", "") or "")
    d, value = (context.plan.row(instruction.operand(i)) for i in (0, 1))

    def step(w: Waves) -> None:
        values = w.rows[value].take(lanes, axis=-1)
        if w.active is not True:
            values[~w.active[..., lanes]] = 0
        w.put(d, values)

    return step
