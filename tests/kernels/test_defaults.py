"""Default knobs of sm_90 with the shared memory that feasibility counts for them, and the safe knobs of every family."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from patune.kernels.compile import compile_call
from patune.kernels.compile_matrix import CompileCase, compile_matrix
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.feasibility import hopper_shared_b, is_feasible, unsupported
from patune.kernels.knobs import HopperKnobs
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.samples import sample_inputs
from patune.kernels.space import feasible_pool
from patune.problem import BLOCK_SIZES, HEAD_DIMS, KV_LAYOUTS, Problem, Workload
from patune.target import ARCHS, Target
from patune.tuner.executors import EmulatedExecutor
from patune.tuner.gate import run_gate

H200 = Target(arch="sm_90", device_name="NVIDIA H200", compute_units=132)
PLAIN = Problem(block_size=64, head_dim=128, qg=8, kv_layout="hnd")
LARGE_PAGES = replace(PLAIN, block_size=1024, kv_layout="aiter")
FP8 = replace(PLAIN, kv_dtype="fp8_e4m3fn", kv_quant="per_token")
ALONE = Workload(batch=1, kv_heads=8, context=4096)
MANY = replace(ALONE, batch=128)
WINDOW = replace(ALONE, context=128)


@pytest.mark.parametrize(
    ("problem", "workload", "tile", "splits", "stages", "warps"),
    [
        (PLAIN, ALONE, 64, 16, 3, 4),
        (PLAIN, MANY, 64, 1, 3, 4),
        (LARGE_PAGES, ALONE, 64, 16, 3, 4),  # tiles of 128 only where a workgroup walks a whole context
        (LARGE_PAGES, MANY, 128, 1, 3, 4),
        (FP8, ALONE, 128, 32, 3, 4),  # two workgroups per SM
        (replace(FP8, query_length=4), ALONE, 64, 33, 3, 4),
        (replace(PLAIN, windowed=True), WINDOW, 64, 1, 2, 4),  # nothing to share
        (replace(PLAIN, windowed=True), replace(WINDOW, context=1024), 64, 4, 2, 4),
        (replace(PLAIN, head_dim=256), MANY, 64, 1, 2, 4),
        (replace(PLAIN, qg=16, query_length=4), MANY, 128, 1, 2, 8),
        (replace(PLAIN, head_dim=256, qg=16, query_length=2), MANY, 128, 1, 1, 8),
    ],
)  # fmt: skip
def test_defaults_are_what_was_best(
    problem: Problem, workload: Workload, tile: int, splits: int, stages: int, warps: int
) -> None:
    knobs = default_knobs(problem, workload, H200)
    seen = (knobs.partition_tokens, knobs.num_splits, knobs.num_stages, knobs.num_warps)
    assert seen == (tile, splits, stages, warps)
    assert isinstance(knobs, HopperKnobs)
    assert knobs.overlap_launch


def test_defaults_are_feasible_for_every_supported_problem() -> None:
    shapes = product(BLOCK_SIZES, HEAD_DIMS, KV_LAYOUTS, (1, 5, 16), (1, 4), (False, True))
    caches = (
        ("bf16", "none", False),
        ("fp8_e4m3fn", "per_token", False),
        ("fp8_e4m3fn", "per_token", True),
    )
    for (page, dim, layout, qg, length, windowed), (kv, quant, math) in product(shapes, caches):  # fmt: skip
        problem = Problem(
            block_size=page, head_dim=dim, qg=qg, query_length=length, kv_layout=layout,
            kv_dtype=kv, kv_quant=quant, fp8_math=math, windowed=windowed,
        )  # fmt: skip
        assert unsupported(problem, H200) is None
        for workload in (ALONE, MANY, WINDOW):
            knobs = default_knobs(problem, workload, H200)
            assert is_feasible(knobs, problem, H200) is None


@pytest.mark.parametrize("problem", [PLAIN, LARGE_PAGES, FP8, replace(PLAIN, block_size=16)])
def test_the_counted_shared_memory_is_that_of_the_build(problem: Problem) -> None:
    knobs = default_knobs(problem, MANY, H200)
    inputs = sample_inputs(problem, Workload(batch=1, kv_heads=1, context=64), torch.device("cpu"))
    out = torch.empty(inputs.query.shape, dtype=inputs.out_dtype)
    assert workspace_elements(problem, MANY, knobs) == 0
    (call,) = plan_decode(inputs, knobs, H200, out=out)
    assert compile_call(call, H200).shared_b == hopper_shared_b(knobs, problem)


def every_problem() -> list[Problem]:
    """The whole grid: every value of every field, rows from 1 to 64 in every step of padding, where they go together."""
    caches = [("bf16", "bf16", "none", False), ("fp16", "fp16", "none", False)]
    for fp8 in ("fp8_e4m3fn", "fp8_e4m3fnuz"):
        for query, quant, math in product(("bf16", "fp16", fp8), ("none", "per_tensor", "per_token"), (False, True)):  # fmt: skip
            caches.append((query, fp8, quant, math))
    rows = ((1, 1), (5, 1), (8, 1), (16, 1), (17, 1), (33, 1), (64, 1), (1, 16), (4, 16), (16, 2))
    flags = ((False, False, False), (True, True, True))
    return [
        Problem(
            block_size=page, head_dim=dim, qg=qg, query_length=length, kv_layout=layout, query_dtype=query,
            kv_dtype=kv, kv_quant=quant, fp8_math=math, windowed=windowed, sinks=sinks, softcap=softcap,
        )
        for page, dim, layout, (qg, length), (query, kv, quant, math), (windowed, sinks, softcap)
        in product(BLOCK_SIZES, HEAD_DIMS, KV_LAYOUTS, rows, caches, flags)
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_safe_knobs_are_feasible_for_every_supported_problem(arch: str) -> None:
    target = Target.named(arch)
    problems = [problem for problem in every_problem() if unsupported(problem, target) is None]
    assert len(problems) == 33600
    for problem in problems:
        knobs = safe_knobs(problem, target)
        assert is_feasible(knobs, problem, target) is None, problem
        assert knobs.one_shot
        assert workspace_elements(problem, MANY, knobs) == 0


@pytest.mark.parametrize(
    "problem", [PLAIN, replace(PLAIN, qg=16, query_length=4), replace(PLAIN, head_dim=256), FP8]
)
def test_no_feasible_knobs_of_as_many_warps_take_less_shared_memory(problem: Problem) -> None:
    knobs = safe_knobs(problem, H200)
    assert isinstance(knobs, HopperKnobs)
    pool = [k for k in feasible_pool(problem, ALONE, H200) if k.num_warps == knobs.num_warps]
    assert len(pool) > 100
    least = min(hopper_shared_b(k, problem) for k in pool if isinstance(k, HopperKnobs))
    assert hopper_shared_b(knobs, problem) == least


def test_the_compiled_matrix_has_the_safe_knobs_of_each_of_its_problems() -> None:
    cases = compile_matrix()
    have = {(case.problem, case.target, case.knobs) for case in cases}
    for problem, target in {(case.problem, case.target) for case in cases}:
        assert (problem, target, safe_knobs(problem, target)) in have


SAMPLE = {
    "gfx942": Problem(block_size=1024, head_dim=128, qg=8),
    "gfx950": Problem(block_size=64, head_dim=64, qg=16, query_length=4, kv_layout="hnd", windowed=True, sinks=True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", SAMPLE)
def test_safe_knobs_pass_the_emulated_gate_and_do_not_spill(arch: str) -> None:
    problem, target = SAMPLE[arch], Target.named(arch)
    knobs = safe_knobs(problem, target)
    report = run_gate(problem, knobs, target, EmulatedExecutor(target))
    assert (report.status, report.reason) == ("ok", "")
    (call,) = CompileCase(problem=problem, knobs=knobs, target=target).calls()
    assert compile_call(call, target).facts()["spills"] == 0
