"""A compiled kernel, ready to run: its text parsed once into basic blocks of Python closures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.emulator.assembly import Instruction
from patune.emulator.counting import issue_slots
from patune.emulator.ds import build_ds
from patune.emulator.formats import fp8_formats
from patune.emulator.lockstep import END
from patune.emulator.metadata import body_lines, parse_metadata
from patune.emulator.registers import RegisterPlan
from patune.emulator.salu import BRANCHES, build_condition, build_scalar
from patune.emulator.sources import Context, nothing
from patune.emulator.valu_dispatch import build_vector
from patune.emulator.vmem import build_scalar_load, build_vector_memory, build_wait, track_pending
from patune.emulator.waits import check_waits
from patune.errors import EmulatorError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from patune.emulator.machine import Execution
    from patune.emulator.sources import Step
    from patune.emulator.waves import Waves


_ENDS = ("s_barrier", "s_endpgm")  # of a block, besides branches
Successors = Callable[["Waves"], Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Instructions that always run together.

    Attributes:
        first_pc: number of the first instruction in the program.
        steps: what they do, without those that do nothing and the one that ends the block.
        pcs: number of each step's instruction.
        successors: the next blocks and the waves that go there, as bit masks.
        is_barrier: the block ends with s_barrier: the wave waits for the others.
        slots: issue slots of one run by one wave.
        instructions: wave instructions of that.
        mfma: matrix instructions of that.
        mnemonics: how often each instruction occurs, the last one included.
    """

    first_pc: int
    steps: tuple[Step, ...]
    pcs: tuple[int, ...]
    successors: Successors
    is_barrier: bool
    slots: int
    instructions: int
    mfma: int
    mnemonics: dict[str, int]


class Program:
    """A kernel's ``asm["amdgcn"]`` text, parsed once and launched many times.

    Attributes:
        arch: gfx942 or gfx950.
        metadata: launch conventions and arguments.
        lines: the instructions' texts.
        blocks: the basic blocks; 0 is the entry.
        shared_b: shared memory of a workgroup.
        plan: register views that the steps use.

    Raises:
        EmulatorError: an instruction or a modifier that nobody has verified (nothing is guessed), or one that uses a
            register which an outstanding load may still write.
    """

    def __init__(self, asm: str, shared_bytes: int) -> None:
        self.metadata = parse_metadata(asm)
        self.arch = self.metadata.arch
        self.shared_b = max(shared_bytes, self.metadata.shared_b)
        self.plan = RegisterPlan(self.metadata.vgprs, self.metadata.vector_registers)
        fp8, bf8 = fp8_formats(self.arch)
        self._context = Context(plan=self.plan, arch=self.arch, fp8=fp8, bf8=bf8)
        body = body_lines(asm, self.metadata.name)
        self.lines = tuple(line for line in body if not line.endswith(":"))
        self._lands_late = any(re.search(r"\blds\b", line) for line in self.lines)
        self.blocks = self._build(body)

    def launch(
        self,
        grid: tuple[int, int, int],
        num_warps: int,
        arguments: Sequence[npt.NDArray[Any] | np.generic | int | float],
        *,
        names: Sequence[str] | None = None,
        detect_races: bool = True,
        count: bool = True,
    ) -> Execution:
        """Run every workgroup of a grid.

        Args:
            grid: workgroups per axis; x is the fastest in launch order.
            num_warps: wavefronts of a workgroup.
            arguments: the kernel's run-time arguments in order. Arrays are pointers and are written in place.
            names: the arguments' names, for messages and traffic.
            detect_races: watch shared memory for accesses that no barrier orders, that a copy under way overlaps, and reads of
                bytes that nobody has written.
            count: fill the histogram and the traffic of the result.

        Raises:
            InvalidValueError: a grid or a number of warps that no launch can have.
            EmulatorError: an argument that does not fit its slot, an access outside of every argument, or an instruction
                in a state that has not been verified; the message names workgroup, wave and instruction.
        """
        from patune.emulator.machine import launch

        return launch(
            self, grid, num_warps, arguments, names=names, detect_races=detect_races, count=count
        )

    # ---- building -----------------------------------------------------------------------------------------------

    def _build(self, body: list[str]) -> tuple[Block, ...]:
        """Cut the text at labels, branches, barriers and ends, and build each piece."""
        pieces: list[list[Instruction]] = [[]]
        label_at: dict[str, int] = {}
        for line in body:
            if line.endswith(":"):
                if pieces[-1]:
                    pieces.append([])
                label_at[line[:-1]] = len(pieces) - 1
                continue
            instruction = Instruction(line)
            pieces[-1].append(instruction)
            if instruction.mnemonic in BRANCHES or instruction.mnemonic in _ENDS:
                pieces.append([])
        blocks, pc = [], 0
        for index, piece in enumerate(pieces):
            blocks.append(self._block(piece, index, pc, label_at))
            pc += len(piece)
        check_waits(pieces, label_at)
        return tuple(blocks)

    def _block(
        self, instructions: list[Instruction], index: int, first: int, label_at: dict[str, int]
    ) -> Block:
        last = instructions[-1].mnemonic if instructions else ""
        ends = last in BRANCHES or last in _ENDS
        done = [self._step(i) for i in (instructions[:-1] if ends else instructions)]
        steps = [(step, first + pc) for pc, step in enumerate(done) if step is not nothing]
        return Block(
            first_pc=first,
            steps=tuple(step for step, _ in steps),
            pcs=tuple(pc for _, pc in steps),
            successors=self._successors(instructions[-1] if ends else None, index, label_at),
            is_barrier=last == "s_barrier",
            slots=sum(issue_slots(i.mnemonic) for i in instructions),
            instructions=len(instructions),
            mfma=sum(i.mnemonic.startswith("v_mfma") for i in instructions),
            mnemonics=dict(Counter(i.mnemonic for i in instructions)),
        )

    def _successors(
        self, last: Instruction | None, index: int, label_at: dict[str, int]
    ) -> Successors:
        """Where the waves go after the block that ends with an instruction, or just before a label."""
        if last is None or last.mnemonic not in BRANCHES:
            after = END if last is not None and last.mnemonic == "s_endpgm" else index + 1
            return lambda w: ((after, w.members),)
        label = last.operands[0]
        if label not in label_at:
            raise EmulatorError(f"`{last.text}`: no such label in the kernel.")
        target, condition = label_at[label], build_condition(last.mnemonic, self.plan)
        if condition is None:
            return lambda w: ((target, w.members),)

        def successors(w: Waves) -> Sequence[tuple[int, int]]:
            taken = condition(w)
            as_bytes = taken.tobytes()
            if as_bytes == w.all_waves:
                return ((target, w.members),)
            if as_bytes == w.no_waves:
                return ((index + 1, w.members),)
            gone = sum(1 << number for number in w.numbers[taken].tolist())
            return (target, gone), (index + 1, w.members & ~gone)

        return successors

    def _step(self, instruction: Instruction) -> Step:
        try:
            step = self._build_step(instruction)
        except EmulatorError as error:
            if instruction.text in str(error):
                raise
            raise EmulatorError(f"instruction `{instruction.text}`: {error}") from None
        if instruction.modifiers:
            raise instruction.refusal(f"modifier {next(iter(instruction.modifiers))}")
        return step

    def _build_step(self, instruction: Instruction) -> Step:
        name = instruction.mnemonic
        if name.startswith("v_"):
            return build_vector(instruction, self._context)
        if name == "s_waitcnt":
            return build_wait(instruction, self._context)
        if name.startswith("s_load_"):
            return build_scalar_load(instruction, self._context)
        if name.startswith("s_"):
            return build_scalar(instruction, self._context)
        if name.startswith("ds_"):
            return build_ds(instruction, self._context)
        to_lds = "lds" in instruction.modifiers
        step = build_vector_memory(instruction, self._context)
        return track_pending(step) if self._lands_late and not to_lds else step
