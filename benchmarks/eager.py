"""Host time of eager calls of paged_attention_decode, warm and back to back. Prints one JSON document; needs an sm_90 GPU.

    python benchmarks/eager.py [--json FILE]

A figure is the median of many repeats of 200 calls with no synchronisation inside: microseconds of the calling thread per call, after two
seconds of calls that bring the clocks up. Batch 1, context 4096, 8 KV heads, 64 query heads of 128; the stored or default knobs, looked up
and given with ``overlap_launch`` on and off. ``through_triton`` plans and launches as a first call does; ``bound_launch`` and ``signature``
are parts of a call. An empty Triton kernel and ``fill_`` of the output give the scale of this host.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from patune import paged_attention_decode
from patune.kernels import decode
from patune.kernels.decode import forget_steps, workspace_for
from patune.kernels.inputs import DecodeInputs
from patune.kernels.knobs import HopperKnobs, knobs_to_dict
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import Target, detect_target

CALLS = 200
REPEATS = 200
WARM_UP_S = 2.0  # before the first figure: without it the first configuration of a process took 24.5 us, the others 18
WARM_UP_CALLS = 2000  # before every figure
WORKLOAD = Workload(batch=1, kv_heads=8, context=4096)
PROBLEMS = {
    "page64_hnd": Problem(block_size=64, head_dim=128, qg=8, kv_layout="hnd"),
    "page1024_aiter": Problem(block_size=1024, head_dim=128, qg=8),
}
VARIANTS = {"looked_up": None, "overlap": True, "alone": False}  # of overlap_launch


@triton.jit
def empty_kernel(pointer):
    pass


def host_us(function: Callable[[], object]) -> dict[str, float]:
    """Microseconds per call: median, fastest and slowest repeat."""
    for _ in range(WARM_UP_CALLS):
        function()
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            function()
        seconds.append((time.perf_counter() - started) / CALLS)
    torch.cuda.synchronize()
    found = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(value * 1e6, 2) for name, value in found.items()}


def warm_up(function: Callable[[], object]) -> None:
    """Call for ``WARM_UP_S`` seconds."""
    ends = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < ends:
        for _ in range(CALLS):
            function()
        torch.cuda.synchronize()


def caller(inputs: DecodeInputs, **options: Any) -> Callable[[], object]:
    """A call as serving code writes it: caches and lengths by position, the rest by keyword."""
    query, key, value = inputs.query, inputs.key_cache, inputs.value_cache
    table, lengths, scale = inputs.block_tables, inputs.context_lengths, inputs.softmax_scale
    return lambda: paged_attention_decode(
        query, key, value, table, lengths, softmax_scale=scale, **options
    )


def parts(inputs: DecodeInputs, out: torch.Tensor, space: torch.Tensor, knobs: Any) -> dict[str, Any]:  # fmt: skip
    """What a warm call with both buffers is made of; its step is the only one there is."""
    (step,) = decode._steps.values()
    assert step.bound is not None, "the step is launched by Triton each time"
    launch = step.bound.launch
    tensors = (
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables, inputs.context_lengths,
        None, None, None, None,
    )  # fmt: skip
    scalars = (inputs.softmax_scale, 1, 0, 0.0, False, None)
    every = (*tensors, out, None, space)
    return {
        "knobs": knobs_to_dict(step.knobs),
        "kernels": len(step.bound._launches),
        "signature": host_us(
            lambda: decode._steps[decode._signature(tensors, scalars, out, space, False, knobs)]
        ),
        "bound_launch": host_us(lambda: launch(every)),
        "through_triton": host_us(lambda: decode._launch_by_triton(step, scalars, every)),
    }


def measure(problem: Problem, overlap: bool | None, target: Target) -> dict[str, Any]:
    """One problem by which buffers the caller brings; knobs are given too unless ``overlap`` is None."""
    forget_steps()
    inputs = sample_inputs(problem, WORKLOAD, torch.device("cuda"))
    knobs = None
    if overlap is not None:
        looked_up = decode._looked_up(problem, WORKLOAD, target).knobs
        assert isinstance(looked_up, HopperKnobs)
        knobs = replace(looked_up, overlap_launch=overlap)
    space = workspace_for(problem, WORKLOAD, device=torch.device("cuda"), knobs=knobs)
    out = torch.empty_like(inputs.query)
    with_both = caller(inputs, out=out, workspace=space, knobs=knobs)
    warm_up(with_both)
    found = {"given": host_us(with_both), **parts(inputs, out, space, knobs)}
    for name, buffers in {
        "no_out": {"workspace": space},
        "no_workspace": {"out": out},
        "no_buffers": {},
    }.items():
        found[name] = host_us(caller(inputs, knobs=knobs, **buffers))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the document to this file")
    target = detect_target() if torch.cuda.is_available() else None
    file: Path | None = parser.parse_args().json
    if target is None or target.arch != "sm_90":
        raise SystemExit("benchmarks/eager.py needs an sm_90 GPU; `patune doctor` says what is here.")  # fmt: skip
    some = torch.empty(64 * 128, dtype=torch.bfloat16, device="cuda")
    compiled = empty_kernel[(1,)](some)
    warm_up(lambda: some.fill_(0.0))
    document = {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "calls": CALLS,
        "repeats": REPEATS,
        "warm_up_s": WARM_UP_S,
        "unit": "us of host time per call",
        "empty_triton_kernel": host_us(lambda: empty_kernel[(1,)](some)),
        "empty_compiled_kernel": host_us(lambda: compiled[(1, 1, 1)](some)),
        "fill": host_us(lambda: some.fill_(0.0)),
        "empty_like": host_us(lambda: torch.empty_like(some)),
        "decode": {
            f"{name}_{variant}": measure(problem, overlap, target)
            for name, problem in PROBLEMS.items()
            for variant, overlap in VARIANTS.items()
        },
    }
    text = json.dumps(document, indent=2)
    print(text)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
