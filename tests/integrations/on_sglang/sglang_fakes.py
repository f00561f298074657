"""SGLang's own pools, layers and batches on any device, in a stand-in for the one thing that needs a server: the model runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PADDING_ROW = 0  # of the request table: SGLang gives it to no request


@dataclass(kw_only=True)
class Server:
    """One model runner's state, and what was written to it, as float32.

    Attributes:
        history: what each request's tokens are, [tokens, kv_heads, head_dim] keys and values: the naive attention reads these.
    """

    page_tokens: int
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 4096
    pages: int = 24
    requests: int = 6
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    layers: Sequence[RadixAttention] = ()
    window_layers: Sequence[int] = ()
    seed: int = 0
    device: str = "cpu"
    history: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.requests_table = ReqToTokenPool(self.requests, self.context, self.device, False)
        self.pool = self._pool()
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(self.seed)) + 1
        self.free_pages = order.tolist()  # page 0 is SGLang's padding page
        if not self.layers:
            self.layers = (self.layer(),)
        self.runner = SimpleNamespace(
            device=self.device,
            dtype=self.dtype,
            page_size=self.page_tokens,
            kv_cache_dtype=self.pool.dtype,
            use_mla_backend=False,
            is_draft_worker=False,
            sliding_window_size=None,
            model_config=SimpleNamespace(is_encoder_decoder=False, context_len=self.context),
            model=torch.nn.ModuleList(self.layers),
            req_to_token_pool=self.requests_table,
            token_to_kv_pool=self.pool,
            kv_index_translator=KVIndexTranslator(
                req_to_token=self.requests_table.req_to_token,
                token_to_kv_pool_allocator=None,
                token_to_kv_pool=self.pool,
                page_size=self.page_tokens,
                device=self.device,
            ),
        )

    def _pool(self) -> Any:
        common = {
            "page_size": self.page_tokens,
            "dtype": self.kv_dtype or self.dtype,
            "head_num": self.kv_heads,
            "head_dim": self.head_dim,
            "device": self.device,
            "enable_memory_saver": False,
        }
        tokens = self.pages * self.page_tokens
        if not self.window_layers:
            return MHATokenToKVPool(size=tokens, layer_num=2, **common)
        full = [n for n in range(2) if n not in self.window_layers]
        pool = SWAKVPool(
            size=tokens,
            size_swa=tokens,
            swa_attention_layer_ids=list(self.window_layers),
            full_attention_layer_ids=full,
            **common,
        )
        # pages of the window pool in another order, as its own allocator would give them
        pages = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(self.pages) + 1])
        offsets = torch.arange(self.page_tokens)
        mapping = (pages[:, None] * self.page_tokens + offsets).flatten()
        pool.register_mapping(torch.cat([mapping, torch.tensor([-1])]).to(self.device))
        return pool

    def layer(self, layer_id: int = 0, **options: Any) -> RadixAttention:
        """A layer of this server's shape."""
        shape = {
            "num_heads": self.q_heads,
            "head_dim": self.head_dim,
            "scaling": self.head_dim**-0.5,
            "num_kv_heads": self.kv_heads,
        }
        return RadixAttention(**{**shape, **options}, layer_id=layer_id)

    def admit(self, request: int, tokens: int) -> torch.Tensor:
        """Give a request room for so many more tokens; their slots."""
        row = self.requests_table.req_to_token[request]
        have = len(self.history[request][0]) if request in self.history else 0
        page = int(row[have - 1]) // self.page_tokens if have else 0
        slots = []
        for position in range(have, have + tokens):
            if position % self.page_tokens == 0:
                page = self.free_pages.pop()
            slots.append(page * self.page_tokens + position % self.page_tokens)
        row[have : have + tokens] = torch.tensor(slots, dtype=row.dtype)
        return row[have : have + tokens].long()

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, self.head_dim).to(self.dtype).to(self.device)

    def integers(self, values: Iterable[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor([*values], dtype=dtype).to(self.device)

    def batch(self, mode: ForwardMode, new: dict[int, int], spec_info: Any = None) -> tuple:
        """A batch that adds so many tokens to each request; (batch, q, k, v), flat as a model hands them over."""
        prefixes = [len(self.history[r][0]) if r in self.history else 0 for r in new]
        slots = [self.admit(request, tokens) for request, tokens in new.items()]
        keys = [self.random(tokens, self.kv_heads) for tokens in new.values()]
        values = [self.random(tokens, self.kv_heads) for tokens in new.values()]
        for request, key, value in zip(new, keys, values, strict=True):
            none = torch.zeros(0, self.kv_heads, self.head_dim)
            old = self.history.get(request, (none, none))
            self.history[request] = (
                torch.cat([old[0], key.float().cpu()]),
                torch.cat([old[1], value.float().cpu()]),
            )
        counted = [p + n for p, n in zip(prefixes, new.values(), strict=True)]
        lengths = prefixes if mode.is_target_verify() else counted
        total = sum(new.values())
        positions = torch.cat([torch.arange(p, c) for p, c in zip(prefixes, counted, strict=True)])
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(new),
            input_ids=self.integers([0] * total),
            req_pool_indices=self.integers(new),
            seq_lens=self.integers(lengths),
            out_cache_loc=torch.cat(slots),
            seq_lens_sum=sum(lengths),
            positions=positions.to(self.device),
            spec_info=spec_info,
        )
        if mode.is_extend() and not mode.is_target_verify():
            batch.extend_seq_lens = self.integers(new.values(), torch.int32)
            batch.extend_prefix_lens = self.integers(prefixes, torch.int32)
            batch.extend_seq_lens_cpu = list(new.values())
            batch.extend_prefix_lens_cpu = prefixes
            batch.extend_num_tokens = total
        self.runner.kv_index_translator.bind_own_plan(batch)
        query = self.random(total, self.q_heads)
        return batch, query.flatten(1), torch.cat(keys), torch.cat(values)

    def expected(
        self,
        query: torch.Tensor,
        new: dict[int, int],
        *,
        window: int = 0,
        sinks: torch.Tensor | None = None,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Naive float32 attention of the newest tokens of each request, [tokens, q_heads * head_dim]; on the CPU.

        Args:
            query: as the model hands it over.
            new: new tokens per request.
            window: tokens that a query token sees, itself included; 0 is all.
            sinks: [q_heads].
            softcap: 0 is none.
        """
        rows = query.view(-1, self.q_heads, self.head_dim).float().cpu().split([*new.values()])
        out = []
        for request, rows_of_one in zip(new, rows, strict=True):
            keys, values = self.history[request]
            first = len(keys) - new[request]
            for at, one in enumerate(rows_of_one, start=first):
                low = max(0, at + 1 - window) if window else 0
                out.append(
                    self._one_token(one, keys[low : at + 1], values[low : at + 1], sinks, softcap)
                )
        return torch.stack(out).flatten(1)

    def _one_token(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: Any,
        softcap: float,
    ):
        heads = []
        for head in range(self.q_heads):
            shared = head // (self.q_heads // self.kv_heads)
            scores = keys[:, shared] @ query[head] * self.head_dim**-0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].float().cpu().view(1)])
            weights = torch.softmax(scores, 0)[: len(keys)]
            heads.append(weights @ values[:, shared])
        return torch.stack(heads)
