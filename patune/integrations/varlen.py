"""Causal attention over packed sequences of any lengths: the prefill and mixed steps of an engine, which patune's decode kernels do not compute.

On a GPU this is torch's ``varlen_attn`` (FlashAttention). Where that does not compute a case (CPU tensors, a soft-cap, ``key_lengths`` with torch
2.11) the sequences are computed one after the other in float32: right and slow, and it waits for the GPU to read the lengths.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LOGGER = logging.getLogger("patune")
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_MAX_HEAD_DIM = 256
SCORES_AT_A_TIME = 1 << 28  # float32 scores of one piece of a sequence: 1 GiB


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    max_query: int,
    max_key: int,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed sequences: the last query token of a sequence sees its last key.

    Args:
        query: [query_tokens, q_heads, head_dim].
        key: [key_tokens, kv_heads, head_dim].
        value: like the key.
        cu_query: [batch + 1] int32; sequence b has query tokens cu_query[b] to cu_query[b + 1].
        cu_key: [batch + 1] int32, likewise.
        max_query: query tokens of the longest sequence, or more.
        max_key: keys of the longest sequence, or more.
        softmax_scale: factor on query . key.
        sliding_window: tokens that a query token sees, itself included; 0 is no window.
        sinks: [q_heads] raw logits added to the softmax denominators, or None.
        softcap: cap of the scores, cap * tanh(score / cap); 0 is none.
        key_lengths: [batch] int32: of each sequence's keys only so many are there; None is all.

    Returns:
        [query_tokens, q_heads, head_dim] of the query's dtype; rows that see nothing are zero.
    """
    if not _flash_computes(query, softcap, key_lengths):
        if query.is_cuda:
            _warn_about_sequences(softcap)
        return _by_sequences(
            query, key, value, cu_query, cu_key, softmax_scale, sliding_window, sinks, softcap, key_lengths,
        )  # fmt: skip
    from torch.nn.attention.varlen import AuxRequest

    out: torch.Tensor
    out, lse = _flash()(
        query, key, value, cu_query, cu_key, max_query, max_key,
        scale=softmax_scale,
        window_size=(sliding_window - 1 if sliding_window > 0 else -1, 0),
        return_aux=AuxRequest(lse=True),
        **({} if key_lengths is None else {"seqused_k": key_lengths}),
    )  # fmt: skip
    if sinks is not None:
        out = out * _kept(lse.view(query.shape[1], -1).T, sinks)[..., None].to(out.dtype)
    return out


def _kept(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What a sink leaves of a row: exp(lse) / (exp(lse) + exp(sink)).

    Args:
        lse: [query_tokens, q_heads] natural log.
        sinks: [q_heads].
    """
    return torch.sigmoid(lse - sinks.float())


def _flash_computes(query: torch.Tensor, softcap: float, key_lengths: torch.Tensor | None) -> bool:
    return (
        query.is_cuda
        and query.dtype in FLASH_DTYPES
        and query.shape[-1] <= FLASH_MAX_HEAD_DIM
        and softcap == 0
        and (key_lengths is None or "seqused_k" in _flash_parameters())
    )


@functools.cache
def _flash_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def _flash() -> Callable[..., Any]:
    """``varlen_attn`` for grouped query heads: torch 2.11 takes them without being told."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _flash_parameters() else {}
    return functools.partial(varlen_attn, **grouped)


@functools.cache
def _warn_about_sequences(softcap: float) -> None:
    reason = f"soft-cap {softcap:g}" if softcap else "this torch, dtype or head_dim"
    LOGGER.warning(
        "Prefill: torch's varlen attention has no kernel for %s; patune computes sequence by sequence in float32, which is correct and slow.",
        reason,
    )


def _by_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    softmax_scale: float,
    sliding_window: int,
    sinks: torch.Tensor | None,
    softcap: float,
    key_lengths: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.zeros_like(query)
    q_starts, k_starts = cu_query.tolist(), cu_key.tolist()
    lengths = None if key_lengths is None else key_lengths.tolist()
    for b in range(len(q_starts) - 1):
        k_start, k_stop = k_starts[b], k_starts[b + 1]
        if lengths is not None:
            k_stop = k_start + lengths[b]
        keys, values = key[k_start:k_stop].float(), value[k_start:k_stop].float()
        q_start, q_stop = q_starts[b], q_starts[b + 1]
        if not len(keys):
            continue
        piece = max(1, SCORES_AT_A_TIME // (query.shape[1] * len(keys)))
        for first in range(q_start, q_stop, piece):
            rows = range(first, min(first + piece, q_stop))
            last_seen = len(keys) - q_stop  # of query token 0 of the pack, minus itself
            positions = torch.arange(rows.start, rows.stop, device=query.device) + last_seen
            out[rows.start : rows.stop] = _one_sequence(
                query[rows.start : rows.stop].float(), keys, values, positions,
                softmax_scale, sliding_window, sinks, softcap,
            ).to(out.dtype)  # fmt: skip
    return out


def _one_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    softmax_scale: float,
    sliding_window: int,
    sinks: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """Query tokens at ``positions`` of a sequence over its keys; float32 throughout."""
    tokens, q_heads, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(tokens, kv_heads, q_heads // kv_heads, head_dim)
    scores = torch.einsum("thgd,khd->thgk", grouped, key) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(key), device=query.device)
    seen = at <= positions[:, None]
    if sliding_window > 0:
        seen &= at > positions[:, None] - sliding_window
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    total = lse
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.float().view(1, kv_heads, -1, 1))
    probs = torch.exp(scores - total.masked_fill(lse == float("-inf"), float("inf")))
    return torch.einsum("thgk,khd->thgd", probs, value).reshape(tokens, q_heads, head_dim)
