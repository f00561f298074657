"""A vLLM batch, taken apart once for all layers: decode rows for the kernels, the rest for varlen attention over gathered pages.

Lengths are read from the copies that vLLM keeps on the CPU; nothing here waits for the GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import (
    get_num_attention_heads_from_layers,
    split_decodes_and_prefills,
)

from patune.errors import UnsupportedProblemError
from patune.integrations.layers import AttentionLayer
from patune.integrations.vllm_backend import ALTERNATIVE
from patune.problem import MAX_QUERY_LENGTH, MAX_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

GATHERED_TOKENS = (
    1 << 16
)  # per piece of a batch, unless one sequence is longer: 128 MiB of keys for 8 heads of 128 in bf16


@dataclass(kw_only=True)
class PrefillPiece:
    """Sequences whose pages are gathered together.

    Attributes:
        tokens: of the batch, their query tokens.
        pages: [n] of the cache, sequence after sequence.
        cu_query: [sequences + 1] int32.
        cu_key: [sequences + 1] int32, in gathered tokens: whole pages.
        key_lengths: [sequences] int32, the keys that are there.
        max_query: of any of them.
        max_key: of any of them, or more.
    """

    tokens: slice
    pages: torch.Tensor
    cu_query: torch.Tensor
    cu_key: torch.Tensor
    key_lengths: torch.Tensor
    max_query: int
    max_key: int


@dataclass(kw_only=True)
class PatuneMetadata(AttentionMetadata):
    """What the layers need to know of a batch; vLLM copies the fields of it into subclasses, so it is neither frozen nor slotted.

    Attributes:
        decodes: sequences at the front of the batch that the kernels compute.
        query_length: query tokens of each of them.
        block_tables: [decodes, pages] int32.
        context_lengths: [decodes] int32.
        max_context: power of two that no context is longer than. It chooses knobs, so it should not change with every step.
        pieces: the rest.
    """

    decodes: int
    query_length: int
    block_tables: torch.Tensor
    context_lengths: torch.Tensor
    max_context: int
    pieces: list[PrefillPiece] = field(default_factory=list)


class PatuneMetadataBuilder(AttentionMetadataBuilder[PatuneMetadata]):
    """Splits batches that vLLM has reordered: sequences with few query tokens come first."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size: int = kv_cache_spec.block_size
        self._check_spec()
        self._init_reorder_batch_threshold(
            1, supports_spec_as_decode=_computes_verification(vllm_config)
        )

    def _check_spec(self) -> None:
        """Refuse caches that are not keys followed by values; layers could not see it when they were made."""
        spec, config = self.kv_cache_spec, self.vllm_config
        q_heads = get_num_attention_heads_from_layers(config, self.layer_names)
        others = ("pages packed by another backend",) if spec.state_content_bytes else ()
        AttentionLayer(
            where=f"the vLLM layers {', '.join(self.layer_names)}",
            alternative=ALTERNATIVE,
            block_size=spec.block_size,
            head_dim=spec.head_size,
            value_head_dim=spec.head_size_v,
            q_heads=q_heads or config.model_config.get_num_attention_heads(config.parallel_config),
            kv_heads=spec.num_kv_heads,
            dtype=torch.bfloat16,  # the activations' type was checked when the layers were made
            others=others,
        ).problem()

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Decode batches: one launch sequence per shape, that reads lengths and pages on the device. With speculation, verification batches too."""
        if max_decode_query_len(vllm_config) > 1 and _computes_verification(vllm_config):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PatuneMetadata:
        """Take a batch apart.

        Raises:
            UnsupportedProblemError: it is not causal.
        """
        batch = common_attn_metadata
        if batch.causal is not True:
            raise UnsupportedProblemError(
                f"patune does not serve a vLLM batch that is not causal. Use {ALTERNATIVE} instead."
            )
        decodes, query_length, others = self._split(batch)
        return PatuneMetadata(
            decodes=decodes,
            query_length=query_length,
            block_tables=batch.block_table_tensor[:decodes],
            context_lengths=batch.seq_lens[:decodes],
            max_context=1 << (max(1, batch.max_seq_len) - 1).bit_length(),
            pieces=[self._piece(batch, *piece) for piece in self._pieces(batch, others)],
        )

    def _split(self, batch: CommonAttentionMetadata) -> tuple[int, int, int]:
        """Sequences for the kernels, query tokens of each, and the first of the other sequences.

        The last sequences of a padded batch have no query tokens. There are rows of the query for them, and their contexts are 0.
        """
        threshold = self.reorder_batch_threshold
        decodes, _, tokens, _ = split_decodes_and_prefills(
            batch, decode_threshold=threshold, require_uniform=True
        )
        if not decodes:
            return 0, 1, 0
        lengths = batch.query_start_loc_cpu[: decodes + 1].diff()
        query_length = max(1, int(lengths[0]))
        real = int(lengths.count_nonzero())
        if not bool((lengths[:real] == query_length).all()):
            return 0, 1, 0
        return min(decodes, tokens // query_length), query_length, decodes

    def _pieces(
        self, batch: CommonAttentionMetadata, first: int
    ) -> Iterator[tuple[int, int, list[int]]]:
        """Sequences from ``first`` on, in pieces of bounded size: first, last + 1, pages of each."""
        bounds, starts = batch.seq_lens_cpu_upper_bound, batch.query_start_loc_cpu
        width, limit = batch.block_table_tensor.shape[1], GATHERED_TOKENS // self.block_size
        pages: list[int] = []
        stop = int((starts[:-1] < starts[-1]).count_nonzero())  # the others are padding
        for sequence in range(first, stop):
            bound = batch.max_seq_len if bounds is None else int(bounds[sequence])
            needed = min(width, -(-bound // self.block_size))
            if pages and sum(pages) + needed > limit:
                yield first, sequence, pages
                first, pages = sequence, []
            pages.append(needed)
        if pages:
            yield first, stop, pages

    def _piece(
        self, batch: CommonAttentionMetadata, first: int, stop: int, pages: list[int]
    ) -> PrefillPiece:
        starts = batch.query_start_loc_cpu[first : stop + 1].tolist()
        table = batch.block_table_tensor
        row, column = _copied(torch.tensor(_cells(first, pages)), table.device)
        cu_pages = torch.tensor([0, *pages]).cumsum(0)
        return PrefillPiece(
            tokens=slice(starts[0], starts[-1]),
            pages=table[row, column],
            cu_query=batch.query_start_loc[first : stop + 1] - starts[0],
            cu_key=_copied((cu_pages * self.block_size).to(torch.int32), table.device),
            key_lengths=batch.seq_lens[first:stop],
            max_query=max(b - a for a, b in itertools.pairwise(starts)),
            max_key=max(pages) * self.block_size,
        )


def _cells(first: int, pages: list[int]) -> tuple[list[int], list[int]]:
    """Rows and columns of the block table that hold the pages of sequences ``first``, ``first + 1`` and so on."""
    rows = [first + index for index, count in enumerate(pages) for _ in range(count)]
    return rows, [column for count in pages for column in range(count)]


def _copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` of the CPU on ``device``, without waiting for it: vLLM copies through pinned memory, which needs a GPU driver."""
    return values if device.type == "cpu" else async_tensor_h2d(values, device)


def _computes_verification(vllm_config: VllmConfig) -> bool:
    """Whether the kernels compute the batches that verify speculated tokens."""
    query_length = max_decode_query_len(vllm_config)
    if query_length == 1:
        return True
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    return bool(query_length <= MAX_QUERY_LENGTH and query_length * group <= MAX_ROWS)
