"""The tensors of one decode step, and the problem and workload that they pose."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from patune.problem import Problem, Workload

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# every launch asks for its problem: checking the fields anew takes 10 us, finding the checked one 2 us (2026-11, one core)
_checked_problem = functools.lru_cache(maxsize=256)(Problem)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeInputs:
    """Everything a decode step reads.

    Attributes:
        query: [batch * query_length, q_heads, head_dim], row b * query_length + i is query token i of sequence b.
        key_cache: AITER [pages, kv_heads, head_dim / x, block_size, x] with x = 16 bytes / itemsize, or strided
            [pages, kv_heads, block_size, head_dim] with any strides but 1 for the last axis (an NHD cache is a permuted view).
        value_cache: AITER [pages, kv_heads, head_dim, block_size] or [pages, kv_heads, block_size / x, head_dim, x], or strided like the key.
        block_tables: [batch, max_pages] int32, entry j of a row is the page of tokens [j * block_size, (j + 1) * block_size).
        context_lengths: [batch] int32, tokens of each sequence, its query tokens included.
        softmax_scale: factor on query . key, usually head_dim ** -0.5.
        query_length: query tokens per sequence.
        sliding_window: tokens that a query token sees, itself included; 0 is no window.
        sinks: [q_heads] raw logits added to each row's softmax denominator, or None.
        query_scale: [1] or [batch * query_length, q_heads, 1] float32, or None.
        key_scale, value_scale: [1] or [pages, kv_heads, block_size, 1] float32, or None.
        softcap: cap of the scores, cap * tanh(score / cap); 0 is none.
        fp8_math: compute the products of an fp8 cache in fp8.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lengths: torch.Tensor
    softmax_scale: float
    query_length: int = 1
    sliding_window: int = 0
    sinks: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    softcap: float = 0.0
    fp8_math: bool = False

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.block_tables.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.key_cache.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.key_cache.shape[-2]

    @property
    def out_dtype(self) -> torch.dtype:
        """Element type of the output: the query's, bf16 for an fp8 query."""
        return torch.bfloat16 if self.query.element_size() == 1 else self.query.dtype

    @property
    def kv_layout(self) -> str:
        """``aiter`` and ``aiter_5d`` by rank, ``nhd`` or ``hnd`` by which of the head and token axes has the smaller stride."""
        if self.key_cache.ndim == 5:
            return "aiter" if self.value_cache.ndim == 4 else "aiter_5d"
        return "nhd" if self.key_cache.stride(1) < self.key_cache.stride(2) else "hnd"

    @property
    def problem(self) -> Problem:
        """The problem that these tensors pose.

        Raises:
            InvalidValueError: no kernel and no oracle knows such a problem.
        """
        quant = "none"
        if self.key_scale is not None:
            quant = "per_tensor" if self.key_scale.numel() == 1 else "per_token"
        return _checked_problem(
            block_size=self.block_size,
            head_dim=self.query.shape[-1],
            qg=self.query.shape[1] // self.kv_heads,
            query_length=self.query_length,
            query_dtype=DTYPE_NAMES[self.query.dtype],
            kv_dtype=DTYPE_NAMES[self.key_cache.dtype],
            kv_quant=quant,
            kv_layout=self.kv_layout,
            windowed=self.sliding_window > 0,
            sinks=self.sinks is not None,
            softcap=self.softcap > 0,
            fp8_math=self.fp8_math,
        )

    def workload(self, max_context: int | None = None) -> Workload:
        """The workload, without reading the lengths from the device.

        The block tables' width bounds the context, and so does a window: what lies before it is not visited.
        """
        context = self.block_tables.shape[1] * self.block_size
        if max_context is not None:
            context = min(context, max_context)
        if self.sliding_window > 0:
            context = min(context, self.sliding_window)
        return Workload(batch=self.batch, kv_heads=self.kv_heads, context=context)
