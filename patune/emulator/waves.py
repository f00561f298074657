"""A batch of whole workgroups: the state of their waves, and the sets of waves that run in lockstep.

An instruction is one numpy call for all waves that are at it. Such a set is a slice of the batch's waves, and its views reach
nothing outside of that slice: a wave that is elsewhere cannot change, whatever an instruction does.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from patune.emulator.assembly import EXEC
from patune.emulator.registers import (
    LANES,
    POISON,
    SCALARS,
    Lanes,
    RegisterPlan,
    Row,
    scalar_template,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.emulator.lds import Lds
    from patune.emulator.memory import Memory
    from patune.emulator.pending import PendingLoads


def lanes_of(masks: Row) -> Lanes:
    """The lanes of 64-bit masks as booleans, [..., 64]."""
    as_bytes = np.frombuffer(masks.tobytes(), np.uint8)
    lanes = np.unpackbits(as_bytes, bitorder="little").view(np.bool_)
    return lanes.reshape(*masks.shape, LANES)


def masks_of(lanes: Lanes) -> npt.NDArray[np.uint64]:
    """The 64-bit masks of booleans [..., 64]."""
    masks = np.packbits(lanes, bitorder="little").view(np.uint64)
    return masks.reshape(lanes.shape[:-1])


class Batch:
    """The waves of some workgroups in launch order; wave ``i`` of workgroup ``g`` has the number ``g * num_warps + i``.

    Attributes:
        plan: how the views of registers are made.
        num_warps: waves of a workgroup.
        waves: number of waves.
        vector: vector registers, [rows, workgroups, num_warps, 64].
        scalar: scalar registers, [workgroups, num_warps, 130].
        scratch: private memory, [32-bit words of a lane, workgroups, num_warps, 64].
        fp16_overflow: MODE.FP16_OVFL of each wave: conversions clamp instead of overflowing.
        hits: how often each wave ran each basic block, [blocks, workgroups, num_warps].
        lds, memory, pending: what the waves can reach; set before each use of the batch.
        spill_bytes: moved to and from scratch.
    """

    lds: Lds
    memory: Memory
    pending: PendingLoads

    def __init__(
        self, plan: RegisterPlan, *, num_warps: int, workgroups: int, scratch_b: int, blocks: int
    ) -> None:
        self.plan = plan
        self.num_warps = num_warps
        self.waves = num_warps * workgroups
        each = (workgroups, num_warps)
        self.vector = np.empty((max(plan.vector_rows, 1), *each, LANES), np.uint32)
        self.scalar = np.empty((*each, SCALARS), np.uint32)
        self.scratch = np.empty((-(-scratch_b // 4), *each, LANES), np.uint32)
        self.fp16_overflow = np.zeros(each, np.bool_)
        self.hits = np.zeros((blocks, *each), np.int64)
        self.spill_bytes = 0
        self._current: Waves | None = None
        self._sets: dict[int, tuple[Waves, ...]] = {}

    def reset(self) -> None:
        """The state at the start of workgroups; everything that the hardware leaves undefined is poisoned."""
        self.vector.fill(POISON)
        self.scratch.fill(POISON)
        self.scalar[:] = scalar_template()
        self.fp16_overflow[:] = False
        self.hits.fill(0)
        self.spill_bytes = 0
        self._current = None

    def sets_of(self, members: int) -> tuple[Waves, ...]:
        """A set of waves, given as a bit mask of their numbers, as few slices of the batch."""
        found = self._sets.get(members)
        if found is None:
            found = tuple(Waves(self, *part) for part in _slices(members, self.num_warps))
            self._sets[members] = found
        return found

    def wave(self, number: int) -> Waves:
        """One wave as a set of its own."""
        return self.sets_of(1 << number)[0]

    def enter(self, w: Waves) -> None:
        """Continue with a set of waves: its copy of EXEC is old when another set ran in between."""
        if self._current is not w:
            self._current = w
            w.refresh_exec()


def _slices(members: int, num_warps: int) -> list[tuple[slice, slice]]:
    """A set of waves as products of a slice of workgroups and a slice of the waves of each."""
    workgroups_of: dict[int, list[int]] = {}  # waves of a workgroup, as a bit mask
    for workgroup in range(-(-members.bit_length() // num_warps)):
        if pattern := members >> workgroup * num_warps & ((1 << num_warps) - 1):
            workgroups_of.setdefault(pattern, []).append(workgroup)
    return [
        (workgroups, waves)
        for pattern, numbers in workgroups_of.items()
        for workgroups in _runs(numbers)
        for waves in _runs([i for i in range(num_warps) if pattern >> i & 1])
    ]


def _runs(numbers: list[int]) -> list[slice]:
    """One slice where ascending numbers are evenly spaced, else one per run of neighbours."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(steps) <= 1:
        return [slice(numbers[0], numbers[-1] + 1, steps.pop() if steps else 1)]
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [*starts[1:], len(numbers)]
    return [slice(numbers[a], numbers[b - 1] + 1) for a, b in zip(starts, ends, strict=True)]


def _merge(array: Row, axis: int) -> Row:
    """The same memory with two neighbouring axes as one where their elements are evenly spaced: numpy is faster with fewer axes."""
    outer, inner = array.shape[axis : axis + 2]
    distance, step = array.strides[axis : axis + 2]
    if outer > 1 and inner > 1 and distance != inner * step:
        return array
    merged = array.reshape(*array.shape[:axis], outer * inner, *array.shape[axis + 2 :])
    assert np.may_share_memory(merged, array) or not array.size
    return merged


class _Views(dict[int, Row]):
    """The views of a program for some waves, made when an instruction first needs them."""

    def __init__(self, plan: RegisterPlan, vector: Row, scalar: Row) -> None:
        super().__init__()
        self._make = plan.views
        self._registers = vector, scalar

    def __missing__(self, index: int) -> Row:
        view = self[index] = self._make[index](*self._registers)
        return view


class Waves:
    """Some waves of a batch in lockstep: a slice of its workgroups and a slice of the waves of each.

    ``[waves]`` is one axis, or two (workgroups, waves of each) where they are not evenly spaced in the batch.

    Attributes:
        batch: which they belong to.
        members: their numbers as a bit mask.
        numbers: their numbers, [waves].
        own: index of every wave in their own views.
        count: how many.
        shape: [waves, 64].
        first_lane: position of each wave's lane 0 in a flat row, [waves, 1].
        rows: the program's views of their registers.
        scratch: their private memory, [words, waves, 64].
        exec: EXEC, [waves] uint64.
        active: the lanes of EXEC, [waves, 64], or True when all are on.
        fp16_overflow: MODE.FP16_OVFL, [waves].
        hits: how often they ran each basic block, [blocks, waves].
        no_waves, all_waves: bytes of one boolean per wave that are all off, or all on.
        no_lanes, all_lanes: bytes of one lane mask per wave likewise.
    """

    __slots__ = (
        "_buffers", "active", "all_lanes", "all_waves", "batch", "count", "exec", "first_lane", "fp16_overflow", "hits",
        "members", "no_lanes", "no_waves", "numbers", "own", "rows", "scratch", "shape",
    )  # fmt: skip

    def __init__(self, batch: Batch, workgroups: slice, waves: slice) -> None:
        def part(array: Row, axis: int) -> Row:
            """The waves' part of an array whose axes ``axis`` and ``axis + 1`` are the batch's workgroups and waves of each."""
            return _merge(array[(slice(None),) * axis + (workgroups, waves)], axis)

        self.batch = batch
        self.numbers = part(np.arange(batch.waves).reshape(-1, batch.num_warps), 0)
        self.members = sum(1 << n for n in self.numbers.reshape(-1).tolist())
        self.count = self.numbers.size
        self.own: tuple[Row, ...] = np.ix_(*(np.arange(n) for n in self.numbers.shape))
        self.shape = (*self.numbers.shape, LANES)
        self.first_lane = LANES * np.arange(self.count).reshape(*self.numbers.shape, 1)
        scalar = part(batch.scalar, 0)
        self.rows = _Views(batch.plan, part(batch.vector, 1), scalar)
        self.scratch = part(batch.scratch, 1)
        self.exec = scalar.view(np.uint64)[..., EXEC // 2]
        self.fp16_overflow = part(batch.fp16_overflow, 0)
        self.hits = part(batch.hits, 1)
        self.active: Lanes | Literal[True] = True
        self.no_waves, self.all_waves = bytes(self.count), b"\x01" * self.count
        self.no_lanes, self.all_lanes = bytes(8 * self.count), b"\xff" * (8 * self.count)
        self._buffers: dict[object, tuple[Row, Row]] = {}

    def one_by_one(self) -> Iterator[Waves]:
        """Each of the waves alone, ready to run an instruction."""
        for number in self.numbers.reshape(-1).tolist():
            alone = self.batch.wave(number)
            alone.refresh_exec()
            yield alone

    def refresh_exec(self) -> None:
        """Follow a change of EXEC."""
        masks = self.exec
        self.active = True if masks.tobytes() == self.all_lanes else lanes_of(masks)

    def put(self, row: int, value: Row) -> None:
        """Write a view under EXEC."""
        if self.active is True:
            self.rows[row][...] = value
        else:
            np.copyto(self.rows[row], value, where=self.active, casting="unsafe")

    def any_active(self) -> bool:
        """A lane is on."""
        return self.active is True or bool(self.active.any())

    def full(self, value: Row) -> Row:
        """Values that may broadcast as [waves, 64]."""
        return value if value.shape == self.shape else np.broadcast_to(value, self.shape)

    def compress(self, values: Row) -> Row:
        """The entries of the lanes that are on: [waves, 64] as they are when all are, else [lanes]."""
        return self.full(values) if self.active is True else self.full(values)[self.active]

    def spread(self, per_wave: Row) -> Row:
        """Values of waves beside compressed lanes: [waves, 1], or [lanes]."""
        column = per_wave[..., None]
        return column if self.active is True else self.compress(column)

    def buffer(self, key: object, shape: tuple[int, ...]) -> tuple[Row, Row]:
        """Memory for one step's use, as float32 and as uint32; steps with equal keys share it."""
        found = self._buffers.get((key, shape))
        if found is None:
            values = np.empty(shape, np.float32)
            found = self._buffers[key, shape] = values, values.view(np.uint32)
        return found
