"""Bound launches on a real device: they compute what a launch through Triton computes, whatever changes between calls."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton

from patune import paged_attention_decode
from patune.kernels import decode
from patune.kernels.decode import forget_steps
from patune.kernels.knobs import HopperKnobs
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.reference import reference_decode
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import Target, detect_target

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs
    from patune.kernels.launch import BoundLaunch

pytestmark = pytest.mark.gpu
SPLIT = HopperKnobs(partition_tokens=64, num_splits=3, num_stages=3, num_warps=4)
KNOBS = {
    "split": SPLIT,
    "one_shot": replace(SPLIT, num_splits=1, num_stages=2),
    "alone": replace(SPLIT, overlap_launch=False),
}
PROBLEMS = {
    "aiter": Problem(block_size=1024, head_dim=128, qg=8),
    "hnd_sinks": Problem(block_size=64, head_dim=128, qg=8, kv_layout="hnd", sinks=True),
    "window_mtp": Problem(block_size=16, head_dim=64, qg=4, query_length=2, windowed=True),
    "softcap": Problem(block_size=64, head_dim=128, qg=4, softcap=True),
    "fp8": Problem(block_size=64, head_dim=128, qg=8, kv_dtype="fp8_e4m3fn", kv_quant="per_tensor"),
}
WORKLOAD = Workload(batch=3, kv_heads=2, context=700)
GPU = torch.device("cuda")
BUSY_CYCLES = 50_000_000  # 25 ms at 2 GHz: steps are queued before the first one starts


@pytest.fixture(scope="module")
def target() -> Target:
    found = detect_target()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _forget() -> None:
    forget_steps()


def samples(problem: Problem, seed: int, workload: Workload = WORKLOAD) -> DecodeInputs:
    """Inputs with random values of their own, in new memory; one tensor is both scales."""
    inputs = sample_inputs(problem, workload, GPU)
    generator = torch.Generator("cuda").manual_seed(seed)

    def anew(tensor: torch.Tensor) -> torch.Tensor:
        values = torch.randn(tensor.shape, generator=generator, device="cuda").to(tensor.dtype)
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
        ).copy_(values)

    scale = None if inputs.key_scale is None else torch.full((1,), 1.0 + seed, device="cuda")
    lengths = torch.randint(1, workload.context, (workload.batch,), generator=generator, device="cuda")  # fmt: skip
    return replace(
        inputs,
        query=anew(inputs.query),
        key_cache=anew(inputs.key_cache),
        value_cache=anew(inputs.value_cache),
        context_lengths=lengths.to(torch.int32),
        sinks=None if inputs.sinks is None else anew(inputs.sinks),
        key_scale=scale,
        value_scale=scale,
        softcap=20.0 if problem.softcap else 0.0,
    )


def call(inputs: DecodeInputs, **options: Any) -> Any:
    names = (
        "query", "key_cache", "value_cache", "block_tables", "context_lengths", "softmax_scale", "query_length",
        "sliding_window", "sinks", "query_scale", "key_scale", "value_scale", "softcap", "fp8_math",
    )  # fmt: skip
    return paged_attention_decode(**{name: getattr(inputs, name) for name in names}, **options)


def workspace_of(inputs: DecodeInputs, knobs: HopperKnobs, fill: float) -> torch.Tensor:
    elements = workspace_elements(inputs.problem, inputs.workload(), knobs)
    return torch.full((elements,), fill, device="cuda")


def by_triton(inputs: DecodeInputs, knobs: HopperKnobs, target: Target) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What plain launches of the same plan compute: output and LSE."""
    dtype = torch.bfloat16 if inputs.query.element_size() == 1 else inputs.query.dtype
    out = torch.full(inputs.query.shape, float("nan"), dtype=dtype, device="cuda")
    lse = torch.full(inputs.query.shape[:2], float("nan"), device="cuda")
    workspace = workspace_of(inputs, knobs, 0.0)
    for kernel in plan_decode(inputs, knobs, target, out=out, workspace=workspace, lse=lse):
        kernel.launch()
    assert torch.isfinite(out.float()).all()
    return out, lse


def bound() -> list[BoundLaunch | None]:
    return [step.bound for step in decode._steps.values()]


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_bound_launches_equal_tritons_over_changing_tensors(
    problem: Problem, knobs: HopperKnobs, target: Target
) -> None:
    for seed in range(4):
        inputs = samples(problem, seed)
        expected, expected_lse = by_triton(inputs, knobs, target)
        out, lse = call(inputs, knobs=knobs, return_lse=True)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        assert torch.equal(call(inputs, knobs=knobs), expected)
    assert len(bound()) == 2
    assert all(bound())
    exact, _ = reference_decode(inputs, dtype=torch.float64)
    assert float((out.double() - exact).norm() / exact.norm()) < 0.01


def test_alternating_shapes_keep_their_launches(target: Target) -> None:
    problem = PROBLEMS["aiter"]
    small = Workload(batch=1, kv_heads=2, context=300)
    for seed in range(6):
        for workload in (WORKLOAD, small):
            inputs = samples(problem, seed, workload)
            expected, _ = by_triton(inputs, SPLIT, target)
            assert torch.equal(call(inputs, knobs=SPLIT), expected)
    assert len(bound()) == 2
    assert all(bound())


def test_misaligned_queries_and_hooks_go_through_triton(target: Target) -> None:
    inputs = samples(PROBLEMS["aiter"], 0)
    expected, _ = by_triton(inputs, SPLIT, target)
    query = inputs.query
    off = torch.empty(query.numel() + 8, dtype=query.dtype, device="cuda")[1:-7].view_as(query)
    off.copy_(query)
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    for _ in range(2):
        assert torch.equal(call(replace(inputs, query=off), knobs=SPLIT), expected)
        assert torch.equal(call(inputs, knobs=SPLIT), expected)
        assert all(bound())
        seen.clear()
        triton.knobs.runtime.launch_enter_hook.add(hook)
        try:
            assert torch.equal(call(inputs, knobs=SPLIT), expected)
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(hook)
        assert seen == ["hopper_decode_kernel", "reduce_kernel"]


@pytest.mark.parametrize("own_stream", [True, False], ids=["two_streams", "one_stream"])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_threads_do_not_disturb_each_other(
    knobs: HopperKnobs, own_stream: bool, target: Target
) -> None:
    problem = PROBLEMS["hnd_sinks"]
    sets = [[samples(problem, 10 * thread + i) for i in range(3)] for thread in range(2)]
    expected = [[by_triton(inputs, knobs, target)[0] for inputs in several] for several in sets]
    call(sets[0][0], knobs=knobs)  # compiles: what is tested are the launches
    torch.cuda.synchronize()
    start = threading.Barrier(2)
    found: list[list[torch.Tensor]] = [[], []]

    def work(thread: int) -> None:
        stream = torch.cuda.Stream() if own_stream else None
        start.wait()
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for i in range(300):
                found[thread].append(call(sets[thread][i % 3], knobs=knobs))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(bound()) == 3, "one per thread, the main one's included"
    assert all(bound())
    for several, right in zip(found, expected, strict=True):
        assert len(several) == 300
        assert all(torch.equal(out, right[i % 3]) for i, out in enumerate(several))


@pytest.mark.parametrize("given", [True, False], ids=["workspace_given", "no_workspace"])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_graphs_follow_the_context_lengths(knobs: HopperKnobs, given: bool, target: Target) -> None:
    inputs = samples(PROBLEMS["hnd_sinks"], 0)
    out = torch.empty_like(inputs.query)
    workspace = workspace_of(inputs, knobs, float("nan")) if given else None
    options: dict[str, Any] = {"knobs": knobs, "out": out, "workspace": workspace}
    for _ in range(2):
        call(inputs, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(inputs, **options)
        call(inputs, **options)
    larger = samples(PROBLEMS["hnd_sinks"], 1, replace(WORKLOAD, batch=8))
    for contexts in ((700, 1, 64), (65, 0, 699), (1, 1, 1)):
        call(larger, knobs=knobs)  # replaces the eager calls' own workspace by a larger one
        inputs.context_lengths.copy_(torch.tensor(contexts, dtype=torch.int32))
        expected, _ = by_triton(inputs, knobs, target)
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)
        out.fill_(float("nan"))
        assert torch.equal(call(inputs, **options), expected)


def test_a_workspace_may_hold_garbage(target: Target) -> None:
    inputs = samples(PROBLEMS["aiter"], 0)
    expected, _ = by_triton(inputs, SPLIT, target)
    for garbage in (float("nan"), 3.0, -1.0):
        workspace = workspace_of(inputs, SPLIT, garbage)
        for _ in range(3):
            assert torch.equal(call(inputs, knobs=SPLIT, workspace=workspace), expected)


class Chain:
    """Steps of two shapes in turn: each one's query is what the one before wrote, and caches and lengths change on the way."""

    N_STEPS = 50

    def __init__(self) -> None:
        problem = PROBLEMS["hnd_sinks"]
        contexts = (WORKLOAD.context, 300)
        self.live = [samples(problem, 90, replace(WORKLOAD, context=c)) for c in contexts]
        self.news = [
            [samples(problem, seed, replace(WORKLOAD, context=c)) for seed in range(5)]
            for c in contexts
        ]
        self.first_query = self.news[0][0].query
        self.outs = [torch.empty_like(self.first_query) for _ in range(self.N_STEPS)]

    def inputs(self, step: int) -> DecodeInputs:
        """The inputs of a step; two of four, and the first of each shape, change in place. Between the others there are decode kernels only."""
        live, new = self.live[step % 2], self.news[step % 2][step // 2 % 5]
        if step < 2 or step % 4 >= 2:
            live.context_lengths.copy_(new.context_lengths)
            live.key_cache.copy_(new.key_cache)
            live.value_cache.copy_(new.value_cache)
        query = self.outs[step - 1] if step else self.first_query
        return replace(
            live, query=query, softmax_scale=2.0
        )  # outputs are small: so they still matter as queries

    def expected(self, knobs: HopperKnobs, target: Target) -> list[torch.Tensor]:
        """Every output, each computed alone by plain launches."""
        for step, out in enumerate(self.outs):
            out.copy_(by_triton(self.inputs(step), replace(knobs, overlap_launch=False), target)[0])
            torch.cuda.synchronize()
        return [out.clone() for out in self.outs]

    def run(self, knobs: HopperKnobs) -> None:
        for step, out in enumerate(self.outs):
            call(self.inputs(step), knobs=knobs, out=out)

    def forget(self) -> None:
        for out in self.outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ["split", "one_shot"])
def test_overlapping_steps_read_nothing_too_early(
    name: str, in_graph: bool, target: Target
) -> None:
    knobs = replace(KNOBS[name], overlap_launch=True)
    chain = Chain()
    expected = chain.expected(knobs, target)
    assert len({out.double().sum().item() for out in expected}) == chain.N_STEPS
    chain.run(knobs)  # compiles and binds
    graph = torch.cuda.CUDAGraph()
    if in_graph:
        with torch.cuda.graph(graph):
            chain.run(knobs)
    for _ in range(5):
        chain.forget()
        if in_graph:
            graph.replay()
        else:
            torch.cuda._sleep(BUSY_CYCLES)
            chain.run(knobs)
        torch.cuda.synchronize()
        wrong = [i for i in range(chain.N_STEPS) if not torch.equal(chain.outs[i], expected[i])]
        assert not wrong
    assert len(bound()) == 2
    assert all(bound())


def test_a_warm_call_allocates_nothing_and_never_plans(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = samples(PROBLEMS["aiter"], 0)
    out = torch.empty_like(inputs.query)
    workspace = workspace_of(inputs, SPLIT, 0.0)
    expected, _ = by_triton(inputs, SPLIT, target)
    call(inputs, knobs=SPLIT, out=out, workspace=workspace)
    monkeypatch.setattr(decode, "plan_decode", None)
    out.fill_(float("nan"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        call(inputs, knobs=SPLIT, out=out, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(out, expected)


def test_one_cache_as_key_and_value(target: Target) -> None:
    inputs = samples(PROBLEMS["hnd_sinks"], 0)
    both = replace(inputs, value_cache=inputs.key_cache)
    for each in (both, inputs, both, inputs):
        apart = replace(each, value_cache=each.value_cache.clone())
        expected, _ = by_triton(apart, SPLIT, target)
        assert torch.equal(call(each, knobs=SPLIT), expected)
    assert len(bound()) == 1
