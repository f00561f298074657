"""Serving on a real device: winners that do not build or load, the safe knobs under the gate, overrides, and warm-up that leaves nothing to compile."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton
from test_gpu_launch import call
from triton.errors import TritonError

import patune
from patune.configs import dispatcher
from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.environment import current_environment
from patune.kernels import decode, feasibility, hopper, reduce
from patune.kernels.decode import forget_steps
from patune.kernels.defaults import safe_knobs
from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import HopperKnobs
from patune.kernels.plan import workspace_elements
from patune.kernels.reference import reference_decode
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.settings import database_place
from patune.target import Target, detect_target
from patune.trial import Timing
from patune.tuner.executors import GpuExecutor
from patune.tuner.gate import run_gate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.inputs import DecodeInputs
    from patune.kernels.knobs import Knobs

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SIZES = Workload(batch=3, kv_heads=2, context=700)
# Each test has problems of its own: what fails once is not tried again in this process.
PLAIN = Problem(block_size=32, head_dim=128, qg=7)
WGMMA = HopperKnobs(partition_tokens=64, num_splits=2, num_stages=1, num_warps=2)
LARGE = HopperKnobs(partition_tokens=256, num_splits=4, num_stages=4, num_warps=4)


@pytest.fixture(scope="module")
def target() -> Target:
    found = detect_target()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _own_answers(_own_database: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other tests looked up does not count here, nor the other way round."""
    monkeypatch.setattr(dispatcher, "_state", dispatcher._state)
    monkeypatch.setattr(decode, "_changed", False)
    monkeypatch.setenv("PATUNE_WATCH", "0")
    monkeypatch.setenv("PATUNE_CAPTURE", "0")
    forget_steps()
    dispatcher.reload()
    monkeypatch.setattr(decode, "_changed", False)
    yield
    forget_steps()


def plant(problem: Problem, knobs: Knobs, target: Target, workload: Workload = SIZES) -> None:
    """Make these knobs the stored winner of the problem."""
    winner = Winner(
        target=target,
        environment=current_environment(target),
        problem=problem,
        workload=workload,
        knobs=knobs,
        evidence="measured",
        timing=Timing(median_us=8.0, p20_us=7.9, p80_us=8.1, replays=24, read_fraction=0.5),
        counted=None,
        default_score=None,
        default_knobs=None,
        trials=8,
        gate_cases=7,
        error_rms=0.0025,
        created="2026-11-22T10:42:00Z",
    )
    with Store.open(database_place()) as store:
        store.merge([winner], imported_from="a test")
    dispatcher.reload()
    decode._changed = False


@pytest.fixture(params=["does_not_compile", "does_not_load"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HopperKnobs:
    """Knobs that fail on the device, and that feasibility takes for good."""
    if request.param == "does_not_compile":
        monkeypatch.setattr(feasibility, "WARPGROUP", 2)
        return WGMMA
    monkeypatch.setattr(feasibility, "hopper_shared_b", lambda knobs, problem: 0)
    return LARGE


def is_right(out: torch.Tensor, inputs: DecodeInputs) -> bool:
    exact, _ = reference_decode(inputs, dtype=torch.float64)
    return float((out.double() - exact).norm() / exact.norm()) < 0.01


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = (r for r in caplog.records if r.name.startswith("patune"))
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


def launched() -> list[Knobs]:
    return [step.knobs for step in decode._steps.values()]


def test_a_winner_that_fails_is_replaced_with_one_warning(
    broken: HopperKnobs, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    problem = replace(PLAIN, qg=7 if broken is WGMMA else 6)
    plant(problem, broken, target)
    assert is_feasible(broken, problem, target) is None
    assert dispatcher.lookup_problem(problem, SIZES, target).knobs == broken
    inputs = sample_inputs(problem, SIZES, GPU)
    caplog.clear()
    for _ in range(3):
        assert is_right(call(inputs), inputs)
    (said,) = warnings(caplog)
    assert f"patune sweep --block-size 32 --head-dim 128 --qg {problem.qg}" in said
    assert broken not in launched()
    assert dispatcher.lookup_problem(problem, SIZES, target).knobs == launched()[0]
    # other signatures of the problem begin with what works
    out, _ = call(inputs, return_lse=True)
    assert is_right(out, inputs)
    dispatcher.reload()
    assert is_right(call(inputs), inputs)
    assert len(warnings(caplog)) == 1
    # and what replaces it can be captured
    out = torch.zeros_like(out)
    call(inputs, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(inputs, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert is_right(out, inputs)


def test_a_workspace_for_the_winner_serves_what_replaces_it(
    broken: HopperKnobs, target: Target
) -> None:
    problem = replace(PLAIN, qg=5 if broken is WGMMA else 3)
    plant(problem, broken, target)
    inputs = sample_inputs(problem, SIZES, GPU)
    workspace = torch.full((workspace_elements(problem, SIZES, broken),), float("nan"), device=GPU)
    for _ in range(2):
        assert is_right(call(inputs, workspace=workspace), inputs)
    (knobs,) = launched()
    assert knobs != broken
    assert workspace_elements(problem, SIZES, knobs) <= workspace.numel()


def test_chosen_knobs_that_fail_raise(broken: HopperKnobs, target: Target) -> None:
    problem = replace(PLAIN, qg=2)
    inputs = sample_inputs(problem, SIZES, GPU)
    for _ in range(2):
        with pytest.raises((RuntimeError, TritonError)):
            call(inputs, knobs=broken)
        with patune.override(broken), pytest.raises((RuntimeError, TritonError)):  # fmt: skip
            call(inputs)
    assert launched() == []
    assert is_right(call(inputs), inputs)


def test_an_override_is_launched_inside_only(target: Target) -> None:
    inputs = sample_inputs(replace(PLAIN, qg=4), SIZES, GPU)
    assert is_right(call(inputs), inputs)
    (usual,) = launched()
    for _ in range(2):
        with patune.override(num_splits=5, num_stages=1):
            assert is_right(call(inputs), inputs)
        assert is_right(call(inputs), inputs)
    assert launched() == [usual, replace(usual, num_splits=5, num_stages=1)]


FP8 = {"kv_dtype": "fp8_e4m3fn"}
GATED = [
    Problem(block_size=1024, head_dim=128, qg=8),
    Problem(block_size=16, head_dim=64, qg=1, kv_layout="nhd"),
    Problem(block_size=64, head_dim=128, qg=16, query_length=4, windowed=True, sinks=True),
    Problem(block_size=32, head_dim=256, qg=16, kv_layout="hnd", softcap=True),
    Problem(block_size=512, head_dim=256, qg=32, query_length=2),
    Problem(block_size=16, head_dim=128, qg=5, query_length=2, kv_layout="aiter_5d", **FP8, kv_quant="per_token"),
    Problem(block_size=128, head_dim=64, qg=8, kv_layout="hnd", **FP8, kv_quant="per_tensor", fp8_math=True),
    Problem(block_size=64, head_dim=128, qg=33, **FP8, query_dtype="fp8_e4m3fn", kv_quant="per_token", fp8_math=True),
    Problem(block_size=256, head_dim=128, qg=8, query_dtype="fp16", kv_dtype="fp16", sinks=True),
]  # fmt: skip


@pytest.mark.parametrize("problem", GATED, ids=lambda p: f"{p.block_size}_{p.head_dim}_{p.rows}_{p.kv_layout}_{p.kv_dtype}")  # fmt: skip
def test_safe_knobs_pass_the_gate(problem: Problem, target: Target) -> None:
    report = run_gate(problem, safe_knobs(problem, target), target, GpuExecutor(target))
    assert (report.status, report.reason) == ("ok", "")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton's JIT does not find in this process meanwhile."""
    seen: list[str] = []

    def hook(**compilation: Any) -> None:
        seen.append(compilation["fn"].name)

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield seen
    finally:
        triton.knobs.runtime.jit_cache_hook = before


WARM = [
    (Problem(block_size=1024, head_dim=128, qg=8), Workload(batch=2, kv_heads=2, context=4000)),
    (Problem(block_size=16, head_dim=64, qg=4, kv_layout="nhd", sinks=True), Workload(batch=130, kv_heads=2, context=100)),
    (Problem(block_size=64, head_dim=128, qg=8, windowed=True, query_length=2), Workload(batch=1, kv_heads=8, context=128)),
    (Problem(block_size=64, head_dim=128, qg=8, kv_layout="hnd", **FP8, kv_quant="per_token"), Workload(batch=3, kv_heads=3, context=700)),
    (Problem(block_size=16, head_dim=128, qg=2, **FP8, kv_quant="per_tensor", query_dtype="fp8_e4m3fn"), Workload(batch=1, kv_heads=1, context=2000)),
]  # fmt: skip


def test_after_warm_up_calls_compile_nothing(target: Target) -> None:
    for kernel in (hopper.hopper_decode_kernel, reduce.reduce_kernel):
        kernel.device_caches.clear()
    with compilations() as seen:
        warmed = patune.warmup(WARM)
    assert [w.error for w in warmed] == [None] * len(WARM)
    assert len(seen) > len(WARM), "decode kernels, one more for sinks, and reduce kernels"
    assert all(w.answer is not None and w.seconds > 0 for w in warmed)
    with compilations() as seen:
        for problem, workload in WARM:
            inputs = sample_inputs(problem, workload, GPU)
            several = [inputs]
            if problem.sinks:
                assert inputs.sinks is not None
                several.append(replace(inputs, sinks=inputs.sinks.to(inputs.out_dtype)))
            for each in several:
                out = call(each, max_context=workload.context)
                assert is_right(out, each) or problem.kv_itemsize == 1
        torch.cuda.synchronize()
    assert seen == []
    with compilations() as seen:
        inputs = sample_inputs(*WARM[0], GPU)
        call(
            inputs, knobs=HopperKnobs(partition_tokens=128, num_splits=2, num_stages=1, num_warps=8)
        )
    assert seen, "the hook sees what is compiled"


def test_warm_up_gives_a_broken_winner_up(broken: HopperKnobs, target: Target) -> None:
    problem = replace(PLAIN, block_size=128, qg=7 if broken is WGMMA else 6)
    plant(problem, broken, target)
    (warmed,) = patune.warmup([(problem, SIZES)])
    assert warmed.error is None
    assert warmed.answer is not None
    assert warmed.answer.knobs != broken
    inputs = sample_inputs(problem, SIZES, GPU)
    with compilations() as seen:
        assert is_right(call(inputs), inputs)
    assert seen == []
