"""Planted faults in compiled code: the assembly text of a real build with one barrier, wait or shared-memory offset changed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patune.tuner.executors import EmulatedExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.calls import KernelCall
    from patune.kernels.compile import Build
    from patune.target import Target

_LDS_ACCESS = re.compile(r"^\tds_(?:read|write)|^\tbuffer_load_dwordx4 .* lds", re.MULTILINE)
_DS_OFFSET = re.compile(r"^\tds_(?:read|write)(?!2)\S* [^\n;]*?(?: offset:(\d+))?$", re.MULTILINE)
_COPY_WAIT = re.compile(r"vmcnt\((\d+)\)")
LDS_SHIFT_B = 64  # more than one lane's element, and a multiple of every access's alignment


@dataclass(frozen=True)
class Fault:
    """One fault: ``kind`` groups them, ``place`` says where in the text, ``asm`` is the whole text with it."""

    kind: str
    place: str
    asm: str


def _line(asm: str, position: int) -> str:
    return f"line {asm.count(chr(10), 0, position) + 1}"


def removed_barriers(asm: str) -> Iterator[Fault]:
    """Each barrier removed; those with no access to shared memory between them together, as one alone orders the same."""
    barriers = [match.start() for match in re.finditer(r"\n\ts_barrier\b", asm)]
    groups: list[list[int]] = []
    for at in barriers:
        if groups and not _LDS_ACCESS.search(asm, groups[-1][-1], at):
            groups[-1].append(at)
        else:
            groups.append([at])
    for group in groups:
        text = asm
        for at in group:
            text = text[:at] + text[at:].replace("\n\ts_barrier", "\n\ts_nop 0", 1)
            assert len(text) == len(asm) + len("s_nop 0") - len("s_barrier") or len(group) > 1
            asm_shift = len("s_nop 0") - len("s_barrier")
            group[:] = [g + asm_shift if g > at else g for g in group]
        yield Fault("removed barrier", _line(asm, group[0]), text)


def shifted_offsets(asm: str) -> Iterator[Fault]:
    """Each single load from and store to shared memory moved by some bytes."""
    for match in _DS_OFFSET.finditer(asm):
        offset = int(match[1] or 0) + LDS_SHIFT_B
        line = re.sub(r" offset:\d+$", "", match[0]) + f" offset:{offset}"
        yield Fault("shifted shared memory offset", _line(asm, match.start()), asm[: match.start()] + line + asm[match.end() :])  # fmt: skip


def weakened_waits(asm: str, copies: int) -> Iterator[Fault]:
    """Each wait for direct-to-LDS copies that leaves one tile more under way."""
    for match in _COPY_WAIT.finditer(asm):
        outstanding = int(match[1])
        if outstanding < copies:
            continue  # a wait for ordinary loads, or for everything
        text = f"vmcnt({outstanding + copies})"
        yield Fault("weakened wait", _line(asm, match.start()), asm[: match.start()] + text + asm[match.end() :])  # fmt: skip


class FaultyExecutor(EmulatedExecutor):
    """Runs the builds of another executor, with one kernel's text replaced."""

    def __init__(self, target: Target, builds: EmulatedExecutor, kernel: str, fault: Fault) -> None:
        super().__init__(target)
        self._originals, self._kernel, self._fault = builds, kernel, fault
        self._seen: Build | None = None

    def _build(self, call: KernelCall) -> Build:
        build = self._originals._build(call)
        if call.kernel.fn.__name__ != self._kernel:
            return build
        if self._seen is None:
            self._seen = build
        return replace(build, asm=self._fault.asm)
