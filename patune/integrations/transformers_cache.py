"""One layer's part of transformers' ``PagedAttentionCache``, whatever the release calls it (5.17; 5.18 and newer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import UnsupportedProblemError
from patune.integrations.transformers import RELEASES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCache:
    """Where a layer's keys and values lie.

    Attributes:
        group: index of the layer's kind in ``read_index``, ``write_index`` and ``block_table``.
        first: whether it is the first layer of its group.
        kind: key of the layer's kind in dicts: ``full_attention`` or ``sliding_attention``.
        window: tokens of the ring that a sliding layer keeps: token ``t`` has slot ``t % window`` of the sequence's pages; 0 is no ring.
        key_pages: [pages, block_size, kv_heads, head_dim], the layer's keys; slot ``s`` of an index is slot ``s % block_size`` of page ``s // block_size``.
        value_pages: likewise.
        trash: a slot that belongs to no sequence.
    """

    group: int
    first: bool
    kind: str
    window: int
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    trash: int

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return int(self.key_pages.shape[1])

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new tokens.

        Args:
            slots: [tokens] int64.
            key: [tokens, kv_heads, head_dim].
            value: likewise.
        """
        self.key_pages.flatten(0, 1).index_copy_(0, slots, key)
        self.value_pages.flatten(0, 1).index_copy_(0, slots, value)


def layer_cache(cache: Any, layer: int) -> LayerCache:
    """The part of a layer.

    Args:
        cache: a ``PagedAttentionCache``.
        layer: index of the layer in the model.

    Raises:
        UnsupportedProblemError: the cache is not as any release that patune knows makes it.
    """
    try:
        if hasattr(cache, "layer_to_allocator"):
            return _of_allocator(cache.layer_to_allocator[layer], layer)
        return _of_groups(cache, layer)
    except (AttributeError, KeyError, TypeError, NotImplementedError) as error:
        import transformers

        raise UnsupportedProblemError(
            f"transformers {transformers.__version__} keeps its paged cache in a way that patune does not know "
            f"({type(error).__name__}: {error}); allowed: {RELEASES}."
        ) from error


def _of_groups(cache: Any, layer: int) -> LayerCache:
    """Transformers 5.17: a list of tensors, each shared by one layer of every group."""
    group, place = cache.layer_index_to_group_indices[layer]
    window = cache.sliding_windows[layer]
    sliding = window != 1
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    return LayerCache(
        group=group,
        first=place == 0,
        kind="sliding_attention" if sliding else "full_attention",
        window=window if sliding else 0,
        key_pages=cache.key_cache[place].view(shape),
        value_pages=cache.value_cache[place].view(shape),
        trash=cache.write_trash_index,
    )


def _of_allocator(allocator: Any, layer: int) -> LayerCache:
    """Transformers 5.18 and newer: an allocator per kind of layer, all in one tensor."""
    from transformers.generation.continuous_batching.cache_allocators import (
        FullAttentionCacheAllocator,
    )

    # a sliding allocator has the same views, and refuses to give them: they are a ring
    keys, values = FullAttentionCacheAllocator.get_cache_for_block_table(allocator, layer)
    return LayerCache(
        group=allocator.index,
        first=allocator.layer_indices[0] == layer,
        kind=allocator.layer_type,
        window=getattr(allocator, "sliding_window", 0),
        key_pages=keys,
        value_pages=values,
        trash=allocator.write_trash_index,
    )
