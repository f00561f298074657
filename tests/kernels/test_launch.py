"""Bound launches: the parameters that the machine code takes, new addresses on every launch, and everything that needs Triton."""

from __future__ import annotations

import ctypes
import gc
import struct
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton
from without_gpu import (
    ATTRIBUTE_B,
    FUNCTION,
    Cuda,
    aligned,
    compile_by_jit,
    load,
    mixed_call,
    ptx_parameters,
)

from patune.kernels import launch
from patune.kernels.knobs import HopperKnobs
from patune.kernels.launch import bind, parameters, why_unbound
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from patune.kernels.calls import KernelCall

PROBLEM = Problem(block_size=64, head_dim=64, qg=8, kv_layout="hnd", sinks=True)
WORKLOAD = Workload(batch=2, kv_heads=1, context=128)
SPLIT = HopperKnobs(partition_tokens=64, num_splits=2, num_stages=2, num_warps=4)
ALONE = replace(SPLIT, overlap_launch=False)
ONE_SHOT = replace(SPLIT, num_splits=1)
each_way = pytest.mark.parametrize(
    "knobs", [SPLIT, ALONE, ONE_SHOT], ids=["split", "alone", "one_shot"]
)
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6, allowed: the bytes that Triton's C launcher hands over
OVERLAP = struct.pack("<i4xi60x", 6, 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    machine = Cuda()
    machine.install(monkeypatch)
    return machine


def decode_step(
    knobs: HopperKnobs = SPLIT,
) -> tuple[list[KernelCall], tuple[torch.Tensor | None, ...]]:
    """A decode on CPU tensors, and all of its tensors in the order of ``_decode_on_gpu``."""
    inputs = sample_inputs(PROBLEM, WORKLOAD, torch.device("cpu"))
    out = torch.empty_like(inputs.query)
    lse = aligned(2 * 8).view(2, 8)
    workspace = aligned(workspace_elements(PROBLEM, WORKLOAD, knobs))
    calls = plan_decode(inputs, knobs, Target.named("sm_90"), out=out, workspace=workspace, lse=lse)
    tensors = (
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables, inputs.context_lengths,
        inputs.sinks, None, None, None, out, lse, workspace,
    )  # fmt: skip
    return calls, tensors


def kinds(kernel: Any) -> list[str]:
    return ["*" if kind.startswith("*") else kind for _, kind in parameters(kernel)]


def test_none_one_and_constexprs_are_no_parameters(cuda: Cuda) -> None:
    kernel = compile_by_jit(mixed_call(aligned(64), aligned(64)))
    assert [name for name, _ in parameters(kernel)] == ["a_ptr", "count", "even", "wide", "scale", "out_ptr"]  # fmt: skip
    assert [*kinds(kernel), "*", "*"] == ptx_parameters(kernel)


@each_way
def test_parameters_are_those_of_the_machine_code(cuda: Cuda, knobs: HopperKnobs) -> None:
    calls, _ = decode_step(knobs)
    for kernel in load(calls):
        assert len(parameters(kernel)) > 5
        assert [*kinds(kernel), "*", "*"] == ptx_parameters(kernel)


@each_way
def test_an_overlapping_kernel_waits_before_it_reads(cuda: Cuda, knobs: HopperKnobs) -> None:
    calls, _ = decode_step(knobs)
    for kernel in load(calls):
        ptx = kernel.asm["ptx"]
        assert ("griddepcontrol" in ptx) == knobs.overlap_launch
        if knobs.overlap_launch:
            reads = [
                ptx.find(read) for read in ("ld.global", "cp.async.c", "st.global") if read in ptx
            ]
            wait, trigger = (
                ptx.index(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents")
            )
            assert wait < trigger < min(reads)


def test_a_launch_carries_what_the_call_says(cuda: Cuda) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out)
    (kernel,) = load([call])
    cuda.stream = 77
    bound = bind([call], [kernel], (a, out, None), 0)
    assert bound is not None
    assert bound.launch((a, out, None))
    (seen,) = cuda.launches
    assert (seen.grid, seen.block) == ((2, 3, 4), (4 * 32, 1, 1))
    assert (seen.shared_b, seen.stream) == (kernel.metadata.shared, 77)
    assert seen.attributes == b""
    assert seen.function == FUNCTION
    assert seen.words[0] == a.data_ptr()
    assert [seen.scalar(i, ctypes.c_int32) for i in (1, 2)] == [1, 32]
    assert seen.scalar(3, ctypes.c_int64) == 2**40
    assert seen.scalar(4, ctypes.c_float) == torch.tensor(0.1).item()
    assert seen.words[5:] == [out.data_ptr(), 0, 0]


@pytest.mark.parametrize("number", [-1, -(2**31), 2**31 - 1, 2**31, -(2**40), 2**63])
def test_integers_of_every_width_arrive(cuda: Cuda, number: int) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out, wide=number)
    kernels = load([call])
    bound = bind([call], kernels, (a, out, None), 0)
    assert bound is not None
    assert bound.launch((a, out, None))
    kind = dict(parameters(kernels[0]))["wide"]
    assert kind == ("i32" if -(2**31) <= number < 2**31 else "i64" if number < 2**63 else "u64")
    assert cuda.launches[0].scalar(3, launch.SCALARS[kind]) == number


def test_a_float_beyond_float32_becomes_infinite_as_in_triton(cuda: Cuda) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out, scale=1e300)
    bound = bind([call], load([call]), (a, out, None), 0)
    assert bound is not None
    assert bound.launch((a, out, None))
    assert cuda.launches[0].scalar(4, ctypes.c_float) == float("inf")


def expected_words(call: KernelCall, kernel: Any) -> list[int]:
    words = []
    for name, kind in parameters(kernel):
        value = call.arguments[name]
        if isinstance(value, torch.Tensor):
            words.append(value.data_ptr())
        else:
            scalar = launch.SCALARS[kind](value)
            words.append(int.from_bytes(bytes(scalar), "little"))
    return [*words, 0, 0]


@each_way
def test_a_decode_step_follows_its_tensors(cuda: Cuda, knobs: HopperKnobs) -> None:
    calls, tensors = decode_step(knobs)
    kernels = load(calls)
    bound = bind(calls, kernels, tensors, 0)
    assert bound is not None
    for _ in range(3):
        calls, tensors = decode_step(knobs)  # the same shapes elsewhere in memory
        cuda.launches.clear()
        assert bound.launch(tensors)
        assert [seen.words for seen in cuda.launches] == [
            expected_words(call, kernel) for call, kernel in zip(calls, kernels, strict=True)
        ]
        assert [seen.grid for seen in cuda.launches] == [call.grid for call in calls]
        assert [seen.function for seen in cuda.launches] == [k.function for k in kernels]


@pytest.mark.parametrize(("knobs", "n_kernels"), [(SPLIT, 2), (ONE_SHOT, 1)])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_kernel_of_a_step_overlaps_or_none_does(
    cuda: Cuda, overlap: bool, knobs: HopperKnobs, n_kernels: int
) -> None:
    calls, tensors = decode_step(replace(knobs, overlap_launch=overlap))
    kernels = load(calls)
    assert [bool(kernel.metadata.launch_pdl) for kernel in kernels] == [overlap] * n_kernels
    bound = bind(calls, kernels, tensors, 0)
    assert bound is not None
    for _ in range(2):
        assert bound.launch(tensors)
    expected = OVERLAP if overlap else b""
    assert [seen.attributes for seen in cuda.launches] == [expected] * n_kernels * 2


def test_a_kernel_overlaps_on_its_own_account(cuda: Cuda) -> None:
    a, out = aligned(64), aligned(64)
    calls = [mixed_call(a, out), mixed_call(a, out), mixed_call(a, out)]
    calls[1].options["launch_pdl"] = True
    bound = bind(calls, load(calls), (a, out, None), 0)
    assert bound is not None
    assert bound.launch((a, out, None))
    assert [seen.attributes for seen in cuda.launches] == [b"", OVERLAP, b""]


def test_the_attribute_is_laid_out_as_in_cuda_h() -> None:
    assert ctypes.sizeof(launch._Attribute) == ATTRIBUTE_B
    assert ctypes.alignment(launch._Attribute) == 8
    assert bytes(launch._OVERLAP) == OVERLAP


def test_parts_of_the_workspace_move_with_it(cuda: Cuda) -> None:
    first, second, out = aligned(256), aligned(256), aligned(64)
    call = mixed_call(first[64:], out)
    bound = bind([call], load([call]), (out, None, first), 0)
    assert bound is not None
    for workspace in (first, second, first, second[16:], second[16:]):
        assert bound.launch((out, None, workspace))
        assert cuda.launches[-1].words[0] == workspace.data_ptr() + 64 * 4


def test_only_what_the_kernels_take_is_asked_for_an_address(cuda: Cuda) -> None:
    a = aligned(64)
    call = mixed_call(a, a)
    bound = bind([call], load([call]), (None, a, None), 0)
    assert bound is not None
    other = aligned(64)
    assert bound.launch((None, other, None))
    assert [cuda.launches[0].words[i] for i in (0, 5)] == [other.data_ptr()] * 2


def test_streams_change(cuda: Cuda) -> None:
    calls, tensors = decode_step()
    bound = bind(calls, load(calls), tensors, 0)
    assert bound is not None
    for stream in (0, 5, 5, 0, 9):
        cuda.stream = stream
        cuda.launches.clear()
        assert bound.launch(tensors)
        assert {seen.stream for seen in cuda.launches} == {stream}


def test_another_current_device_is_left_for_the_launch(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: asked.append((cuda.device, index)) or 3
    )
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out)
    bound = bind([call], load([call]), (a, out, None), 1)
    assert bound is not None
    assert bound.launch((a, out, None))
    assert asked == [(1, 1)]
    assert cuda.device == 0
    assert cuda.launches[0].stream == 3


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 9, 10, 11])
def test_a_misaligned_pointer_needs_triton(cuda: Cuda, place: int) -> None:
    calls, tensors = decode_step()
    kernels = load(calls)
    bound = bind(calls, kernels, tensors, 0)
    assert bound is not None
    tensor = tensors[place]
    assert tensor is not None
    store = torch.zeros(tensor.numel() + 16, dtype=tensor.dtype)
    off = store[1:].as_strided(tensor.shape, tensor.stride())
    moved = (*tensors[:place], off, *tensors[place + 1 :])
    assert not bound.launch(moved)
    assert cuda.launches == []
    assert bound.launch(tensors)


def test_what_was_launched_misaligned_is_not_bound(cuda: Cuda) -> None:
    off, out = aligned(68)[1:65], aligned(64)
    call = mixed_call(off, out)
    assert bind([call], load([call]), (off, out, None), 0) is None
    shifted = aligned(68)[1:]  # an aligned part of a misaligned workspace
    call = mixed_call(shifted[3:], out)
    assert bind([call], load([call]), (out, None, shifted), 0) is None


def test_pointers_of_unknown_origin_are_not_bound(cuda: Cuda) -> None:
    a, out = aligned(64), aligned(64)
    for stranger in (a.clone(), a[16:], out[16:]):
        call = mixed_call(stranger, out)
        assert bind([call], load([call]), (a, out, None), 0) is None
        assert bind([call], load([call]), (a, out, aligned(64)), 0) is None


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_launch_hook_needs_triton(cuda: Cuda, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out)
    bound = bind([call], load([call]), (a, out, None), 0)
    assert bound is not None
    chain = getattr(triton.knobs.runtime, hook)

    def profile(metadata: object) -> None: ...

    chain.add(profile)
    try:
        assert not bound.launch((a, out, None))
        assert cuda.launches == []
    finally:
        chain.remove(profile)
    assert bound.launch((a, out, None))
    monkeypatch.setattr(triton.knobs.runtime, hook, profile)  # a function in place of the chain
    assert not bound.launch((a, out, None))
    monkeypatch.setattr(triton.knobs.runtime, hook, None)
    assert bound.launch((a, out, None))


def described(**changed: Any) -> Any:
    """A compiled kernel as far as ``why_unbound`` looks at it."""
    signature = changed.pop("signature", {"a_ptr": "*fp32", "n": "i32", "N": "constexpr"})
    metadata = {
        "target": SimpleNamespace(backend="cuda"), "num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0,
        "launch_cooperative_grid": False, "launch_pdl": False, "instrumentation_mode": "",
    }  # fmt: skip
    return SimpleNamespace(
        metadata=SimpleNamespace(**(metadata | changed)), src=SimpleNamespace(signature=signature)
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"target": SimpleNamespace(backend="hip")}, "not a compiled CUDA kernel"),
        ({"num_ctas": 2}, "num_ctas=2"),
        ({"global_scratch_size": 128}, "global_scratch_size=128"),
        ({"profile_scratch_size": 64}, "profile_scratch_size=64"),
        ({"launch_cooperative_grid": True}, "launch_cooperative_grid=True"),
        ({"launch_pdl": True}, None),
        ({"instrumentation_mode": "consan"}, "instrumentation_mode=consan"),
        ({"signature": {"d": "tensordesc<fp16[64,64]>"}}, "parameter d is of type tensordesc<fp16[64,64]>"),
        ({"signature": {"t": ("i32", "i32")}}, "parameter t is of type ('i32', 'i32')"),
        ({"signature": {"h": "fp16"}}, "parameter h is of type fp16"),
    ],
)  # fmt: skip
def test_kernels_that_need_triton(changed: dict[str, Any], reason: str | None) -> None:
    assert why_unbound(described(**changed)) == reason


def test_no_driver_no_kernel_no_binding(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out)
    kernels = load([call])
    assert bind([], [], (a, out, None), 0) is None
    assert bind([call], [None], (a, out, None), 0) is None
    monkeypatch.setattr(launch, "_driver", lambda: None)
    assert bind([call], kernels, (a, out, None), 0) is None


def test_a_refused_launch_names_the_error_and_the_kernel(cuda: Cuda) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out)
    bound = bind([call], load([call]), (a, out, None), 0)
    assert bound is not None
    cuda.status = 400
    with pytest.raises(RuntimeError, match=r"mixed_kernel: CUDA_ERROR_INVALID_HANDLE \(400\)"):
        bound.launch((a, out, None))


def test_a_bound_kernel_stays_loaded(cuda: Cuda) -> None:
    a, out = aligned(64), aligned(64)
    call = mixed_call(a, out)
    kernels = load([call])
    bound = bind([call], kernels, (a, out, None), 0)
    held = weakref.ref(kernels.pop())
    gc.collect()
    assert held() is not None
    del bound
    gc.collect()
    assert held() is None
