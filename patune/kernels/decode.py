"""The public operation: check the tensors, choose knobs, launch.

On a GPU everything that depends only on shapes, strides, dtypes and flags is done once per signature; a warm call builds one key, plans and
launches. Nothing reads a tensor's values, so no call synchronises and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, overload

import torch

from patune.errors import InvalidValueError, UnsupportedProblemError, reject
from patune.kernels.feasibility import is_feasible, unsupported
from patune.kernels.inputs import DecodeInputs
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.reference import reference_decode
from patune.kernels.validate import check_inputs, check_out, check_pointers, check_workspace
from patune.target import Target, detect_target

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from patune.kernels.calls import KernelCall
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload

logger = logging.getLogger(__name__)
MAX_STEPS = 4096  # signatures kept: serving sees a few per batch size and block-table width


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What one signature was resolved to."""

    knobs: Knobs
    target: Target
    workspace_elements: int


_steps: dict[Hashable, _Step] = {}


@overload
def paged_attention_decode(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    block_tables: torch.Tensor, context_lengths: torch.Tensor, *,
    softmax_scale: float, query_length: int = ..., sliding_window: int = ...,
    sinks: torch.Tensor | None = ..., query_scale: torch.Tensor | None = ...,
    key_scale: torch.Tensor | None = ..., value_scale: torch.Tensor | None = ...,
    out: torch.Tensor | None = ..., workspace: torch.Tensor | None = ...,
    return_lse: Literal[False] = ..., knobs: Knobs | None = ..., max_context: int | None = ...,
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
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def paged_attention_decode(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    block_tables: torch.Tensor, context_lengths: torch.Tensor, *,
    softmax_scale: float, query_length: int = 1, sliding_window: int = 0,
    sinks: torch.Tensor | None = None, query_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None, value_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None, workspace: torch.Tensor | None = None,
    return_lse: bool = False, knobs: Knobs | None = None, max_context: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of the newest ``query_length`` tokens of every sequence over its paged KV cache, those tokens included.

    With ``out`` and ``workspace`` given and ``return_lse`` off, a call allocates nothing. CPU tensors are computed by the float32 oracle.

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
        workspace: float32 of :func:`workspace_for`.
        return_lse: return (out, lse) with the natural-log LSE [batch * query_length, q_heads] float32, without the sinks.
        knobs: how to compute it; None takes the stored winner of the problem, else the default.
        max_context: upper bound of ``context_lengths`` when the caller knows one below the block tables' width; it only chooses knobs.

    Raises:
        InvalidValueError: tensors that do not fit together, or knobs that do not fit the problem.
        UnsupportedProblemError: no kernel of this device computes the problem.
    """
    inputs = DecodeInputs(
        query=query, key_cache=key_cache, value_cache=value_cache, block_tables=block_tables,
        context_lengths=context_lengths, softmax_scale=softmax_scale, query_length=query_length,
        sliding_window=_window_tokens(sliding_window), sinks=sinks,
        query_scale=query_scale, key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip
    if query.device.type == "cpu":
        result, lse = _decode_on_cpu(inputs, out, max_context)
    else:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if return_lse else None
        result = _decode_on_gpu(inputs, out, workspace, lse, knobs, max_context)
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
            workspace_elements(problem, w, _looked_up(problem, w, target)) for w in smaller
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
    _steps.clear()


def _decode_on_cpu(
    inputs: DecodeInputs, out: torch.Tensor | None, max_context: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _warn_about_cpu()
    _check(inputs, out, max_context)
    exact, lse = reference_decode(inputs)
    return (_new_out(inputs) if out is None else out).copy_(exact), lse


def _decode_on_gpu(
    inputs: DecodeInputs,
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
    lse: torch.Tensor | None,
    knobs: Knobs | None,
    max_context: int | None,
) -> torch.Tensor:
    key = _signature(inputs, out, workspace, knobs, max_context)
    step = _steps.get(key)
    if step is None:
        step = _resolve(inputs, out, workspace, knobs, max_context)
        if len(_steps) >= MAX_STEPS:
            _steps.clear()
        _steps[key] = step
    check_pointers(inputs)
    query = inputs.query
    if out is None:
        out = _new_out(inputs)
    if workspace is None and step.workspace_elements:
        workspace = query.new_empty(step.workspace_elements, dtype=torch.float32)
    calls = plan_decode(inputs, step.knobs, step.target, out=out, workspace=workspace, lse=lse)
    _launch(calls, query.device)
    return out


def _launch(calls: Sequence[KernelCall], device: torch.device) -> None:
    here = device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(device):
        for call in calls:
            call.launch()


def _check(
    inputs: DecodeInputs, out: torch.Tensor | None, max_context: int | None
) -> tuple[Problem, Workload]:
    check_inputs(inputs)
    if out is not None:
        check_out(inputs, out)
    return inputs.problem, inputs.workload(max_context)


def _spec(tensor: torch.Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _signature(
    inputs: DecodeInputs,
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
    knobs: Knobs | None,
    max_context: int | None,
) -> Hashable:
    """Everything that validation, problem and lookup depend on."""
    return (
        _spec(inputs.query), _spec(inputs.key_cache), _spec(inputs.value_cache),
        _spec(inputs.block_tables), _spec(inputs.context_lengths), _spec(inputs.sinks),
        _spec(inputs.query_scale), _spec(inputs.key_scale), _spec(inputs.value_scale),
        _spec(out), _spec(workspace), knobs, max_context,
        type(inputs.softmax_scale), inputs.query_length, inputs.sliding_window,
    )  # fmt: skip


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
    source = "given" if knobs is not None else "looked up"
    knobs = knobs or _looked_up(problem, workload, target)
    if reason := is_feasible(knobs, problem, target):
        raise InvalidValueError(
            f"The {source} knobs do not fit the problem on {target.arch}: {reason}. With knobs=None proven ones are taken."
        )
    elements = workspace_elements(problem, workload, knobs)
    if workspace is not None:
        check_workspace(inputs, workspace, elements)
    return _Step(knobs=knobs, target=target, workspace_elements=elements)


def _looked_up(problem: Problem, workload: Workload, target: Target) -> Knobs:
    from patune.configs.dispatcher import lookup_problem

    return lookup_problem(problem, workload, target).knobs


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


def _new_out(inputs: DecodeInputs) -> torch.Tensor:
    query = inputs.query
    dtype = torch.bfloat16 if query.element_size() == 1 else query.dtype
    return query.new_empty(query.shape, dtype=dtype)


@functools.cache
def _warn_about_cpu() -> None:
    logger.warning(
        "CPU tensors: paged_attention_decode runs its float32 oracle, which is correct and slow; kernels need a GPU."
    )
