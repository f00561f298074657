"""The public operation: refusals that say what to mend, the CPU path, and what a call does on the way to the GPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from without_gpu import Cuda

import patune
from patune.errors import InvalidValueError, UnsupportedProblemError
from patune.kernels import decode
from patune.kernels.caches import to_layout
from patune.kernels.decode import forget_steps, paged_attention_decode, workspace_for
from patune.kernels.inputs import DecodeInputs
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.kernels.reference import reference_decode
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.calls import KernelCall

H200 = Target.named("sm_90")
KNOBS = HopperKnobs(partition_tokens=64, num_splits=2, num_stages=2, num_warps=4)
F8 = torch.float8_e4m3fn


def arguments(
    *,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "aiter",
    length: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """A valid call: 2 sequences, 8 query heads, 2 KV heads, 5 pages of 16."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(5, 16, 2, 64, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(2 * length, 8, 64, generator=generator).to(
        torch.bfloat16 if dtype.itemsize == 1 else dtype
    )
    tensors = {
        "query": query,
        "key_cache": to_layout(key, layout, is_value=False),
        "value_cache": to_layout(value, layout, is_value=True),
        "block_tables": torch.tensor([[1, 2, 0], [4, 3, 1]], dtype=torch.int32),
        "context_lengths": torch.tensor([20, 33], dtype=torch.int32),
    }
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**moved, "softmax_scale": 0.125, "query_length": length}


def oracle(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_decode(DecodeInputs(**call))


def wide(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor whose last axis has stride 2."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.zeros(2, 8 * 64)}, "query has shape [2, 512]; expected [batch * query_length, q_heads, head_dim]"),
    ({"query": torch.zeros(3, 8, 64, dtype=torch.bfloat16)},
     "query has shape [3, 8, 64]; expected [batch * query_length, q_heads, head_dim] = [2, 8, 64]"),
    ({"query": torch.zeros(2, 8, 64)}, "query.dtype=torch.float32 is not allowed; allowed: torch.bfloat16, torch.float16"),
    ({"query": torch.zeros(2, 8, 96, dtype=torch.bfloat16)}, "head_dim (query.shape[2])=96 is not allowed; allowed: 64, 128"),
    ({"query": torch.zeros(2, 7, 64, dtype=torch.bfloat16)}, "query has 7 heads and key_cache 2; allowed: query heads that are a multiple"),
    ({"query": wide((2, 8, 64))}, "query has strides [1024, 128, 2]; expected [..., 1]"),
    ({"query": torch.zeros(2, 8, 64, dtype=torch.float16)}, "query.dtype=torch.float16 does not go with key_cache.dtype=torch.bfloat16"),
    ({"query": torch.zeros(2, 8, 64, dtype=F8)}, "query.dtype=torch.float8_e4m3fn does not go with key_cache.dtype=torch.bfloat16"),
    ({"query": torch.zeros(2, 132, 64, dtype=torch.bfloat16)}, "qg=66 is not allowed; allowed: an integer from 1 to 64"),
    ({"query_length": 2}, "query has shape [2, 8, 64]; expected [batch * query_length, q_heads, head_dim] = [4, 8, 64]"),
    ({"query_length": 17}, "query_length=17 is not allowed; allowed: an integer from 1 to 16"),
    ({"key_cache": torch.zeros(5, 2, 64, dtype=torch.bfloat16)}, "key_cache has shape [5, 2, 64]; expected [pages, kv_heads, head_dim/x"),
    ({"key_cache": torch.zeros(5, 2, 8, 48, 8, dtype=torch.bfloat16)}, "block_size (key_cache.shape[-2])=48 is not allowed"),
    ({"key_cache": torch.zeros(5, 2, 4, 16, 16, dtype=torch.bfloat16)},
     "key_cache has shape [5, 2, 4, 16, 16]; expected [pages, kv_heads, head_dim/x, block_size, x] = [5, 2, 8, 16, 8]"),
    ({"key_cache": torch.zeros(5, 2, 8, 16, 8)}, "key_cache.dtype=torch.float32 is not allowed"),
    ({"key_cache": torch.zeros(5, 2, 8, 32, 8, dtype=torch.bfloat16)[:, :, :, :16]},
     "key_cache has strides [4096, 2048, 256, 8, 1]; expected [..., 128, 8, 1]"),
    ({"value_cache": torch.zeros(5, 2, 64, 32, dtype=torch.bfloat16)},
     "value_cache has shape [5, 2, 64, 32]; expected [pages, kv_heads, head_dim, block_size] = [5, 2, 64, 16]"),
    ({"value_cache": torch.zeros(5, 2, 4, 64, 8, dtype=torch.bfloat16)},
     "value_cache has shape [5, 2, 4, 64, 8]; expected [pages, kv_heads, block_size/x, head_dim, x] = [5, 2, 2, 64, 8]"),
    ({"value_cache": torch.zeros(5, 2, 64, 16, dtype=torch.float16)}, "value_cache.dtype=torch.float16 is not allowed"),
    ({"block_tables": torch.zeros(2, 3, dtype=torch.int64)}, "block_tables.dtype=torch.int64 is not allowed; allowed: torch.int32"),
    ({"block_tables": torch.zeros(6, dtype=torch.int32)}, "block_tables has shape [6]; expected [batch, max_pages]"),
    ({"block_tables": torch.zeros(2, 0, dtype=torch.int32)}, "at least one page"),
    ({"block_tables": torch.zeros(0, 3, dtype=torch.int32)}, "1 to 65535 sequences"),
    ({"block_tables": torch.zeros(2, 3, dtype=torch.int32, device="meta")}, "block_tables is on meta; expected: cpu"),
    ({"context_lengths": torch.zeros(3, dtype=torch.int32)}, "context_lengths has shape [3]; expected [batch] = [2]"),
    ({"context_lengths": torch.zeros(2)}, "context_lengths.dtype=torch.float32 is not allowed"),
    ({"context_lengths": wide((2,), torch.int32)}, "context_lengths has strides [2]; expected [..., 1]"),
    ({"softmax_scale": torch.tensor(0.125)}, "allowed: a Python float (a tensor would sync)"),
    ({"softmax_scale": float("nan")}, "softmax_scale=nan is not allowed; allowed: a finite number"),
    ({"softmax_scale": [0.125]}, "softmax_scale=[0.125] is not allowed"),
    ({"softcap": -1.0}, "softcap=-1.0 is not allowed"),
    ({"softcap": True}, "softcap=True is not allowed"),
    ({"fp8_math": 1}, "fp8_math=1 is not allowed"),
    ({"fp8_math": True}, "fp8_math=True needs an fp8 cache, seen kv_dtype='bf16'"),
    ({"sliding_window": None}, "sliding_window=None is not allowed; allowed: an integer"),
    ({"sliding_window": 1.0}, "sliding_window=1.0 is not allowed"),
    ({"sinks": torch.zeros(2)}, "sinks has shape [2]; expected [q_heads] = [8]"),
    ({"sinks": torch.zeros(8, dtype=torch.int32)}, "sinks.dtype=torch.int32 is not allowed"),
    ({"key_scale": torch.ones(1), "value_scale": torch.ones(1)}, "key_scale is given, but what it scales is torch.bfloat16"),
    ({"query_scale": torch.ones(1)}, "query_scale is given, but what it scales is torch.bfloat16"),
    ({"max_context": 0}, "context=0 is not allowed"),
    ({"out": torch.zeros(2, 8, 128, dtype=torch.bfloat16)}, "out has shape [2, 8, 128]; expected [batch * query_length, q_heads, head_dim]"),
    ({"out": torch.zeros(2, 8, 64)}, "out.dtype=torch.float32 is not allowed; allowed: torch.bfloat16, torch.float16"),
    ({"out": wide((2, 8, 64))}, "out has strides [1024, 128, 2]: it is written in place"),
    ({"out": torch.zeros(1, 8, 64, dtype=torch.bfloat16).expand(2, 8, 64)}, "no repeated (expanded) elements"),
    ({"out": torch.zeros(2, 8, 64, dtype=torch.bfloat16, device="meta")}, "out is on meta; expected: cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m[:50] for _, m in REFUSALS])
def test_a_wrong_argument_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        paged_attention_decode(**(arguments() | change))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_scale": torch.ones(1)}, "key_scale is [1] and value_scale is None; allowed: both None"),
        ({"key_scale": torch.ones(1), "value_scale": torch.ones(5, 2, 16, 1)}, "both [1], or both per token"),
        ({"key_scale": torch.ones(5, 2, 16)}, "key_scale has shape [5, 2, 16]; expected [1] or [pages, kv_heads, block_size, 1] = [5, 2, 16, 1]"),
        ({"key_scale": torch.ones(1, dtype=torch.float16)}, "key_scale.dtype=torch.float16 is not allowed; allowed: torch.float32"),
    ],
)  # fmt: skip
def test_a_wrong_scale_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        paged_attention_decode(**(arguments(dtype=F8) | change))
    assert message in str(caught.value)


def test_the_strided_form_is_checked_too() -> None:
    call = arguments(layout="nhd")
    call["value_cache"] = call["value_cache"][:, :, :8]
    with pytest.raises(
        InvalidValueError,
        match=r"value_cache has shape \[5, 2, 8, 64\]; expected \[pages, kv_heads, block_size, head_dim\]",
    ):
        paged_attention_decode(**call)


@pytest.mark.parametrize("layout", ["aiter", "nhd", "hnd"])
@pytest.mark.parametrize("window", [-1, 0, 7])
def test_cpu_tensors_are_computed_by_the_oracle(layout: str, window: int) -> None:
    call = arguments(layout=layout, length=2)
    out = paged_attention_decode(**call, sliding_window=window)
    exact, exact_lse = oracle(call | {"sliding_window": max(0, window)})
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))
    same, lse = paged_attention_decode(**call, sliding_window=window, return_lse=True)
    assert torch.equal(same, out)
    assert lse.dtype == torch.float32
    assert torch.equal(lse, exact_lse)


def test_out_is_written_in_place_through_its_strides() -> None:
    call = arguments()
    buffer = torch.full((2, 11, 64), 9.0, dtype=torch.float16)
    out = buffer[:, 2:10]
    assert paged_attention_decode(**call, out=out) is out
    assert torch.equal(buffer[:, 2:10], oracle(call)[0].to(torch.float16))
    assert (buffer[:, :2] == 9).all()
    assert (buffer[:, 10:] == 9).all()


def test_fp8_query_and_cache_give_bf16() -> None:
    call = arguments(dtype=F8)
    scales = {"key_scale": torch.tensor([0.5]), "value_scale": torch.tensor([2.0])}
    assert paged_attention_decode(**call, **scales).dtype == torch.bfloat16
    quantised = call | {"query": call["query"].to(F8)}
    out = paged_attention_decode(**quantised, query_scale=torch.tensor([1.5]), **scales)
    exact, _ = oracle(quantised | scales | {"query_scale": torch.tensor([1.5])})
    assert torch.equal(out, exact.to(torch.bfloat16))


def test_the_cpu_path_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    decode._warn_about_cpu.cache_clear()
    with caplog.at_level(logging.INFO, logger="patune"):
        for _ in range(3):
            paged_attention_decode(**arguments())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "float32 oracle" in caplog.text


def test_the_package_exports_the_operation() -> None:
    assert patune.paged_attention_decode is paged_attention_decode


def answered(knobs: Any, source: str = "exact") -> Any:
    """What a lookup answers, as far as a launch looks at it."""
    return SimpleNamespace(knobs=knobs, source=source)


class Gpu:
    """Stands in for the device: records what would have been launched, on meta tensors."""

    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []
        self.lookups: list[tuple[Problem, Workload, Target]] = []
        self.launched = 0

    def plan(
        self, inputs: DecodeInputs, knobs: Any, target: Target, **buffers: Any
    ) -> list[KernelCall]:
        self.plans.append({"inputs": inputs, "knobs": knobs, "target": target, **buffers})
        return []

    def look_up(self, problem: Problem, workload: Workload, target: Target) -> Any:
        self.lookups.append((problem, workload, target))
        return answered(KNOBS)

    def launch(self, calls: list[KernelCall], device: torch.device) -> list[Any]:
        assert device.type == "meta"
        self.launched += 1
        return []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    Cuda().install(monkeypatch)
    fake = Gpu()
    monkeypatch.setattr(decode, "plan_decode", fake.plan)
    monkeypatch.setattr(decode, "_looked_up", fake.look_up)
    monkeypatch.setattr(decode, "_launch", fake.launch)
    monkeypatch.setattr(decode, "_device_index", lambda device: 0)
    monkeypatch.setattr(decode, "_target_of", lambda index: H200)
    forget_steps()
    yield fake
    forget_steps()


def elements_of(knobs: Any, batch: int = 2) -> int:
    walks, rows = batch * 2, 4
    return walks * knobs.num_splits * rows * (64 + 2)  # accumulator, max, sum


def test_a_warm_call_looks_nothing_up(gpu: Gpu) -> None:
    call = arguments(device="meta")
    for _ in range(3):
        paged_attention_decode(**call, sliding_window=40)
    assert len(gpu.lookups) == 1
    problem, workload, target = gpu.lookups[0]
    assert problem == Problem(block_size=16, head_dim=64, qg=4, windowed=True)
    assert workload == Workload(batch=2, kv_heads=2, context=40)
    assert target == H200
    assert [p["inputs"].sliding_window for p in gpu.plans] == [40, 40, 40]
    assert gpu.launched == 3
    for changed in (
        {"sliding_window": 0},
        {"sinks": torch.zeros(8, device="meta")},
        {"max_context": 20},
        {"out": torch.empty(2, 8, 64, dtype=torch.float16, device="meta")},
        {"block_tables": torch.zeros(2, 4, dtype=torch.int32, device="meta")},
    ):
        before = len(gpu.lookups)
        paged_attention_decode(**(call | changed))
        assert len(gpu.lookups) == before + 1, changed
    assert gpu.lookups[3][1].context == 20
    forget_steps()
    paged_attention_decode(**call, sliding_window=40)
    assert len(gpu.lookups) == 7


def test_given_buffers_are_used_and_nothing_is_allocated(gpu: Gpu) -> None:
    call = arguments(device="meta")
    out = torch.empty(2, 8, 64, dtype=torch.bfloat16, device="meta")
    workspace = torch.empty(elements_of(KNOBS), device="meta")
    paged_attention_decode(**call, out=out, workspace=workspace)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "zeros", "full", "empty_like"):
            patch.setattr(torch, name, None)
        for name in ("new_empty", "new_zeros", "new_full", "clone", "to"):
            patch.setattr(torch.Tensor, name, None)
        assert paged_attention_decode(**call, out=out, workspace=workspace) is out
    assert gpu.plans[-1]["out"] is out
    assert gpu.plans[-1]["workspace"] is workspace
    assert gpu.plans[-1]["lse"] is None


def test_missing_buffers_are_allocated(gpu: Gpu) -> None:
    out, lse = paged_attention_decode(**arguments(device="meta"), return_lse=True)
    plan = gpu.plans[-1]
    assert plan["out"] is out
    assert plan["lse"] is lse
    assert (out.shape, out.dtype, out.device.type) == ((2, 8, 64), torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 8), torch.float32)
    assert plan["workspace"].numel() == elements_of(KNOBS)
    one_shot = HopperKnobs(partition_tokens=64, num_splits=1, num_stages=2, num_warps=4)
    paged_attention_decode(**arguments(device="meta"), knobs=one_shot)
    assert gpu.plans[-1]["workspace"] is None
    assert gpu.plans[-1]["knobs"] is one_shot
    assert len(gpu.lookups) == 1, "given knobs are not looked up"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workspace": torch.empty(99, device="meta")}, "workspace has shape [99]; expected: one contiguous axis of at least 2112"),
        ({"workspace": torch.empty(2112, dtype=torch.float16, device="meta")}, "workspace.dtype=torch.float16 is not allowed"),
        ({"workspace": torch.empty(2112)}, "workspace is on cpu; expected: meta"),
        ({"sinks": torch.zeros(8)}, "sinks is on cpu; expected: meta, where query is"),
        ({"knobs": CdnaKnobs(partition_tokens=64, num_splits=1, num_stages=1, num_warps=1)},
         "The given knobs do not fit the problem on sm_90: knobs of family cdna_mfma do not drive sm_90"),
        ({"knobs": HopperKnobs(partition_tokens=64, num_splits=1, num_stages=1, num_warps=8)}, "num_warps=8 covers 128 rows"),
    ],
)  # fmt: skip
def test_what_only_kernels_need_is_refused(gpu: Gpu, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        paged_attention_decode(**(arguments(device="meta") | change))
    assert message in str(caught.value)
    assert gpu.launched == 0


def test_fp8_of_another_vendor_has_no_kernel(gpu: Gpu) -> None:
    one = torch.ones(1, device="meta")
    call = arguments(dtype=torch.float8_e4m3fnuz, device="meta")
    for knobs in (None, KNOBS):
        with pytest.raises(UnsupportedProblemError, match="sm_90 has fp8_e4m3fn only"):
            paged_attention_decode(**call, key_scale=one, value_scale=one, knobs=knobs)
    assert gpu.lookups == []


def test_a_misaligned_cache_is_refused_on_every_call(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(device="meta")
    paged_attention_decode(**call)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0x1008)
    with pytest.raises(
        InvalidValueError,
        match="key_cache starts at 0x1008, value_cache at 0x1008; allowed: addresses that are multiples of 16",
    ):
        paged_attention_decode(**call)


def test_other_devices_are_unsupported() -> None:
    with pytest.raises(
        UnsupportedProblemError, match="device='meta' has no kernels; allowed: cuda"
    ):
        paged_attention_decode(**arguments(device="meta"))


def test_the_step_table_is_bounded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_STEPS", 3)
    for bound in range(1, 9):
        paged_attention_decode(**arguments(device="meta"), max_context=bound)
        assert 1 <= len(decode._steps) <= 3


def test_a_tensor_that_changes_in_place_is_seen(gpu: Gpu) -> None:
    call = arguments(device="meta")
    paged_attention_decode(**call)
    call["block_tables"].resize_(2, 4)
    paged_attention_decode(**call)
    call["block_tables"].resize_(2, 3)
    paged_attention_decode(**call)
    assert [workload.context for _, workload, _ in gpu.lookups] == [48, 64]
    assert gpu.launched == 3
    call["block_tables"].resize_(3, 3)
    with pytest.raises(InvalidValueError, match=r"context_lengths has shape \[2\]; expected"):
        paged_attention_decode(**call)


def test_a_workspace_fits_every_smaller_workload(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(block_size=16, head_dim=64, qg=4)
    device = torch.device("meta")

    def look_up(problem: Problem, workload: Workload, target: Target) -> Any:
        splits = max(1, 132 // workload.walks) if workload.context >= 1024 else 1
        return answered(replace(KNOBS, num_splits=splits))

    monkeypatch.setattr(decode, "_looked_up", look_up)
    workspace = workspace_for(problem, Workload(batch=40, kv_heads=2, context=4096), device=device)
    walks_times_splits = max(2 * batch * (132 // (2 * batch)) for batch in range(1, 41))
    assert workspace.shape == (walks_times_splits * 4 * 66,)
    assert workspace.dtype == torch.float32
    short = workspace_for(problem, Workload(batch=40, kv_heads=2, context=512), device=device)
    assert short.numel() == 0
    given = workspace_for(
        problem, Workload(batch=40, kv_heads=2, context=512), device=device, knobs=KNOBS
    )
    assert given.numel() == elements_of(KNOBS, batch=40)
