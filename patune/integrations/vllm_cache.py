"""Reads and writes of vLLM's KV cache beside the decode kernels: one tensor per layer, whose axes may lie in memory in any order."""

from __future__ import annotations

import torch


def write_tokens(
    new: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """Write tokens into their slots, for CPU tensors: which tokens are padding is read from the mapping.

    Args:
        new: [tokens, kv_heads, head_dim]; what is past the mapping's end is padding.
        cache: [pages, kv_heads, block_size, head_dim].
        slot_mapping: page * block_size + place in the page; a slot below 0 is not written.
        scale: [1] float32, what an fp8 cache's values are multiplied by when they are read.
    """
    kept = slot_mapping >= 0
    slots, new = slot_mapping[kept], new[: len(slot_mapping)][kept]
    page, place = slots // cache.shape[2], slots % cache.shape[2]
    if scale is None:
        cache[page, :, place] = new.to(cache.dtype)
        return
    limit = torch.finfo(cache.dtype).max  # torch before 2.13 makes NaN of what is larger
    stored = (new.float() / scale).clamp_(-limit, limit).to(cache.dtype)
    # torch moves fp8 values as bytes everywhere, as fp8 only in some operations
    cache.view(torch.uint8)[page, :, place] = stored.view(torch.uint8)


def gather_pages(
    cache: torch.Tensor, pages: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Pages of a cache as packed tokens, [pages * block_size, kv_heads, head_dim].

    Args:
        cache: [pages, kv_heads, block_size, head_dim].
        pages: [n] indices.
        scale: [1] float32 of an fp8 cache, or None.
        dtype: of the result.
    """
    by_token = cache.transpose(1, 2)
    if scale is None:
        return by_token.index_select(0, pages).flatten(0, 1)
    stored = by_token.view(torch.uint8).index_select(0, pages).view(cache.dtype)
    # in place, the product is taken in float32 and rounded once
    return stored.to(dtype).mul_(scale).flatten(0, 1)
