"""Block tables of one decode step, made on the device from what transformers hands an attention function. Nothing here waits for the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTables:
    """Where the sequences of a decode step have their tokens; the same for all layers of a group.

    Attributes:
        block_tables: [batch, pages] int32; entries past a sequence's pages are 0.
        context_lengths: [batch] int32, the new token included; 0 for padding.
        slots: [batch] int64, where the new tokens go.
    """

    block_tables: torch.Tensor
    context_lengths: torch.Tensor
    slots: torch.Tensor


def from_block_table(
    block_table: torch.Tensor, cu_key: torch.Tensor, *, block_size: int, trash: int
) -> StepTables:
    """Of a step that transformers made the block table of.

    Args:
        block_table: [batch, pages] int32; -1 past a sequence's pages.
        cu_key: [batch + 1] int32, cumulative lengths, the new tokens included; padding rows add nothing.
        block_size: tokens per page.
        trash: slot for the new tokens of padding rows.
    """
    lengths = cu_key[1:] - cu_key[:-1]
    last = (lengths.long() - 1).clamp(min=0)
    page = block_table.gather(1, (last // block_size)[:, None])[:, 0].long()
    slots = torch.where(lengths > 0, page * block_size + last % block_size, trash)
    return StepTables(
        block_tables=block_table.contiguous(),
        context_lengths=lengths.to(torch.int32),
        slots=slots,
    )


def from_slots(
    read_index: torch.Tensor,
    write_index: torch.Tensor,
    cu_key: torch.Tensor,
    max_key: int,
    *,
    block_size: int,
) -> StepTables:
    """Of a step of full-attention layers that transformers listed every cached token's slot of.

    Args:
        read_index: [sum of lengths] int64, the slots of each sequence's tokens in order, the new one included.
        write_index: [batch] int64, the slots of the new tokens.
        cu_key: [batch + 1] int32, cumulative lengths, the new tokens included.
        max_key: the longest length.
        block_size: tokens per page.
    """
    first = _first_tokens(max_key, block_size, cu_key.device)
    lengths = cu_key[1:] - cu_key[:-1]
    at = (cu_key[:-1, None] + first).clamp(max=read_index.numel() - 1)
    pages = torch.where(first < lengths[:, None], read_index[at] // block_size, 0)
    return StepTables(
        block_tables=pages.to(torch.int32),
        context_lengths=lengths.to(torch.int32),
        slots=write_index,
    )


def from_ring(
    read_index: torch.Tensor,
    write_index: torch.Tensor,
    cu_key: torch.Tensor,
    max_key: int,
    positions: torch.Tensor,
    *,
    block_size: int,
    window: int,
) -> StepTables:
    """Of a step of sliding-window layers: with the new token written, a ring holds exactly the tokens that it sees, in an order that attention does not depend on.

    Token t of a sequence has ring slot t % window. ``read_index`` lists the slots by age, with a placeholder for the new token last; so once the ring
    is full, its slot r is entry (r - length) % window.

    Args:
        read_index: [sum of min(length, window)] int64.
        write_index: [batch] int64, the slots of the new tokens.
        cu_key: [batch + 1] int32, cumulative min(length, window).
        max_key: the largest min(length, window).
        positions: [batch] of the new tokens: length - 1.
        block_size: tokens per page.
        window: tokens of a ring.
    """
    first = _first_tokens(max_key, block_size, cu_key.device)
    held = cu_key[1:] - cu_key[:-1]
    lengths = positions[:, None] + 1
    entry = torch.where(lengths > window, (first - lengths) % window, first)
    at = (cu_key[:-1, None] + entry).clamp(max=read_index.numel() - 1)
    slots = torch.where(entry == held[:, None] - 1, write_index[:, None], read_index[at])
    pages = torch.where(first < held[:, None], slots // block_size, 0)
    return StepTables(
        block_tables=pages.to(torch.int32),
        context_lengths=held.to(torch.int32),
        slots=write_index,
    )


def _first_tokens(max_key: int, block_size: int, device: torch.device) -> torch.Tensor:
    """[1, pages]: the first token of each page, for as many pages as a table has."""
    pages = rounded_pages(-(-max_key // block_size))
    return torch.arange(0, pages * block_size, block_size, device=device)[None]


def rounded_pages(pages: int) -> int:
    """At least ``pages``, at most an eighth more: a table's width is part of a call's signature, and each new one is resolved anew (0.2 ms)."""
    step = max(1, (1 << (pages - 1).bit_length()) // 16)
    return -(-pages // step) * step
