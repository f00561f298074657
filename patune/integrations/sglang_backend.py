"""SGLang's attention backend ``patune``: its decode and verification steps run on patune's kernels, its prefill on torch's varlen attention.

Block tables are made on the device from SGLang's request table, once per batch and by operations that a CUDA graph records; no step of
decode reads the device. Written for and tested with SGLang 0.5.23.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

from patune.errors import InvalidValueError
from patune.integrations.sglang_layers import (
    check_arguments,
    check_layer,
    check_mode,
    check_runner,
    window_tokens,
)
from patune.integrations.sglang_metadata import (
    DecodeMetadata,
    ExtendMetadata,
    Tables,
    narrowed,
)
from patune.integrations.sglang_pool import Pool
from patune.integrations.varlen import varlen_attention
from patune.kernels.decode import paged_attention_decode
from patune.target import detect_target

if TYPE_CHECKING:
    ModelRunner = Any
    ForwardBatch = Any

PADDED_LENGTH = 1  # of the rows that fill a CUDA graph's batch: they read the first slot of page 0, which SGLang keeps for them


class PatuneAttnBackend(AttentionBackend):  # type: ignore[misc]  # SGLang has no types
    """Serves the layers of one model runner; :mod:`~patune.integrations.sglang_layers` says which.

    Raises:
        UnsupportedProblemError: it does not serve this model runner or one of its layers.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.runner = model_runner
        device = torch.device(model_runner.device)
        self.target = detect_target() if device.type == "cuda" else None
        check_runner(model_runner, self.target)
        kv_pool = model_runner.token_to_kv_pool
        self.kv_cache_dtype = self.data_type = kv_pool.dtype
        self.pool = Pool(kv_pool, model_runner.page_size, device)
        self.tables = Tables(
            req_to_token=model_runner.req_to_token_pool.req_to_token,
            page_tokens=model_runner.page_size,
            translate=kv_pool.translate_loc_from_full_to_swa if self.pool.is_hybrid else None,
        )
        self.forward_metadata: DecodeMetadata | ExtendMetadata | None = None
        self._graph_buffers: DecodeMetadata | None = None
        self._captured: dict[tuple[int, int], DecodeMetadata] = {}
        self._checked: set[tuple[int, bool, int]] = set()
        for layer in _attention_layers(model_runner.model):
            self._check(layer, sinks=False, query_length=1)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Metadata of a batch that runs outside of a CUDA graph."""
        check_mode(forward_batch)
        if _is_extend(forward_batch):
            self.forward_metadata = self.tables.extend(forward_batch)
            return
        query_length = _query_length(forward_batch)
        sequences = forward_batch.batch_size
        metadata = self.tables.empty(sequences, sequences * query_length, query_length)
        self.tables.fill(metadata, forward_batch)
        self.forward_metadata = metadata

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers that every captured graph of this backend reads."""
        self._graph_buffers = self.tables.empty(max_bs, max_num_tokens, 1)
        self._captured = {}

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Choose the buffers of this batch size; what is in them is written in the graph."""
        check_mode(forward_batch)
        if _is_extend(forward_batch):
            raise InvalidValueError(
                f"A CUDA graph of mode {forward_batch.forward_mode.name} was asked for; patune's backend has those of decode and verification. "
                "Serve with --disable-prefill-cuda-graph."
            )
        key = (forward_batch.batch_size, _query_length(forward_batch))
        if in_capture:
            if self._graph_buffers is None:
                raise InvalidValueError("A capture came before init_cuda_graph_state.")
            self._captured[key] = narrowed(self._graph_buffers, *key)
        self.forward_metadata = self._captured[key]

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Write the block tables and lengths; recorded at capture, and replayed with the graph."""
        assert isinstance(self.forward_metadata, DecodeMetadata)
        self.tables.fill(self.forward_metadata, forward_batch)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of the rows that pad a captured batch."""
        return PADDED_LENGTH

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Write the new keys and values, then attend over the cache.

        Returns:
            [tokens, q_heads * head_dim] of the query's dtype.
        """
        metadata = self.forward_metadata
        assert isinstance(metadata, DecodeMetadata)
        check_arguments(kwargs)
        self._check(layer, sinks=sinks is not None, query_length=metadata.query_length)
        if save_kv_cache and k is not None:
            self.pool.write(layer, forward_batch, k, v, metadata.window_writes)
        keys, values = self.pool.pages(layer)
        key_scale, value_scale = self.pool.scales(layer, keys.dtype)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        windowed = self.pool.in_window_pool(layer)
        tables = metadata.window_tables if windowed else metadata.tables
        assert tables is not None
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        paged_attention_decode(
            query,
            keys,
            values,
            tables,
            metadata.lengths,
            softmax_scale=layer.scaling,
            query_length=metadata.query_length,
            sliding_window=window_tokens(layer),
            sinks=sinks,
            key_scale=key_scale,
            value_scale=value_scale,
            softcap=layer.logit_cap,
            out=out,
        )
        return out.flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Prefill, or a verification step, which is a decode step of several query tokens per sequence.

        Returns:
            [tokens, q_heads * head_dim] of the query's dtype; rows past the batch's tokens are zero.
        """
        metadata = self.forward_metadata
        if isinstance(metadata, DecodeMetadata):
            return self.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **kwargs
            )
        assert metadata is not None
        check_arguments(kwargs)
        self._check(layer, sinks=sinks is not None, query_length=1)
        if save_kv_cache and k is not None:
            self.pool.write(layer, forward_batch, k, v, metadata.window_writes)
        keys, values = self._packed(layer, k, v, metadata)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = varlen_attention(
            query[: metadata.tokens],
            keys,
            values,
            metadata.cu_query,
            metadata.cu_key,
            metadata.max_query,
            metadata.max_key,
            softmax_scale=layer.scaling,
            sliding_window=window_tokens(layer),
            sinks=sinks,
            softcap=layer.logit_cap,
        ).flatten(1)
        missing = len(query) - metadata.tokens
        return torch.nn.functional.pad(out, (0, 0, 0, missing)) if missing else out

    def _packed(
        self,
        layer: RadixAttention,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        metadata: ExtendMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens of the batch: the new ones as they came where nothing else is there, else from the pool."""
        plain = not metadata.has_prefix and self.kv_cache_dtype == self.runner.dtype
        if k is not None and v is not None and plain:
            shape = (-1, layer.tp_k_head_num, layer.qk_head_dim)
            return k.reshape(shape)[: metadata.tokens], v.reshape(shape)[: metadata.tokens]
        windowed = self.pool.in_window_pool(layer)
        slots = metadata.window_slots if windowed else metadata.slots
        assert slots is not None
        return self.pool.tokens(layer, slots, self.runner.dtype)

    def _check(self, layer: RadixAttention, *, sinks: bool, query_length: int) -> None:
        key = (id(layer), sinks, query_length)
        if key not in self._checked:
            check_layer(layer, self.runner, self.target, sinks=sinks, query_length=query_length)
            self._checked.add(key)


def _attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def _is_extend(batch: ForwardBatch) -> bool:
    mode = batch.forward_mode
    return not (mode.is_decode_or_idle() or mode.is_target_verify())


def _query_length(batch: ForwardBatch) -> int:
    """Query tokens per sequence of a decode or verification step."""
    return int(batch.spec_info.draft_token_num) if batch.forward_mode.is_target_verify() else 1
