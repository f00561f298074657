"""The correctness gate: runs poisoned cases and compares every output row with the oracle. Nothing is timed before it passed.

It stops at the first case that fails, and says which row was wrong, by how much, and where it can tell, which tokens were lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from patune.errors import EmulatorError
from patune.kernels.reference import reference_decode
from patune.record import check_choice
from patune.trial import STATUSES
from patune.tuner.gate.cases import Case, gate_cases
from patune.tuner.gate.checks import POISON, Rejected, check_lse, check_out, out_dtype, place
from patune.tuner.gate.tensors import build_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.calls import KernelCall
    from patune.kernels.inputs import DecodeInputs
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.target import Target
    from patune.tuner.executors import Executor

GUARD = 4096  # elements before and after every output buffer, which nobody may write


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """Verdict of the gate.

    Attributes:
        status: ``ok``, ``wrong``, ``nonfinite``, ``unstable`` or ``launch_error``.
        reason: what the first failing case saw; empty when ok.
        cases: cases passed.
        error_rms: worst relative RMS error of a row over the passed cases, or of the failing row.
        failed_case: name of the case that failed.
    """

    status: str
    reason: str = ""
    cases: int = 0
    error_rms: float | None = None
    failed_case: str | None = None

    def __post_init__(self) -> None:
        check_choice("status", self.status, STATUSES)

    @property
    def ok(self) -> bool:
        """Every case passed."""
        return self.status == "ok"


class Plan(Protocol):
    """How inputs and knobs become calls; :func:`patune.kernels.plan.plan_decode` is the one that counts."""

    def __call__(
        self,
        inputs: DecodeInputs,
        knobs: Knobs,
        target: Target,
        *,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> Sequence[KernelCall]:
        """Calls that compute the decode step."""
        ...


def run_gate(
    problem: Problem,
    knobs: Knobs,
    target: Target,
    executor: Executor,
    *,
    plan: Plan | None = None,
) -> GateReport:
    """Decide whether the knobs compute the problem. Deterministic: the same cases for the same problem and knobs.

    CPU executors (the emulator) get the small list of cases, devices the wide one.

    Raises:
        Exception: what compiling or launching raised, with the case as a note: only the worker knows whether its device survived.
    """
    cases = gate_cases(problem, knobs, emulated=executor.device.type == "cpu")
    return run_cases(cases, problem, knobs, target, executor, plan=plan)


def run_cases(
    cases: Sequence[Case],
    problem: Problem,
    knobs: Knobs,
    target: Target,
    executor: Executor,
    *,
    plan: Plan | None = None,
) -> GateReport:
    """Run the cases in order up to the first that fails."""
    worst = 0.0
    for passed, case in enumerate(cases):
        try:
            worst = max(worst, _run_case(case, problem, knobs, target, executor, plan))
        except Rejected as verdict:
            return GateReport(
                status=verdict.status,
                reason=f"case {case.name} (window {case.window}, tile {knobs.partition_tokens}, page {problem.block_size}, "
                f"splits {knobs.num_splits}): {verdict.reason}",
                cases=passed,
                error_rms=verdict.error_rms,
                failed_case=case.name,
            )
        except Exception as error:
            error.add_note(f"in gate case {case.name}")
            raise
    return GateReport(status="ok", cases=len(cases), error_rms=worst)


def _run_case(
    case: Case,
    problem: Problem,
    knobs: Knobs,
    target: Target,
    executor: Executor,
    plan: Plan | None,
) -> float:
    """Run one case with all its repeats; the worst relative RMS error of a row."""
    from patune.kernels.plan import plan_decode, workspace_elements

    inputs = build_inputs(case, problem, executor.device)
    if 0 < case.most_splits < knobs.num_splits:
        knobs = replace(knobs, num_splits=case.most_splits)
    elements = workspace_elements(problem, inputs.workload(), knobs)
    out = _Guarded("out", inputs.query.shape, out_dtype(problem), executor.device, gap=1)
    workspace = _Guarded("workspace", (elements,), torch.float32, executor.device)
    lse = _Guarded("lse", inputs.query.shape[:2], torch.float32, executor.device)
    buffers = (out, workspace, lse)
    calls = (plan or plan_decode)(
        inputs,
        knobs,
        target,
        out=out.inner,
        workspace=workspace.inner if elements else None,
        lse=lse.inner if case.checks_lse else None,
    )
    exact, exact_lse = reference_decode(inputs, dtype=torch.float64)
    caches = [] if case.far_pages else [memory.clone() for memory in _cache_memory(inputs)]
    _run(executor, calls, buffers)
    first = out.inner.clone()
    error_rms = check_out(case, problem, inputs, first, exact, exact_lse)
    if case.checks_lse:
        check_lse(problem, inputs, lse.inner.double(), exact_lse)
    for repeat in range(case.repeats):
        _run(executor, calls, buffers)
        if not torch.equal(out.inner, first):
            row = int((out.inner != first).flatten(1).any(1).nonzero()[0])
            where = place(inputs, row, 0).rsplit(",", 1)[0]
            raise Rejected("unstable", f"run {repeat + 2} differs from run 1 in {where}: a race")
    if caches and not all(map(torch.equal, caches, _cache_memory(inputs))):
        raise Rejected("wrong", "the key or value cache was written")
    return error_rms


def _cache_memory(inputs: DecodeInputs) -> list[torch.Tensor]:
    """The bytes that the caches lie in, those between their strides included."""
    return [
        torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
        for cache in (inputs.key_cache, inputs.value_cache)
    ]


class _Guarded:
    """An output buffer that is poison until a kernel writes it, between guards and with a gap after each row, which must stay poison."""

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        gap: int = 0,
    ) -> None:
        padded = torch.Size((shape[0], shape[1] + gap, *shape[2:]) if gap else shape)
        buffer = torch.empty(padded.numel() + 2 * GUARD, dtype=dtype, device=device)
        self.bits = buffer.view(torch.int16 if buffer.itemsize == 2 else torch.int32)
        self.poison = POISON[8 * buffer.itemsize]
        whole = slice(GUARD, GUARD + padded.numel())
        self.inner = buffer[whole].view(padded)
        self.guards = {f"before {name}": self.bits[:GUARD], f"after {name}": self.bits[-GUARD:]}
        if gap:
            self.guards[f"between rows of {name}"] = self.bits[whole].view(padded)[:, shape[1] :]
            self.inner = self.inner[:, : shape[1]]

    def poison_all(self) -> None:
        self.bits.fill_(self.poison)

    def check_guards(self) -> None:
        for where, guard in self.guards.items():
            if written := int((guard != self.poison).sum()):
                raise Rejected("wrong", f"{written} elements {where} were written")


def _run(executor: Executor, calls: Sequence[KernelCall], buffers: Sequence[_Guarded]) -> None:
    for buffer in buffers:
        buffer.poison_all()
    try:
        executor.run(calls)
    except EmulatorError as error:
        status = "unstable" if str(error).startswith("race") else "launch_error"
        raise Rejected(status, " ".join(str(error).split())) from error
    for buffer in buffers:
        buffer.check_guards()
