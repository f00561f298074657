"""What worker processes do for a check and for a verification: build one case, and run its gate.

A build looks for no GPU. The gate of an AMD target runs in the emulator, that of an NVIDIA target (a verification's) on the GPU of this process.
Each task takes a JSON payload and returns JSON. Torch and Triton are imported inside: the coordinator imports this module too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from patune.errors import NoUsableGpuError
from patune.kernels.knobs import Knobs, knobs_from_dict
from patune.problem import Problem, Workload
from patune.record import digest
from patune.target import Target
from patune.tuner.check_rows import is_refusal
from patune.tuner.tasks import TINY_CONTEXT, reason_of, status_of
from patune.tuner.worker import poisons_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.calls import KernelCall
    from patune.tuner.gate import Plan

TASKS = {
    "build": "patune.tuner.check_tasks:build_case",
    "gate": "patune.tuner.check_tasks:gate_case",
}
TINY = Workload(batch=1, kv_heads=8, context=TINY_CONTEXT)  # builds do not depend on the sizes


def build_case(payload: dict[str, Any], plan: Plan | None = None) -> dict[str, Any]:
    """Compile a case's kernels: ``{"status", "reason", "facts", "identity"}``; status ``ok`` or why the case ends here.

    Cases of one identity have the same machine code, the same launch and the same gate cases: one gate speaks for all of them.
    """
    from patune.kernels.compile import compile_call
    from patune.tuner.executors import judge_builds
    from patune.tuner.gate.cases import gate_cases

    problem, knobs, target = _decoded(payload)
    try:
        calls = _sample_calls(problem, knobs, target, plan)
        builds = {call.kernel.fn.__name__: compile_call(call, target) for call in calls}
        report = judge_builds(builds, target)
    except Exception as error:  # whatever the compiler raises is the verdict of this case
        return _failure(error, "build")
    emulated = target.vendor == "amd"
    cases = [dataclasses.asdict(case) for case in gate_cases(problem, knobs, emulated=emulated)]
    launches = [_launch_of(call) for call in calls]
    identity = digest([payload["target"], payload["problem"], report.digest, launches, cases])
    return {
        "status": report.status,
        "reason": report.reason,
        "facts": report.facts,
        "identity": identity,
    }


def gate_case(payload: dict[str, Any], plan: Plan | None = None) -> dict[str, Any]:
    """Run the correctness gate on the compiled code: ``{"status", "reason", "gate_cases", "error_rms"}``.

    Raises:
        Exception: what the device context did not survive; the crew replaces the worker.
    """
    import torch

    from patune.tuner.executors import make_executor
    from patune.tuner.gate import run_gate

    problem, knobs, target = _decoded(payload)
    if target.vendor == "amd":
        torch.set_num_threads(1)  # there is a worker per core
    try:
        # an executor of its own: programs of hundreds of cases would add up, and Triton's cache has the builds
        report = run_gate(problem, knobs, target, make_executor(target), plan=plan)
    except NoUsableGpuError as error:  # says nothing about the case
        return {"status": "no_device", "reason": f"gate: {error}"}
    except Exception as error:  # the emulator's or the compiler's: the verdict of this case
        if poisons_context(error):
            raise
        return _failure(error, "gate")
    refused = report.status == "launch_error" and is_refusal(report.reason)
    return {
        "status": "not_verified" if refused else report.status,
        "reason": report.reason,
        "gate_cases": report.cases,
        "error_rms": report.error_rms,
    }


def _decoded(payload: dict[str, Any]) -> tuple[Problem, Knobs, Target]:
    return (
        Problem.from_dict(payload["problem"]),
        knobs_from_dict(payload["knobs"]),
        Target.from_dict(payload["target"]),
    )


def _failure(error: Exception, phase: Any) -> dict[str, Any]:
    return {"status": status_of(error, phase), "reason": f"{phase}: {reason_of(error)}"}


def _sample_calls(
    problem: Problem, knobs: Knobs, target: Target, plan: Plan | None
) -> Sequence[KernelCall]:
    """The calls of a decode step on tiny CPU tensors."""
    import torch

    from patune.kernels.plan import plan_decode, workspace_elements
    from patune.kernels.samples import sample_inputs

    inputs = sample_inputs(problem, TINY, torch.device("cpu"))
    workspace = torch.empty(workspace_elements(problem, TINY, knobs), dtype=torch.float32)
    out = torch.empty(inputs.query.shape, dtype=inputs.out_dtype)
    return (plan or plan_decode)(inputs, knobs, target, out=out, workspace=workspace, lse=None)


def _launch_of(call: KernelCall) -> list[Any]:
    """What a launch depends on besides machine code and tensors: the grid, and run-time numbers such as the number of splits."""
    numbers = {n: v for n, v in call.arguments.items() if isinstance(v, int | float)}
    return [call.kernel.fn.__name__, list(call.grid), numbers]
