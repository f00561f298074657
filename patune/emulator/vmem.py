"""Vector memory: global and buffer loads and stores, scratch (register spills), scalar loads, and s_waitcnt.

Ordinary waits are the compiler's duty and are not modelled: a load has its value at once. Direct-to-LDS loads are the
programmer's duty in Gluon, so they land as late as they may: when an ``s_waitcnt vmcnt`` forces them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patune.emulator.assembly import M0
from patune.emulator.memory import compress
from patune.emulator.registers import LANE_NUMBER, LANES
from patune.emulator.sources import pair_reader
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import RegisterPlan, Row, Wave
    from patune.emulator.sources import Context, Step

_NAME = re.compile(
    r"^(global|buffer|scratch)_(load|store)_(dwordx[234]|dword|[us]?short|[us]byte|byte)(?:_(d16_hi|d16))?$"
)
_WIDTH_B = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
_CACHE_FLAGS = ("sc0", "sc1", "nt", "glc", "slc")
_CACHE_CONTROL = ("buffer_wbl2", "buffer_inv")
Elements = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a load or store moves per lane.

    Attributes:
        width_b: bytes.
        signed: a narrow load is sign-extended.
        part: ``d16`` or ``d16_hi``: half of the register that a narrow access uses; None for the whole.
        is_store: to memory.
    """

    width_b: int
    signed: bool = False
    part: str | None = None
    is_store: bool = False


def register_writer(
    plan: RegisterPlan, operand: Operand, access: Access
) -> Callable[[Wave, Elements], None]:
    """Puts loaded elements of the active lanes into registers."""
    words = access.width_b // 4
    if words:
        rows = plan.rows(operand, words)

        def write_words(w: Wave, loaded: Elements) -> None:
            values = loaded.view(np.uint32).reshape(-1, words).T
            if w.active is True:
                w.rows[rows][...] = values
            else:
                w.rows[rows][:, w.active] = values

        return write_words
    sign = "i" if access.signed else "u"
    narrow, wide = f"{sign}{access.width_b}", np.dtype(sign + ("2" if access.part else "4"))
    if access.part:
        row = plan.row(operand, "u2", 1 if access.part == "d16_hi" else 0)
    else:
        row = plan.row(operand)
    unsigned = np.dtype(f"u{wide.itemsize}")

    def write(w: Wave, loaded: Elements) -> None:
        values = loaded.view(narrow).astype(wide).view(unsigned)
        if w.active is True:
            w.rows[row][...] = values
        else:
            w.rows[row][w.active] = values

    return write


def register_reader(
    plan: RegisterPlan, operand: Operand, access: Access
) -> Callable[[Wave], Elements]:
    """Reads the elements that the active lanes store."""
    width_b, opaque = access.width_b, f"V{access.width_b}"
    if width_b >= 4:
        rows = plan.rows(operand, width_b // 4)

        def read(w: Wave) -> Elements:
            lanes = np.ascontiguousarray(compress(w.rows[rows].T, w.active))
            return lanes.view(opaque).reshape(-1)

        return read
    # byte 2 or half 1 for d16_hi, else the low end
    row = plan.row(operand, f"u{width_b}", 2 // width_b if access.part == "d16_hi" else 0)
    return lambda w: np.ascontiguousarray(compress(w.rows[row], w.active)).view(opaque)


def build_vector_memory(instruction: Instruction, context: Context) -> Step:
    """The step of a global, buffer or scratch instruction.

    Raises:
        EmulatorError: the instruction, or a modifier of it, has not been verified.
    """
    if instruction.mnemonic in _CACHE_CONTROL:
        for flag in _CACHE_FLAGS:
            instruction.take(flag)
        return lambda w: None
    match = _NAME.match(instruction.mnemonic)
    if match is None:
        raise instruction.refusal()
    space, direction, kind, part = match.groups()
    access = Access(
        width_b=_WIDTH_B.get(kind) or (1 if "byte" in kind else 2),
        signed=kind in ("sbyte", "sshort"),
        part=part,
        is_store=direction == "store",
    )
    for flag in _CACHE_FLAGS:
        instruction.take(flag)
    return {"scratch": _scratch, "buffer": _buffer, "global": _global}[space](
        instruction, context, access
    )


# ---- global ---------------------------------------------------------------------------------------------------------


def _global(instruction: Instruction, context: Context, access: Access) -> Step:
    plan, store = context.plan, access.is_store
    data, address = instruction.operand(1 if store else 0), instruction.operand(0 if store else 1)
    base, offset = instruction.operand(2), instruction.take_int("offset")
    if base.kind == "scalar" and not store:
        return _load_from_scalar_base(context, access, data, address, base, offset)
    addresses = _lane_addresses(plan, address, base, offset)
    if store:
        read = register_reader(plan, data, access)

        def step_store(w: Wave) -> None:
            if w.active is True or w.active.any():
                w.memory.scatter(addresses(w), read(w), "global store")

        return step_store
    write = register_writer(plan, data, access)

    def step(w: Wave) -> None:
        if w.active is True or w.active.any():
            write(w, w.memory.gather(addresses(w), access.width_b, "global load"))

    return step


def _lane_addresses(
    plan: RegisterPlan, address: Operand, base: Operand, offset: int
) -> Callable[[Wave], npt.NDArray[np.int64]]:
    """Addresses of the active lanes: 64 bits each, or a 64-bit scalar base plus an unsigned 32-bit offset each."""
    if base.kind == "scalar":
        row, pair = plan.row(address), plan.scalar_pair(base)
        return lambda w: compress(w.rows[row], w.active).astype(np.int64) + (w.q[pair] + offset)
    read_pair = pair_reader(plan, address, "i8")

    def read(w: Wave) -> npt.NDArray[np.int64]:
        lanes = compress(read_pair(w), w.active)
        return lanes + offset if offset else lanes

    return read


def _load_from_scalar_base(
    context: Context, access: Access, data: Operand, address: Operand, base: Operand, offset: int
) -> Step:
    plan = context.plan
    row, pair = plan.row(address), plan.scalar_pair(base)
    write = register_writer(plan, data, access)

    def step(w: Wave) -> None:
        if w.active is True or w.active.any():
            lanes, start = compress(w.rows[row], w.active), w.q[pair] + offset
            write(w, w.memory.gather_offsets(start, lanes, access.width_b, "global load"))

    return step


# ---- buffer ---------------------------------------------------------------------------------------------------------


class _BufferAddress:
    """Addressing of raw buffers: base + soffset + (lane offset + constant), checked against the descriptor's size."""

    def __init__(self, instruction: Instruction, plan: RegisterPlan, first: int) -> None:
        lane, descriptor, scalar = (instruction.operand(first + i) for i in range(3))
        self._instruction = instruction
        self.row = plan.row(lane) if instruction.take_flag("offen") else None
        self.offset = instruction.take_int("offset")
        if (lane.kind == "off" and self.row is not None) or descriptor.count != 4:
            raise instruction.refusal("address operands")
        self.descriptor = plan.scalar(descriptor)
        self.soffset = plan.scalar(scalar)

    def __call__(self, w: Wave, width_b: int) -> tuple[int, Row, bool | Row]:
        """(base, offsets of the active lanes, which of them are in range: True for all)."""
        s, d = w.s, self.descriptor
        soffset, size = s[self.soffset], s[d + 2]
        if s[d + 1] >> 31:
            raise self._instruction.refusal("swizzled buffer")
        base = (s[d] | (s[d + 1] & 0xFFFF) << 32) + soffset + self.offset
        if self.row is None:
            count = LANES if w.active is True else int(np.count_nonzero(w.active))
            offsets = np.zeros(count, np.uint32)
        else:
            offsets = compress(w.rows[self.row], w.active)
        last = size - soffset - self.offset - width_b
        if not len(offsets) or int(np.maximum.reduce(offsets)) <= last:
            return base, offsets, True
        in_range = offsets.astype(np.int64) <= last
        if np.any(offsets[~in_range].astype(np.int64) < size - soffset - self.offset):
            raise EmulatorError(
                f"an access straddles the end of its buffer descriptor ({size} bytes): not verified."
            )
        return base, offsets, in_range


def _buffer(instruction: Instruction, context: Context, access: Access) -> Step:
    plan, width_b = context.plan, access.width_b
    if instruction.take_flag("lds"):
        return _buffer_to_lds(instruction, context, width_b)
    address = _BufferAddress(instruction, plan, 1)
    data = instruction.operand(0)
    if not access.is_store:
        write = register_writer(plan, data, access)
        return lambda w: write(w, _buffer_load(w, address, width_b, "buffer load"))
    read = register_reader(plan, data, access)

    def step_store(w: Wave) -> None:
        base, offsets, in_range = address(w, width_b)
        values = read(w)
        if in_range is not True:
            offsets, values = offsets[in_range], values[in_range]
        if len(offsets):
            w.memory.scatter(offsets.astype(np.int64) + base, values, "buffer store")

    return step_store


def _buffer_load(w: Wave, address: _BufferAddress, width_b: int, what: str) -> Elements:
    """Elements of the active lanes; those beyond the descriptor's size read zero."""
    base, offsets, in_range = address(w, width_b)
    if in_range is True:
        return w.memory.gather_offsets(base, offsets, width_b, what)
    loaded = np.zeros(len(offsets), f"V{width_b}")
    if np.any(in_range):
        loaded[in_range] = w.memory.gather_offsets(base, offsets[in_range], width_b, what)
    return loaded


def _buffer_to_lds(instruction: Instruction, context: Context, width_b: int) -> Step:
    """buffer_load ... lds: lane l's element goes to shared memory at M0 + offset + l * width."""
    if len(instruction.operands) != 3 or width_b not in (4, 12, 16):
        raise instruction.refusal()
    offset = int(instruction.modifiers.get("offset", "0"), 0)
    address = _BufferAddress(instruction, context.plan, 0)

    def step(w: Wave) -> None:
        loaded = _buffer_load(w, address, width_b, "buffer load to LDS")
        start = (w.s[M0] & 0x3FFFF) + offset
        places = compress(LANE_NUMBER, w.active) * width_b + start

        def land() -> None:
            w.lds.store(w.number, places, 0, loaded, instruction.text)

        w.pending.append(land)

    return step


def track_pending(step: Step) -> Step:
    """Count an ordinary vector memory operation in vmcnt's queue, for programs that have direct-to-LDS loads."""

    def stepped(w: Wave) -> None:
        step(w)
        w.pending.append(None)

    return stepped


def build_wait(instruction: Instruction, context: Context) -> Step:
    """s_waitcnt: lands direct-to-LDS loads until at most vmcnt operations are outstanding.

    Raises:
        EmulatorError: a wait in its numeric form, other than for everything.
    """
    keep = instruction.take("vmcnt")
    for name in ("lgkmcnt", "expcnt"):
        instruction.take(name)
    if instruction.operands:
        if int(instruction.operands[0], 0) != 0:
            raise instruction.refusal("numeric wait")
        keep = "0"
    if keep is None:
        return lambda w: None
    limit = int(keep)

    def step(w: Wave) -> None:
        while len(w.pending) > limit:
            land = w.pending.pop(0)
            if land is not None:
                land()

    return step


# ---- scratch and scalar loads ---------------------------------------------------------------------------------------


def _scratch(instruction: Instruction, context: Context, access: Access) -> Step:
    """Register spills: every lane the same offset, so private memory is rows of 64 lanes like the registers."""
    store, width_b = access.is_store, access.width_b
    data, lane = instruction.operand(1 if store else 0), instruction.operand(0 if store else 1)
    base, offset = instruction.operand(2), instruction.take_int("offset")
    if lane.kind != "off" or width_b < 4 or offset % 4:
        raise instruction.refusal("addressing")
    words, rows = width_b // 4, context.plan.rows(data, width_b // 4)
    scalar = context.plan.scalar(base) if base.kind != "off" else None

    def place(w: Wave) -> Row:
        start = offset + (w.s[scalar] if scalar is not None else 0)
        if start % 4 or start + width_b > 4 * len(w.scratch):
            raise EmulatorError(
                f"out-of-bounds scratch access: bytes {start}..{start + width_b} of {4 * len(w.scratch)}."
            )
        w.spill_bytes += width_b * w.active_count()
        return w.scratch[start // 4 : start // 4 + words]

    if store:
        return lambda w: np.copyto(place(w), w.rows[rows], where=w.active)
    return lambda w: np.copyto(w.rows[rows], place(w), where=w.active)


def build_scalar_load(instruction: Instruction, context: Context) -> Step:
    """s_load_dword*: consecutive scalar registers from memory.

    Raises:
        EmulatorError: an unknown width.
    """
    match = re.match(r"^s_load_dword(?:x(2|4|8|16))?$", instruction.mnemonic)
    if match is None:
        raise instruction.refusal()
    count = int(match[1] or 1)
    d = context.plan.scalars(instruction.operand(0), count)
    base = context.plan.scalar_pair(instruction.operand(1))
    extra, offset = context.plan.scalar(instruction.operand(2)), instruction.take_int("offset")

    def step(w: Wave) -> None:
        address = (w.q[base] & ~3) + w.s[extra] + offset
        w.rows[d][...] = w.memory.scalar_words(address, count)

    return step
