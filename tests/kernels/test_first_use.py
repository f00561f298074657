"""Looked-up knobs that do not compile or launch: others are launched in their place, and everything else is raised."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_decode import H200, KNOBS, answered, arguments, elements_of
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from without_gpu import Cuda

from patune.configs import dispatcher
from patune.errors import InvalidValueError
from patune.kernels import decode, first_use, plan
from patune.kernels.compile import compile_call
from patune.kernels.decode import forget_steps, paged_attention_decode
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.first_use import blames_knobs, reason_of
from patune.kernels.forced import forced
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.calls import KernelCall
    from patune.kernels.knobs import Knobs

PROBLEM = Problem(block_size=16, head_dim=64, qg=4)
SIZES = Workload(batch=2, kv_heads=2, context=48)
SECOND = replace(KNOBS, num_splits=5)
THIRD = replace(KNOBS, num_splits=1, num_stages=1)
NO_FIT = OutOfResources(300_000, 232_448, "shared memory")
ILLEGAL = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


class Device:
    """Launches nothing: knobs in ``broken`` raise what they map to. The dispatcher answers ``layers`` in turn."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        Cuda().install(patch)
        self.layers: list[Knobs] = [KNOBS, SECOND, THIRD]
        self.source = "exact"
        self.broken: dict[Knobs, Exception] = {}
        self.launched: list[Knobs] = []
        self.workspaces: list[torch.Tensor | None] = []
        self.given_up: list[tuple[Knobs, str]] = []
        self.planned: Knobs = KNOBS
        patch.setattr(decode, "plan_decode", self.plan)
        patch.setattr(decode, "_looked_up", self.answer)
        patch.setattr(decode, "_launch", self.launch)
        patch.setattr(decode, "_device_index", lambda device: 0)
        patch.setattr(decode, "_target_of", lambda index: H200)
        patch.setattr(dispatcher, "give_up", self.give_up, raising=False)

    def answer(self, problem: Problem, workload: Workload, target: Target) -> Any:
        assert (problem, workload, target) == (PROBLEM, SIZES, H200)
        return answered(self.layers[0], self.source)

    def give_up(
        self, problem: Problem, workload: Workload, target: Target, knobs: Knobs, reason: str
    ) -> Any:
        self.given_up.append((knobs, reason))
        if knobs == self.layers[0] and len(self.layers) > 1:
            del self.layers[0]
        return self.answer(problem, workload, target)

    def plan(self, inputs: Any, knobs: Knobs, target: Target, **buffers: Any) -> list[KernelCall]:
        self.planned = knobs
        self.workspaces.append(buffers["workspace"])
        return []

    def launch(self, calls: list[KernelCall], device: torch.device) -> list[Any]:
        if error := self.broken.get(self.planned):
            raise error
        self.launched.append(self.planned)
        return []


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    first_use._warn_about_workspace.cache_clear()
    yield Device(monkeypatch)
    forget_steps()


def run(**more: Any) -> torch.Tensor:
    return paged_attention_decode(**arguments(device="meta"), **more)


def steps() -> list[Knobs]:
    return [step.knobs for step in decode._steps.values()]


def test_the_next_layers_are_launched_until_one_works(device: Device) -> None:
    device.broken = {KNOBS: NO_FIT, SECOND: PTXASError("no registers left\n at line 3")}
    run()
    assert device.launched == [THIRD]
    assert device.given_up == [
        (KNOBS, "OutOfResources: out of resource: shared memory, Required: 300000, Hardware limit: 232448. "
                "Reducing block sizes or `num_stages` may help."),
        (SECOND, "PTXASError: no registers left"),
    ]  # fmt: skip
    assert steps() == [THIRD]
    assert [None if w is None else w.numel() >= elements_of(k) for w, k in zip(device.workspaces, (KNOBS, SECOND), strict=False)] == [True, True]  # fmt: skip
    assert device.workspaces[-1] is None, "one split has no partial results"
    run()
    assert device.launched == [THIRD, THIRD]
    assert len(device.given_up) == 2, "the step that works is kept"


def test_a_larger_workspace_is_made_for_the_next_knobs(device: Device) -> None:
    device.broken = {KNOBS: NO_FIT}
    run()
    assert device.launched == [SECOND]
    sizes = [w.numel() for w in device.workspaces if w is not None]
    assert sizes == [elements_of(KNOBS), elements_of(SECOND)]


def test_when_all_fail_the_first_error_says_what_was_tried(device: Device) -> None:
    last = safe_knobs(PROBLEM, H200)
    usual = default_knobs(PROBLEM, SIZES, H200)
    everything = (KNOBS, SECOND, THIRD, usual, last)
    device.broken = {
        knobs: OutOfResources(number, 0, "x") for number, knobs in enumerate(everything)
    }
    with pytest.raises(OutOfResources) as caught:
        run()
    assert caught.value is device.broken[KNOBS]
    (note,) = caught.value.__notes__
    assert note.startswith("No knobs could be launched. Tried:\n")
    for number, knobs in enumerate(everything):
        assert f"  {knobs}: OutOfResources: out of resource: x, Required: {number}," in note
    assert device.launched == []
    assert steps() == []


@pytest.mark.parametrize("chosen", ["given", "override"])
def test_knobs_that_somebody_chose_raise(device: Device, chosen: str) -> None:
    device.broken = {KNOBS: NO_FIT}
    device.source = "override"
    with pytest.raises(OutOfResources):
        run(**({"knobs": KNOBS} if chosen == "given" else {}))
    assert device.given_up == []
    assert steps() == []


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_fault_of_the_device_is_not_retried(device: Device, when: str) -> None:
    device.broken = {KNOBS: ILLEGAL} if when == "first" else {KNOBS: NO_FIT, SECOND: ILLEGAL}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run()
    assert [knobs for knobs, _ in device.given_up] == ([] if when == "first" else [KNOBS])
    assert device.launched == []
    assert steps() == []


def test_what_a_callers_workspace_does_not_hold_is_passed_over(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="patune")
    device.broken = {KNOBS: NO_FIT}
    workspace = torch.empty(elements_of(KNOBS), device="meta")
    run(workspace=workspace)
    usual = default_knobs(PROBLEM, SIZES, H200)
    assert elements_of(SECOND) > workspace.numel() >= elements_of(usual)
    assert device.launched == [usual]
    # the next signature looks the larger knobs up at once; the workspace is the same
    run(workspace=workspace, return_lse=True)
    assert device.launched == [usual, usual]
    assert [r.message for r in caplog.records] == [
        f"Knobs of block_size=16 head_dim=64 qg=4 on sm_90 changed since the workspace of {workspace.numel()} elements was allocated, "
        "and need a larger one: others that fit it are taken. workspace_for(...) allocates one for the present knobs."
    ]


def test_a_workspace_that_was_too_small_from_the_start_is_refused(device: Device) -> None:
    workspace = torch.empty(99, device="meta")
    with pytest.raises(InvalidValueError, match=r"workspace has shape \[99\]"):
        run(workspace=workspace)
    run()
    forget_steps()  # as a reload does: the database may say something else now
    run(workspace=workspace)
    assert device.launched == [KNOBS, default_knobs(PROBLEM, SIZES, H200)]


def test_a_workspace_of_another_type_is_refused_whatever_changed(device: Device) -> None:
    device.broken = {KNOBS: NO_FIT}
    run()
    with pytest.raises(InvalidValueError, match=r"workspace\.dtype"):
        run(workspace=torch.empty(4, dtype=torch.float16, device="meta"))


def test_a_step_that_was_resolved_before_a_reload_is_not_kept(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*args: Any, **buffers: Any) -> list[KernelCall]:
        forget_steps()  # another thread's reload, between the lookup and the launch
        return device.plan(*args, **buffers)

    monkeypatch.setattr(decode, "plan_decode", planned)
    run()
    assert device.launched == [KNOBS]
    assert steps() == []


def test_an_override_has_steps_of_its_own(device: Device) -> None:
    run()
    token = forced.set(("an override",))
    device.layers = [SECOND]
    run()
    run(knobs=THIRD)
    forced.reset(token)
    run()
    assert device.launched == [KNOBS, SECOND, THIRD, KNOBS]
    token = forced.set(("an override",))
    device.layers = [THIRD]
    run()
    forced.reset(token)
    assert device.launched[-1] == SECOND, "an equal override finds its step again"


CUDA, HIP = "Triton Error [CUDA]: ", "Triton Error [HIP]:  Code: 1, Messsage: "
BLAMED = [
    NO_FIT,
    PTXASError("x"),
    CompilationError("a = 1", None, "no such layout"),
    RuntimeError("PassManager::run failed"),
    RuntimeError(CUDA + "invalid argument"),
    RuntimeError(CUDA + "too many resources requested for launch"),
    RuntimeError(HIP + "out of resources"),
    ValueError("num_warps=6 is not a power of two"),
    AssertionError("num_warps must be a power of 2"),
]
NOT_BLAMED = [
    ILLEGAL,
    RuntimeError(CUDA + "misaligned address"),
    RuntimeError(CUDA + "unspecified launch failure"),
    RuntimeError(CUDA + "device-side assert triggered"),
    RuntimeError(CUDA + "out of memory"),
    RuntimeError(CUDA + "operation not permitted when stream is capturing"),
    RuntimeError(CUDA + "context is destroyed"),
    RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    InvalidValueError("key_cache starts at 0x1008"),
    OSError("No space left on device"),
    MemoryError(),
    KeyError("x"),
]  # fmt: skip


@pytest.mark.parametrize("error", BLAMED, ids=repr)
def test_blamed(error: Exception) -> None:
    assert blames_knobs(error)


@pytest.mark.parametrize("error", NOT_BLAMED, ids=repr)
def test_not_blamed(error: Exception) -> None:
    assert not blames_knobs(error)


UNCOMPILABLE = {
    "sm_90": HopperKnobs(partition_tokens=64, num_splits=1, num_stages=1, num_warps=2),
    "gfx942": CdnaKnobs(partition_tokens=64, num_splits=1, num_stages=1, num_warps=8),
}


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("sm_90", "RuntimeError: error encountered during parsing"),
        ("gfx942", "CompileTimeAssertionFailure: a shorter contraction than the operand layout"),
    ],
)
def test_what_the_real_compiler_says_is_recognised(arch: str, reason: str) -> None:
    """Half a warpgroup issues no wgmma, and 8 tokens per warp are too few: feasibility refuses both, and so does the compiler."""
    target, knobs = Target.named(arch), UNCOMPILABLE[arch]
    inputs = sample_inputs(PROBLEM, SIZES, torch.device("cpu"))
    (call,) = plan.plan_decode(inputs, knobs, target, out=torch.empty_like(inputs.query))
    with pytest.raises((RuntimeError, CompilationError)) as caught:
        compile_call(call, target)
    assert blames_knobs(caught.value)
    assert reason_of(caught.value).startswith(reason)
