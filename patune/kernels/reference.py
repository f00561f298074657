"""The oracle: paged-attention decode in plain torch, written to be read. What it computes is what every kernel has to compute.

For query token i of sequence b with context C, and query head h (KV head h // group), over the tokens k that it sees:

    score_k = softmax_scale * query_scale * key_scale_k * (query . key_k)    then capped: softcap * tanh(score_k / softcap)
    lse     = log sum_k exp(score_k)                                     natural log, without the sink
    out     = sum_k exp(score_k - log(exp(lse) + exp(sink_h))) * value_scale_k * value_k

The query's own tokens are already in the cache: query token i is token C - L + i of its sequence (L = query_length), and it sees the last
``sliding_window`` tokens up to itself, its own included, or all of them. The sink is a raw logit: no scale, no cap, denominator only.
A query token that sees nothing gives zeros and lse = -inf. ``fp8_math`` changes nothing here: the stored values are computed on exactly.

Only slots and block-table entries of tokens that some query token of the sequence sees are read: the rest may hold anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patune.errors import InvalidValueError
from patune.kernels.caches import from_layout

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs


def visible_tokens(
    context: int, query_token: int, query_length: int, sliding_window: int
) -> tuple[int, int]:
    """Tokens [start, stop) that a query token sees; empty when start == stop."""
    stop = max(0, context - (query_length - 1 - query_token))
    return (max(0, stop - sliding_window) if sliding_window > 0 else 0), stop


def reference_decode(
    inputs: DecodeInputs, *, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the decode step in ``dtype`` on the tensors' own device.

    Returns:
        out [batch * query_length, q_heads, head_dim] and lse [batch * query_length, q_heads], both ``dtype``.

    Raises:
        InvalidValueError: a context is longer than its block table, or a table entry that is needed names no page.
    """
    query = inputs.query.to(dtype).contiguous()
    if inputs.query_scale is not None:
        query = query * inputs.query_scale
    out = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:2], -torch.inf)
    length, window = inputs.query_length, inputs.sliding_window
    for sequence, context in enumerate(inputs.context_lengths.tolist()):
        first, _ = visible_tokens(context, 0, length, window)
        keys, values = keys_and_values(inputs, sequence, first, context, dtype)
        for query_token in range(length):
            start, stop = visible_tokens(context, query_token, length, window)
            if start < stop:
                row = sequence * length + query_token
                seen = slice(start - first, stop - first)
                out[row], lse[row] = _attend(inputs, query[row], keys[seen], values[seen])
    return out, lse


def _attend(
    inputs: DecodeInputs, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one query token: query [q_heads, D], keys and values [tokens, kv_heads, D], every token visible."""
    q_heads, head_dim = query.shape
    group = q_heads // inputs.kv_heads
    grouped = query.view(inputs.kv_heads, group, head_dim)  # head h belongs to KV head h // group
    scores = inputs.softmax_scale * torch.einsum("hgd,khd->hgk", grouped, keys).flatten(0, 1)
    if inputs.softcap:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    lse = torch.logsumexp(scores, dim=-1)
    total = lse if inputs.sinks is None else torch.logaddexp(lse, inputs.sinks.to(lse.dtype))
    probs = torch.exp(scores - total[:, None]).view(inputs.kv_heads, group, -1)
    return torch.einsum("hgk,khd->hgd", probs, values).flatten(0, 1), lse


def keys_and_values(
    inputs: DecodeInputs, sequence: int, first: int, context: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """De-quantised keys and values [context - first, kv_heads, head_dim] of tokens [first, context) of a sequence."""
    block_size = inputs.block_size
    first_page = first // block_size
    pages = _pages(inputs, sequence, first_page, -(-context // block_size))
    skipped = first_page * block_size
    tokens = slice(first - skipped, context - skipped)

    def gather(cache: torch.Tensor, scale: torch.Tensor | None, *, is_value: bool) -> torch.Tensor:
        logical = from_layout(cache[pages], inputs.kv_layout, is_value=is_value)
        stored = logical.flatten(0, 1)[tokens].to(dtype)
        if scale is None or scale.numel() == 1:
            return stored if scale is None else stored * scale
        return stored * from_layout(scale[pages], "hnd", is_value=is_value).flatten(0, 1)[tokens]

    return (
        gather(inputs.key_cache, inputs.key_scale, is_value=False),
        gather(inputs.value_cache, inputs.value_scale, is_value=True),
    )


def _pages(inputs: DecodeInputs, sequence: int, begin: int, end: int) -> torch.Tensor:
    """Entries [begin, end) of a sequence's block-table row, each checked to name a page."""
    width, pages = inputs.block_tables.shape[1], inputs.key_cache.shape[0]
    if end > width:
        raise InvalidValueError(
            f"context_lengths[{sequence}]={int(inputs.context_lengths[sequence])} needs {end} pages of {inputs.block_size} "
            f"tokens, block_tables has {width} columns; allowed: at most {width * inputs.block_size} tokens."
        )
    entries = inputs.block_tables[sequence, begin:end].long()
    outside = (entries < 0) | (entries >= pages)
    if bool(outside.any()):
        column = begin + int(outside.nonzero()[0])
        seen = int(inputs.block_tables[sequence, column])
        raise InvalidValueError(
            f"block_tables[{sequence}, {column}]={seen} is not allowed; allowed: pages 0 to {pages - 1}."
        )
    return entries
