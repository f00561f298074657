"""SGLang's KV pools as patune reads them: pages for decode, gathered tokens for prefill. Torch only, and no host reads the device."""

from __future__ import annotations

import torch


def pages_of(buffer: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """A pool's K or V buffer as a cache that ``paged_attention_decode`` takes; a view.

    Args:
        buffer: NHD [slots, kv_heads, head_dim], HND [pages, kv_heads, page_tokens, head_dim], or a 5-D one of SGLang's AITER layout.
        page_tokens: tokens per page.
    """
    if buffer.ndim != 3:
        return buffer
    pages = len(buffer) // page_tokens  # slots past the last whole page are never given out
    paged = buffer[: pages * page_tokens].view(pages, page_tokens, *buffer.shape[1:])
    return paged.transpose(1, 2)


def layout_of(key_buffer: torch.Tensor, page_tokens: int) -> str:
    """The ``kv_layout`` of a pool's buffers, as in :class:`patune.Problem`."""
    pages = pages_of(key_buffer, page_tokens)
    if pages.ndim == 5:
        return "aiter_5d"
    return "nhd" if pages.stride(1) < pages.stride(2) else "hnd"


def keys_at(buffer: torch.Tensor, slots: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """[tokens, kv_heads, head_dim] of the keys in these slots; a copy.

    Args:
        buffer: as for :func:`pages_of`; 5-D is [pages, kv_heads, head_dim/x, page_tokens, x].
        slots: [tokens] of any integer type.
        page_tokens: tokens per page.
    """
    bits = _indexable(buffer)
    if buffer.ndim == 3:
        found = bits[slots]
    elif buffer.ndim == 4:
        found = bits[slots // page_tokens, :, slots % page_tokens]
    else:
        found = bits[slots // page_tokens, :, :, slots % page_tokens].flatten(2)
    return found.view(buffer.dtype)


def values_at(buffer: torch.Tensor, slots: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """Like :func:`keys_at`; a 5-D buffer of values is [pages, kv_heads, page_tokens/x, head_dim, x]."""
    if buffer.ndim < 5:
        return keys_at(buffer, slots, page_tokens)
    run = buffer.shape[4]
    tokens = slots % page_tokens
    found = _indexable(buffer)[slots // page_tokens, :, tokens // run, :, tokens % run]
    return found.view(buffer.dtype)


def _indexable(buffer: torch.Tensor) -> torch.Tensor:
    """The same bits of a type that torch indexes: it indexes no fp8 tensor on every device."""
    return buffer.view(torch.uint8) if buffer.element_size() == 1 else buffer


def packed_slots(
    req_to_token: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, total: int
) -> torch.Tensor:
    """[total] slots of every token of every sequence, one sequence after the other.

    Args:
        req_to_token: [requests, positions] slots.
        rows: [batch] the sequences' rows in it.
        lengths: [batch] tokens per sequence.
        total: their sum, which the host knows.
    """
    lengths = lengths.long()
    starts = torch.cumsum(lengths, 0) - lengths
    owners = torch.repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=lengths.device) - starts[owners]
    return req_to_token[rows[owners], positions]


def bounds(lengths: torch.Tensor) -> torch.Tensor:
    """[batch + 1] int32: where each packed sequence starts, and the end."""
    ends = torch.cumsum(lengths, 0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))
