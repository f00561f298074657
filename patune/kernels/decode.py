"""The public operation: check the tensors, choose knobs, launch.

On a GPU everything that depends only on shapes, strides, dtypes, flags and scalars is done once per signature; a warm call builds one key
and launches what was bound for it. Nothing reads a tensor's values, so no call synchronises and all of it can be captured in a CUDA graph.
Looked-up knobs that do not compile or launch are given up, and what the next layer of the dispatcher answers is launched in their place.
"""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch

from patune.errors import InvalidValueError, UnsupportedProblemError, reject
from patune.kernels.feasibility import is_feasible, unsupported
from patune.kernels.first_use import blames_knobs, reason_of, that_fit, tried_note
from patune.kernels.inputs import DecodeInputs
from patune.kernels.launch import bind
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.reference import reference_decode
from patune.kernels.signatures import signature as _signature
from patune.kernels.validate import check_inputs, check_out, check_pointers, check_workspace
from patune.kernels.workspace import own_workspace
from patune.target import Target, detect_target

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from patune.kernels.calls import KernelCall
    from patune.kernels.first_use import Answered
    from patune.kernels.knobs import Knobs
    from patune.kernels.launch import BoundLaunch
    from patune.kernels.signatures import AllTensors, InputTensors, Scalars
    from patune.problem import Problem, Workload


logger = logging.getLogger(__name__)
MAX_STEPS = 4096  # signatures kept: serving sees a few per batch size and block-table width


@dataclass(slots=True, kw_only=True)
class _Step:
    """What one signature was resolved to.

    Attributes:
        replaceable: others may be launched in the knobs' place: nobody chose these.
        bound: comes with the first launch that can be repeated without Triton.
    """

    knobs: Knobs
    target: Target
    workspace_elements: int
    replaceable: bool = False
    bound: BoundLaunch | None = None


_steps: dict[Hashable, _Step] = {}
_changed = False  # answers did, since the first of them: a caller's workspace may be too small through no fault of the caller


@overload
def paged_attention_decode(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    block_tables: torch.Tensor, context_lengths: torch.Tensor, *,
    softmax_scale: float, query_length: int = ..., sliding_window: int = ...,
    sinks: torch.Tensor | None = ..., query_scale: torch.Tensor | None = ...,
    key_scale: torch.Tensor | None = ..., value_scale: torch.Tensor | None = ...,
    out: torch.Tensor | None = ..., workspace: torch.Tensor | None = ...,
    return_lse: Literal[False] = ..., knobs: Knobs | None = ..., max_context: int | None = ...,
    softcap: float = ..., fp8_math: bool = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def paged_attention_decode(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    block_tables: torch.Tensor, context_lengths: torch.Tensor, *,
    softmax_scale: float, query_length: int = ..., sliding_window: int = ...,
    sinks: torch.Tensor | None = ..., query_scale: torch.Tensor | None = ...,
    key_scale: torch.Tensor | None = ..., value_scale: torch.Tensor | None = ...,
    out: torch.Tensor | None = ..., workspace: torch.Tensor | None = ...,
    return_lse: Literal[True], knobs: Knobs | None = ..., max_context: int | None = ...,
    softcap: float = ..., fp8_math: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def paged_attention_decode(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    block_tables: torch.Tensor, context_lengths: torch.Tensor, *,
    softmax_scale: float, query_length: int = 1, sliding_window: int = 0,
    sinks: torch.Tensor | None = None, query_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None, value_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None, workspace: torch.Tensor | None = None,
    return_lse: bool = False, knobs: Knobs | None = None, max_context: int | None = None,
    softcap: float = 0.0, fp8_math: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of the newest ``query_length`` tokens of every sequence over its paged KV cache, those tokens included.

    With ``out`` and ``workspace`` given and ``return_lse`` off, a call allocates nothing. CPU tensors are computed by the float32 oracle.

    A workspace is scratch memory: what it holds between calls does not matter, but two streams must not use one at once. Without one,
    patune keeps its own per thread and stream, and a graph capture gets one from the graph's pool.

    Args:
        query: [batch * query_length, q_heads, head_dim], row b * query_length + i is query token i of sequence b.
        key_cache: [pages, kv_heads, head_dim/x, block_size, x], x = 16 bytes / itemsize, or [pages, kv_heads, block_size, head_dim].
        value_cache: [pages, kv_heads, head_dim, block_size], or strided like the key.
        block_tables: [batch, max_pages] int32.
        context_lengths: [batch] int32, the query tokens included.
        softmax_scale: factor on query . key.
        query_length: query tokens per sequence.
        sliding_window: tokens that a query token sees, itself included; 0 or less is no window. A run-time value: no compile per value.
        sinks: [q_heads] raw logits added to the softmax denominators, or None.
        query_scale: [1] or [batch * query_length, q_heads, 1] float32, or None.
        key_scale: [1] or [pages, kv_heads, block_size, 1] float32, or None.
        value_scale: like key_scale.
        out: [batch * query_length, q_heads, head_dim] bf16 or fp16, written in place and returned.
        workspace: float32 of :func:`workspace_for`, or any that is large enough.
        return_lse: return (out, lse) with the natural-log LSE [batch * query_length, q_heads] float32, without the sinks.
        knobs: how to compute it; None takes the stored winner of the problem, else the default.
        max_context: upper bound of ``context_lengths`` when the caller knows one below the block tables' width; it only chooses knobs.
        softcap: cap of the scores, cap * tanh(score / cap); 0 is none. A run-time value.
        fp8_math: compute the products of an fp8 cache in fp8: 2 to 3 % error instead of 0.1 %.

    Raises:
        InvalidValueError: tensors that do not fit together, or knobs that do not fit the problem.
        UnsupportedProblemError: no kernel of this device computes the problem.
    """
    tensors = (
        query, key_cache, value_cache, block_tables, context_lengths,
        sinks, query_scale, key_scale, value_scale,
    )  # fmt: skip
    scalars = (softmax_scale, query_length, sliding_window, softcap, fp8_math, max_context)
    if query.is_cpu:
        result, lse = _decode_on_cpu(_inputs_of(tensors, scalars), out, max_context)
    else:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if return_lse else None
        result = _decode_on_gpu(tensors, scalars, out, workspace, lse, knobs)
    return (result, lse) if return_lse and lse is not None else result


def workspace_for(
    problem: Problem, workload: Workload, *, device: torch.device, knobs: Knobs | None = None
) -> torch.Tensor:
    """Allocate a workspace once, for ``workload`` and every smaller batch and power-of-two fraction of its context.

    Raises:
        UnsupportedProblemError: no kernel of this device computes the problem.
    """
    contexts = {max(1, workload.context >> shift) for shift in range(workload.context.bit_length())}
    smaller = (
        replace(workload, batch=batch, context=context)
        for batch in range(1, workload.batch + 1)
        for context in contexts
    )
    if knobs is None:
        target = _target_of(_device_index(device))
        _check_supported(problem, target)
        elements = max(
            workspace_elements(problem, w, _looked_up(problem, w, target).knobs) for w in smaller
        )
    else:
        elements = workspace_elements(problem, workload, knobs)
    return torch.empty(elements, dtype=torch.float32, device=device)


def _window_tokens(sliding_window: int) -> int:
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
        raise reject("sliding_window", sliding_window, "an integer; 0 or less is no window")
    return max(0, sliding_window)


def forget_steps() -> None:
    """Drop what was resolved per signature: the next call of each looks its knobs up again."""
    global _changed, _steps
    _changed = _changed or bool(_steps)
    _steps = {}  # a call that is resolving meanwhile keeps its step in the old one, which nobody asks again


def _decode_on_cpu(
    inputs: DecodeInputs, out: torch.Tensor | None, max_context: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _warn_about_cpu()
    _check(inputs, out, max_context)
    exact, lse = reference_decode(inputs)
    return (_new_out(inputs.query) if out is None else out).copy_(exact), lse


def _inputs_of(tensors: InputTensors, scalars: Scalars) -> DecodeInputs:
    query, key_cache, value_cache, block_tables, context_lengths = tensors[:5]
    sinks, query_scale, key_scale, value_scale = tensors[5:]
    softmax_scale, query_length, sliding_window, softcap, fp8_math, _ = scalars
    return DecodeInputs(
        query=query, key_cache=key_cache, value_cache=value_cache, block_tables=block_tables,
        context_lengths=context_lengths, softmax_scale=softmax_scale, query_length=query_length,
        sliding_window=_window_tokens(sliding_window), sinks=sinks,
        query_scale=query_scale, key_scale=key_scale, value_scale=value_scale,
        softcap=softcap, fp8_math=fp8_math,
    )  # fmt: skip


def _decode_on_gpu(
    tensors: InputTensors,
    scalars: Scalars,
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
    lse: torch.Tensor | None,
    knobs: Knobs | None,
) -> torch.Tensor:
    key = _signature(tensors, scalars, out, workspace, lse is not None, knobs)
    steps = _steps
    try:
        step = steps.get(key)
    except TypeError:  # a scalar that cannot be hashed: resolving says which
        step = None
    new = step is None
    if step is None:
        step = _resolve(_inputs_of(tensors, scalars), out, workspace, knobs, scalars[5])
    if out is None:
        out = _new_out(tensors[0])
    every = (*tensors, out, lse, _scratch(step, workspace, tensors[0].device))
    if step.bound is None or not step.bound.launch(every):
        try:
            _launch_by_triton(step, scalars, _told_apart(every))
        except Exception as error:
            if not step.replaceable or not blames_knobs(error):
                raise
            steps.pop(key, None)
            new, step = True, _launch_others(error, step, scalars, every, workspace)
            steps = _steps  # giving up made a new one
    if new:
        if len(steps) >= MAX_STEPS:
            steps.clear()
        steps[key] = step
    return out


def _scratch(
    step: _Step, workspace: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """The caller's workspace, else patune's own where the step needs one."""
    if workspace is None and step.workspace_elements:
        return own_workspace(step.workspace_elements, device)
    return workspace


def _launch_others(
    error: Exception,
    failed: _Step,
    scalars: Scalars,
    every: AllTensors,
    workspace: torch.Tensor | None,
) -> _Step:
    """Give up knobs that failed and launch what is answered in their place, until some work; the step of these.

    ``every`` are the call's tensors; the workspace among them, unless it is the caller's ``workspace``, is replaced by one for the new knobs.
    When all fail, the first error is raised, with what was tried.
    """
    global _changed
    _changed = True
    inputs = _inputs_of(every[:9], scalars)
    problem, workload, target = inputs.problem, inputs.workload(scalars[5]), failed.target
    last, tried = failed.knobs, {failed.knobs: reason_of(error)}
    while True:
        answer = _give_up(problem, workload, target, last, tried[last])
        fitting = that_fit(answer.knobs, problem, workload, target, workspace)
        untried = [knobs for knobs in fitting if knobs not in tried]
        if not untried:
            error.add_note(tried_note(tried))
            raise error
        last = untried[0]
        elements = workspace_elements(problem, workload, last)
        step = _Step(knobs=last, target=target, workspace_elements=elements, replaceable=True)
        tensors = (*every[:11], _scratch(step, workspace, inputs.query.device))
        try:
            _launch_by_triton(step, scalars, _told_apart(tensors))
        except Exception as another:
            if not blames_knobs(another):
                raise
            tried[last] = reason_of(another)
        else:
            return step


def _launch_by_triton(step: _Step, scalars: Scalars, every: AllTensors) -> None:
    """Plan and launch; then bind what was launched, if it can be, for the calls to come."""
    inputs = _inputs_of(every[:9], scalars)
    check_pointers(inputs)
    out, lse, workspace = every[9:]
    calls = plan_decode(inputs, step.knobs, step.target, out=out, workspace=workspace, lse=lse)
    device = inputs.query.device
    kernels = _launch(calls, device)
    if step.bound is None:
        step.bound = bind(calls, kernels, every, _device_index(device))


def _told_apart(tensors: AllTensors) -> AllTensors:
    """An alias where an object is there twice (one cache as key and value): :func:`bind` finds the places of pointers by their objects."""
    seen: list[torch.Tensor | None] = []
    for tensor in tensors:
        twice = tensor is not None and any(tensor is other for other in seen)
        seen.append(tensor.detach() if twice and tensor is not None else tensor)
    return cast("AllTensors", tuple(seen))


def _launch(calls: Sequence[KernelCall], device: torch.device) -> list[Any]:
    here = device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(device):
        return [call.launch() for call in calls]


def _check(
    inputs: DecodeInputs, out: torch.Tensor | None, max_context: int | None
) -> tuple[Problem, Workload]:
    check_inputs(inputs)
    if out is not None:
        check_out(inputs, out)
    return inputs.problem, inputs.workload(max_context)


def _resolve(
    inputs: DecodeInputs,
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
    knobs: Knobs | None,
    max_context: int | None,
) -> _Step:
    """Validate, name the problem, choose knobs: the part of a call that its signature decides."""
    problem, workload = _check(inputs, out, max_context)
    target = _target_of(_device_index(inputs.query.device))
    _check_supported(problem, target)
    replaceable, source = False, "given"
    if knobs is None:
        answer = _looked_up(problem, workload, target)
        knobs, replaceable, source = answer.knobs, answer.source != "override", "looked up"
    if reason := is_feasible(knobs, problem, target):
        raise InvalidValueError(
            f"The {source} knobs do not fit the problem on {target.arch}: {reason}. With knobs=None proven ones are taken."
        )
    if replaceable and _changed and workspace is not None:
        knobs = next(iter(that_fit(knobs, problem, workload, target, workspace)), knobs)
    elements = workspace_elements(problem, workload, knobs)
    if workspace is not None:
        check_workspace(inputs, workspace, elements)
    return _Step(knobs=knobs, target=target, workspace_elements=elements, replaceable=replaceable)


def _looked_up(problem: Problem, workload: Workload, target: Target) -> Answered:
    from patune.configs.dispatcher import lookup_problem

    return lookup_problem(problem, workload, target)


def _give_up(
    problem: Problem, workload: Workload, target: Target, knobs: Knobs, reason: str
) -> Answered:
    from patune.configs import dispatcher

    return dispatcher.give_up(problem, workload, target, knobs, reason)


def _check_supported(problem: Problem, target: Target) -> None:
    if reason := unsupported(problem, target):
        raise UnsupportedProblemError(
            f"No kernel of {target.device_name} computes this problem: {reason}. "
            "patune.kernels.reference.reference_decode computes it on any device, slowly."
        )


@functools.cache
def _target_of(index: int) -> Target:
    with torch.cuda.device(index):
        target = detect_target()
        name = torch.cuda.get_device_name()
    if target is None:
        raise UnsupportedProblemError(
            f"cuda:{index} is {name}, which no kernel family serves. Run `patune doctor` to see what this machine has."
        )
    return target


def _device_index(device: torch.device) -> int:
    if device.type != "cuda":
        raise UnsupportedProblemError(
            f"device={str(device)!r} has no kernels; allowed: cuda (NVIDIA or ROCm), or cpu for the oracle."
        )
    return torch.cuda.current_device() if device.index is None else device.index


def _new_out(query: torch.Tensor) -> torch.Tensor:
    # half the time of query.new_empty(query.shape): 1.9 against 3.8 us (2026-11, one core)
    dtype = torch.bfloat16 if query.element_size() == 1 else query.dtype
    return torch.empty_like(query, dtype=dtype, memory_format=torch.contiguous_format)


@functools.cache
def _warn_about_cpu() -> None:
    logger.warning(
        "CPU tensors: paged_attention_decode runs its float32 oracle, which is correct and slow; kernels need a GPU."
    )
