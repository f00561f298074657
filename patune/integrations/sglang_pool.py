"""One model runner's KV pool, with the scales that its layers gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from patune.integrations.sglang_pages import keys_at, pages_of, values_at

if TYPE_CHECKING:
    RadixAttention = Any
    ForwardBatch = Any
    Scales = tuple[torch.Tensor | None, torch.Tensor | None]


class Pool:
    """Reads and writes the keys and values of any layer.

    Args:
        pool: SGLang's ``token_to_kv_pool``.
        page_tokens: tokens per page.
        device: where it is.
    """

    def __init__(self, pool: Any, page_tokens: int, device: torch.device) -> None:
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        self.pool = pool
        self.page_tokens = page_tokens
        self.is_hybrid = isinstance(pool, SWAKVPool)
        self._one = torch.ones(1, dtype=torch.float32, device=device)

    def in_window_pool(self, layer: RadixAttention) -> bool:
        """Whether the layer's tokens are in the sliding-window pool of a hybrid one: then slots and pages are that pool's."""
        return self.is_hybrid and bool(self.pool.layers_mapping[layer.layer_id][1])

    def write(
        self,
        layer: RadixAttention,
        batch: ForwardBatch,
        k: torch.Tensor,
        v: torch.Tensor | None,
        window_writes: torch.Tensor | None,
    ) -> None:
        """Put new keys and values where the batch says; SGLang divides them by the scales of an fp8 cache."""
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        where = KVWriteLoc.for_batch(batch, swa_loc=window_writes)
        self.pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)

    def pages(self, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's key and value pages, as ``paged_attention_decode`` takes them; views."""
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        return pages_of(keys, self.page_tokens), pages_of(values, self.page_tokens)

    def scales(self, layer: RadixAttention, dtype: torch.dtype) -> Scales:
        """Scales of the layer's keys and values, [1] float32 each; None unless the cache is of an fp8 ``dtype``."""
        if dtype.itemsize > 1:
            return None, None
        return self._scale(layer.k_scale), self._scale(layer.v_scale)

    def tokens(
        self, layer: RadixAttention, slots: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in these slots, [tokens, kv_heads, head_dim] of ``dtype``; copies, their scales applied."""
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        key = keys_at(keys, slots, self.page_tokens)
        value = values_at(values, slots, self.page_tokens)
        key_scale, value_scale = self.scales(layer, keys.dtype)
        if key_scale is None or value_scale is None:
            return key, value
        return (key.float() * key_scale).to(dtype), (value.float() * value_scale).to(dtype)

    def _scale(self, scale: torch.Tensor | None) -> torch.Tensor:
        return self._one if scale is None else scale.detach().view(1)
