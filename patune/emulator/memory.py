"""Global memory: the argument arrays at made-up addresses, far enough apart that no wild offset lands in another one."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Sequence

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.int64]

FIRST_ADDRESS = 0x7F00_0000_0000
GUARD_B = 1 << 33  # more than any 32-bit offset can bridge, in either direction
ALIGNMENT_B = 1 << 16


def windows(data: Bytes, width_b: int) -> npt.NDArray[Any]:
    """Every run of ``width_b`` bytes as one opaque element, at byte steps.

    Indexing it with the byte offsets of all lanes is a whole vector load or store in one numpy call, whatever the alignment,
    and numpy refuses offsets past the end.
    """
    return np.ndarray((max(len(data) - width_b + 1, 0),), f"V{width_b}", data, strides=(1,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that a launch moved from and to one argument, or from and to shared memory."""

    load_b: int = 0
    store_b: int = 0


class Region:
    """One range of host memory at a made-up address.

    Attributes:
        name: argument name; names of overlapping arguments are joined with ``|``.
        start: made-up address of byte 0.
        data: the bytes themselves; writing here writes the caller's array.
        load_b, store_b: bytes moved so far.
    """

    __slots__ = ("_windows", "data", "load_b", "name", "start", "store_b")

    def __init__(self, name: str, start: int, data: Bytes) -> None:
        self.name = name
        self.start = start
        self.data = data
        self.load_b = 0
        self.store_b = 0
        self._windows: dict[int, npt.NDArray[Any]] = {}

    def windows(self, width_b: int) -> npt.NDArray[Any]:
        """The region's bytes as overlapping elements of ``width_b`` bytes."""
        view = self._windows.get(width_b)
        if view is None:
            view = self._windows[width_b] = windows(self.data, width_b)
        return view

    def spans(self, places: Addresses, width_b: int) -> bool:
        """All accesses at these byte offsets are inside."""
        # One comparison for both ends: a negative offset is a huge unsigned one.
        last = int(np.maximum.reduce(places.view(np.uint64), axis=None))
        return last + width_b <= len(self.data)

    def store(self, places: Addresses, values: npt.NDArray[Any], what: str) -> None:
        """Store opaque elements at byte offsets.

        Raises:
            EmulatorError: a read-only array.
        """
        if not self.data.flags.writeable:
            raise EmulatorError(f"{what} to the read-only argument {self.name}.")
        self.windows(values.dtype.itemsize)[places] = values
        self.store_b += values.nbytes


class Memory:
    """Every region that a launch may touch."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self._next = FIRST_ADDRESS

    # ---- set-up -------------------------------------------------------------------------------------------------

    def add(self, name: str, data: Bytes) -> Region:
        """Place bytes behind a guard gap."""
        region = Region(name, self._next, data)
        self.regions.append(region)
        self._starts.append(region.start)
        end = self._next + len(data) + GUARD_B
        self._next = -(-end // ALIGNMENT_B) * ALIGNMENT_B
        return region

    def add_arrays(self, arrays: Sequence[tuple[str, npt.NDArray[Any]]]) -> list[int]:
        """Place argument arrays and return their addresses; arrays that share host memory share it here too.

        Raises:
            EmulatorError: an array is not contiguous.
        """
        for name, array in arrays:
            if not array.flags.c_contiguous:
                raise EmulatorError(
                    f"argument {name}: strides {array.strides} of shape {array.shape} are not contiguous; "
                    "pass the contiguous storage, a kernel gets its strides as arguments."
                )
        addresses = [0] * len(arrays)
        for members in _overlapping([array for _, array in arrays]):
            first = min(arrays[i][1].ctypes.data for i in members)
            data = _span([arrays[i][1] for i in members])
            region = self.add("|".join(dict.fromkeys(arrays[i][0] for i in members)), data)
            for i in members:
                addresses[i] = region.start + arrays[i][1].ctypes.data - first
        return addresses

    # ---- access -------------------------------------------------------------------------------------------------

    def gather(self, addresses: Addresses, width_b: int, what: str) -> npt.NDArray[Any]:
        """Load ``width_b`` bytes from each address, as opaque elements in the shape of the addresses.

        Raises:
            EmulatorError: an access that is not inside of one region.
        """
        region = self._nearest(int(addresses.flat[0]))
        places = addresses - region.start
        if region.spans(places, width_b):
            region.load_b += width_b * places.size
            loaded: npt.NDArray[Any] = region.windows(width_b)[places]
            return loaded
        loaded = np.empty(addresses.shape, f"V{width_b}")
        for region, lanes in self._split(addresses, width_b, what):
            loaded[lanes] = region.windows(width_b)[addresses[lanes] - region.start]
            region.load_b += width_b * int(lanes.sum())
        return loaded

    def scatter(self, addresses: Addresses, values: npt.NDArray[Any], what: str) -> None:
        """Store opaque elements; of lanes that write the same bytes the last one wins.

        Raises:
            EmulatorError: an access that is not inside of one region, or a read-only array.
        """
        width_b = values.dtype.itemsize
        region = self._nearest(int(addresses.flat[0]))
        places = addresses - region.start
        if region.spans(places, width_b):
            region.store(places, values, what)
            return
        for region, lanes in self._split(addresses, width_b, what):
            region.store(addresses[lanes] - region.start, values[lanes], what)

    # ---- which region -------------------------------------------------------------------------------------------

    def _nearest(self, address: int) -> Region:
        """The last region that starts at or before an address; whether it holds the address is another question."""
        return self.regions[max(bisect.bisect_right(self._starts, address) - 1, 0)]

    def _split(
        self, addresses: Addresses, width_b: int, what: str
    ) -> list[tuple[Region, npt.NDArray[np.bool_]]]:
        """The regions of accesses and which accesses are theirs.

        Raises:
            EmulatorError: an access that is not inside of one region; the first one is named.
        """
        index = np.maximum(np.searchsorted(self._starts, addresses, side="right") - 1, 0)
        last = np.array([r.start + len(r.data) - width_b for r in self.regions])
        inside = (addresses >= np.array(self._starts)[index]) & (addresses <= last[index])
        if not inside.all():
            raise self.out_of_bounds(int(addresses[~inside][0]), width_b, what)
        return [(self.regions[i], index == i) for i in np.unique(index)]

    def out_of_bounds(self, address: int, width_b: int, what: str) -> EmulatorError:
        """The error for an access outside of every region; it names the nearest one."""
        message = f"out-of-bounds {what} of {width_b} bytes at address {address:#x}"
        near = min(
            self.regions,
            key=lambda r: max(r.start - address, address - r.start - len(r.data)),
            default=None,
        )
        if near is not None and -GUARD_B < address - near.start < len(near.data) + GUARD_B:
            offset = address - near.start
            message += (
                f", argument {near.name}[{offset}..{offset + width_b}] of {len(near.data)} bytes"
            )
        return EmulatorError(message)


def _overlapping(arrays: Sequence[npt.NDArray[Any]]) -> list[list[int]]:
    """Groups of arrays whose byte ranges overlap."""
    order = sorted(range(len(arrays)), key=lambda i: arrays[i].ctypes.data)
    groups: list[list[int]] = []
    end = -1
    for i in order:
        start, size = arrays[i].ctypes.data, arrays[i].nbytes
        if groups and size and start < end:
            groups[-1].append(i)
            end = max(end, start + size)
        else:
            groups.append([i])
            end = start + size
    return groups


def _span(arrays: Sequence[npt.NDArray[Any]]) -> Bytes:
    """The bytes from the first to the last of overlapping arrays as one array."""
    if len(arrays) == 1:
        return arrays[0].reshape(-1).view(np.uint8)
    start = min(a.ctypes.data for a in arrays)
    end = max(a.ctypes.data + a.nbytes for a in arrays)
    # numpy offers no way to merge views; the caller's arrays outlive the launch, and so does their memory.
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
    data.setflags(write=all(a.flags.writeable for a in arrays))
    return data
