"""The Hopper kernels on a real device: the gate over the variants, the seed's test plan, planted bugs, and the public call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from mutants import mutants_of, plant, posed

from patune import paged_attention_decode
from patune.kernels.decode import workspace_for
from patune.kernels.defaults import default_knobs
from patune.kernels.knobs import HopperKnobs
from patune.kernels.reference import reference_decode
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import Target, detect_target
from patune.tuner.executors import GpuExecutor
from patune.tuner.gate import run_cases, run_gate
from patune.tuner.gate.seed_plan import seed_plan_cases

if TYPE_CHECKING:
    from pathlib import Path

    from mutants import Mutant

    from patune.kernels.inputs import DecodeInputs

pytestmark = pytest.mark.gpu
SPLIT = HopperKnobs(partition_tokens=64, num_splits=3, num_stages=3, num_warps=4)
ONE_SHOT = replace(SPLIT, num_splits=1, num_stages=2)
FP8 = {"kv_dtype": "fp8_e4m3fn"}
VARIANTS = {
    "plain": {},
    "mtp": {"query_length": 4},
    "window": {"windowed": True},
    "window_sinks_mtp": {"windowed": True, "sinks": True, "query_length": 4},
    "sinks_fp16": {"sinks": True, "query_dtype": "fp16", "kv_dtype": "fp16"},
    "softcap_sinks": {"softcap": True, "sinks": True},
    "fp8_unscaled": FP8,
    "fp8_tensor_scales_mtp": {**FP8, "kv_quant": "per_tensor", "query_length": 4},
    "fp8_token_scales_window": {**FP8, "kv_quant": "per_token", "windowed": True, "sinks": True},
    "fp8_query_fp16_cap": {**FP8, "query_dtype": "fp8_e4m3fn", "kv_quant": "per_token", "softcap": True},
    "fp8_cache_fp16_query": {**FP8, "query_dtype": "fp16", "kv_quant": "per_token"},
    "fp8_math": {**FP8, "kv_quant": "per_tensor", "fp8_math": True},
    "fp8_math_token_scales": {**FP8, "kv_quant": "per_token", "fp8_math": True, "windowed": True, "query_length": 2},
    "fp8_math_fp8_query": {**FP8, "query_dtype": "fp8_e4m3fn", "kv_quant": "per_tensor", "fp8_math": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    found = detect_target()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def executor(target: Target) -> GpuExecutor:
    return GpuExecutor(target)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("page", [16, 64, 1024])
@pytest.mark.parametrize("layout", ["aiter", "aiter_5d", "nhd", "hnd"])
def test_variants_pass_the_gate(
    layout: str, page: int, variant: str, target: Target, executor: GpuExecutor
) -> None:
    problem = Problem(block_size=page, head_dim=128, qg=8, kv_layout=layout, **VARIANTS[variant])
    one_shot = (
        len(layout) + page // 16 + list(VARIANTS).index(variant)
    ) % 2  # every variant gets both
    report = run_gate(problem, ONE_SHOT if one_shot else SPLIT, target, executor)
    assert (report.status, report.reason) == ("ok", "")


SHAPES = [(page, dim, 8, 1) for page in (16, 32, 64, 128, 256, 512, 1024) for dim in (64, 128, 256)]
SHAPES += [(64, dim, qg, 1) for dim in (64, 128, 256) for qg in (1, 5, 16, 33, 64)]
SHAPES += [
    (16, 128, 4, 16),
    (1024, 128, 1, 5),
    (64, 256, 16, 4),
    (1024, 64, 16, 4),
    (16, 128, 16, 4),
]


@pytest.mark.parametrize("cache", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize(("page", "head_dim", "qg", "query_length"), SHAPES)
def test_default_knobs_pass_the_gate(
    page: int, head_dim: int, qg: int, query_length: int, cache: str, target: Target, executor: GpuExecutor
) -> None:  # fmt: skip
    problem = Problem(
        block_size=page, head_dim=head_dim, qg=qg, query_length=query_length, kv_dtype=cache,
        kv_quant="none" if cache == "bf16" else "per_token", kv_layout="aiter" if page > 64 else "hnd",
    )  # fmt: skip
    for batch in (1, 128):
        knobs = default_knobs(problem, Workload(batch=batch, kv_heads=8, context=4096), target)
        report = run_gate(problem, knobs, target, executor)
        assert (report.status, report.reason) == ("ok", "")


@pytest.mark.parametrize("seed_case", seed_plan_cases(), ids=lambda s: s.case.name)
def test_the_seeds_plan(seed_case: object, target: Target, executor: GpuExecutor) -> None:
    problem, case = seed_case.problem, seed_case.case
    for splits in (1, 8):
        knobs = HopperKnobs(
            partition_tokens=seed_case.partition_tokens,
            num_splits=splits,
            num_stages=1,
            num_warps=8,
        )
        report = run_cases([case], problem, knobs, target, executor)
        assert (report.status, report.reason) == ("ok", "")


# A fault would end this process, and timing is not for a test: `mutation_table.py --on device` runs those too.
PLANTED = [m for m in mutants_of("hopper_wgmma", shown_by="device") if not (m.faults or m.racy)]


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda m: m.name)
def test_planted_bugs_are_rejected(
    mutant: Mutant, tmp_path: Path, target: Target, executor: GpuExecutor
) -> None:
    problem, knobs, _ = posed(mutant, "hopper_wgmma")
    report = run_gate(problem, knobs, target, executor, plan=plant(mutant, tmp_path))
    assert report.status in ("wrong", "nonfinite")


def call(inputs: DecodeInputs, **options: object) -> torch.Tensor:
    return paged_attention_decode(
        inputs.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.block_tables,
        inputs.context_lengths,
        softmax_scale=inputs.softmax_scale,
        **options,
    )


def test_public_call_equals_the_oracle_and_its_lse(target: Target) -> None:
    inputs = sample_inputs(
        Problem(block_size=64, head_dim=128, qg=8),
        Workload(batch=3, kv_heads=8, context=700),
        torch.device("cuda"),
    )
    out, lse = call(inputs, return_lse=True)
    exact, exact_lse = reference_decode(inputs, dtype=torch.float64)
    assert float((out.double() - exact).norm() / exact.norm()) < 0.005
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-3)


def test_given_out_and_workspace_nothing_is_allocated_and_graphs_replay(target: Target) -> None:
    problem = Problem(block_size=64, head_dim=128, qg=8)
    workload = Workload(batch=4, kv_heads=8, context=2048)
    inputs = sample_inputs(problem, workload, torch.device("cuda"))
    out = torch.empty_like(inputs.query)
    workspace = workspace_for(problem, workload, device=inputs.query.device)
    call(inputs, out=out, workspace=workspace)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call(inputs, out=out, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(inputs, out=out, workspace=workspace)
    for contexts in ((2048, 1, 0, 700), (65, 64, 63, 1999)):
        inputs.context_lengths.copy_(torch.tensor(contexts, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        exact, _ = reference_decode(inputs, dtype=torch.float64)
        assert float((out.double() - exact).norm() / exact.norm()) < 0.005
