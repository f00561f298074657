"""Where the caches of a case lie in memory: between guards, side by side, or too far apart for 32-bit offsets. What is not theirs is NaN.

A device cannot be asked which addresses a kernel read, so what lies around the caches has to show in the output. (The emulator refuses
every access outside of a tensor, guards or not.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.tuner.gate.case import Case

GAP = 64  # poisoned elements between the halves of an interleaved page
INT32_ELEMENTS = 1 << 31  # an element offset of this size no longer fits a signed 32-bit integer
STRIDE_ELEMENTS = 16  # what strides are multiples of, so that 16-byte copies stay aligned


def place_caches(
    case: Case, key: torch.Tensor, value: torch.Tensor, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of both caches [pages, kv_heads and maybe spare ones, ...] where the case wants them, without the spare heads."""
    if case.far in ("pages", "heads"):
        key, value = _far(case, key[:, :kv_heads], value[:, :kv_heads])
    elif case.interleaved and key.ndim == 4 and key.shape == value.shape:
        key, value = _side_by_side(key, value)
    else:
        key, value = _guarded(key), _guarded(value)
    return key[:, :kv_heads], value[:, :kv_heads]


def _guarded(cache: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides with a page of NaN before and after it."""
    guard = cache[0].numel()
    buffer = _poisoned(cache, cache.numel() + 2 * guard)
    return _copy(cache, buffer, cache.stride(), guard)


def _side_by_side(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves of one tensor [pages, 2, ...], as vLLM keeps them, with gaps; a page of NaN before and after."""
    elements = key[0].numel()
    page = 2 * (elements + GAP)
    buffer = _poisoned(key, (len(key) + 2) * page)
    strides = (page, *key.stride()[1:])
    return (
        _copy(key, buffer, strides, page),
        _copy(value, buffer, strides, page + elements + GAP),
    )


def place_far_rows(query: torch.Tensor) -> torch.Tensor:
    """A copy of the query whose rows are far apart."""
    stride = _far_stride(len(query) - 1)
    lead = _lead(query)
    buffer = query.new_empty(lead + (len(query) - 1) * stride + query[0].numel())
    return _copy(query, buffer, (stride, query.shape[2], 1), lead)


def _far(case: Case, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies in one buffer of gigabytes, of which only they are ever touched."""
    if case.far == "pages":
        elements = key[0].numel()
        outer = (_far_stride(len(key) - 2), key.stride(1))  # the last page is nobody's
    else:
        elements = key[0, 0].numel()
        outer = (2 * elements, _far_stride(key.shape[1] - 1))
    lead = _lead(key)
    span = sum((n - 1) * stride for n, stride in zip(key.shape, outer, strict=False))
    buffer = key.new_empty(lead + span + 2 * elements)
    return (
        _copy(key, buffer, (*outer, *key.stride()[2:]), lead),
        _copy(value, buffer, (*outer, *value.stride()[2:]), lead + elements),
    )


def _far_stride(last: int) -> int:
    """The smallest stride that takes index ``last`` beyond a 32-bit offset. Itself it has to fit: a 64-bit stride would hide the bug."""
    stride = STRIDE_ELEMENTS * -(-INT32_ELEMENTS // (STRIDE_ELEMENTS * last))
    assert stride < INT32_ELEMENTS
    return stride


def _lead(like: torch.Tensor) -> int:
    """Elements before the first one: on a device, where a 32-bit offset wraps to is memory too. The bug is a wrong result then, not a
    fault that ends the process.
    """
    return INT32_ELEMENTS if like.device.type == "cuda" else 0


def _poisoned(like: torch.Tensor, elements: int) -> torch.Tensor:
    return torch.full((elements,), torch.nan, device=like.device).to(like.dtype)


def _copy(
    cache: torch.Tensor, buffer: torch.Tensor, strides: Sequence[int], offset: int
) -> torch.Tensor:
    return buffer.as_strided(cache.shape, tuple(strides), offset).copy_(cache)
