"""One attention layer of vLLM, run by patune: the cache write, decode by the kernels, prefill by varlen attention over gathered pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from patune import paged_attention_decode
from patune.errors import UnsupportedProblemError
from patune.integrations.layers import AttentionLayer
from patune.integrations.varlen import varlen_attention
from patune.integrations.vllm_backend import ALTERNATIVE, CACHE_DTYPES, fits
from patune.integrations.vllm_cache import gather_pages, write_tokens
from patune.integrations.vllm_metadata import GATHERED_TOKENS, PatuneMetadata
from patune.problem import BLOCK_SIZES
from patune.target import Target, detect_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.attention.backend import AttentionLayer as VllmLayer

    from patune.integrations.vllm_metadata import PrefillPiece


class PatuneImpl(AttentionImpl[PatuneMetadata]):
    """Runs a layer.

    Args:
        sinks: [num_heads] logits.
        unknown: what a model asks of one backend only; refused.

    Raises:
        UnsupportedProblemError: no kernel computes the layer.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = float(scale)
        self.sliding_window = sliding_window or 0
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.fp8 = kv_cache_dtype.startswith("fp8")
        self._fp8_dtype: torch.dtype = current_platform.fp8_dtype()
        config = get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        longest = 0 if model is None else model.max_model_len + BLOCK_SIZES[-1]
        self._gathered_tokens = max(GATHERED_TOKENS, longest)
        block_size = BLOCK_SIZES[0] if config is None else config.cache_config.block_size
        others = tuple(_others(alibi_slopes, attn_type, kv_cache_dtype, unknown))
        self._check(_kernel_block_size(block_size), others)

    def _check(self, block_size: int, others: tuple[str, ...]) -> None:
        dtype = torch.get_default_dtype()  # what vLLM sets while it builds a model
        AttentionLayer(
            where=f"a vLLM layer of {self.num_heads} query heads",
            alternative=ALTERNATIVE,
            block_size=block_size,
            head_dim=self.head_size,
            q_heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            dtype=dtype,
            kv_dtype=self._fp8_dtype if self.fp8 else None,
            kv_quant="per_tensor" if self.fp8 else "none",
            windowed=self.sliding_window > 0,
            sinks=self.sinks is not None,
            softcap=self.softcap > 0,
            others=others,
        ).problem(_initialised_target())

    def forward(
        self,
        layer: VllmLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PatuneMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a batch, written into ``output``; its keys and values are in the cache by now.

        Args:
            layer: has the cache's scales.
            query: [tokens, num_heads, head_size], padding at the end.
            key: not read.
            value: not read.
            kv_cache: [pages, num_kv_heads, block_size, 2 * head_size] in any order of memory, keys before values.
            attn_metadata: the batch, or None while vLLM measures memory.
            output: like ``query``; rows of padding are not written.
            output_scale: refused.
            output_block_scale: refused.

        Raises:
            UnsupportedProblemError: quantised output is asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedProblemError(
                f"patune does not serve a vLLM layer with quantised output. Use {ALTERNATIVE} instead."
            )
        if attn_metadata is None:
            self._reserve(query)
            return output.fill_(0)
        key_cache, value_cache = self._caches(kv_cache)
        scales = self._scales(layer)
        if attn_metadata.decodes:
            self._decode(attn_metadata, query, key_cache, value_cache, scales, output)
        for piece in attn_metadata.pieces:
            self._prefill(piece, query, key_cache, value_cache, scales, output)
        return output

    def do_kv_cache_update(
        self,
        layer: VllmLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys and values into their slots; a slot of -1 is padding.

        Args:
            layer: has the cache's scales.
            key: [tokens, num_kv_heads, head_size].
            value: like ``key``.
            kv_cache: as for :meth:`forward`.
            slot_mapping: [tokens or fewer] int64, page * block_size + place in the page.
        """
        if not kv_cache.numel():
            return
        key_cache, value_cache = self._caches(kv_cache)
        if key.is_cpu:
            scales = self._scales(layer)
            for new, cache, scale in zip(
                (key, value), (key_cache, value_cache), scales, strict=True
            ):
                write_tokens(new, cache, slot_mapping, scale)
        else:
            self._write_by_vllm(layer, key, value, key_cache, value_cache, slot_mapping)

    def _write_by_vllm(
        self,
        layer: VllmLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """By the kernel of vLLM: it skips padding on the device, which torch could only do by waiting for it."""
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
            triton_reshape_and_cache_flash,
        )

        triton_reshape_and_cache_flash(
            key, value, key_cache.transpose(1, 2), value_cache.transpose(1, 2), slot_mapping,
            self.kv_cache_dtype, layer._k_scale, layer._v_scale,
        )  # fmt: skip

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and of the values, [pages, num_kv_heads, block_size, head_size]."""
        if self.fp8 and kv_cache.dtype != self._fp8_dtype:
            kv_cache = kv_cache.view(self._fp8_dtype)
        return (
            kv_cache.narrow(-1, 0, self.head_size),
            kv_cache.narrow(-1, self.head_size, self.head_size),
        )

    def _scales(self, layer: VllmLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.fp8:
            return None, None
        return layer._k_scale.view(1), layer._v_scale.view(1)

    def _decode(
        self,
        batch: PatuneMetadata,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        output: torch.Tensor,
    ) -> None:
        rows = batch.decodes * batch.query_length
        paged_attention_decode(
            query[:rows], key_cache, value_cache, batch.block_tables, batch.context_lengths,
            softmax_scale=self.scale, query_length=batch.query_length, sliding_window=self.sliding_window,
            sinks=self.sinks, key_scale=scales[0], value_scale=scales[1],
            out=output[:rows], max_context=batch.max_context, softcap=self.softcap,
        )  # fmt: skip

    def _prefill(
        self,
        piece: PrefillPiece,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        output: torch.Tensor,
    ) -> None:
        output[piece.tokens] = varlen_attention(
            query[piece.tokens],
            gather_pages(key_cache, piece.pages, scales[0], query.dtype),
            gather_pages(value_cache, piece.pages, scales[1], query.dtype),
            piece.cu_query, piece.cu_key, piece.max_query, piece.max_key,
            softmax_scale=self.scale, sliding_window=self.sliding_window, sinks=self.sinks,
            softcap=self.softcap, key_lengths=piece.key_lengths,
        )  # fmt: skip

    def _reserve(self, query: torch.Tensor) -> None:
        """Have what a prefill gathers counted as memory that the cache cannot have."""
        shape = (2, self._gathered_tokens, self.num_kv_heads, self.head_size)
        gathered = torch.empty(shape, dtype=query.dtype, device=query.device)
        stored = (
            torch.empty(shape[1:], dtype=torch.uint8, device=query.device) if self.fp8 else None
        )
        del gathered, stored


def _others(
    alibi_slopes: list[float] | None, attn_type: str, kv_cache_dtype: str, unknown: dict[str, Any]
) -> Iterator[str]:
    if alibi_slopes is not None:
        yield "it has ALiBi slopes"
    if attn_type != AttentionType.DECODER:
        yield f"attn_type={str(getattr(attn_type, 'value', attn_type))!r}, allowed: 'decoder'"
    if kv_cache_dtype not in CACHE_DTYPES:
        yield f"kv_cache_dtype={kv_cache_dtype!r}, allowed: {', '.join(CACHE_DTYPES)}"
    elif not fits(kv_cache_dtype, torch.get_default_dtype()):
        yield f"a {kv_cache_dtype} cache with {torch.get_default_dtype()} activations, allowed: auto or fp8"
    for name, asked in unknown.items():
        if asked not in (None, False):
            yield f"{name}={asked!r}, which patune does not know"


def _kernel_block_size(block_size: int) -> int:
    """The page that vLLM will give the kernels: the largest of theirs that divides the one asked for, else that itself, to be refused."""
    return max((size for size in BLOCK_SIZES if block_size % size == 0), default=block_size)


def _initialised_target() -> Target | None:
    """The device, if this process serves on one; a process that only looks at layers must not open it."""
    return detect_target() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
