"""Valid inputs of a given problem and size, for building kernels and counting their work. Their values prove nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patune.kernels.caches import to_layout
from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs

if TYPE_CHECKING:
    from patune.problem import Problem, Workload

SAMPLE_SOFTCAP = 30.0  # Gemma 2 caps its logits at 30 and 50
WINDOWED_CONTEXTS = 4  # a windowed sequence is this many windows long: most of it must be skipped


def sequence_tokens(problem: Problem, workload: Workload) -> int:
    """Tokens of a sequence: the workload's context, or several windows of it when the context is the window's size."""
    return workload.context * WINDOWED_CONTEXTS if problem.windowed else workload.context


def sample_inputs(problem: Problem, workload: Workload, device: torch.device) -> DecodeInputs:
    """Random inputs of ``workload.batch`` full-length sequences over pages of their own."""
    generator = torch.Generator().manual_seed(0)
    tokens = sequence_tokens(problem, workload)
    pages_each = -(-tokens // problem.block_size)
    pages = workload.batch * pages_each
    shape = (pages, problem.block_size, workload.kv_heads, problem.head_dim)
    key, value = (
        torch.randn(shape, generator=generator).to(TORCH_DTYPES[problem.kv_dtype]) for _ in range(2)
    )
    q_heads = workload.kv_heads * problem.qg
    query = torch.randn(
        workload.batch * problem.query_length, q_heads, problem.head_dim, generator=generator
    )
    return DecodeInputs(
        query=query.to(TORCH_DTYPES[problem.query_dtype]).to(device),
        key_cache=to_layout(key, problem.kv_layout, is_value=False).to(device),
        value_cache=to_layout(value, problem.kv_layout, is_value=True).to(device),
        block_tables=torch.randperm(pages, generator=generator)
        .to(torch.int32)
        .view(workload.batch, pages_each)
        .to(device),
        context_lengths=torch.full((workload.batch,), tokens, dtype=torch.int32, device=device),
        softmax_scale=problem.head_dim**-0.5,
        query_length=problem.query_length,
        sliding_window=workload.context if problem.windowed else 0,
        sinks=torch.zeros(q_heads, device=device) if problem.sinks else None,
        query_scale=torch.ones(1, device=device) if problem.query_dtype.startswith("fp8") else None,
        key_scale=_ones_per_scale(problem, workload, pages, device),
        value_scale=_ones_per_scale(problem, workload, pages, device),
        softcap=SAMPLE_SOFTCAP if problem.softcap else 0.0,
        fp8_math=problem.fp8_math,
    )


def _ones_per_scale(
    problem: Problem, workload: Workload, pages: int, device: torch.device
) -> torch.Tensor | None:
    if problem.kv_quant == "none":
        return None
    per_token = (pages, workload.kv_heads, problem.block_size, 1)
    return torch.ones(1 if problem.kv_quant == "per_tensor" else per_token, device=device)
