"""Refuses tensors that a kernel would read wrongly. Looks at shapes, strides, dtypes and devices only: never at values, so it never syncs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from patune.errors import InvalidValueError, reject
from patune.kernels.caches import VECTOR_BYTES
from patune.kernels.inputs import DTYPE_NAMES
from patune.problem import BLOCK_SIZES, HEAD_DIMS, MAX_QUERY_LENGTH
from patune.record import check_bool, check_int, check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.inputs import DecodeInputs

OUTPUT_DTYPES = (torch.bfloat16, torch.float16)
SINK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STRIDED = "pages, kv_heads, block_size, head_dim"
AITER_KEY = "pages, kv_heads, head_dim/x, block_size, x"
AITER_VALUE = "pages, kv_heads, head_dim, block_size"
AITER_5D_VALUE = "pages, kv_heads, block_size/x, head_dim, x"
TOKEN_SCALE = "pages, kv_heads, block_size, 1"
STRIDE_ELEMENTS = 16  # kernels copy 16 bytes at a time, and Triton specialises on integers that are multiples of 16
MAX_GRID_AXIS = 65_535  # CUDA's limit for grid axes y and z: sequences are one of them


def check_inputs(inputs: DecodeInputs) -> None:
    """Refuse inputs of a decode step that do not fit together.

    Raises:
        InvalidValueError: a shape, stride, dtype or device is wrong; the message names the tensor, what was seen and what is expected.
    """
    check_int("query_length", inputs.query_length, low=1, high=MAX_QUERY_LENGTH)
    check_int("sliding_window", inputs.sliding_window, low=0)
    for name, number in (("softmax_scale", inputs.softmax_scale), ("softcap", inputs.softcap)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise reject(name, number, "a Python float (a tensor would sync)")
    if not math.isfinite(inputs.softmax_scale):
        raise reject("softmax_scale", inputs.softmax_scale, "a finite number")
    check_number("softcap", inputs.softcap, low=0.0)
    check_bool("fp8_math", inputs.fp8_math)
    _check_table(inputs)
    _check_query(inputs)
    _check_caches(inputs)
    _check_heads(inputs)
    _check_scales(inputs)
    _check_devices(inputs)


def check_out(inputs: DecodeInputs, out: torch.Tensor) -> None:
    """Refuse an output that a kernel could not write in place.

    Raises:
        InvalidValueError: wrong shape, dtype, device or strides.
    """
    _check_shape("out", out, inputs.query.shape, "batch * query_length, q_heads, head_dim")
    _check_dtype("out", out, OUTPUT_DTYPES)
    _check_device("out", out, inputs.query.device)
    if out.stride(2) != 1 or 0 in out.stride():
        raise InvalidValueError(
            f"out has strides {list(out.stride())}: it is written in place as [batch, query_length, kv_heads, group, head_dim]; "
            "allowed: a contiguous last axis and no repeated (expanded) elements."
        )


def check_workspace(inputs: DecodeInputs, workspace: torch.Tensor, elements: int) -> None:
    """Refuse a workspace that is too small for ``elements`` float32 values.

    Raises:
        InvalidValueError: wrong dtype, device, rank or size.
    """
    _check_dtype("workspace", workspace, (torch.float32,))
    _check_device("workspace", workspace, inputs.query.device)
    if workspace.ndim != 1 or not workspace.is_contiguous() or workspace.numel() < elements:
        raise InvalidValueError(
            f"workspace has shape {list(workspace.shape)}; expected: one contiguous axis of at least {elements} float32 elements. "
            "workspace_for(...) allocates one that fits every smaller batch too."
        )


def check_pointers(inputs: DecodeInputs) -> None:
    """Refuse caches that are not 16-byte aligned: kernels copy 16 bytes at a time. The only check that every GPU call repeats.

    Raises:
        InvalidValueError: a cache starts off a 16-byte boundary.
    """
    if (inputs.key_cache.data_ptr() | inputs.value_cache.data_ptr()) % VECTOR_BYTES:
        raise InvalidValueError(
            f"key_cache starts at {inputs.key_cache.data_ptr():#x}, value_cache at {inputs.value_cache.data_ptr():#x}; "
            f"allowed: addresses that are multiples of {VECTOR_BYTES}."
        )


def _check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int], axes: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise InvalidValueError(
            f"{name} has shape {list(tensor.shape)}; expected [{axes}] = {list(expected)}."
        )


def _check_rank(name: str, tensor: torch.Tensor, ranks: tuple[int, ...], axes: str) -> None:
    if tensor.ndim not in ranks:
        raise InvalidValueError(f"{name} has shape {list(tensor.shape)}; expected {axes}.")


def _check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise reject(f"{name}.dtype", tensor.dtype, allowed)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidValueError(
            f"{name} is on {tensor.device}; expected: {device}, where query is."
        )


def _check_strides(name: str, tensor: torch.Tensor, inner: Sequence[int], why: str) -> None:
    """The innermost axes must have exactly these strides; an axis of one element may have any."""
    axes = zip(tensor.shape[-len(inner) :], tensor.stride()[-len(inner) :], inner, strict=True)
    if any(size > 1 and seen != expected for size, seen, expected in axes):
        raise InvalidValueError(
            f"{name} has strides {list(tensor.stride())}; expected [..., {', '.join(map(str, inner))}]: {why}."
        )


def _check_table(inputs: DecodeInputs) -> None:
    table, lengths = inputs.block_tables, inputs.context_lengths
    _check_rank("block_tables", table, (2,), "[batch, max_pages]")
    _check_dtype("block_tables", table, (torch.int32,))
    _check_dtype("context_lengths", lengths, (torch.int32,))
    if not 1 <= table.shape[0] <= MAX_GRID_AXIS or table.shape[1] < 1:
        raise InvalidValueError(
            f"block_tables has shape {list(table.shape)}; expected [batch, max_pages] with 1 to {MAX_GRID_AXIS} sequences "
            "and at least one page."
        )
    _check_strides("block_tables", table, (1,), "a row's entries follow each other")
    _check_shape("context_lengths", lengths, (inputs.batch,), "batch")
    _check_strides("context_lengths", lengths, (1,), "it is read as a plain array")


def _check_query(inputs: DecodeInputs) -> None:
    query = inputs.query
    _check_rank("query", query, (3,), "[batch * query_length, q_heads, head_dim]")
    _check_dtype("query", query, tuple(DTYPE_NAMES))
    if query.shape[2] not in HEAD_DIMS:
        raise reject("head_dim (query.shape[2])", query.shape[2], HEAD_DIMS)
    rows = inputs.batch * inputs.query_length
    expected = (rows, *query.shape[1:])
    _check_shape("query", query, expected, "batch * query_length, q_heads, head_dim")
    _check_strides("query", query, (1,), "a head's channels follow each other")


def _check_caches(inputs: DecodeInputs) -> None:
    key, value, query = inputs.key_cache, inputs.value_cache, inputs.query
    head_dim = query.shape[2]
    _check_rank("key_cache", key, (4, 5), f"[{AITER_KEY}] or [{STRIDED}]")
    _check_dtype("key_cache", key, tuple(DTYPE_NAMES))
    _check_dtype("value_cache", value, (key.dtype,))
    if query.dtype != key.dtype and (query.element_size() == 1 or key.element_size() == 2):
        raise InvalidValueError(
            f"query.dtype={query.dtype} does not go with key_cache.dtype={key.dtype}; "
            "allowed: equal dtypes, or a bf16 or fp16 query with an fp8 cache."
        )
    if key.ndim == 5:
        _check_rank("value_cache", value, (4, 5), f"[{AITER_VALUE}] or [{AITER_5D_VALUE}]")
    else:
        _check_rank("value_cache", value, (4,), f"[{STRIDED}], as key_cache has 4 axes")
    if inputs.block_size not in BLOCK_SIZES:
        raise reject("block_size (key_cache.shape[-2])", inputs.block_size, BLOCK_SIZES)
    _check_forms(key, value, inputs.block_size, head_dim)
    axes = ("page", "head") if key.ndim == 5 else ("page", "head", "token")
    for name, cache in (("key_cache", key), ("value_cache", value)):
        _check_outer_strides(name, cache, axes)


def _check_forms(key: torch.Tensor, value: torch.Tensor, block_size: int, head_dim: int) -> None:
    """Shapes, and the strides that kernels take for granted."""
    pages, kv_heads = key.shape[:2]
    if key.ndim == 5:
        # x follows from the dtype alone: whether scales are given says nothing about the layout
        x = VECTOR_BYTES // key.element_size()
        _check_shape("key_cache", key, (pages, kv_heads, head_dim // x, block_size, x), AITER_KEY)
        _check_strides("key_cache", key, (block_size * x, x, 1), "a (page, head) is one block")
        if value.ndim == 5:
            runs = (pages, kv_heads, block_size // x, head_dim, x)
            _check_shape("value_cache", value, runs, AITER_5D_VALUE)
            _check_strides(
                "value_cache", value, (head_dim * x, x, 1), "a (page, head) is one block"
            )
            return
        _check_shape("value_cache", value, (pages, kv_heads, head_dim, block_size), AITER_VALUE)
        _check_strides("value_cache", value, (block_size, 1), "a (page, head) is one block")
        return
    for name, cache in (("key_cache", key), ("value_cache", value)):
        _check_shape(name, cache, (pages, kv_heads, block_size, head_dim), STRIDED)
        _check_strides(name, cache, (1,), "a token's channels follow each other")


def _check_outer_strides(name: str, cache: torch.Tensor, axes: Sequence[str]) -> None:
    """The strides that kernels take at run time: any, key and value in one tensor too, as long as 16-byte copies stay aligned."""
    for axis, stride in zip(axes, cache.stride(), strict=False):
        if stride % STRIDE_ELEMENTS:
            raise InvalidValueError(
                f"{name} has strides {list(cache.stride())}: its {axis} stride is {stride}; "
                f"allowed: multiples of {STRIDE_ELEMENTS} elements."
            )


def _check_heads(inputs: DecodeInputs) -> None:
    q_heads, kv_heads = inputs.query.shape[1], inputs.kv_heads
    if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
        raise InvalidValueError(
            f"query has {q_heads} heads and key_cache {kv_heads}; allowed: query heads that are a multiple of the KV heads."
        )
    if (sinks := inputs.sinks) is not None:
        _check_shape("sinks", sinks, (q_heads,), "q_heads")
        _check_dtype("sinks", sinks, SINK_DTYPES)
        _check_strides("sinks", sinks, (1,), "it is read as a plain array")


def _check_scales(inputs: DecodeInputs) -> None:
    query, key, value = inputs.query_scale, inputs.key_scale, inputs.value_scale
    per_row = (*inputs.query.shape[:2], 1)
    per_token = (inputs.key_cache.shape[0], inputs.kv_heads, inputs.block_size, 1)
    _check_scale(
        "query_scale", query, inputs.query, per_row, "batch * query_length, q_heads, 1",
        (per_row[1], 1, 1), "it is read as a plain array",
    )  # fmt: skip
    for name, scale, cache in (
        ("key_scale", key, inputs.key_cache), ("value_scale", value, inputs.value_cache),
    ):  # fmt: skip
        _check_scale(
            name, scale, cache, per_token, TOKEN_SCALE, (1, 1), "a page's tokens follow each other"
        )
    shapes = ["None" if scale is None else str(list(scale.shape)) for scale in (key, value)]
    if shapes[0] != shapes[1]:
        raise InvalidValueError(
            f"key_scale is {shapes[0]} and value_scale is {shapes[1]}; allowed: both None, both [1], or both per token."
        )


def _check_scale(
    name: str,
    scale: torch.Tensor | None,
    scaled: torch.Tensor,
    shape: Sequence[int],
    axes: str,
    inner: Sequence[int],
    why: str,
) -> None:
    if scale is None:
        return
    if scaled.element_size() != 1:
        raise InvalidValueError(
            f"{name} is given, but what it scales is {scaled.dtype}; allowed: scales of fp8 tensors only, else None."
        )
    _check_dtype(name, scale, (torch.float32,))
    if tuple(scale.shape) not in ((1,), tuple(shape)):
        raise InvalidValueError(
            f"{name} has shape {list(scale.shape)}; expected [1] or [{axes}] = {list(shape)}."
        )
    if tuple(scale.shape) == tuple(shape):
        _check_strides(name, scale, inner, why)


def _check_devices(inputs: DecodeInputs) -> None:
    for name in (
        "key_cache", "value_cache", "block_tables", "context_lengths",
        "sinks", "query_scale", "key_scale", "value_scale",
    ):  # fmt: skip
        tensor = getattr(inputs, name)
        if tensor is not None:
            _check_device(name, tensor, inputs.query.device)
