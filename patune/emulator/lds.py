"""Shared memory (LDS) of one workgroup, with a race detector.

Between two barriers the waves of a workgroup may run in any order. The emulator runs them one after the other, so it keeps, per
byte, who wrote and who read it since the last barrier. Touching a byte that another wave wrote, or writing one that another wave
read, is a race; two waves writing equal values is not (replicated layouts do that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from patune.emulator.memory import windows
from patune.errors import EmulatorError

Elements = npt.NDArray[Any]
LaneAddresses = npt.NDArray[np.int64]

POISON_BYTE = 0xA5  # uninitialised shared memory is visible: -2.9e-16 as float32
NOBODY = 0xFF
SEVERAL = 0xFE
MAX_WAVES = 16  # 1024 work-items, the largest workgroup
MAX_RACES = 64  # a broken kernel races at every access; the first ones tell the story


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Two waves touched a byte of shared memory without a barrier in between, and one of them wrote.

    Attributes:
        instruction: the later access in the emulator's order.
        wave: its wave.
        other: the other wave, or None when several had read the byte.
        byte: the first such byte.
        access: what the later access did.
    """

    instruction: str
    wave: int
    other: int | None
    byte: int
    access: Literal["read", "write"]

    def __str__(self) -> str:
        other = "several waves" if self.other is None else f"wave {self.other}"
        return (
            f"wave {self.wave} and {other} touch shared memory byte {self.byte} without a barrier in between: "
            f"{self.access} by `{self.instruction}`"
        )


class _Window(NamedTuple):
    """What accesses of one width at one constant offset index with their lane addresses."""

    data: Elements
    writer: Elements
    reader: Elements


class Lds:
    """The shared memory of the workgroup that runs now.

    Lane addresses are non-negative, and the caller leaves the array alone afterwards: reads are only listed at first.
    """

    def __init__(self, size_b: int, *, detect_races: bool) -> None:
        self.data = np.empty(size_b, np.uint8)
        self.races: list[Race] = []
        self._detect = detect_races
        self._writer = np.empty(size_b if detect_races else 0, np.uint8)
        self._reader = np.empty_like(self._writer)
        self._windows: dict[tuple[int, int], _Window] = {}
        self._marks: dict[tuple[int, int], Elements] = {}
        self.reset()

    def reset(self) -> None:
        """The state at the start of a workgroup."""
        self.data.fill(POISON_BYTE)
        self.barrier()

    def barrier(self) -> None:
        """All waves have arrived: what they did before orders before what they do next."""
        self._wrote = 0  # bit set of the waves that wrote since the barrier
        self._read = 0
        self._listed: list[tuple[int, LaneAddresses, Elements]] = []
        self._writer.fill(NOBODY)
        self._reader.fill(NOBODY)

    def load(
        self, wave: int, addresses: LaneAddresses, offset: int, width_b: int, text: str
    ) -> Elements:
        """Load ``width_b`` bytes per lane from its address plus a constant.

        Raises:
            EmulatorError: an access beyond the shared memory of the launch.
        """
        window = self._window(offset, width_b)
        try:
            loaded: Elements = window.data[addresses]
        except IndexError:
            raise self._out_of_bounds("read", addresses, offset, width_b) from None
        if self._detect:
            if self._wrote & ~(1 << wave):
                self._check(window.writer[addresses], wave, addresses, offset, text, "read")
            self._listed.append((wave, addresses, window.reader))
            self._read |= 1 << wave
        return loaded

    def store(
        self, wave: int, addresses: LaneAddresses, offset: int, values: Elements, text: str
    ) -> None:
        """Store opaque elements at each lane's address plus a constant.

        Raises:
            EmulatorError: an access beyond the shared memory of the launch.
        """
        width_b = values.dtype.itemsize
        window = self._window(offset, width_b)
        try:
            if self._detect:
                self._note_store(window, wave, addresses, offset, values, text)
            window.data[addresses] = values
        except IndexError:
            raise self._out_of_bounds("write", addresses, offset, width_b) from None

    # ---- race detection -----------------------------------------------------------------------------------------

    def _note_store(
        self,
        window: _Window,
        wave: int,
        addresses: LaneAddresses,
        offset: int,
        values: Elements,
        text: str,
    ) -> None:
        if self._wrote & ~(1 << wave):
            old = window.data[addresses]
            if old.tobytes() != values.tobytes():
                changed = _bytes_of(old) != _bytes_of(values)
                seen = window.writer[addresses]
                self._check(seen, wave, addresses, offset, text, "write", changed)
        if self._read & ~(1 << wave):
            self._enter_reads()
            self._check(window.reader[addresses], wave, addresses, offset, text, "write")
        mark = self._marks.get((wave, values.dtype.itemsize))
        if mark is None:
            mark = np.full(values.dtype.itemsize, wave, np.uint8).view(values.dtype)
            self._marks[wave, values.dtype.itemsize] = mark
        window.writer[addresses] = mark
        self._wrote |= 1 << wave

    def _enter_reads(self) -> None:
        """Enter the reads that were only listed so far; most intervals between barriers never need it."""
        for wave, addresses, reader in self._listed:
            seen = _bytes_of(reader[addresses])
            others = (seen != NOBODY) & (seen != wave)
            entry = np.where(others, np.uint8(SEVERAL), np.uint8(wave))
            reader[addresses] = entry.view(reader.dtype).reshape(-1)
        self._listed.clear()

    def _check(
        self,
        seen: Elements,
        wave: int,
        addresses: LaneAddresses,
        offset: int,
        text: str,
        access: Literal["read", "write"],
        counts: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Note a race if a byte's shadow names another wave; ``counts`` [lanes, bytes] says which bytes can conflict at all."""
        if not seen.tobytes().translate(None, bytes((NOBODY, wave))):
            return
        owner = _bytes_of(seen)
        conflict = (owner != NOBODY) & (owner != wave)
        if counts is not None:
            conflict &= counts
        if not conflict.any() or len(self.races) >= MAX_RACES:
            return
        lane, byte = (int(i) for i in np.argwhere(conflict)[0])
        other = int(owner[lane, byte])
        self.races.append(
            Race(
                instruction=text,
                wave=wave,
                other=None if other == SEVERAL else other,
                byte=int(addresses[lane]) + offset + byte,
                access=access,
            )
        )

    # ---- views --------------------------------------------------------------------------------------------------

    def _window(self, offset: int, width_b: int) -> _Window:
        window = self._windows.get((offset, width_b))
        if window is None:
            shadows = (self.data, self._writer, self._reader)
            window = _Window(*(windows(part, width_b)[offset:] for part in shadows))
            self._windows[offset, width_b] = window
        return window

    def _out_of_bounds(
        self, what: str, addresses: LaneAddresses, offset: int, width_b: int
    ) -> EmulatorError:
        last = int(addresses.max()) + offset + width_b
        return EmulatorError(
            f"out-of-bounds shared memory {what}: bytes up to {last} of {len(self.data)} that the launch has."
        )


def _bytes_of(elements: Elements) -> npt.NDArray[np.uint8]:
    """Opaque elements as [elements, bytes]."""
    as_bytes = np.ascontiguousarray(elements).view(np.uint8)
    return as_bytes.reshape(len(elements), elements.dtype.itemsize)
