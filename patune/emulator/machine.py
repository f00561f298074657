"""Running a program: its workgroups batch by batch in launch order, all waves of a batch in lockstep."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patune.emulator.arguments import KERNARG, hidden_values, place_arguments
from patune.emulator.lds import MAX_WAVES, Lds, Race
from patune.emulator.lockstep import Lockstep
from patune.emulator.memory import Memory, Traffic
from patune.emulator.pending import PendingLoads
from patune.emulator.registers import LANE_NUMBER, LANES, MASK32
from patune.emulator.waves import Batch
from patune.errors import EmulatorError
from patune.record import check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.emulator.program import Program

BATCH_WAVES = 64  # waves in lockstep
SPARE_BATCHES = 8  # kept for the next launch: their views cost more than a short kernel's run

Position = tuple[int, int, int]


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
        lds_traffic: bytes that active lanes loaded from and stored to shared memory, with ``ds_*`` or direct-to-LDS loads that landed.
    """

    races: tuple[Race, ...]
    wave_instructions: int
    slots_per_workgroup: list[int]
    spill_bytes: int
    mfma: int
    histogram: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    lds_traffic: Traffic = field(default_factory=Traffic)


def launch(
    program: Program,
    grid: Position,
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
    hidden = hidden_values(grid, num_warps)
    kernarg = place_arguments(program.metadata, memory, arguments, labels, hidden)
    lds = Lds(program.shared_b, num_warps=num_warps, detect_races=detect_races)
    lockstep = Lockstep(program)
    hits: list[npt.NDArray[np.int64]] = []
    spill_bytes = 0
    positions = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    together = max(1, BATCH_WAVES // num_warps)
    for first in range(0, len(positions), together):
        part = positions[first : first + together]
        batch = _take_batch(program, num_warps, len(part))
        _prepare(batch, program, part, kernarg)
        batch.memory, batch.lds, batch.pending = memory, lds, PendingLoads(batch.waves)
        lds.reset(first_workgroup=first, workgroups=len(part))
        with np.errstate(all="ignore"):
            lockstep.run(batch, part)
        hits.append(batch.hits.sum(axis=2))
        spill_bytes += batch.spill_bytes
        _keep_batch(program, num_warps, len(part), batch)
    return _summary(program, np.concatenate(hits, axis=1), memory, lds, spill_bytes, count)


def _summary(
    program: Program,
    hits: npt.NDArray[np.int64],
    memory: Memory,
    lds: Lds,
    spill_bytes: int,
    count: bool,
) -> Execution:
    """What a launch did; ``hits`` is [blocks, workgroups]."""
    runs = list(zip(program.blocks, hits.sum(axis=1).tolist(), strict=True))
    histogram: Counter[str] = Counter()
    for block, n in runs if count else ():
        histogram.update({name: n * times for name, times in block.mnemonics.items() if n})
    slots = np.array([block.slots for block in program.blocks])
    regions = [r for r in memory.regions if r.name != KERNARG]
    return Execution(
        races=tuple(lds.races),
        wave_instructions=sum(n * block.instructions for block, n in runs),
        slots_per_workgroup=(slots @ hits).tolist(),
        spill_bytes=spill_bytes,
        mfma=sum(n * block.mfma for block, n in runs),
        histogram=dict(histogram),
        traffic={r.name: Traffic(load_b=r.load_b, store_b=r.store_b) for r in regions} if count else {},
        lds_traffic=Traffic(load_b=lds.load_b, store_b=lds.store_b) if count else Traffic(),
    )  # fmt: skip


def _prepare(batch: Batch, program: Program, positions: Sequence[Position], kernarg: int) -> None:
    """The registers with which the hardware starts waves."""
    meta = program.metadata
    batch.reset()
    batch.scalar[..., meta.kernarg_sgpr] = kernarg & MASK32
    batch.scalar[..., meta.kernarg_sgpr + 1] = kernarg >> 32
    numbers = np.array(positions)[:, None, meta.workgroup_axes]
    batch.scalar[..., meta.user_sgprs : meta.user_sgprs + numbers.shape[2]] = numbers
    # v0 packs x, y and z of the work-item; Triton's workgroups are one-dimensional.
    batch.vector[0] = LANE_NUMBER + LANES * np.arange(batch.num_warps)[:, None]


# ---- batches between launches ---------------------------------------------------------------------------------------

_spare: OrderedDict[tuple[Program, int, int], Batch] = OrderedDict()


def _take_batch(program: Program, num_warps: int, workgroups: int) -> Batch:
    """A batch that nobody else uses."""
    batch = _spare.pop((program, num_warps, workgroups), None)
    return batch or Batch(
        program.plan,
        num_warps=num_warps,
        workgroups=workgroups,
        scratch_b=program.metadata.scratch_b,
        blocks=len(program.blocks),
    )


def _keep_batch(program: Program, num_warps: int, workgroups: int, batch: Batch) -> None:
    """Keep it for the next launch of the same shape, and drop the one that has waited longest."""
    del batch.memory, batch.lds, batch.pending
    _spare[program, num_warps, workgroups] = batch
    if len(_spare) > SPARE_BATCHES:
        _spare.popitem(last=False)
