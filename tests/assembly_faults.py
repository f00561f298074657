"""Planted faults in compiled code: the text of a real build with one barrier, wait or shared-memory offset changed, or a buffer cut short."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from patune.tuner.executors import EmulatedExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patune.emulator import Execution
    from patune.kernels.calls import KernelCall
    from patune.kernels.compile import Build

_BARRIER = re.compile(r"^\ts_barrier\b", re.MULTILINE)
_LDS_ACCESS = re.compile(r"^\t(?:ds_(?:read|write)|buffer_load\S* .* lds\b)", re.MULTILINE)
_LDS_OFFSET = re.compile(r"^(\tds_(?:read|write)_\S+ [^\n;]*?)(?: offset:(\d+))?[ \t]*$", re.MULTILINE)  # fmt: skip
_LDS_PAIR = re.compile(r"^(\tds_(?:read|write)2\S* [^\n;]*? offset1:)(\d+)", re.MULTILINE)
_COPY_WAIT = re.compile(r"^(\ts_waitcnt [^\n]*?vmcnt\()([1-9]\d*)\)", re.MULTILINE)
SHIFT_B = 64  # not a lane's own element again, and a multiple of every access's alignment
NO_OPERATION = "\ts_nop 0"


@dataclass(frozen=True)
class Fault:
    """One fault: ``kind`` groups them, ``place`` says where; the text with it, or the argument that lost its second half."""

    kind: str
    place: str
    asm: str = ""
    argument: str = ""


def _place(asm: str, match: re.Match[str]) -> str:
    line = asm.count("\n", 0, match.start()) + 1
    return f"line {line}: {' '.join(match[0].split())}"


def _spliced(asm: str, match: re.Match[str], text: str) -> str:
    return asm[: match.start()] + text + asm[match.end() :]


def removed_barriers(asm: str) -> Iterator[Fault]:
    """Each barrier gone; those with no access to shared memory in between go together, as one of them orders the same."""
    groups: list[list[re.Match[str]]] = []
    for match in _BARRIER.finditer(asm):
        if groups and not _LDS_ACCESS.search(asm, groups[-1][-1].end(), match.start()):
            groups[-1].append(match)
        else:
            groups.append([match])
    for group in groups:
        text = asm
        for match in reversed(group):
            text = _spliced(text, match, NO_OPERATION)
        yield Fault("removed barrier", _place(asm, group[0]), text)


def shifted_offsets(asm: str) -> Iterator[Fault]:
    """Each access to shared memory elsewhere: its constant offset is larger."""
    for match in _LDS_OFFSET.finditer(asm):
        text = f"{match[1]} offset:{int(match[2] or 0) + SHIFT_B}"
        yield Fault("shifted LDS offset", _place(asm, match), _spliced(asm, match, text))
    for match in _LDS_PAIR.finditer(asm):
        text = f"{match[1]}{int(match[2]) + 8}"
        yield Fault("shifted LDS offset", _place(asm, match), _spliced(asm, match, text))


def weakened_waits(asm: str) -> Iterator[Fault]:
    """Each wait for direct-to-LDS copies that does not wait; waits for everything are the compiler's, for its own loads."""
    for match in _COPY_WAIT.finditer(asm):
        text = f"{match[1]}63)"
        yield Fault("weakened wait", _place(asm, match), _spliced(asm, match, text))


def short_buffers(arguments: Sequence[str]) -> Iterator[Fault]:
    """Each buffer of a launch half as long as the kernel may believe."""
    for name in arguments:
        yield Fault("short buffer", name, argument=name)


def builds_of(executor: EmulatedExecutor, kernel: str) -> list[Build]:
    """The builds of a kernel that an executor has made, in order."""
    return [build for key, build in executor._builds.items() if f"'{kernel}'" in key]


class FaultyExecutor(EmulatedExecutor):
    """Runs the builds of another executor, one of them with a fault."""

    def __init__(self, builds: EmulatedExecutor, original: Build, fault: Fault) -> None:
        super().__init__(builds.target)
        self._originals, self._original, self._fault = builds, original, fault

    def _build(self, call: KernelCall) -> Build:
        build = self._originals._build(call)
        if self._fault.asm and build.digest == self._original.digest:
            return replace(build, asm=self._fault.asm)
        return build

    def execute(self, call: KernelCall, *, count: bool) -> Execution:
        name = self._fault.argument
        if name and self._originals._build(call).digest == self._original.digest:
            tensor = call.arguments[name]
            assert isinstance(tensor, torch.Tensor)
            short = torch.as_strided(tensor, (max(1, _span(tensor) // 2),), (1,))
            call = replace(call, arguments={**call.arguments, name: short})
        return super().execute(call, count=count)


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
