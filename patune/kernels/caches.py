"""KV caches between their logical form and the memory layouts that kernels read.

The logical form is [pages, block_size, kv_heads, channels]: slot ``t`` of page ``p`` of KV head ``h``. ``channels`` is head_dim for keys
and values, 1 for per-token scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.problem import KV_LAYOUTS
from patune.record import check_choice

if TYPE_CHECKING:
    import torch

VECTOR_BYTES = 16  # AITER keys keep runs of 16 bytes of one token together


def to_layout(logical: torch.Tensor, kv_layout: str, *, is_value: bool) -> torch.Tensor:
    """Lay a logical cache out as kernels take it.

    Args:
        logical: [pages, block_size, kv_heads, head_dim].
        kv_layout: ``aiter`` gives key [pages, kv_heads, head_dim / x, block_size, x] with x = 16 bytes / itemsize, value [pages, kv_heads,
            head_dim, block_size]; ``aiter_5d`` the same key, value [pages, kv_heads, block_size / x, head_dim, x];
            ``nhd`` a permuted view and ``hnd`` a copy, both [pages, kv_heads, block_size, head_dim]: kernels take them by strides.
        is_value: value cache, else key cache; they differ in the AITER layouts only.

    Raises:
        InvalidValueError: the layout is unknown.
    """
    check_choice("kv_layout", kv_layout, KV_LAYOUTS)
    if kv_layout == "nhd":
        return logical.contiguous().permute(0, 2, 1, 3)
    if kv_layout == "hnd":
        return logical.permute(0, 2, 1, 3).contiguous()
    if is_value and kv_layout == "aiter":
        return logical.permute(0, 2, 3, 1).contiguous()
    pages, block_size, kv_heads, head_dim = logical.shape
    x = VECTOR_BYTES // logical.element_size()
    if is_value:
        runs = logical.reshape(pages, block_size // x, x, kv_heads, head_dim)
        return runs.permute(0, 3, 1, 4, 2).contiguous()
    vectors = logical.reshape(pages, block_size, kv_heads, head_dim // x, x)
    return vectors.permute(0, 2, 3, 1, 4).contiguous()


def from_layout(cache: torch.Tensor, kv_layout: str, *, is_value: bool) -> torch.Tensor:
    """Logical form [pages, block_size, kv_heads, head_dim] of a cache, a view where the layout allows one.

    Raises:
        InvalidValueError: the layout is unknown.
    """
    check_choice("kv_layout", kv_layout, KV_LAYOUTS)
    if kv_layout in ("nhd", "hnd"):
        return cache.permute(0, 2, 1, 3)
    if is_value and kv_layout == "aiter":
        return cache.permute(0, 3, 1, 2)
    if is_value:
        return cache.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return cache.permute(0, 3, 1, 2, 4).flatten(3)
