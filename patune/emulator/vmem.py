"""Vector memory: global and buffer loads and stores, scratch (register spills), scalar loads, and s_waitcnt.

A load to registers has its values at once; that the program waits for them is checked in its text, in
:mod:`patune.emulator.waits`. Direct-to-LDS loads land as late as they may: when an ``s_waitcnt vmcnt`` forces them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patune.emulator.assembly import M0
from patune.emulator.registers import LANE_NUMBER, LANES, rows_first, rows_last
from patune.emulator.sources import nothing, pair_reader
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.emulator.assembly import Instruction, Operand
    from patune.emulator.registers import RegisterPlan
    from patune.emulator.sources import Context, Step
    from patune.emulator.waves import Waves

_NAME = re.compile(
    r"^(global|buffer|scratch)_(load|store)_(dwordx[234]|dword|[us]?short|[us]byte|byte)(?:_(d16_hi|d16))?$"
)
_WIDTH_B = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
_CACHE_FLAGS = ("sc0", "sc1", "nt", "glc", "slc")
_CACHE_CONTROL = ("buffer_wbl2", "buffer_inv")
Elements = npt.NDArray[Any]
Addresses = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_NO_OFFSET = np.zeros(1, np.uint32)


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
) -> Callable[[Waves, Elements], None]:
    """Puts loaded elements of the active lanes into registers."""
    words = access.width_b // 4
    if words:
        rows = plan.rows(operand, words)

        def write_words(w: Waves, loaded: Elements) -> None:
            values = loaded.view(np.uint32)
            if w.active is True:
                w.rows[rows][...] = rows_first(values.reshape(*w.shape, words))
            else:
                w.rows[rows][:, w.active] = values.reshape(-1, words).T

        return write_words
    sign = "i" if access.signed else "u"
    narrow, wide = f"{sign}{access.width_b}", np.dtype(sign + ("2" if access.part else "4"))
    if access.part:
        row = plan.row(operand, "u2", 1 if access.part == "d16_hi" else 0)
    else:
        row = plan.row(operand)
    unsigned = np.dtype(f"u{wide.itemsize}")

    def write(w: Waves, loaded: Elements) -> None:
        values = loaded.view(narrow).astype(wide).view(unsigned)
        if w.active is True:
            w.rows[row][...] = values.reshape(w.shape)
        else:
            w.rows[row][w.active] = values

    return write


def register_reader(
    plan: RegisterPlan, operand: Operand, access: Access
) -> Callable[[Waves], Elements]:
    """Reads the elements that the active lanes store: [waves, 64] when all are on, else [lanes]."""
    width_b, opaque = access.width_b, f"V{access.width_b}"
    if width_b >= 4:
        rows = plan.rows(operand, width_b // 4)

        def read(w: Waves) -> Elements:
            words = rows_last(w.rows[rows])
            lanes = words if w.active is True else words[w.active]
            return np.ascontiguousarray(lanes).view(opaque)[..., 0]

        return read
    # byte 2 or half 1 for d16_hi, else the low end
    row = plan.row(operand, f"u{width_b}", 2 // width_b if access.part == "d16_hi" else 0)
    return lambda w: np.ascontiguousarray(w.compress(w.rows[row])).view(opaque)


def build_vector_memory(instruction: Instruction, context: Context) -> Step:
    """The step of a global, buffer or scratch instruction.

    Raises:
        EmulatorError: the instruction, or a modifier of it, has not been verified.
    """
    if instruction.mnemonic in _CACHE_CONTROL:
        for flag in _CACHE_FLAGS:
            instruction.take(flag)
        return nothing
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
    addresses = _lane_addresses(plan, address, base, offset)
    if store:
        read = register_reader(plan, data, access)

        def step_store(w: Waves) -> None:
            if w.any_active():
                w.batch.memory.scatter(addresses(w), read(w), "global store")

        return step_store
    write = register_writer(plan, data, access)

    def step(w: Waves) -> None:
        if w.any_active():
            write(w, w.batch.memory.gather(addresses(w), access.width_b, "global load"))

    return step


def _lane_addresses(
    plan: RegisterPlan, address: Operand, base: Operand, offset: int
) -> Callable[[Waves], Addresses]:
    """Addresses of the active lanes: 64 bits each, or a 64-bit scalar base plus an unsigned 32-bit offset each."""
    if base.kind == "scalar":
        row, start = plan.row(address), plan.scalar(base, "i8")
        return lambda w: w.compress(w.rows[row]) + w.spread(w.rows[start] + offset)
    read_pair = pair_reader(plan, address, "i8")

    def read(w: Waves) -> Addresses:
        lanes = w.compress(read_pair(w))
        return lanes + offset if offset else lanes

    return read


# ---- buffer ---------------------------------------------------------------------------------------------------------


class _BufferAddress:
    """Addressing of raw buffers: base + soffset + (lane offset + constant), checked against the descriptor's size."""

    def __init__(self, instruction: Instruction, plan: RegisterPlan, first: int) -> None:
        lane, descriptor, scalar = (instruction.operand(first + i) for i in range(3))
        self._instruction = instruction
        self._row = plan.row(lane) if instruction.take_flag("offen") else None
        self._offset = instruction.take_int("offset")
        if (lane.kind == "off" and self._row is not None) or descriptor.count != 4:
            raise instruction.refusal("address operands")
        self._descriptor = plan.scalars(descriptor, 4)
        self._soffset = plan.scalar(scalar)
        self._known: tuple[tuple[int, ...], bytes, bytes] | None = None

    def __call__(self, w: Waves, width_b: int) -> tuple[Addresses, bool | Flags]:
        """(addresses of the active lanes, which of them are in range: True for all)."""
        base, available = self._range(w)
        offsets = w.compress(_NO_OFFSET if self._row is None else w.rows[self._row])
        addresses = offsets + w.spread(base)
        last = int(np.maximum.reduce(offsets, axis=None)) if offsets.size else 0
        if last + width_b <= self._least:
            return addresses, True
        room = w.spread(available) - offsets.astype(np.int64)
        in_range = room >= width_b
        if np.any((room > 0) & ~in_range):
            raise EmulatorError(
                f"an access straddles the end of its buffer descriptor ({self._size_b} bytes): not verified."
            )
        return addresses, in_range

    def _range(self, w: Waves) -> tuple[Addresses, Addresses]:
        """(address of lane offset 0, bytes from there to the end of the descriptor) of each wave, [waves]."""
        words, soffset = w.rows[self._descriptor], w.rows[self._soffset]
        # The same ones come back in every round of a loop.
        key = (words.shape, words.tobytes(), soffset.tobytes())
        if self._known != key:
            low, high, size, _ = (words[..., i].astype(np.int64) for i in range(4))
            if (high >> 31).any():
                raise self._instruction.refusal("swizzled buffer")
            constant = soffset.astype(np.int64) + self._offset
            self._base = (low | (high & 0xFFFF) << 32) + constant
            self._available = size - constant
            self._least, self._size_b = int(self._available.min()), int(size.min())
            self._known = key
        return self._base, self._available


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

    def step_store(w: Waves) -> None:
        addresses, in_range = address(w, width_b)
        values = read(w)
        if in_range is not True:
            addresses, values = addresses[in_range], values[in_range]
        if addresses.size:
            w.batch.memory.scatter(addresses, values, "buffer store")

    return step_store


def _buffer_load(w: Waves, address: _BufferAddress, width_b: int, what: str) -> Elements:
    """Elements of the active lanes; those beyond the descriptor's size read zero."""
    addresses, in_range = address(w, width_b)
    if in_range is True and addresses.size:
        return w.batch.memory.gather(addresses, width_b, what)
    loaded = np.zeros(addresses.shape, f"V{width_b}")
    if np.any(in_range) and addresses.size:
        loaded[in_range] = w.batch.memory.gather(addresses[in_range], width_b, what)
    return loaded


def _buffer_to_lds(instruction: Instruction, context: Context, width_b: int) -> Step:
    """buffer_load ... lds: lane l's element goes to shared memory at M0 + offset + l * width."""
    if len(instruction.operands) != 3 or width_b not in (4, 12, 16):
        raise instruction.refusal()
    offset = int(instruction.modifiers.get("offset", "0"), 0)
    address = _BufferAddress(instruction, context.plan, 0)
    m0, in_wave = context.plan.scalar_at(M0), LANE_NUMBER * width_b + offset

    def step(w: Waves) -> None:
        loaded = _buffer_load(w, address, width_b, "buffer load to LDS")
        starts = w.rows[m0][..., None] & np.uint32(0x3FFFF)
        w.batch.pending.add(w, w.compress(starts + in_wave), loaded, instruction.text)

    return step


def track_pending(step: Step) -> Step:
    """Count an ordinary vector memory operation in vmcnt's queue, for programs that have direct-to-LDS loads."""

    def stepped(w: Waves) -> None:
        step(w)
        w.batch.pending.count(w)

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
        return nothing
    limit = int(keep)
    return lambda w: w.batch.pending.wait(w, limit)


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

    def start_of(w: Waves) -> int | None:
        """The byte that all waves begin at; None when they differ."""
        starts = (
            {offset}
            if scalar is None
            else {offset + s for s in w.rows[scalar].reshape(-1).tolist()}
        )
        return starts.pop() if len(starts) == 1 else None

    def step(w: Waves) -> None:
        start = start_of(w)
        if start is None:
            for alone in w.one_by_one():
                step(alone)
            return
        if start % 4 or start + width_b > 4 * len(w.scratch):
            raise EmulatorError(
                f"out-of-bounds scratch access: bytes {start}..{start + width_b} of {4 * len(w.scratch)}."
            )
        lanes = LANES * w.count if w.active is True else int(np.count_nonzero(w.active))
        w.batch.spill_bytes += width_b * lanes
        private, registers = w.scratch[start // 4 : start // 4 + words], w.rows[rows]
        target, values = (private, registers) if store else (registers, private)
        np.copyto(target, values, where=w.active)

    return step


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
    base = context.plan.scalar(instruction.operand(1), "i8")
    extra, offset = context.plan.scalar(instruction.operand(2)), instruction.take_int("offset")

    def step(w: Waves) -> None:
        addresses = (w.rows[base] & ~3) + w.rows[extra] + offset
        words = w.batch.memory.gather(addresses, 4 * count, "scalar load")
        w.rows[d][...] = words.view(np.uint32).reshape(*addresses.shape, count)

    return step
