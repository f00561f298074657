"""One kernel launch as a value: a GPU launches it, the compiler takes its signature, the emulator takes its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelCall:
    """A kernel with everything it is launched with.

    Attributes:
        kernel: the ``@gluon.jit`` function.
        grid: workgroups per axis.
        arguments: run-time arguments by name, in the kernel's parameter order; an absent pointer is None, known at compile time.
        constants: constexpr arguments by name.
        options: compile options (num_warps, maxnreg, waves_per_eu, ...).
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, torch.Tensor | int | float | None]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def launch(self) -> Any:
        """Compile if needed and launch on the current device's stream; returns Triton's compiled kernel."""
        return self.kernel[self.grid](*self.arguments.values(), **self.constants, **self.options)
