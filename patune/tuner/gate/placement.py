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
    if case.far:
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


def _far(case: Case, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies in one buffer of gigabytes, of which only they are ever touched.

    On a device as much lies before them: where a 32-bit offset wraps to is then memory too, and the bug is a wrong result, not a fault
    that ends the process.
    """
    apart = 0 if case.far == "pages" else 1
    elements = key[0].numel() if apart == 0 else key[0, 0].numel()
    last = len(key) - 2 if apart == 0 else key.shape[1] - 1  # the last page is nobody's
    far = STRIDE_ELEMENTS * -(-INT32_ELEMENTS // (STRIDE_ELEMENTS * last))
    assert far < INT32_ELEMENTS, "a stride that does not fit 32 bits itself would hide the bug"
    strides = (far, *key.stride()[1:]) if apart == 0 else (2 * elements, far, *key.stride()[2:])
    lead = INT32_ELEMENTS if key.device.type == "cuda" else 0
    span = sum((n - 1) * s for n, s in zip(key.shape[:2], strides[:2], strict=True))
    buffer = key.new_empty(lead + span + 2 * elements)
    return _copy(key, buffer, strides, lead), _copy(
        value, buffer, _strides_like(value, strides), lead + elements
    )


def _strides_like(value: torch.Tensor, strides: Sequence[int]) -> tuple[int, ...]:
    """The value's own inner strides under the key's outer ones."""
    return (*strides[:2], *value.stride()[2:])


def _poisoned(like: torch.Tensor, elements: int) -> torch.Tensor:
    return torch.full((elements,), torch.nan, device=like.device).to(like.dtype)


def _copy(
    cache: torch.Tensor, buffer: torch.Tensor, strides: Sequence[int], offset: int
) -> torch.Tensor:
    return buffer.as_strided(cache.shape, tuple(strides), offset).copy_(cache)
