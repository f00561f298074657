"""Shared memory (LDS) of the workgroups of a batch, with a race detector.

Between two barriers the waves of a workgroup may run in any order. The emulator keeps, per byte, which wave of its workgroup wrote
and which read it since the last barrier. Touching a byte that another wave wrote, or writing one that another wave read, is a race;
two waves writing equal values is not (replicated layouts do that). Waves in lockstep access it in one call, which is split by the
same rule: what the shadows say before the access, and which wave they name after it.

A direct-to-LDS copy writes at any time between its issue and the wait for it. So its bytes are checked as a store when it is issued,
and whoever touches them before it has landed races with it, the issuing wave included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from patune.emulator.memory import windows
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from patune.emulator.registers import Row
    from patune.emulator.waves import Waves

Elements = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

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
        workgroup: position of their workgroup in launch order.
        wave: its wave, counted inside of the workgroup.
        other: the other wave, or None when several had read the byte.
        byte: the first such byte.
        access: what the later access did.
        under_way: the other wave's access is a direct-to-LDS copy that nobody has waited for; it may be the wave's own.
    """

    instruction: str
    workgroup: int
    wave: int
    other: int | None
    byte: int
    access: Literal["read", "write"]
    under_way: bool = False

    def __str__(self) -> str:
        if self.under_way:
            return (
                f"wave {self.wave} touches shared memory byte {self.byte} while a copy of wave {self.other} into it is under way: "
                f"{self.access} by `{self.instruction}`"
            )
        other = "several waves" if self.other is None else f"wave {self.other}"
        return (
            f"wave {self.wave} and {other} touch shared memory byte {self.byte} without a barrier in between: "
            f"{self.access} by `{self.instruction}`"
        )


class _Window(NamedTuple):
    """What accesses of one width at one constant offset index with their places."""

    data: Elements
    writer: Elements
    reader: Elements
    copier: Elements
    blank: Elements


class _Access(NamedTuple):
    """Accesses of the active lanes of some waves.

    Attributes:
        window: what they index.
        places: first byte in the batch's shared memory, without the constant offset, [lanes].
        marks: the number of each lane's wave inside of its workgroup, in each accessed byte, [lanes].
        waves: number in the batch of each lane's wave, [lanes].
        offset: constant.
        text: the instruction.
    """

    window: _Window
    places: Places
    marks: Elements
    waves: Row
    offset: int
    text: str


class Lds:
    """The shared memory of all workgroups of a batch, each in a range of its own.

    Attributes:
        size_b: of one workgroup.
        races: what was noticed, at most 64.
        load_b, store_b: bytes moved by active lanes.
        first_workgroup: position in the launch of the workgroup at byte 0.
        copying: direct-to-LDS copies are under way; kept by who queues them.
    """

    def __init__(self, size_b: int, *, num_warps: int, detect_races: bool) -> None:
        self.size_b = size_b
        self.races: list[Race] = []
        self.load_b = 0
        self.store_b = 0
        self._num_warps = num_warps
        self._detect = detect_races and num_warps > 1  # one wave cannot race with another
        self._watch_copies = detect_races
        self.reset(first_workgroup=0, workgroups=0)

    def reset(self, *, first_workgroup: int, workgroups: int) -> None:
        """The state at the start of workgroups."""
        self.first_workgroup = first_workgroup
        total_b = self.size_b * workgroups
        self._data = np.full(total_b, POISON_BYTE, np.uint8)
        self._writer = np.full(total_b if self._detect else 0, NOBODY, np.uint8)
        self._reader = self._writer.copy()
        self._blank = np.full(
            total_b if self._watch_copies else 0, True, np.bool_
        )  # nobody has written the byte
        self._copier = np.full(total_b if self._watch_copies else 0, NOBODY, np.uint8)
        self.copying = False
        self._windows: dict[tuple[int, int], _Window] = {}
        self._wrote = False  # somebody, since the barrier
        self._reads: list[_Access] = []  # since the barrier, and not yet in the shadow
        self._read = False
        self._starts_of: dict[Waves, Row] = {}
        self._marks_of: dict[tuple[Waves, np.dtype[Any]], tuple[Elements, Row]] = {}

    def barrier(self) -> None:
        """All waves have arrived: what they did before orders before what they do next."""
        if self._wrote:
            self._writer.fill(NOBODY)
            self._wrote = False
        if self._read:
            self._reader.fill(NOBODY)
            self._read = False
        self._reads.clear()

    def load(self, w: Waves, addresses: Row, offset: int, width_b: int, text: str) -> Elements:
        """Load ``width_b`` bytes per active lane from its address plus a constant.

        Args:
            w: the waves.
            addresses: of all lanes in the workgroup's shared memory, [waves, 64] uint32.
            offset: the constant.
            width_b: bytes.
            text: the instruction.

        Raises:
            EmulatorError: an access beyond the shared memory of the launch.
        """
        places = self._places(w, w.compress(addresses), offset, width_b, "read")
        window = self._window(offset, width_b)
        loaded: Elements = window.data[places]
        self.load_b += loaded.nbytes
        if self._watch_copies and any(window.blank[places].tobytes()):
            self._refuse_blank(window.blank[places], places, offset)
        if self.copying and self._watch_copies:
            self._check_copies(self._access(w, window, places, offset, text), "read")
        if self._detect:
            access = self._access(w, window, places, offset, text)
            if self._wrote:
                self._check(access, window.writer[access.places], "read")
            self._reads.append(access)
        return loaded

    def store(self, w: Waves, addresses: Row, offset: int, values: Elements, text: str) -> None:
        """Store opaque elements of the active lanes at their address plus a constant; arguments as of :meth:`load`.

        Raises:
            EmulatorError: an access beyond the shared memory of the launch.
        """
        self.store_compressed(w, w.compress(addresses), offset, values, text)

    def store_compressed(
        self, w: Waves, addresses: Row, offset: int, values: Elements, text: str
    ) -> None:
        """The same for addresses of the active lanes only."""
        width_b = values.dtype.itemsize
        places = self._places(w, addresses, offset, width_b, "write")
        window = self._window(offset, width_b)
        self.store_b += values.nbytes
        if self._watch_copies:
            window.blank[places] = np.zeros((), window.blank.dtype)
        if self.copying and self._watch_copies:
            self._check_copies(self._access(w, window, places, offset, text), "write")
        if not self._detect:
            window.data[places] = values
            return
        access = self._access(w, window, places, offset, text)
        flat = values.reshape(-1)
        self._check_store(access, flat)
        window.data[access.places] = flat
        window.writer[access.places] = access.marks
        self._wrote = True
        self._check_overwritten(access, flat)

    def begin_copy(self, w: Waves, addresses: Row, width_b: int, text: str) -> None:
        """A direct-to-LDS copy has been issued: from now on it may write ``width_b`` bytes at each of the active lanes' addresses."""
        places = self._places(w, addresses, 0, width_b, "write")
        if not self._watch_copies:
            return
        access = self._access(w, self._window(0, width_b), places, 0, text)
        if self.copying:
            self._check_copies(access, "write")
        if self._detect:
            if self._wrote:
                self._check(access, access.window.writer[access.places], "write")
            if self._reads:
                self._enter_reads()
            if self._read:
                self._check(access, access.window.reader[access.places], "write")
        access.window.copier[access.places] = access.marks

    def end_copy(self, w: Waves, addresses: Row, values: Elements, text: str) -> None:
        """A copy lands, or the part of it that belongs to some waves."""
        if self._watch_copies:
            width_b = values.dtype.itemsize
            places = self._places(w, addresses, 0, width_b, "write").reshape(-1)
            nobody = np.full(width_b, NOBODY, np.uint8).view(values.dtype)
            self._window(0, width_b).copier[places] = nobody
        self.store_compressed(w, addresses, 0, values, text)

    def _refuse_blank(self, blank: Elements, places: Places, offset: int) -> None:
        byte = _bytes_of(blank.reshape(-1))
        lane, part = (int(i) for i in np.argwhere(byte)[0])
        at = (int(places.reshape(-1)[lane]) + offset + part) % self.size_b
        raise EmulatorError(f"read of shared memory byte {at}, which nobody has written.")

    # ---- race detection -----------------------------------------------------------------------------------------

    def _check_copies(self, access: _Access, what: Literal["read", "write"]) -> None:
        """Against the direct-to-LDS copies that are under way."""
        seen = access.window.copier[access.places]
        owner = _bytes_of(seen)
        conflict = owner != NOBODY
        if conflict.any():
            own = _bytes_of(access.marks)
            self._report(access, conflict, wave=own, other=owner, what=what, under_way=True)

    def _access(self, w: Waves, window: _Window, places: Places, offset: int, text: str) -> _Access:
        marks, waves = self._marks(w, window.data.dtype)
        if w.active is not True:
            active = w.active.reshape(-1)
            marks, waves = marks[active], waves[active]
        return _Access(window, places.reshape(-1), marks, waves, offset, text)

    def _marks(self, w: Waves, dtype: np.dtype[Any]) -> tuple[Elements, Row]:
        """(shadow entries of all lanes, numbers of their waves), each a flat [waves * 64]."""
        known = self._marks_of.get((w, dtype))
        if known is None:
            waves = np.repeat(w.numbers.reshape(-1), w.shape[-1])
            numbers = (waves % self._num_warps).astype(np.uint8)
            known = np.repeat(numbers, dtype.itemsize).view(dtype), waves
            self._marks_of[w, dtype] = known
        return known

    def _check_store(self, access: _Access, values: Elements) -> None:
        """Against what happened before this instruction."""
        window, places = access.window, access.places
        if self._wrote:
            self._check(access, window.writer[places], "write", values)
        if self._reads:
            self._enter_reads()
        if self._read:
            self._check(access, window.reader[places], "write")

    def _check_overwritten(self, access: _Access, values: Elements) -> None:
        """Against the other waves of this instruction: the last one has left its number and its value."""
        left = access.window.writer[access.places]
        if left.tobytes() == access.marks.tobytes():
            return
        left, own = _bytes_of(left), _bytes_of(access.marks)
        differ = _bytes_of(access.window.data[access.places]) != _bytes_of(values)
        self._report(access, (left != own) & differ, wave=left, other=own, what="write")

    def _enter_reads(self) -> None:
        """Enter the reads that were only listed so far; most intervals between barriers never need it."""
        for access in self._reads:
            reader, places = access.window.reader, access.places
            seen, own = _bytes_of(reader[places]), _bytes_of(access.marks)
            entry = np.where((seen != NOBODY) & (seen != own), np.uint8(SEVERAL), own)
            reader[places] = entry.view(reader.dtype).reshape(-1)
            differ = (
                _bytes_of(reader[places]) != entry
            )  # another wave has read it in the same instruction
            if differ.any():
                width_b = entry.shape[1]
                byte = places[:, None] + (access.offset + np.arange(width_b))
                self._reader[byte[differ]] = SEVERAL
        self._read = True
        self._reads.clear()

    def _check(
        self,
        access: _Access,
        seen: Elements,
        what: Literal["read", "write"],
        values: Elements | None = None,
    ) -> None:
        """Note a race where a byte's shadow names another wave; a store of the value that is there conflicts with no store."""
        owner, own = _bytes_of(seen), _bytes_of(access.marks)
        conflict = (owner != NOBODY) & (owner != own)
        if not conflict.any():
            return
        if values is not None:
            conflict &= _bytes_of(access.window.data[access.places]) != _bytes_of(values)
        self._report(access, conflict, wave=own, other=owner, what=what)

    def _report(
        self,
        access: _Access,
        conflict: Flags,
        *,
        wave: npt.NDArray[np.uint8],
        other: npt.NDArray[np.uint8],
        what: Literal["read", "write"],
        under_way: bool = False,
    ) -> None:
        """Note the first conflict of each wave; all arguments are [lanes, bytes]."""
        lanes = np.flatnonzero(conflict.any(axis=1))
        _, first = np.unique(access.waves[lanes], return_index=True)
        for lane in lanes[np.sort(first)]:
            byte = int(conflict[lane].argmax())
            workgroup = int(access.waves[lane]) // self._num_warps
            rival = int(other[lane, byte])
            if len(self.races) < MAX_RACES:
                self.races.append(
                    Race(
                        instruction=access.text,
                        workgroup=self.first_workgroup + workgroup,
                        wave=int(wave[lane, byte]),
                        other=None if rival == SEVERAL else rival,
                        byte=int(access.places[lane]) + access.offset + byte - workgroup * self.size_b,
                        access=what,
                        under_way=under_way,
                    )
                )  # fmt: skip

    # ---- addresses ----------------------------------------------------------------------------------------------

    def _places(
        self, w: Waves, addresses: Row, offset: int, width_b: int, what: Literal["read", "write"]
    ) -> Places:
        """Addresses of the active lanes in the range of their workgroup; the constant offset is left to the window."""
        if addresses.size:
            end = int(np.maximum.reduce(addresses, axis=None)) + offset + width_b
            if end > self.size_b:
                raise EmulatorError(
                    f"out-of-bounds shared memory {what}: bytes up to {end} of {self.size_b} that the launch has."
                )
        starts = self._starts_of.get(w)
        if starts is None:
            starts = self._starts_of[w] = w.numbers // self._num_warps * self.size_b
        places: Places = addresses + w.spread(starts)
        return places

    def _window(self, offset: int, width_b: int) -> _Window:
        window = self._windows.get((offset, width_b))
        if window is None:
            shadows = (self._data, self._writer, self._reader, self._copier, self._blank)
            window = _Window(*(windows(part.view(np.uint8), width_b)[offset:] for part in shadows))
            self._windows[offset, width_b] = window
        return window


def _bytes_of(elements: Elements) -> npt.NDArray[np.uint8]:
    """Opaque elements as [elements, bytes]."""
    as_bytes = np.ascontiguousarray(elements).view(np.uint8)
    return as_bytes.reshape(len(elements), elements.dtype.itemsize)
