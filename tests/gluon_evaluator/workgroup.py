"""One program of a grid: its indices, its shared memory and the copies under way into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from gluon_evaluator import assembly, memory, products
from gluon_evaluator.copies import Copies
from gluon_evaluator.errors import require
from gluon_evaluator.formats import poisoned
from gluon_evaluator.shared import Shared
from gluon_evaluator.values import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gluon_evaluator.memory import Pointer


SHARED_LAYOUTS = (gl.NVMMASharedLayout, gl.SharedLinearLayout, gl.SwizzledSharedLayout)


class Workgroup:
    """What the functions of a program share. One workgroup runs the programs of a grid in turn."""

    def __init__(self) -> None:
        self.start((0, 0, 0))

    def start(self, program: tuple[int, int, int]) -> None:
        """Begin a program: nothing is left of the one before."""
        self.program = program
        self.copies = Copies()
        self._allocated_b = 0

    def program_id(self, axis: int) -> Tensor:
        return Tensor(np.int32(self.program[axis]), gl.int32)

    def allocate(
        self, element_ty: Any, shape: Sequence[int], layout: Any, value: Tensor | None = None
    ) -> Shared:
        """Poisoned shared memory, or a copy of ``value``."""
        require(isinstance(layout, SHARED_LAYOUTS), "shared memory in layout {}", layout)
        bits = poisoned(tuple(int(n) for n in shape), element_ty)
        shared = Shared(bits, element_ty, layout, self._allocated_b, self.copies)
        self._allocated_b = shared.end_b
        if value is not None:
            shared.store(value)
        return shared

    def copy_to_shared(
        self, smem: Shared, pointer: Pointer, mask: Tensor | bool | None = None
    ) -> None:
        """Start a copy from global memory. Lanes that are masked off write zeros."""
        require(
            smem.shape == pointer.shape and smem.dtype == pointer.buffer.dtype,
            "copy of {} {} to {}",
            pointer.shape,
            pointer.dtype,
            smem,
        )
        bits, kept = memory.gather("asynchronous copy", pointer, mask)
        self.copies.start(smem, bits if kept is None else np.where(kept, bits, bits.dtype.type(0)))

    def functions(self) -> dict[Any, Callable[..., Any]]:
        """The functions of ``gluon.language`` that know the workgroup or the memory."""
        table: dict[Any, Callable[..., Any]] = {
            gl.program_id: self.program_id,
            gl.allocate_shared_memory: self.allocate,
            gl.load: memory.load,
            gl.store: memory.store,
            gl.inline_asm_elementwise: assembly.inline_asm_elementwise,
            warpgroup_mma: products.warpgroup_mma,
            fence_async_shared: _nothing_to_order,
            async_copy.commit_group: lambda: self.copies.commit_group(),
            async_copy.wait_group: lambda n=0: self.copies.wait_group(n),
        }
        # Triton 3.6 and 3.9 name them differently; 3.9 keeps the old name of the copy, for an error message
        start = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
        barrier = getattr(gl, "barrier", None) or gl.thread_barrier
        return table | {start: self.copy_to_shared, barrier: _nothing_to_order}


def _nothing_to_order() -> None:
    """Barriers and fences: the threads of a workgroup are one here."""
