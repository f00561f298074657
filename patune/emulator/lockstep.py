"""Scheduling the waves of a batch: those at the same basic block run it together.

The set with the smallest block index runs first, so that waves which parted at a branch meet again where their paths join. A wave at
an ``s_barrier`` waits; when every wave of the batch waits or has ended, all barriers open at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.emulator.program import Block, Program
    from patune.emulator.sources import Step
    from patune.emulator.waves import Batch, Waves

MAX_INSTRUCTIONS = 10**8  # wave instructions of one launch: a runaway loop ends here, minutes in
END = -1  # index of the block after s_endpgm


class Lockstep:
    """Runs the batches of one launch."""

    def __init__(self, program: Program) -> None:
        self._blocks = program.blocks
        self._lines = program.lines
        self._executed = 0

    def run(self, batch: Batch, positions: Sequence[tuple[int, int, int]]) -> None:
        """Run all waves of a batch to their end.

        Args:
            batch: prepared registers.
            positions: of its workgroups in the grid, for messages.

        Raises:
            EmulatorError: what an instruction refused or an access outside of its bounds, with its place; or a loop without end.
        """
        ready = {0: (1 << batch.waves) - 1}  # block -> waves that are at it, as a bit mask
        while ready:
            waiting: dict[int, int] = {}
            while ready:
                index = min(ready)
                if index >= len(self._blocks):
                    raise EmulatorError("the program runs past its end.")
                block = self._blocks[index]
                arrived = waiting if block.is_barrier else ready
                for w in batch.sets_of(ready.pop(index)):
                    batch.enter(w)
                    self._run_block(block, index, w, positions)
                    for target, members in block.successors(w):
                        if target != END:
                            arrived[target] = arrived.get(target, 0) | members
            batch.lds.barrier()
            ready = waiting

    def _run_block(
        self, block: Block, index: int, w: Waves, positions: Sequence[tuple[int, int, int]]
    ) -> None:
        step = None
        try:
            for step in block.steps:
                step(w)
        except EmulatorError as error:
            raise self._first_fault(error, block, step, w, positions) from error
        except Exception as error:  # a bug of the emulator: say which instruction has it
            error.add_note(self._place(block, step, w, positions))
            raise
        w.hits[index] += 1
        self._executed += block.instructions * w.count
        if self._executed > MAX_INSTRUCTIONS:
            raise EmulatorError(
                f"more than {MAX_INSTRUCTIONS} wave instructions: a loop without end?"
            )

    def _first_fault(
        self,
        error: EmulatorError,
        block: Block,
        step: Step | None,
        w: Waves,
        positions: Sequence[tuple[int, int, int]],
    ) -> EmulatorError:
        """The error of the first wave that has one: an instruction that fails has changed nothing, so each wave can try it alone."""
        for alone in w.one_by_one():
            try:
                if step is not None:
                    step(alone)
            except EmulatorError as own:
                return EmulatorError(f"{own}\n  {self._place(block, step, alone, positions)}")
        return EmulatorError(f"{error}\n  {self._place(block, step, w, positions)}")

    def _place(
        self,
        block: Block,
        step: Step | None,
        w: Waves,
        positions: Sequence[tuple[int, int, int]],
    ) -> str:
        """Where the first of the waves is."""
        workgroup, wave = divmod(int(w.numbers.flat[0]), w.batch.num_warps)
        pc = block.pcs[block.steps.index(step)] if step in block.steps else block.first_pc
        return f"in workgroup {positions[workgroup]}, wave {wave}, pc {pc}: {self._lines[pc]}"
