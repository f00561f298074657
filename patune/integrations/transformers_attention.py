"""The attention function behind ``paged|patune``."""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from patune.errors import UnsupportedProblemError
from patune.integrations.layers import AttentionLayer, target_of
from patune.integrations.transformers import ALTERNATIVE
from patune.integrations.transformers_cache import LayerCache, layer_cache
from patune.integrations.transformers_tables import (
    StepTables,
    from_block_table,
    from_ring,
    from_slots,
)
from patune.integrations.varlen import varlen_attention
from patune.kernels.decode import paged_attention_decode

LOGGER = logging.getLogger("patune")
# What models and continuous batching pass on beside what is read here, and attention does not depend on.
INDIFFERENT = frozenset(
    {
        "cache", "cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index", "block_table", "position_ids", "s_aux",
        "max_seqlen_q", "max_seqlen_k", "max_length_q", "max_length_k",
        "cache_position", "logits_indices", "logits_to_keep", "logits_processor_args", "position_embeddings", "input_ids",
    }
)  # fmt: skip


@dataclass(slots=True)
class _Session:
    """What is known of one cache: its layers, once checked, and the tables of the present step by group."""

    layers: dict[int, LayerCache] = field(default_factory=dict)
    tables: dict[int, StepTables | None] = field(default_factory=dict)


_sessions: WeakKeyDictionary[Any, _Session] = WeakKeyDictionary()


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Store a step's new keys and values in transformers' paged cache, and attend.

    Args:
        module: the attention layer.
        query: [1, q_heads, tokens, head_dim], the step's sequences one after the other.
        key: [1, kv_heads, tokens, head_dim], of the new tokens only.
        value: like the key.
        attention_mask: None; any other is refused.
        dropout: 0.
        scaling: factor on query . key; None is head_dim ** -0.5.
        sliding_window: tokens that a query token sees, itself included; None is all.
        softcap: cap of the scores; None is none.
        kwargs: what continuous batching passes to every layer.

    Returns:
        [1, tokens, q_heads, head_dim], and no attention weights.

    Raises:
        UnsupportedProblemError: patune does not compute this layer, or is not called by continuous batching.
    """
    cache = kwargs.get("cache")
    if cache is None:
        raise UnsupportedProblemError(
            "patune's attention was called without a paged cache: it serves generate_batch() and `transformers serve --continuous-batching`. "
            "For an ordinary forward or generate(), set attn_implementation='sdpa'."
        )
    session = _sessions.get(cache)
    if session is None:
        session = _sessions.setdefault(cache, _Session())
    sinks = kwargs.get("s_aux", getattr(module, "sinks", None))
    layer = session.layers.get(_number(module))
    if layer is None:
        layer = layer_cache(cache, _number(module))
        others = _refusals(module, layer, attention_mask, dropout, sliding_window, kwargs)
        _check(module, layer, query, value, sinks, softcap, others)
        session.layers[_number(module)] = layer
    options: dict[str, Any] = {
        "softmax_scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "sinks": sinks,
        "softcap": softcap or 0.0,
    }
    if layer.first:
        session.tables[layer.group] = _tables(layer, kwargs)
    tables = session.tables[layer.group]
    queries = query[0].transpose(0, 1)
    if tables is None:
        keys, values = _updated(cache, _number(module), key, value, kwargs)
        out = varlen_attention(
            queries, keys, values, kwargs["cu_seq_lens_q"], _of_kind(layer, kwargs["cu_seq_lens_k"]),
            _longest("q", kwargs), _of_kind(layer, _longest("k", kwargs)),
            sliding_window=sliding_window or layer.window,
            **options,
        )  # fmt: skip
    else:
        layer.write(tables.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        out = paged_attention_decode(
            queries,
            layer.key_pages.transpose(1, 2),
            layer.value_pages.transpose(1, 2),
            tables.block_tables,
            tables.context_lengths,
            sliding_window=0 if layer.window else sliding_window or 0,  # a ring holds no more
            **options,
        )
    return out[None], None


# a compiler would copy the whole cache for every layer that writes into it
uncompiled_paged_attention = torch.compiler.disable(paged_attention)  # type: ignore[no-untyped-call]


def _number(module: torch.nn.Module) -> int:
    number: int = module.layer_idx  # type: ignore[assignment]
    return number


def _longest(axis: str, kwargs: dict[str, Any]) -> Any:
    """The longest query or key: ``max_length_q`` since 5.19, ``max_seqlen_q`` before."""
    return kwargs[f"max_length_{axis}" if f"max_length_{axis}" in kwargs else f"max_seqlen_{axis}"]


def _of_kind(layer: LayerCache, value: Any) -> Any:
    """Of a value by kind of layer, this layer's; 5.17 and 5.18 give models with one kind the bare value."""
    return value[layer.kind] if isinstance(value, dict) else value


def _tables(layer: LayerCache, kwargs: dict[str, Any]) -> StepTables | None:
    """The tables of a step that decodes one token of every sequence; None for any other, which is for the prefill path."""
    cu_key = _of_kind(layer, kwargs["cu_seq_lens_k"])
    table = kwargs.get("block_table")
    if table is not None:
        return from_block_table(
            table[layer.group], cu_key, block_size=layer.block_size, trash=layer.trash
        )
    read_index, write_index = kwargs["read_index"][layer.group], kwargs["write_index"][layer.group]
    if _longest("q", kwargs) != 1 or read_index.numel() == 0:
        return None
    max_key = _of_kind(layer, _longest("k", kwargs))
    if not layer.window:
        return from_slots(read_index, write_index, cu_key, max_key, block_size=layer.block_size)
    if (positions := kwargs.get("position_ids")) is None:
        _tell_of_rings()
        return None
    return from_ring(
        read_index, write_index, cu_key, max_key, positions[0],
        block_size=layer.block_size, window=layer.window,
    )  # fmt: skip


@functools.cache
def _tell_of_rings() -> None:
    LOGGER.info(
        "A model's sliding-window layers do not pass position_ids on to their attention: they decode by the prefill path, which is right and slower."
    )


def _updated(
    cache: Any, number: int, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store the new tokens; keys and values [tokens, kv_heads, head_dim] of all that the step reads, packed."""
    if _takes_indices(cache.__class__):
        keys, values = cache.update(
            key_states=key,
            value_states=value,
            layer_idx=number,
            read_index=kwargs["read_index"],
            write_index=kwargs["write_index"],
        )
        return keys, values
    keys, values = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=number,
        kwargs=dict(kwargs),  # it writes into them
    )
    return keys[0].transpose(0, 1), values[0].transpose(0, 1)


@functools.cache
def _takes_indices(kind: type) -> bool:
    """Whether a kind of cache is updated as in 5.17 and 5.18. Every layer of a prefill asks."""
    return "read_index" in inspect.signature(kind.update).parameters  # type: ignore[attr-defined]


def _refusals(
    module: torch.nn.Module,
    layer: LayerCache,
    attention_mask: torch.Tensor | None,
    dropout: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> list[str]:
    """What of a call patune's kernels would leave out."""
    found = []
    if attention_mask is not None:
        found.append(
            "it is given an attention mask; patune's mask is causal, with a window or without"
        )
    if not getattr(module, "is_causal", True):
        found.append("it attends in both directions")
    if dropout:
        found.append(f"dropout={dropout}")
    if layer.window and sliding_window not in (None, layer.window):
        found.append(f"a window of {sliding_window} tokens over a ring of {layer.window}")
    if kwargs.get("output_attentions"):
        found.append(
            "attention weights are asked for (output_attentions), which are never computed"
        )
    for name, given in kwargs.items():
        if isinstance(given, torch.Tensor) and name not in INDIFFERENT:
            found.append(f"it is given {name}, which patune does not know")
    return found


def _check(
    module: torch.nn.Module,
    layer: LayerCache,
    query: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    softcap: float | None,
    others: list[str],
) -> None:
    AttentionLayer(
        where=f"layer {_number(module)} ({type(module).__name__})",
        alternative=ALTERNATIVE,
        block_size=layer.block_size,
        head_dim=query.shape[-1],
        value_head_dim=value.shape[-1],
        q_heads=query.shape[1],
        kv_heads=value.shape[1],
        dtype=query.dtype,
        kv_dtype=layer.key_pages.dtype,
        sinks=sinks is not None,
        softcap=bool(softcap),
        others=tuple(others),
    ).problem(target_of(query.device, alternative=ALTERNATIVE))
