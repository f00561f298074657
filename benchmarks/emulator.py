"""How long the ISA emulator takes on this machine: one decode, and the emulated correctness gate of a few configurations.

    python benchmarks/emulator.py

Compiling and parsing are left out (a first run has done them). Times are the best of several runs, in seconds of one core.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import TYPE_CHECKING

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one core, and before numpy loads its BLAS

import numpy as np
import torch
import triton

from patune.kernels.knobs import CdnaKnobs
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import Target
from patune.tuner.executors import EmulatedExecutor
from patune.tuner.gate import run_gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DECODE_RUNS, GATE_RUNS = 20, 2
DECODE_PROBLEM = Problem(block_size=1024, head_dim=128, qg=16)
DECODE_WORKLOAD = Workload(batch=1, kv_heads=1, context=1024)
DECODE_TILES = ((128, 4), (64, 2))  # (partition_tokens, num_warps)
GATES = {
    "page 1024, qg 8": (
        Problem(block_size=1024, head_dim=128, qg=8),
        CdnaKnobs(partition_tokens=128, num_splits=4, num_stages=1, num_warps=4),
    ),
    "windowed, sinks": (
        Problem(block_size=64, head_dim=128, qg=8, windowed=True, sinks=True),
        CdnaKnobs(partition_tokens=64, num_splits=2, num_stages=1, num_warps=2),
    ),
    "query_length 4": (
        Problem(block_size=64, head_dim=128, qg=8, query_length=4),
        CdnaKnobs(partition_tokens=64, num_splits=4, num_stages=2, num_warps=2),
    ),
    "tile 256, one shot": (
        Problem(block_size=1024, head_dim=128, qg=8),
        CdnaKnobs(partition_tokens=256, num_splits=1, num_stages=1, num_warps=8),
    ),
}


def best_of(runs: int, call: Callable[[], object]) -> float:
    """The shortest of some runs, after one that does not count."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def decodes(arch: str) -> Iterator[tuple[str, int, float]]:
    """(tile, wave instructions, seconds with race detection) of one decode step."""
    executor = EmulatedExecutor(Target.named(arch))
    for tokens, warps in DECODE_TILES:
        knobs = CdnaKnobs(partition_tokens=tokens, num_splits=4, num_stages=1, num_warps=warps)
        inputs = sample_inputs(DECODE_PROBLEM, DECODE_WORKLOAD, executor.device)
        out = torch.empty(inputs.query.shape, dtype=inputs.out_dtype)
        elements = workspace_elements(DECODE_PROBLEM, DECODE_WORKLOAD, knobs)
        workspace = torch.empty(elements, dtype=torch.float32)
        calls = plan_decode(inputs, knobs, executor.target, out=out, workspace=workspace)
        executions = [executor.execute(call, count=True) for call in calls]
        seconds = best_of(DECODE_RUNS, lambda calls=calls: executor.run(calls))  # type: ignore[misc]
        yield (
            f"tile {tokens}, {warps} warps",
            sum(e.wave_instructions for e in executions),
            seconds,
        )


def gates(arch: str) -> Iterator[tuple[str, str, float]]:
    """(configuration, status, seconds) of the emulated gate."""
    executor = EmulatedExecutor(Target.named(arch))
    for name, (problem, knobs) in GATES.items():
        status = run_gate(problem, knobs, executor.target, executor).status
        seconds = best_of(
            GATE_RUNS,
            lambda problem=problem, knobs=knobs: run_gate(  # type: ignore[misc]
                problem, knobs, executor.target, executor
            ),
        )
        yield name, status, seconds


def main() -> None:
    versions = f"triton {triton.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    print(f"{datetime.date.today()}, {versions}")
    for arch in ("gfx942", "gfx950"):
        for tile, instructions, seconds in decodes(arch):
            print(
                f"{arch}  decode 1024 tokens, {tile:18} {seconds:.4f} s, {instructions} wave instructions"
            )
        for name, status, seconds in gates(arch):
            print(f"{arch}  gate {name:27} {seconds:.3f} s, {status}")


if __name__ == "__main__":
    main()
