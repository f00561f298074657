"""What a forward of SGLang's scheduler needs beside the KV pool: made on the device once per batch, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from patune.integrations.sglang_pages import bounds, packed_slots

if TYPE_CHECKING:
    from collections.abc import Callable

    ForwardBatch = Any
    Translate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True, kw_only=True)
class DecodeMetadata:
    """A decode or verification step.

    Attributes:
        query_length: query tokens per sequence.
        tables: [batch, pages] int32 page numbers.
        window_tables: the same in the sliding-window pool, where there is one.
        lengths: [batch] int32 tokens per sequence, the query's included.
        window_writes: [tokens] int64 slots of the new tokens in the sliding-window pool.
    """

    query_length: int
    tables: torch.Tensor
    window_tables: torch.Tensor | None
    lengths: torch.Tensor
    window_writes: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class ExtendMetadata:
    """A prefill step: new tokens of sequences of which some tokens may be in the cache already.

    Attributes:
        tokens: new tokens of the batch.
        has_prefix: some token is in the cache already.
        slots: [all tokens] where keys and values are, the new ones included.
        window_slots: the same in the sliding-window pool.
        cu_query: [batch + 1] int32 bounds of the new tokens.
        cu_key: [batch + 1] int32 bounds of all tokens.
        max_query: new tokens of the longest sequence.
        max_key: tokens of the longest sequence.
        window_writes: as in :class:`DecodeMetadata`.
    """

    tokens: int
    has_prefix: bool
    slots: torch.Tensor
    window_slots: torch.Tensor | None
    cu_query: torch.Tensor
    cu_key: torch.Tensor
    max_query: int
    max_key: int
    window_writes: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Makes metadata from the request table of one model runner.

    Attributes:
        req_to_token: [requests, positions] int32 slots; the slots of one page follow each other.
        page_tokens: tokens per page, a power of two.
        translate: slots of the full pool to slots of the sliding-window pool, where there is one.
    """

    req_to_token: torch.Tensor
    page_tokens: int
    translate: Translate | None

    @property
    def pages(self) -> int:
        """Width of a block table: the pages of the longest sequence that the server admits."""
        return -(-self.req_to_token.shape[1] // self.page_tokens)

    def empty(self, sequences: int, tokens: int, query_length: int) -> DecodeMetadata:
        """Buffers for a step, which :meth:`fill` fills."""
        device, windowed = self.req_to_token.device, self.translate is not None

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return DecodeMetadata(
            query_length=query_length,
            tables=zeros(sequences, self.pages),
            window_tables=zeros(sequences, self.pages) if windowed else None,
            lengths=zeros(sequences),
            window_writes=zeros(tokens, dtype=torch.int64) if windowed else None,
        )

    def fill(self, metadata: DecodeMetadata, batch: ForwardBatch) -> None:
        """Fill in place for this batch; every operation can be recorded in a CUDA graph.

        A verification's ``seq_lens`` do not count its query tokens yet, a decode step's do.
        """
        rows = len(metadata.lengths)
        tables, shift = metadata.tables, self.page_tokens.bit_length() - 1
        firsts = self.req_to_token[:, :: self.page_tokens]
        torch.index_select(firsts, 0, batch.req_pool_indices[:rows], out=tables)
        if metadata.window_tables is not None and self.translate is not None:
            # what left the window has no page any more: -1, or page 0, neither of which is read
            pages = (self.translate(tables) >> shift).clamp_(min=0)
            metadata.window_tables.copy_(pages)
            if metadata.window_writes is not None and batch.out_cache_loc is not None:
                metadata.window_writes.copy_(self.translate(batch.out_cache_loc))
        tables.bitwise_right_shift_(shift)
        metadata.lengths.copy_(batch.seq_lens[:rows])
        if batch.forward_mode.is_target_verify():
            metadata.lengths.add_(metadata.query_length)

    def extend(self, batch: ForwardBatch) -> ExtendMetadata:
        """Metadata of a prefill step."""
        new, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
        lengths = [prefix + tokens for prefix, tokens in zip(prefixes, new, strict=True)]
        rows = len(lengths)
        on_device = batch.seq_lens[:rows]
        slots = packed_slots(
            self.req_to_token, batch.req_pool_indices[:rows], on_device, sum(lengths)
        )
        translate = self.translate
        return ExtendMetadata(
            tokens=sum(new),
            has_prefix=any(prefixes),
            slots=slots,
            window_slots=None if translate is None else translate(slots).clamp_(min=0),
            cu_query=bounds(batch.extend_seq_lens[:rows]),
            cu_key=bounds(on_device),
            max_query=max(new),
            max_key=max(lengths),
            window_writes=None if translate is None else translate(batch.out_cache_loc),
        )


def narrowed(buffers: DecodeMetadata, sequences: int, query_length: int) -> DecodeMetadata:
    """The first rows of persistent buffers, as one captured batch size sees them."""
    tables, writes = buffers.window_tables, buffers.window_writes
    return DecodeMetadata(
        query_length=query_length,
        tables=buffers.tables[:sequences],
        window_tables=None if tables is None else tables[:sequences],
        lengths=buffers.lengths[:sequences],
        window_writes=None if writes is None else writes[: sequences * query_length],
    )
