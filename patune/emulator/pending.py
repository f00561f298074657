"""Direct-to-LDS loads under way: they land as late as they may, when a wave's ``s_waitcnt vmcnt`` forces them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from patune.emulator.registers import LANES

if TYPE_CHECKING:
    from patune.emulator.registers import Lanes, Row
    from patune.emulator.waves import Waves

Elements = npt.NDArray[Any]


class _Load(NamedTuple):
    """One load of some waves.

    Attributes:
        w: the waves.
        active: their lanes when it was issued, [waves, 64], or True for all.
        tickets: vector memory operations that each wave had issued before, [waves].
        places: shared memory addresses of the active lanes.
        values: what was loaded for them.
        text: the instruction.
    """

    w: Waves
    active: Lanes | Literal[True]
    tickets: Row
    places: Row
    values: Elements
    text: str

    def parts(self, members: int) -> list[_Load]:
        """The same load of only these of its waves, as one load of each set that runs in lockstep."""
        active = np.ones(self.w.shape, np.bool_) if self.active is True else self.active
        active = active.reshape(-1, LANES)
        owner = np.repeat(np.arange(len(active)), active.sum(axis=1))
        places, values = self.places.reshape(-1), self.values.reshape(-1)
        tickets, found = self.tickets.reshape(-1), []
        for w in self.w.batch.sets_of(members):
            waves = np.searchsorted(self.w.numbers.reshape(-1), w.numbers.reshape(-1))
            kept = np.zeros(len(active), np.bool_)
            kept[waves] = True
            mine = kept[owner]
            found.append(
                _Load(
                    w,
                    active[waves].reshape(w.shape),
                    tickets[waves].reshape(w.numbers.shape),
                    places[mine],
                    values[mine],
                    self.text,
                )
            )
        return found

    def land(self) -> None:
        """Write the values, under the EXEC of the time when it was issued."""
        w = self.w
        now, w.active = w.active, self.active
        w.batch.lds.end_copy(w, self.places, self.values, self.text)
        w.active = now


class PendingLoads:
    """The direct-to-LDS loads of a batch that no wait has forced to land yet, oldest first."""

    def __init__(self, waves: int) -> None:
        self._issued = np.zeros(waves, np.int64)  # vector memory operations of each wave
        self._loads: list[_Load] = []

    def count(self, w: Waves) -> None:
        """Each of the waves has issued one more vector memory operation."""
        self._issued[w.numbers] += 1

    def add(self, w: Waves, places: Row, values: Elements, text: str) -> None:
        """Queue a load of the active lanes."""
        tickets = self._issued[w.numbers]
        w.batch.lds.begin_copy(w, places, values.dtype.itemsize, text)
        w.batch.lds.copying = True
        self._loads.append(_Load(w, w.active, tickets, places, values, text))
        self.count(w)

    def wait(self, w: Waves, limit: int) -> None:
        """Land the oldest loads of the waves, until each has at most ``limit`` operations outstanding."""
        remaining: list[_Load] = []
        for load in self._loads:
            if not load.w.members & w.members:
                remaining.append(load)
                continue
            due = self._is_due(load, limit)
            if load.w is w and due.all():
                load.land()
                continue
            landing = w.members & sum(1 << int(number) for number in load.w.numbers[due])
            if not landing:
                remaining.append(load)
                continue
            for part in load.parts(landing):
                part.land()
            remaining += load.parts(load.w.members & ~landing)
        self._loads = remaining
        w.batch.lds.copying = bool(remaining)

    def _is_due(self, load: _Load, limit: int) -> npt.NDArray[np.bool_]:
        due: npt.NDArray[np.bool_] = self._issued[load.w.numbers] - load.tickets > limit
        return due
