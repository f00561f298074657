"""What a call is found again by: everything but the addresses and the values of its tensors."""

from __future__ import annotations

from threading import local
from typing import TYPE_CHECKING

from patune.kernels.forced import forced

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

    from patune.kernels.knobs import Knobs

    # query, key_cache, value_cache, block_tables, context_lengths, sinks, query_scale, key_scale, value_scale
    InputTensors = tuple[
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
        torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None,
    ]  # fmt: skip
    # softmax_scale, query_length, sliding_window, softcap, fp8_math, max_context
    Scalars = tuple[float, int, int, float, bool, int | None]
    # the input tensors, then out, lse, workspace
    AllTensors = tuple[
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
        torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None,
        torch.Tensor, torch.Tensor | None, torch.Tensor | None,
    ]  # fmt: skip


class _Thread(local):
    """Part of every signature, since a bound launch belongs to the thread that made it. An identifier would be given to later threads again."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()


def _spec(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def signature(
    tensors: InputTensors,
    scalars: Scalars,
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
    with_lse: bool,
    knobs: Knobs | None,
) -> Hashable:
    """Everything that validation, problem, lookup and the scalars of a bound launch depend on, the thread that owns the launch, and
    the overrides that hold in it.

    All of it is read anew on every call: 4.7 us, and 1.7 us to find the step, of 11.7 us for a call with a driver that does nothing
    (7 tensors, 2 launches; 2026-11, one core). Remembering the tensor objects would not save it: ``resize_``, ``set_`` and ``as_strided_``
    change what an object means, and seeing that takes the same reads. A function per tensor would take 0.4 us more, device numbers in place
    of devices 0.3 us less. Types go with the scalars because ``True == 1 == 1.0``.
    """
    query, key, value, table, contexts, sinks, query_scale, key_scale, value_scale = tensors
    return (
        _thread.token, with_lse, knobs, tuple(map(type, scalars)), scalars,
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        table.shape, table.stride(), table.dtype, table.device,
        contexts.shape, contexts.stride(), contexts.dtype, contexts.device,
        None if sinks is None else _spec(sinks),
        None if query_scale is None else _spec(query_scale),
        None if key_scale is None else _spec(key_scale),
        None if value_scale is None else _spec(value_scale),
        None if out is None else (out.shape, out.stride(), out.dtype, out.device),
        None if workspace is None else (workspace.shape, workspace.stride(), workspace.dtype, workspace.device),
        forced.get(),
    )  # fmt: skip
