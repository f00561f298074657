"""Running a program: workgroups one after the other, their waves one after the other between barriers."""

from __future__ import annotations

import operator
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patune.emulator.lds import MAX_RACES, MAX_WAVES, Lds, Race
from patune.emulator.memory import Memory, Traffic
from patune.emulator.registers import LANE_NUMBER, LANES, MASK32, Wave
from patune.errors import EmulatorError
from patune.record import check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.emulator.metadata import Argument
    from patune.emulator.program import Program

MAX_INSTRUCTIONS = 10**8  # of one launch: a runaway loop ends here, minutes in
KERNARG = "kernel arguments"
TRITON_POINTERS = (
    2  # global scratch and profile scratch, which Triton appends to every kernel's arguments
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What a launch did, besides writing its output arrays.

    Attributes:
        races: unordered accesses to shared memory, the first 64; empty when not watched for.
        wave_instructions: instructions that all waves executed together.
        slots_per_workgroup: issue slots of each workgroup in launch order (x fastest); see docs/emulation.md.
        spill_bytes: bytes stored to and loaded from scratch.
        mfma: matrix instructions among the wave instructions.
        histogram: executed count per mnemonic.
        traffic: bytes per argument name; overlapping arguments share an entry, names joined with ``|``.
    """

    races: tuple[Race, ...]
    wave_instructions: int
    slots_per_workgroup: list[int]
    spill_bytes: int
    mfma: int
    histogram: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)


def launch(
    program: Program,
    grid: tuple[int, int, int],
    num_warps: int,
    arguments: Sequence[npt.NDArray[Any] | np.generic | int | float],
    *,
    names: Sequence[str] | None,
    detect_races: bool,
    count: bool,
) -> Execution:
    """Run every workgroup of a grid; see :meth:`Program.launch`.

    Raises:
        EmulatorError: as described there.
    """
    for axis, size in zip("xyz", grid, strict=True):
        check_int(f"grid.{axis}", size, low=1)
    check_int("num_warps", num_warps, low=1, high=MAX_WAVES)
    if num_warps * LANES > program.metadata.max_workgroup:
        raise EmulatorError(
            f"num_warps={num_warps}: {program.metadata.name} was compiled for workgroups of at most "
            f"{program.metadata.max_workgroup} work-items."
        )
    memory = Memory()
    labels = [f"argument{i}" for i in range(len(arguments))] if names is None else list(names)
    hidden = _hidden_values(grid, num_warps)
    kernarg = _place_arguments(program, memory, arguments, labels, hidden)
    lds = Lds(program.shared_b, detect_races=detect_races)
    scratch_b = program.metadata.scratch_b
    waves = [Wave(program.plan, lds, memory, n, scratch_b) for n in range(num_warps)]
    run = _Run(program, waves, lds)
    slots = []
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    slots.append(run.workgroup((x, y, z), kernarg))
    histogram: Counter[str] = Counter()
    for block, hits in zip(program.blocks, run.hits, strict=True):
        histogram.update({name: n * hits for name, n in block.mnemonics.items() if hits})
    regions = [r for r in memory.regions if r.name != KERNARG]
    return Execution(
        races=tuple(lds.races[:MAX_RACES]),
        wave_instructions=histogram.total(),
        slots_per_workgroup=slots,
        spill_bytes=sum(w.spill_bytes for w in waves),
        mfma=sum(n for name, n in histogram.items() if name.startswith("v_mfma")),
        histogram=dict(histogram) if count else {},
        traffic={r.name: Traffic(load_b=r.load_b, store_b=r.store_b) for r in regions} if count else {},
    )  # fmt: skip


class _Run:
    """The waves of one launch and how often each block ran."""

    def __init__(self, program: Program, waves: list[Wave], lds: Lds) -> None:
        self._program = program
        self._waves = waves
        self._lds = lds
        self._executed = 0
        self._sizes = [block.instructions for block in program.blocks]
        self.hits = [0] * len(program.blocks)

    def workgroup(self, position: tuple[int, int, int], kernarg: int) -> int:
        """Run one workgroup; its issue slots."""
        meta, hits = self._program.metadata, self.hits
        before = hits.copy()
        self._lds.reset()
        for wave in self._waves:
            wave.reset()
            wave.s[meta.kernarg_sgpr] = kernarg & MASK32
            wave.s[meta.kernarg_sgpr + 1] = kernarg >> 32
            numbers = (p for p, used in zip(position, meta.workgroup_axes, strict=True) if used)
            for at, number in enumerate(numbers, meta.user_sgprs):
                wave.s[at] = number
            # v0 packs x, y and z of the work-item; Triton's workgroups are one-dimensional.
            wave.vector[0] = LANE_NUMBER + LANES * wave.number
        running = self._waves
        while running:
            for wave in running:
                self._until_barrier(wave, position)
            self._lds.barrier()
            running = [wave for wave in running if wave.block >= 0]
        slots = [block.slots for block in self._program.blocks]
        return sum((a - b) * s for a, b, s in zip(hits, before, slots, strict=True))

    def _until_barrier(self, wave: Wave, position: tuple[int, int, int]) -> None:
        blocks, hits, sizes = self._program.blocks, self.hits, self._sizes
        while wave.block >= 0:
            index = wave.block
            if index >= len(blocks):
                raise EmulatorError("the program runs past its end.")
            block = blocks[index]
            steps = iter(block.steps)
            try:
                for step in steps:
                    step(wave)
                wave.block = block.following(wave)
            except EmulatorError as error:
                place = self._place(wave, position, operator.length_hint(steps))
                raise EmulatorError(f"{error}\n  {place}") from error
            except Exception as error:  # a bug of the emulator: say which instruction has it
                error.add_note(self._place(wave, position, operator.length_hint(steps)))
                raise
            hits[index] += 1
            self._executed += sizes[index]
            if self._executed > MAX_INSTRUCTIONS:
                raise EmulatorError(
                    f"more than {MAX_INSTRUCTIONS} wave instructions: a loop without end?"
                )
            if block.is_barrier:
                return

    def _place(self, wave: Wave, position: tuple[int, int, int], steps_left: int) -> str:
        block = self._program.blocks[wave.block]
        pc = block.first_pc + len(block.steps) - steps_left - 1
        text = self._program.lines[pc]
        return f"in workgroup {position}, wave {wave.number}, pc {pc}: {text}"


# ---- arguments ------------------------------------------------------------------------------------------------------


def _place_arguments(
    program: Program,
    memory: Memory,
    arguments: Sequence[npt.NDArray[Any] | np.generic | int | float],
    labels: Sequence[str],
    hidden_values: dict[str, int],
) -> int:
    """Put arrays into memory and everything into the argument block; the block's address."""
    metadata = program.metadata
    slots = metadata.arguments[: len(arguments)]
    missing = metadata.arguments[len(arguments) :]
    if (
        not len(slots) == len(arguments) == len(labels)
        or len(missing) > TRITON_POINTERS
        or not all(slot.is_pointer for slot in missing)
    ):
        raise EmulatorError(
            f"{metadata.name} has {len(metadata.arguments)} argument slots, of which the last {TRITON_POINTERS} may be "
            f"Triton's own pointers; given: {len(arguments)} arguments, {len(labels)} names."
        )
    for slot, value, label in zip(slots, arguments, labels, strict=True):
        if slot.is_pointer != isinstance(value, np.ndarray):
            wanted = "an array" if slot.is_pointer else "a number"
            raise EmulatorError(
                f"argument {label} is {type(value).__name__}, the kernel wants {wanted}."
            )
    arrays = [(n, v) for n, v in zip(labels, arguments, strict=True) if isinstance(v, np.ndarray)]
    addresses = iter(memory.add_arrays(arrays))
    block = bytearray(metadata.kernarg_b)
    for slot, value, label in zip(slots, arguments, labels, strict=True):
        if isinstance(value, np.ndarray):
            _pack_number(block, slot, next(addresses), label)
        else:
            _pack_number(block, slot, value, label)
    for slot in metadata.hidden:
        # A hidden argument that the emulator does not know is poisoned: as a pointer it is out of bounds.
        known = hidden_values.get(slot.kind)
        fill = b"\xde" * slot.size if known is None else known.to_bytes(slot.size, "little")
        block[slot.offset : slot.offset + slot.size] = fill
    return memory.add(KERNARG, np.frombuffer(bytes(block), np.uint8)).start


def _hidden_values(grid: tuple[int, int, int], num_warps: int) -> dict[str, int]:
    """The launch as the hidden arguments describe it (HSA code object v5)."""
    values = {"hidden_grid_dims": 3}
    for axis, size in zip("xyz", grid, strict=True):
        values[f"hidden_block_count_{axis}"] = size
        values[f"hidden_group_size_{axis}"] = LANES * num_warps if axis == "x" else 1
        values[f"hidden_remainder_{axis}"] = 0
        values[f"hidden_global_offset_{axis}"] = 0
    return values


def _pack_number(
    block: bytearray, slot: Argument, value: np.generic | int | float, label: str
) -> None:
    """Put a number into its slot: the slot's size says which integer or float it is."""
    number = value.item() if isinstance(value, np.generic) else value
    is_float = isinstance(number, float)
    codes = {8: "d", 4: "f", 2: "e"} if is_float else {8: "q", 4: "i", 2: "h", 1: "b"}
    try:
        struct.pack_into("<" + codes[slot.size], block, slot.offset, number)
    except (KeyError, struct.error, OverflowError) as error:
        raise EmulatorError(
            f"argument {label}={number!r} does not fit a slot of {slot.size} bytes: {error}."
        ) from None
