"""When looked-up knobs do not compile or launch here: whether they are to blame, and what to launch in their place."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Protocol

import torch

from patune.errors import PatuneError
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.feasibility import is_feasible
from patune.kernels.plan import workspace_elements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target

logger = logging.getLogger(__name__)
DRIVER = "triton error ["  # how Triton's launchers begin what the driver said
# What a driver says of the kernel or of its launch. Whatever else it says is of the device or of work queued before: an illegal access stays
# until the process ends, and trying something else would hide it.
OF_THE_LAUNCH = (
    "invalid argument", "invalid configuration", "invalid value", "out of resources", "too many resources", "device kernel image is invalid",
    "no kernel image", "invalid device function", "ptx was compiled", "ptx jit", "invalid source", "shared object", "named symbol not found",
)  # fmt: skip
MAX_REASON = 300


class Answered(Protocol):
    """The part of a lookup's answer that a launch needs."""

    @property
    def knobs(self) -> Knobs:
        """What to launch."""

    @property
    def source(self) -> str:
        """The layer that they are of."""


def blames_knobs(error: Exception) -> bool:
    """Whether a launch failed because of its knobs, so that others may work: the compiler's errors, and the driver's of this one launch."""
    from triton.errors import TritonError

    if isinstance(error, TritonError):
        return True
    if isinstance(error, PatuneError | torch.OutOfMemoryError) or not isinstance(
        error, RuntimeError | ValueError | TypeError | AssertionError
    ):
        return False
    text = str(error).lower()
    if text.startswith(DRIVER):
        return any(said in text for said in OF_THE_LAUNCH)
    # torch's own: its allocator, or an earlier kernel's fault that it noticed
    return "cuda error" not in text and "hip error" not in text and "out of memory" not in text


def reason_of(error: Exception) -> str:
    """One line: the type, and the sentence that says why; a compiler puts the source before it."""
    told = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and not getattr(error, "error_message", None):
        return f"{type(error).__name__}: {type(cause).__name__}: {cause}"[:MAX_REASON]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:MAX_REASON]


def that_fit(
    first: Knobs,
    problem: Problem,
    workload: Workload,
    target: Target,
    workspace: torch.Tensor | None,
) -> list[Knobs]:
    """Of these knobs, the default and the safe ones, those whose partial results the caller's workspace holds, in this order."""
    known = (first, default_knobs(problem, workload, target), safe_knobs(problem, target))
    found = [
        knobs
        for knobs in dict.fromkeys(known)
        if (workspace is None or workspace_elements(problem, workload, knobs) <= workspace.numel())
        and is_feasible(knobs, problem, target) is None
    ]
    if found and found[0] != first and is_feasible(first, problem, target) is None:
        assert workspace is not None
        _warn_about_workspace(problem, target, workspace.numel())
    return found


def tried_note(tried: Mapping[Knobs, str]) -> str:
    """What the last error says of all of them."""
    lines = (f"  {knobs}: {reason}" for knobs, reason in tried.items())
    return "\n".join(["No knobs could be launched. Tried:", *lines])


@functools.lru_cache(maxsize=4096)
def _warn_about_workspace(problem: Problem, target: Target, elements: int) -> None:
    """Say it, once per process."""
    logger.warning(
        "Knobs of block_size=%d head_dim=%d qg=%d on %s changed since the workspace of %d elements was allocated, and need a larger one: "
        "others that fit it are taken. workspace_for(...) allocates one for the present knobs.",
        problem.block_size, problem.head_dim, problem.qg, target.arch, elements,
    )  # fmt: skip
