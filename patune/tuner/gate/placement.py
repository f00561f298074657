"""Where the caches of a case lie in memory: between guards, side by side, or too far apart for 32-bit offsets. What is not theirs is NaN.

A device cannot be asked which addresses a kernel read, so what lies around the caches has to show in the output. (The emulator refuses
every access outside of a tensor, guards or not.)
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.tuner.gate.case import Case

GAP = 64  # poisoned elements between the halves of an interleaved page, and after a head of a wide value cache
INT32_ELEMENTS = 1 << 31  # an element offset of this size no longer fits a signed 32-bit integer
# Python names it from 3.12 on; without it a machine refuses more than its memory, wanted or not
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
STRIDE_ELEMENTS = 16  # what strides are multiples of, so that 16-byte copies stay aligned


def place_caches(
    case: Case, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of both caches [pages, kv_heads, ...] where the case wants them."""
    if case.far in ("pages", "heads"):
        return _far(case, key, value)
    if case.interleaved and key.ndim == 4:
        return _side_by_side(key, value)
    return _guarded(key, gap=0), _guarded(value, gap=GAP if case.wide_values else 0)


def _guarded(cache: torch.Tensor, gap: int) -> torch.Tensor:
    """A copy with ``gap`` elements of NaN after each head, and a page of NaN before and after all."""
    strides = _with_gaps(cache, gap)
    guard = strides[0]
    return _copy(cache, _poisoned(cache, (len(cache) + 2) * guard), strides, guard)


def _with_gaps(cache: torch.Tensor, gap: int) -> list[int]:
    """The strides of [pages, kv_heads, ...] in the same order of axes, with a gap after the elements of a head that lie together."""
    strides, running = list(cache.stride()), 1
    for axis in sorted(range(cache.ndim), key=lambda axis: (cache.stride(axis), -axis)):
        running += gap if axis == 1 else 0
        strides[axis] = running
        running *= cache.shape[axis]
    return strides


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
    buffer = _untouched(query, lead + (len(query) - 1) * stride + query[0].numel())
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
    buffer = _untouched(key, lead + span + 2 * elements)
    return (
        _copy(key, buffer, (*outer, *key.stride()[2:]), lead),
        _copy(value, buffer, (*outer, *value.stride()[2:]), lead + elements),
    )


def place_far_scales(
    key_scale: torch.Tensor, value_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of both [pages, kv_heads, block_size, 1] in one buffer of gigabytes, as if they lay in the pages of a large cache."""
    stride, lead = _far_stride(len(key_scale) - 2), _lead(key_scale)
    elements = key_scale.stride(0)
    span = (len(key_scale) - 1) * stride
    buffer = _untouched(key_scale, lead + span + elements + value_scale.stride(0))
    return (
        _copy(key_scale, buffer, (stride, *key_scale.stride()[1:]), lead),
        _copy(value_scale, buffer, (stride, *value_scale.stride()[1:]), lead + elements),
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


def _untouched(like: torch.Tensor, elements: int) -> torch.Tensor:
    """Memory that nobody has touched, gigabytes of which cost nothing on the CPU: it is there once it is written, and reserved by nobody."""
    if like.device.type != "cpu":
        return like.new_empty(elements)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, elements * like.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype)


def _poisoned(like: torch.Tensor, elements: int) -> torch.Tensor:
    return torch.full((elements,), torch.nan, device=like.device).to(like.dtype)


def _copy(
    cache: torch.Tensor, buffer: torch.Tensor, strides: Sequence[int], offset: int
) -> torch.Tensor:
    return buffer.as_strided(cache.shape, tuple(strides), offset).copy_(cache)
