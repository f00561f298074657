"""Waits for memory operations, checked in the text: no register is used that an outstanding load may still write.

The emulator gives a load its values at once, so a missing ``s_waitcnt`` would change nothing that it computes. This check is
static instead: a forward dataflow over the basic blocks knows which registers are still to be written, and how many younger
operations have been issued since. Where paths meet, the worst of them counts.

Rules of gfx942 and gfx950, from LLVM's ``SIInsertWaitcnts.cpp``, which puts the waits there, and the CDNA3 ISA document
("Data Dependency Resolution"):

* vmcnt: global, buffer and scratch operations finish in order, stores and loads to LDS included. A store has read its data
  registers when it is issued: only GPUs before Sea Islands wait for that (``vmemWriteNeedsExpWaitcnt``).
* lgkmcnt: LDS operations finish in order, scalar loads in any order. While a scalar load may be outstanding, only
  ``lgkmcnt(0)`` counts, for both kinds (``counterOutOfOrder``).
* A load may overwrite the destination of an older load of the same in-order queue. Every other read or write waits.
* A wave reaches ``s_barrier`` with no store to LDS outstanding: the waves behind the barrier read it. Loads may be.

Counters do not saturate here. What a load to LDS writes is not followed: :mod:`patune.emulator.pending` does when the program runs.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from patune.emulator.assembly import VCC, parse_operand
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from patune.emulator.assembly import Instruction

Kind = Literal["vector", "lds", "scalar"]
Registers = frozenset[str]

_VECTOR_MEMORY = ("global_", "buffer_", "scratch_")
_COUNTERS: dict[Kind, str] = {"vector": "vmcnt", "lds": "lgkmcnt", "scalar": "lgkmcnt"}
_WAIT = re.compile(r"\b(vmcnt|lgkmcnt)\((\d+)\)")
# Their operands are labels, counters and hardware registers.
_WITHOUT_REGISTERS = ("s_branch", "s_cbranch_", "s_waitcnt", "s_setreg_imm32", "s_nop")
# VCC is read without being an operand.
_READS_VCC = ("s_cbranch_vcc", "v_div_fmas_")
_LETTERS = {"vector": "v", "accumulator": "a", "scalar": "s"}
_STORED = "shared memory"  # stands for what stores to LDS write, like a register
_NAMES = {f"s{VCC}": "vcc_lo", f"s{VCC + 1}": "vcc_hi"}


@functools.lru_cache(maxsize=1 << 14)  # the same few operands are named thousands of times
def _registers(operand: str) -> Registers:
    """The registers of an operand, one name each."""
    parsed = parse_operand(operand)
    if parsed.kind not in _LETTERS:
        return frozenset()
    letter, first = _LETTERS[parsed.kind], parsed.index
    names = [f"{letter}{number}" for number in range(first, first + parsed.count)]
    return frozenset(_NAMES.get(name, name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Effect:
    """What an instruction means for the registers of outstanding loads.

    Attributes:
        text: the instruction.
        kind: queue that it takes a place in; None if it is no memory operation.
        loaded: registers that it loads.
        used: registers that no outstanding load may still write. Whether they are read or written makes no difference.
        used_or_loaded: those that no load of another queue may still write.
        waits: counter -> operations that may stay outstanding.
    """

    text: str
    kind: Kind | None
    loaded: Registers
    used: Registers
    used_or_loaded: Registers
    waits: Mapping[str, int]


def _kind_of(mnemonic: str) -> Kind | None:
    if mnemonic.startswith(_VECTOR_MEMORY):
        return "vector"
    if mnemonic.startswith("ds_"):
        return "lds"
    return "scalar" if mnemonic.startswith("s_load_") else None


def _has_destination(instruction: Instruction) -> bool:
    """A memory operation's first operand is a register that it loads."""
    name = instruction.mnemonic
    if "_store_" in name or name.startswith(("ds_write", "buffer_wbl2", "buffer_inv")):
        return False
    return not re.search(r"\blds\b", instruction.text)  # buffer_load_dword ... lds


def _waits_of(instruction: Instruction) -> dict[str, int]:
    if instruction.mnemonic != "s_waitcnt":
        return {}
    if instruction.operands:  # the numeric form, of which the emulator takes 0 alone
        return {"vmcnt": 0, "lgkmcnt": 0}
    return {counter: int(number) for counter, number in _WAIT.findall(instruction.text)}


_NONE: Registers = frozenset()


def _effect_of(instruction: Instruction) -> _Effect:
    name, operands = instruction.mnemonic, instruction.operands
    if name.startswith(_WITHOUT_REGISTERS):
        operands = ()
    kind = _kind_of(name)
    loaded = _NONE
    if kind is not None and _has_destination(instruction):
        loaded = _registers(operands[0])
        if (
            kind != "scalar" and "_d16" not in name
        ):  # scalar loads have no order, d16 ones keep half of the register
            operands = operands[1:]
    elif name.startswith("ds_write"):
        loaded = frozenset({_STORED})
    used = _NONE.union(*map(_registers, operands))
    if name == "s_barrier":
        used = frozenset({_STORED})
    if name.startswith(_READS_VCC):
        used |= _registers("vcc")
    return _Effect(
        text=instruction.text,
        kind=kind,
        loaded=loaded,
        used=used,
        used_or_loaded=used | loaded,
        waits=_waits_of(instruction),
    )


# ---- outstanding loads ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Queue:
    """Operations of one kind that may be outstanding.

    Attributes:
        issued: operations since the beginning of the block; loads before it have negative numbers.
        loads: register -> (number, text) of the youngest load that may still write it.
    """

    issued: int = 0
    loads: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, loaded: Iterable[str], text: str) -> None:
        """Issue an operation."""
        self.loads.update(dict.fromkeys(loaded, (self.issued, text)))
        self.issued += 1

    def finish(self, keep: int) -> None:
        """Finish all operations but the ``keep`` youngest."""
        oldest = self.issued - keep
        self.loads = {register: load for register, load in self.loads.items() if load[0] >= oldest}

    def younger(self, register: str) -> int:
        """Operations that were issued after the load that may still write a register."""
        return self.issued - 1 - self.loads[register][0]

    def merge(self, other: _Queue) -> bool:
        """Take over what is worse at the end of another block; True if anything is."""
        worse = False
        for register, (number, text) in other.loads.items():
            before = number - other.issued
            known = self.loads.get(register)
            if known is None or known[0] < before:
                self.loads[register] = (before, text)
                worse = True
        return worse


@dataclass(slots=True)
class _State:
    """Outstanding operations of all kinds."""

    queues: dict[Kind, _Queue] = field(
        default_factory=lambda: {kind: _Queue() for kind in _COUNTERS}
    )

    def copy(self) -> _State:
        return _State({k: _Queue(q.issued, dict(q.loads)) for k, q in self.queues.items()})

    def merge(self, other: _State) -> bool:
        """Take over what is worse in another block's end; True if anything is."""
        worse = [queue.merge(other.queues[kind]) for kind, queue in self.queues.items()]
        return any(worse)

    def step(self, effect: _Effect) -> None:
        """Follow one instruction.

        Raises:
            EmulatorError: it uses a register that an outstanding load may still write.
        """
        for kind, queue in self.queues.items():
            used = effect.used if kind == effect.kind else effect.used_or_loaded
            if not queue.loads.keys().isdisjoint(used):
                raise self._missing(effect, kind, min(used & queue.loads.keys()))
        if effect.kind is not None:
            self.queues[effect.kind].add(effect.loaded, effect.text)
        for counter, keep in effect.waits.items():
            self._wait(counter, keep)

    def _wait(self, counter: str, keep: int) -> None:
        if counter == "vmcnt":
            self.queues["vector"].finish(keep)
        elif keep == 0 or not self.queues["scalar"].loads:
            for kind in ("lds", "scalar"):
                self.queues[kind].finish(keep)

    def _missing(self, effect: _Effect, kind: Kind, register: str) -> EmulatorError:
        queue = self.queues[kind]
        in_order = kind == "vector" or not self.queues["scalar"].loads
        keep = queue.younger(register) if in_order else 0
        doing = "storing to" if register == _STORED else "loading"
        return EmulatorError(
            f"instruction `{effect.text}` uses {register}, which `{queue.loads[register][1]}` may still be {doing}: "
            f"no s_waitcnt {_COUNTERS[kind]}({keep}) in between."
        )


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _successors(
    last: Instruction | None, index: int, label_at: Mapping[str, int]
) -> tuple[int, ...]:
    if last is None or not last.mnemonic.startswith(("s_branch", "s_cbranch_", "s_endpgm")):
        return (index + 1,)
    if last.mnemonic == "s_endpgm":
        return ()
    target = label_at[last.operands[0]]
    return (target,) if last.mnemonic == "s_branch" else (target, index + 1)


def check_waits(blocks: Sequence[Sequence[Instruction]], label_at: Mapping[str, int]) -> None:
    """Refuse a program in which an instruction uses a register that an outstanding load may still write.

    Args:
        blocks: instructions that always run together; 0 is the entry.
        label_at: block that each label stands before.

    Raises:
        EmulatorError: there is such an instruction; the message names both, the register and the wait.
    """
    effects = [[_effect_of(instruction) for instruction in block] for block in blocks]
    after = [
        _successors(block[-1] if block else None, index, label_at)
        for index, block in enumerate(blocks)
    ]
    states: dict[int, _State] = {0: _State()}
    waiting = {0}
    while waiting:
        index = min(waiting)
        waiting.remove(index)
        state = states[index].copy()
        for effect in effects[index]:
            state.step(effect)
        for successor in after[index]:
            if successor == len(blocks):
                continue
            known = successor in states
            if states.setdefault(successor, _State()).merge(state) or not known:
                waiting.add(successor)
