"""One step of a served batch, made of vLLM's own classes, and naive attention over the same sequences.

What vLLM keeps on the device lies on the shape's; keys, values and what is expected stay on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    get_kv_quant_mode,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from patune.integrations.vllm_impl import PatuneImpl
from patune.integrations.vllm_metadata import PatuneMetadata, PatuneMetadataBuilder

LAYERS = ["layers.0.attn", "layers.1.attn"]
FP8 = torch.float8_e4m3fn
POISON = 0xFF  # every byte of an unused slot: NaN in bf16, fp16 and fp8


@dataclass(kw_only=True)
class Shape:
    page: int = 16
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    cache: str = "auto"
    layout: str = "LBNHC"
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    speculated: int = 0
    device: str = "cpu"

    @property
    def spec(self) -> FullAttentionSpec:
        fp8 = self.cache.startswith("fp8")
        return FullAttentionSpec(
            block_size=self.page,
            num_kv_heads=self.kv_heads,
            head_size=self.head_dim,
            dtype=torch.uint8 if fp8 else self.dtype,
            kv_quant_mode=get_kv_quant_mode(self.cache),
        )

    def config(self) -> VllmConfig:
        config = VllmConfig(
            device_config=DeviceConfig(self.device), cache_config=CacheConfig(block_size=self.page)
        )
        config.model_config = SimpleNamespace(
            get_num_attention_heads=lambda _: self.q_heads,
            get_num_kv_heads=lambda _: self.kv_heads,
            max_model_len=4096,
        )
        if self.speculated:
            config.speculative_config = SimpleNamespace(
                num_speculative_tokens=self.speculated, parallel_drafting=False
            )
        return config

    def impl(self, **asked: Any) -> PatuneImpl:
        torch.set_default_dtype(self.dtype)
        arguments = {
            "num_heads": self.q_heads,
            "head_size": self.head_dim,
            "scale": self.head_dim**-0.5,
            "num_kv_heads": self.kv_heads,
            "sliding_window": self.window,
            "kv_cache_dtype": self.cache,
            "logits_soft_cap": self.softcap,
        } | asked
        with set_current_vllm_config(self.config()):
            return PatuneImpl(**arguments)

    def builder(self) -> PatuneMetadataBuilder:
        return PatuneMetadataBuilder(self.spec, LAYERS, self.config(), torch.device(self.device))


def allocate(shape: Shape, pages: int) -> torch.Tensor:
    """The second layer's cache, as vLLM lays it out; everything is poison."""
    spec, layout = shape.spec, KVCacheLayout[shape.layout]
    page_bytes, layers = spec.page_size_bytes, len(LAYERS)
    block_outermost = layout.is_block_outermost
    tensor = KVCacheTensor(
        size=page_bytes * pages * layers,
        layers=LAYERS,
        layer_stride=page_bytes if block_outermost else page_bytes * pages,
        block_stride=page_bytes * layers if block_outermost else page_bytes,
    )
    if shape.layout in ("LHBNC", "BHLNC"):  # a head lies outside of pages or layers
        head_bytes = page_bytes // shape.kv_heads
        tensor.layer_stride = head_bytes if block_outermost else page_bytes * pages
        tensor.block_stride = page_bytes * layers if block_outermost else head_bytes
    config = KVCacheConfig(
        num_blocks=pages,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(LAYERS, spec)],
    )
    views = allocate_kv_cache(config, torch.device(shape.device), layout)
    view = views[LAYERS[1]]
    assert view.shape == (pages, shape.kv_heads, shape.page, 2 * shape.head_dim)
    storage = torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())
    storage.fill_(POISON)
    return view


class Step:
    """A batch of sequences with (computed, new) tokens each, in vLLM's order; padded to more sequences and tokens if asked."""

    def __init__(
        self,
        shape: Shape,
        sequences: list[tuple[int, int]],
        *,
        padded_sequences: int = 0,
        padded_tokens: int = 0,
        optimism: int = 0,
        seed: int = 0,
    ) -> None:
        self.shape, self.sequences = shape, sequences
        draw = torch.Generator().manual_seed(seed)
        heads, dim = shape.kv_heads, shape.head_dim
        totals = [computed + new for computed, new in sequences]

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float32).to(shape.dtype)

        self.keys = [normal(total, heads, dim) for total in totals]
        self.values = [normal(total, heads, dim) for total in totals]
        self.tokens = sum(new for _, new in sequences)
        self.padded_tokens = max(self.tokens, padded_tokens)
        self.query = normal(self.padded_tokens, shape.q_heads, dim).to(shape.device)
        self.sinks = normal(shape.q_heads).to(shape.device) if shape.sinks else None
        self._place(totals, draw, len(sequences) + padded_sequences)
        self._describe(totals, padded_sequences, optimism)
        self.impl = shape.impl(**({} if self.sinks is None else {"sinks": self.sinks}))
        k_scale, v_scale = (0.5, 0.25) if shape.cache.startswith("fp8") else (1.0, 1.0)
        self.layer = SimpleNamespace(
            _k_scale=torch.tensor(k_scale, dtype=torch.float32, device=shape.device),
            _v_scale=torch.tensor(v_scale, dtype=torch.float32, device=shape.device),
        )

    def _place(self, totals: list[int], draw: torch.Generator, rows: int) -> None:
        """Pages in any order; page 0 is vLLM's null block, which also fills the table."""
        needed = [-(-total // self.shape.page) for total in totals]
        self.pages = 2 + sum(needed)
        free = (1 + torch.randperm(self.pages - 1, generator=draw)).tolist()
        self.table = torch.zeros(rows, max(needed) + 2, dtype=torch.int32)
        self.slots = []
        for row, (total, count) in enumerate(zip(totals, needed, strict=True)):
            mine = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
            self.table[row, :count] = mine
            at = torch.arange(total)
            self.slots.append(mine[at // self.shape.page] * self.shape.page + at % self.shape.page)

    def _describe(self, totals: list[int], padded_sequences: int, optimism: int) -> None:
        lengths = [new for _, new in self.sequences] + [0] * padded_sequences
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        contexts = torch.tensor(totals + [0] * padded_sequences, dtype=torch.int32)
        self.slot_mapping = torch.full((self.padded_tokens,), -1, dtype=torch.int64)
        new = [
            slots[computed:]
            for slots, (computed, _) in zip(self.slots, self.sequences, strict=True)
        ]
        self.slot_mapping[: self.tokens] = torch.cat(new)
        device = self.shape.device
        self.common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts.clone(),
            seq_lens=contexts.to(device),
            seq_lens_cpu_upper_bound=contexts + optimism,
            num_reqs=len(lengths),
            num_actual_tokens=self.padded_tokens if padded_sequences else self.tokens,
            max_query_len=max(lengths),
            max_seq_len=max(totals) + optimism,
            block_table_tensor=self.table.to(device),
            slot_mapping=self.slot_mapping.to(device),
        )

    def metadata(self) -> PatuneMetadata:
        return self.shape.builder().build(0, self.common)

    def fill(self, cache: torch.Tensor) -> None:
        """History first, then the step's new tokens with their padding, each by one write."""
        self.fill_history(cache)
        slots = self.common.slot_mapping
        self.impl.do_kv_cache_update(self.layer, *self.new_tokens(), cache, slots)

    def fill_history(self, cache: torch.Tensor) -> None:
        parts = [slice(0, computed) for computed, _ in self.sequences]
        slots = torch.cat([s[part] for s, part in zip(self.slots, parts, strict=True)])
        if len(slots):
            tokens = self._tokens(parts, len(slots))
            self.impl.do_kv_cache_update(self.layer, *tokens, cache, slots.to(self.shape.device))

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the step's tokens, padding included."""
        parts = [slice(computed, None) for computed, _ in self.sequences]
        return self._tokens(parts, self.padded_tokens)

    def _tokens(self, parts: list[slice], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """These parts of every sequence, padded to ``count`` tokens."""

        def packed(sequences: list[torch.Tensor]) -> torch.Tensor:
            tokens = torch.cat([s[part] for s, part in zip(sequences, parts, strict=True)])
            padding = tokens.new_full((count - len(tokens), *tokens.shape[1:]), 77.0)
            return torch.cat([tokens, padding]).to(self.shape.device)

        return packed(self.keys), packed(self.values)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's output, padding included, and the cache after it. Rows nobody wrote hold 7."""
        cache = allocate(self.shape, self.pages)
        self.fill(cache)
        output = torch.full_like(self.query, 7.0)
        result = self.impl.forward(
            self.layer, self.query, None, None, cache, self.metadata(), output
        )
        assert result is output
        return output, cache

    def expected(self) -> torch.Tensor:
        rows, start, queries = [], 0, self.query.cpu().float()
        for key, value, (computed, new) in zip(self.keys, self.values, self.sequences, strict=True):
            query = queries[start : start + new]
            rows.append(
                self._attend(
                    query, self._stored(key, "_k_scale"), self._stored(value, "_v_scale"), computed
                )
            )
            start += new
        return torch.cat(rows)

    def _stored(self, new: torch.Tensor, scale: str) -> torch.Tensor:
        """What the cache gives back."""
        if not self.shape.cache.startswith("fp8"):
            return new.float()
        factor = getattr(self.layer, scale).item()
        return (new.float() / factor).clamp(-448, 448).to(FP8).float() * factor

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, computed: int
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        group = self.shape.q_heads // self.shape.kv_heads
        for i in range(len(query)):
            last = computed + i
            first = 0 if self.shape.window is None else max(0, last + 1 - self.shape.window)
            for head in range(self.shape.q_heads):
                seen = slice(first, last + 1)
                scores = key[seen, head // group] @ query[i, head] * self.shape.head_dim**-0.5
                if self.shape.softcap:
                    scores = self.shape.softcap * torch.tanh(scores / self.shape.softcap)
                logits = scores
                if self.sinks is not None:
                    logits = torch.cat([scores, self.sinks[head : head + 1].cpu().float()])
                weights = torch.softmax(logits, 0)[: len(scores)]
                out[i, head] = weights @ value[seen, head // group]
        return out
