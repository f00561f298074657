"""The registers of one wave, and the views of them that a program's instructions work on.

A VGPR is a row of 64 lanes in one uint32 array, a scalar register an entry of another. Every operand that an instruction names
becomes a numpy view of one of the two, made once per wave: ``wave.rows[i]``. Scalars and constants are one-element views, which
numpy broadcasts, so an instruction does not care which file an operand lives in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from patune.emulator.assembly import EXEC, SCC, Operand
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from patune.emulator.lds import Lds
    from patune.emulator.memory import Memory

Row = npt.NDArray[Any]
Lanes = npt.NDArray[np.bool_]
MakeView = Callable[[npt.NDArray[np.uint32], npt.NDArray[np.uint32]], Row]

LANES = 64
MASK32 = 0xFFFF_FFFF
MASK64 = 0xFFFF_FFFF_FFFF_FFFF
POISON = 0xFFC0_DEAD  # what unwritten vector registers hold: a float32 NaN and an address far outside of every buffer
FIRST_CONSTANT = 130  # scalar entries from here on are the program's constants; nothing writes them
MASK_CACHE_LIMIT = 1 << 16

LANE_NUMBER = np.arange(LANES)
LANE_NUMBER.setflags(write=False)

_lanes_of_mask: dict[int, Lanes] = {}
_mask_of_lanes: dict[bytes, int] = {}


def lanes_of(mask: int) -> Lanes:
    """The 64 lanes of a mask as booleans (shared and read-only: the same few masks come back all the time)."""
    lanes = _lanes_of_mask.get(mask)
    if lanes is None:
        if len(_lanes_of_mask) >= MASK_CACHE_LIMIT:
            _lanes_of_mask.clear()
        as_bytes = np.frombuffer(mask.to_bytes(8, "little"), np.uint8)
        lanes = np.unpackbits(as_bytes, bitorder="little").view(np.bool_)
        lanes.setflags(write=False)
        _lanes_of_mask[mask] = lanes
    return lanes


def mask_of(lanes: Lanes) -> int:
    """The mask of 64 booleans."""
    key = lanes.tobytes()
    mask = _mask_of_lanes.get(key)
    if mask is None:
        if len(_mask_of_lanes) >= MASK_CACHE_LIMIT:
            _mask_of_lanes.clear()
        mask = int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")
        _mask_of_lanes[key] = mask
    return mask


class RegisterPlan:
    """Collects the views and constants that a program's instructions need, while they are built.

    Attributes:
        vgprs: rows before the accumulation registers (``.amdhsa_accum_offset``).
        vector_rows: rows that the program allocates (``.amdhsa_next_free_vgpr``).
    """

    def __init__(self, vgprs: int, vector_rows: int) -> None:
        self.vgprs = vgprs
        self.vector_rows = vector_rows
        self._views: list[MakeView] = []
        self._known: dict[tuple[object, ...], int] = {}
        self._constants: list[int] = []
        self._constant_at: dict[tuple[int, bool], int] = {}

    # ---- where an operand lives ---------------------------------------------------------------------------------

    def vector_index(self, operand: Operand, rows: int = 1) -> int:
        """First row of a VGPR or AGPR operand.

        Raises:
            EmulatorError: not a vector register, or one beyond what the program allocates.
        """
        if not operand.in_vector_file:
            raise EmulatorError(f"operand {operand.text}: a vector register is needed.")
        accumulator = operand.kind == "accumulator"
        first = operand.index + (self.vgprs if accumulator else 0)
        limit = self.vector_rows if accumulator else min(self.vgprs, self.vector_rows)
        if first + rows > limit:
            raise EmulatorError(
                f"operand {operand.text}: the program allocates {self.vector_rows} vector registers, "
                f"{self.vgprs} of them before the accumulation registers."
            )
        return first

    def scalar(self, operand: Operand, width: Literal[16, 32, 64] = 32) -> int:
        """Entry of the scalar array that holds an operand; constants get an entry of their own.

        Raises:
            EmulatorError: not a scalar register or constant.
        """
        if operand.kind == "scalar":
            return operand.index
        if operand.kind != "constant":
            raise EmulatorError(f"operand {operand.text}: a scalar register or constant is needed.")
        bits, wide = operand.constant_bits(width), width == 64
        key = (bits, wide)
        if key not in self._constant_at:
            self._constant_at[key] = FIRST_CONSTANT + len(self._constants)
            # Two entries even for 32 bits keep every pair aligned for the 64-bit view.
            self._constants += [bits & MASK32, bits >> 32 if wide else 0]
        return self._constant_at[key]

    def scalar_pair(self, operand: Operand) -> int:
        """Entry of the 64-bit view of the scalar array.

        Raises:
            EmulatorError: an odd register; 64-bit scalars are aligned.
        """
        index = self.scalar(operand, 64)
        if index % 2:
            raise EmulatorError(
                f"operand {operand.text}: 64-bit scalars start at an even register."
            )
        return index // 2

    # ---- views --------------------------------------------------------------------------------------------------

    def view(self, key: tuple[object, ...], make: MakeView) -> int:
        """Index in ``wave.rows`` of the view that ``make`` builds; ``key`` names it."""
        if key not in self._known:
            self._known[key] = len(self._views)
            self._views.append(make)
        return self._known[key]

    def row(self, operand: Operand, dtype: str = "u4", part: int | None = None) -> int:
        """View of one register, [64] (vector) or [1] (scalar, constant).

        Args:
            operand: the register or constant.
            dtype: numpy dtype of 4 bytes; or of 2 or 1 bytes, then ``part`` says which half or byte.
            part: element of the dtype's size inside of the register.
        """
        size = np.dtype(dtype).itemsize
        offset, step = (0 if part is None else part), 4 // size
        if operand.in_vector_file:
            at = self.vector_index(operand)
            return self.view(("v", dtype, at, offset), lambda v, s: v.view(dtype)[at, offset::step])
        at = self.scalar(operand, 16 if size == 2 else 32) * step + offset
        return self.view(("s", dtype, at), lambda v, s: s.view(dtype)[at : at + 1])

    def rows(self, operand: Operand, count: int, dtype: str = "u4") -> int:
        """View of ``count`` consecutive vector registers, [count, 64]."""
        at = self.vector_index(operand, count)
        return self.view(("r", dtype, at, count), lambda v, s: v.view(dtype)[at : at + count])

    def pair_halves(self, operand: Operand, low: int, high: int, dtype: str = "f4") -> int:
        """View of a packed 64-bit operand as [2, 64], [2, 1] or [1, 1]: which register each half of the operation reads."""
        if operand.kind == "constant":
            return self.row(operand, dtype)
        pick = _pick(low, high)
        if operand.kind == "scalar":
            at = operand.index
            return self.view(
                ("ps", dtype, at, low, high), lambda v, s: s.view(dtype)[at : at + 2, None][pick]
            )
        at = self.vector_index(operand, 2)
        return self.view(
            ("pv", dtype, at, low, high), lambda v, s: v.view(dtype)[at : at + 2][pick]
        )

    def word_halves(self, operand: Operand, low: int, high: int, dtype: str = "f2") -> int:
        """View of a packed 32-bit operand as [64, 2], [1, 2] or narrower: which 16-bit half each half of the operation reads."""
        pick = (slice(None), _pick(low, high))
        if operand.in_vector_file:
            at = self.vector_index(operand)
            return self.view(
                ("hv", dtype, at, low, high),
                lambda v, s: v.view(dtype)[at].reshape(LANES, 2)[pick],
            )
        at = 2 * self.scalar(operand, 16 if operand.kind == "constant" else 32)
        return self.view(
            ("hs", dtype, at, low, high), lambda v, s: s.view(dtype)[None, at : at + 2][pick]
        )

    def scalars(self, operand: Operand, count: int) -> int:
        """View of ``count`` consecutive scalar registers, [count]."""
        at = operand.index
        if operand.kind != "scalar":
            raise EmulatorError(f"operand {operand.text}: scalar registers are needed.")
        return self.view(("ss", at, count), lambda v, s: s[at : at + count])

    # ---- per wave -----------------------------------------------------------------------------------------------

    def scalar_template(self) -> npt.NDArray[np.uint32]:
        """What the scalar array of a fresh wave holds: poisoned registers and the constants."""
        template = np.full(FIRST_CONSTANT + len(self._constants), POISON, np.uint32)
        template[FIRST_CONSTANT:] = self._constants
        template[[SCC, SCC + 1]] = 0
        template[[EXEC, EXEC + 1]] = MASK32
        return template

    def materialise(
        self, vector: npt.NDArray[np.uint32], scalar: npt.NDArray[np.uint32]
    ) -> list[Row]:
        """The views of one wave's registers."""
        return [make(vector, scalar) for make in self._views]


def _pick(low: int, high: int) -> slice:
    """The slice of two elements that reads element ``low`` first and ``high`` second (one element where they agree)."""
    if low == high:
        return slice(low, low + 1)
    return slice(0, 2) if low < high else slice(None, None, -1)


class Wave:
    """One wavefront: its registers, its position in the program, and what it can reach.

    Attributes:
        vector: vector registers, [rows, 64] uint32.
        scalar: scalar registers and the program's constants, uint32.
        s, q: the same scalars as Python integers, 32 and 64 bits each.
        rows: the program's views of the registers.
        active: the lanes of EXEC, or True when all 64 are on (numpy's fast path for ``where=``).
        number: position in the workgroup.
        block: index of the basic block to run next, -1 after the end of the program.
        pending: direct-to-LDS loads that no ``s_waitcnt vmcnt`` has forced to land yet.
        scratch: private memory, one row of 64 lanes per 32-bit word.
        fp16_overflow: MODE.FP16_OVFL: conversions clamp instead of overflowing.
    """

    __slots__ = (
        "_scalar_template", "active", "block", "fp16_overflow", "lds", "memory", "number", "pending",
        "q", "rows", "s", "scalar", "scratch", "spill_bytes", "vector",
    )  # fmt: skip

    def __init__(
        self, plan: RegisterPlan, lds: Lds, memory: Memory, number: int, scratch_bytes: int
    ) -> None:
        self.number = number
        self.lds = lds
        self.memory = memory
        self._scalar_template = plan.scalar_template()
        self.vector = np.empty((max(plan.vector_rows, 1), LANES), np.uint32)
        self.scalar = np.empty_like(self._scalar_template)
        self.s = self.scalar.data
        self.q = self.scalar.view(np.uint64).data
        self.rows = plan.materialise(self.vector, self.scalar)
        self.scratch = np.empty((-(-scratch_bytes // 4), LANES), np.uint32)
        self.spill_bytes = 0
        self.reset()

    def reset(self) -> None:
        """The state at the start of a workgroup; everything that the hardware leaves undefined is poisoned."""
        self.vector.fill(POISON)
        self.scratch.fill(POISON)
        self.scalar[:] = self._scalar_template
        self.active: Lanes | Literal[True] = True
        self.block = 0
        self.pending: list[Callable[[], None] | None] = []
        self.fp16_overflow = False

    def refresh_exec(self) -> None:
        """Follow a change of EXEC."""
        mask = self.q[EXEC // 2]
        self.active = True if mask == MASK64 else lanes_of(mask)

    def put(self, row: int, value: Row) -> None:
        """Write a view under EXEC."""
        if self.active is True:
            self.rows[row][...] = value
        else:
            np.copyto(self.rows[row], value, where=self.active, casting="unsafe")

    def active_count(self) -> int:
        """Lanes that are on."""
        return LANES if self.active is True else int(np.count_nonzero(self.active))
