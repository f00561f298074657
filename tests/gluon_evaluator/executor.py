"""An executor for the gate: runs the source of the Hopper kernels on CPU tensors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gluon_evaluator.binding import Binder
from gluon_evaluator.formats import held_type
from gluon_evaluator.memory import Buffer, Pointer
from gluon_evaluator.promotion import argument_type
from gluon_evaluator.values import Tensor
from gluon_evaluator.workgroup import Workgroup
from patune.errors import EmulatorError
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.calls import KernelCall


class EvaluatedExecutor:
    """Runs calls as :class:`patune.tuner.executors.EmulatedExecutor` does, from source and not from compiled code."""

    def __init__(self) -> None:
        self.target = Target.named("sm_90")
        self.device = torch.device("cpu")
        self._workgroup = Workgroup()
        self._binder = Binder(self._workgroup.functions())

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Evaluate all calls, program after program.

        Raises:
            EmulatorError: an access outside of the arguments, or a race with a copy.
            RefusedProgramError: source that Gluon would not compile.
            UnknownToEvaluatorError: a name that has no numpy version.
        """
        # what overflows, or is NaN, is the kernel's affair
        with np.errstate(all="ignore"):
            for call in calls:
                self._run(call)

    def replay(self, calls: Sequence[KernelCall], resident: Sequence[torch.Tensor]) -> None:
        """Run again."""
        self.run(calls)

    def _run(self, call: KernelCall) -> None:
        function = self._binder.kernel(call.kernel)
        arguments = {name: _argument(name, value) for name, value in call.arguments.items()}
        for z, y, x in itertools.product(*(range(n) for n in reversed(call.grid))):
            self._workgroup.start((x, y, z))
            try:
                function(**arguments, **call.constants)
            except EmulatorError as error:
                where = f"In program {(x, y, z)} of {function.__name__}."
                raise EmulatorError(f"{error} {where}") from error


def _argument(name: str, value: torch.Tensor | int | float | None) -> Any:
    """A run-time argument: a pointer, or a scalar of the type that Triton gives it. What is absent is known at compile time."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return Pointer(Buffer.of(name, value), 0)
    dtype = argument_type(value)
    return Tensor(held_type(dtype)(value), dtype)
