"""False rejections and time of the correctness gate, over the default keys and a grid of knobs.

    python benchmarks/gate.py --target sm_90 --knobs grid --jobs 12 --json gate.json

Every feasible row is compiled and gated in one of ``--jobs`` processes. Then the default rows are gated again one by one in a process that has
them compiled, twice: the second time is the gate's own, without compiling and loading kernels.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patune.environment import current_environment
from patune.kernels.knobs import knobs_from_dict
from patune.problem import Problem
from patune.sweep_request import DEFAULTS, problems_of, workloads_of
from patune.target import Target, detect_target
from patune.tuner.check_cases import CheckOptions, select_cases
from patune.tuner.executors import make_executor
from patune.tuner.gate import run_gate
from patune.tuner.tasks import reason_of, status_of
from patune.tuner.worker import poisons_context

if TYPE_CHECKING:
    from patune.tuner.executors import EmulatedExecutor, GpuExecutor

TIMED_RUNS = 3


@functools.cache
def executor_of(target: Target) -> GpuExecutor | EmulatedExecutor:
    torch.set_num_threads(1)
    return make_executor(target)


def gate(payload: dict[str, Any]) -> dict[str, Any]:
    """Build and gate one row; what is refused before the gate ends there, as in a sweep."""
    from patune.kernels.plan import plan_decode, workspace_elements
    from patune.kernels.samples import sample_inputs
    from patune.tuner.check_tasks import TINY

    target, problem = Target.from_dict(payload["target"]), Problem.from_dict(payload["problem"])
    knobs, executor = knobs_from_dict(payload["knobs"]), executor_of(target)
    try:
        inputs = sample_inputs(problem, TINY, executor.device)
        out = torch.empty(inputs.query.shape, dtype=inputs.out_dtype, device=executor.device)
        elements = workspace_elements(problem, TINY, knobs)
        workspace = torch.empty(elements, device=executor.device)
        built = executor.build(plan_decode(inputs, knobs, target, out=out, workspace=workspace))
        if built.status != "ok":
            return {"status": built.status, "reason": built.reason}
        report = run_gate(problem, knobs, target, executor)
    except Exception as error:  # the verdict of this row
        if poisons_context(error):  # and of no other: this process has lost its device
            raise
        return {"status": status_of(error, "gate"), "reason": reason_of(error)}
    return {
        "status": report.status,
        "reason": report.reason,
        "cases": report.cases,
        "error_rms": report.error_rms,
    }


def gate_time_s(payload: dict[str, Any]) -> float:
    """The shortest of TIMED_RUNS gates after one that does not count."""
    target, problem = Target.from_dict(payload["target"]), Problem.from_dict(payload["problem"])
    knobs, executor = knobs_from_dict(payload["knobs"]), executor_of(target)
    times = []
    for _ in range(1 + TIMED_RUNS):
        start = time.perf_counter()
        run_gate(problem, knobs, target, executor)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="gfx942", help="sm_90, gfx942 or gfx950")
    parser.add_argument("--knobs", choices=("default", "grid"), default="default")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = Target.named(options.target)
    if target.vendor == "nvidia":
        target = detect_target() or target
    check = CheckOptions(
        targets=(target,),
        problems=problems_of(DEFAULTS, {}),
        workloads=workloads_of({}, "emulated"),
        knobs=options.knobs,
    )
    cases = select_cases(check)
    feasible = [case for case in cases if not case.infeasible]
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        verdicts = list(pool.map(gate, (case.to_dict() for case in feasible)))
    seconds = time.perf_counter() - start
    statuses = Counter(verdict["status"] for verdict in verdicts)
    rows = [{**case.to_dict(), "default": case.default, **verdict} for case, verdict in zip(feasible, verdicts, strict=True)]  # fmt: skip
    for row in rows:
        if row["default"] and row["status"] == "ok":
            row["gate_s"] = gate_time_s(row)
    times = [row["gate_s"] for row in rows if "gate_s" in row]
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "target": target.to_dict(),
        "environment": current_environment(target).to_dict(),
        "infeasible": len(cases) - len(feasible),
        "statuses": dict(statuses),
        "seconds": seconds,
        "rows": rows,
    }
    print(f"{document['date']} {target.device_name}: {len(feasible)} feasible rows of {len(cases)}, {dict(statuses)}, {seconds:.0f} s")  # fmt: skip
    if times:
        print(f"gate of {len(times)} default rows: median {statistics.median(times):.3f} s, worst {max(times):.3f} s")  # fmt: skip
    for row in rows:
        if row["status"] not in ("ok", "spills", "out_of_resources"):
            print(f"REJECTED {row['problem']} {row['knobs']}: {row['status']}: {row['reason']}")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if set(statuses) - {"ok", "spills", "out_of_resources"} else 0


if __name__ == "__main__":
    raise SystemExit(main())
