"""Warm-up without a GPU: the tensors that stand for a key, and what becomes of keys that fail."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import patune
from patune import warming
from patune.configs import dispatcher
from patune.errors import InvalidValueError, NoUsableGpuError, UnsupportedProblemError
from patune.kernels import decode
from patune.kernels.compile import call_key
from patune.kernels.defaults import default_knobs
from patune.kernels.feasibility import unsupported
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.samples import sample_inputs
from patune.kernels.validate import check_inputs, check_pointers
from patune.problem import KV_LAYOUTS, Problem, Workload
from patune.target import Target
from patune.warming import tiny_inputs, warmup

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs

H200 = Target.named("sm_90")
CPU = torch.device("cpu")
PROBLEM = Problem(block_size=16, head_dim=64, qg=4)
SIZES = Workload(batch=3, kv_heads=2, context=70)


def problems() -> list[Problem]:
    caches = [("bf16", "bf16", "none"), ("fp16", "fp16", "none")]
    caches += [
        (query, "fp8_e4m3fn", quant)
        for query in ("bf16", "fp8_e4m3fn")
        for quant in ("none", "per_tensor", "per_token")
    ]
    return [
        Problem(
            block_size=page, head_dim=128, qg=5, query_length=2, kv_layout=layout, query_dtype=query, kv_dtype=kv,
            kv_quant=quant, windowed=flag, sinks=flag, softcap=flag, fp8_math=flag and kv != "bf16" and kv != "fp16",
        )
        for page, layout, (query, kv, quant), flag in product((16, 64, 1024), KV_LAYOUTS, caches, (False, True))
    ]  # fmt: skip


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_tiny_inputs_pose_the_problem_and_its_sizes(layout: str) -> None:
    for problem in problems():
        if problem.kv_layout != layout:
            continue
        several = list(tiny_inputs(problem, SIZES, CPU))
        assert len(several) == 1 + problem.sinks
        for inputs in several:
            check_inputs(inputs)
            check_pointers(inputs)
            assert inputs.problem == problem
            assert inputs.workload(SIZES.context) == SIZES
            assert inputs.key_cache.shape[0] == 1
            assert inputs.context_lengths.tolist() == [1, 1, 1]
            assert not inputs.block_tables.any()
            assert inputs.block_tables.shape[1] == -(-SIZES.context // problem.block_size)


def calls_of(inputs: DecodeInputs, **knobs: int) -> list[str]:
    """What Triton would build for the inputs."""
    problem = inputs.problem
    chosen = replace(default_knobs(problem, SIZES, H200), **knobs)
    out = torch.empty(inputs.query.shape, dtype=inputs.out_dtype)
    space = torch.empty(workspace_elements(problem, inputs.workload(SIZES.context), chosen))
    return [call_key(c) for c in plan_decode(inputs, chosen, H200, out=out, workspace=space)]


def test_tiny_inputs_are_built_like_those_of_serving() -> None:
    """The same builds as of full-length sequences over many pages, with one split and with several."""
    for problem in problems():
        assert unsupported(problem, H200) is None
        served = sample_inputs(problem, SIZES, CPU)
        for splits in (1, 3):
            expected = calls_of(served, num_splits=splits)
            tiny = [
                calls_of(inputs, num_splits=splits) for inputs in tiny_inputs(problem, SIZES, CPU)
            ]
            assert tiny[-1] == expected, problem  # with sinks: those of float32, as the samples'
            assert len({tuple(keys) for keys in tiny}) == len(tiny)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU that decodes nothing; gives the calls."""
    calls: list[Any] = []

    def paged_attention_decode(**call: Any) -> None:
        calls.append(call)
        if call["query"].shape[2] == 256:
            error = RuntimeError("PassManager::run failed")
            error.add_note("No knobs could be launched. Tried:\n  these")
            raise error

    def look_up(problem: Problem, workload: Workload, target: Target) -> Any:
        assert target == H200
        return SimpleNamespace(
            knobs=default_knobs(problem, workload, target),
            source="heuristic",
            asked=(problem, workload),
        )

    monkeypatch.setattr(decode, "paged_attention_decode", paged_attention_decode)
    monkeypatch.setattr(decode, "_target_of", lambda index: H200)
    monkeypatch.setattr(dispatcher, "lookup_problem", look_up)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tiny = warming.tiny_inputs
    monkeypatch.setattr(
        warming, "tiny_inputs", lambda problem, workload, device: tiny(problem, workload, CPU)
    )
    return calls


def test_every_key_is_answered_in_order(device: list[Any]) -> None:
    core = {"block_size": 16, "head_dim": 64, "qg": 4}
    keys: list[Any] = [
        (PROBLEM, SIZES),
        {**core, "head_dim": 256},
        {**core, "batch": 3},
        {**core, "qg": 65},
        {**core, "target": "sm_90"},
        "a key",
        {**core, "sinks": True, "kv_heads": 2, "context": 33},
    ]
    warmed = warmup(iter(keys))
    assert [w.key for w in warmed] == keys
    assert [w.error is None for w in warmed] == [True, False, True, False, False, False, True]
    assert [w.answer is not None for w in warmed] == [w.error is None for w in warmed]
    assert all(w.seconds > 0 for w in warmed)
    assert warmed[0].answer.asked == (PROBLEM, SIZES)  # type: ignore[union-attr]
    assert warmed[2].answer.asked == (PROBLEM, Workload(batch=3, kv_heads=8, context=4096))  # type: ignore[union-attr]
    assert warmed[6].answer.asked[1] == Workload(batch=128, kv_heads=2, context=33)  # type: ignore[union-attr]
    errors = [w.error for w in warmed if w.error]
    assert (
        errors[0]
        == "RuntimeError: PassManager::run failed\nNo knobs could be launched. Tried:\n  these"
    )
    assert errors[1].startswith("InvalidValueError: qg=65 is not allowed")
    assert errors[2].startswith("DocumentError: Problem: unknown field 'target'")
    assert errors[3].startswith(
        "InvalidValueError: key='a key' is not allowed; allowed: a pair (Problem, Workload)"
    )
    assert [call["max_context"] for call in device] == [70, 4096, 4096, 33, 33]
    assert [call["sinks"].dtype for call in device[3:]] == [torch.bfloat16, torch.float32]
    assert patune.warmup is warmup


def test_the_device_is_the_one_that_was_named(
    device: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    for name in (None, "cuda", 0, "cuda:1", torch.device("cuda", 0)):
        warmup([(PROBLEM, SIZES)], device=name)
    assert [place.index for place in seen] == [1, 1, 0, 1, 0]
    with pytest.raises(NoUsableGpuError, match=r"device='cuda:2' is not here; there are 2"):
        warmup([], device="cuda:2")
    with pytest.raises(NoUsableGpuError, match="seen device='cpu'"):
        warmup([], device="cpu")
    with pytest.raises(InvalidValueError, match="allowed: a CUDA device, such as cuda:0"):
        warmup([], device="gpu")

    def nothing(index: int) -> Target:
        raise UnsupportedProblemError("cuda:1 is NVIDIA T4, which no kernel family serves.")

    monkeypatch.setattr(decode, "_target_of", nothing)
    with pytest.raises(NoUsableGpuError, match="NVIDIA T4"):
        warmup([])


def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(
        NoUsableGpuError, match="Run it on that machine; `patune doctor` says what is here"
    ):
        warmup([(PROBLEM, SIZES)])
