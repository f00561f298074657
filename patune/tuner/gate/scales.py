"""Queries and scales of a case as they are stored: quantised where the problem has them, and poisoned wherever nothing may be read.

What an fp8 cache stands for is as random as a 16-bit one: keys are divided by their scales before they are stored, so that every token
keeps a say in the softmax whatever its scale; values are not, so that the scales show in the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patune.kernels.inputs import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.problem import Problem
    from patune.tuner.gate.case import Case

GAP = 64  # poisoned elements after a lone scale
VALUE_GAP = 16  # after a head's value scales, so that none of their strides are the keys'
SCALE_LOG2 = 6.0  # scales per token or row are log-uniform over 2^-6 to 2^6
TENSOR_SCALES = {"key_scale": 0.3, "value_scale": 1.7, "query_scale": 0.75}
# Powers of two keep integers exact. Value scales per token move a probability by as much: with 1 and 2 all sums keep within 24 bits.
EXACT_TENSOR_SCALES = {"key_scale": 0.25, "value_scale": 2.0, "query_scale": 0.5}
EXTREME_TENSOR_SCALES = {"key_scale": 1 / 64, "value_scale": 250.0}  # 1/64: keys fill fp8's range
EXTREME_SCALES = (0.0, 1e-6, 1e3)  # of one slot in 16 each; a token of zeros is often given scale 0
# Value scales of whole sequences, by output type: unnormalised, fp16 probabilities times 1e-8 are lost and times 1e4 * 2^6 they overflow.
# Sequences of scale 1 have slots with EXTREME_SCALES besides. fp16 outputs could hold neither 1e-8 nor 1e4.
SEQUENCE_SCALES = {"bf16": (1e-8, 1e4, 1.0, 0.0), "fp16": (1e-3, 1e2, 1.0, 0.0)}
TOP_OCTAVES = 4  # every second row lies so close to the largest: the others' scores may be too small to matter
ROW_TOP = 3.5  # largest element of a row that fp8 holds exactly: 448 / 128


def stored_query(
    case: Case, problem: Problem, query: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stored query, a slice of a q|k|v tensor whose rest is NaN, and its scale. Scale times stored query is ``query`` [rows, heads, head_dim], but for rounding."""
    scale, stored = None, query
    rows, heads, _ = query.shape
    if problem.query_dtype.startswith("fp8"):
        lone = EXACT_TENSOR_SCALES if case.kind == "integers" else TENSOR_SCALES
        scale = _lone(torch.tensor([lone["query_scale"]], device=query.device))
        if case.row_scales:
            scale = _lone(_log_uniform((rows * heads,), generator)).view(rows, heads, 1)
        stored = query / scale
    elif problem.fp8_math and not case.rounded_query:
        stored = _fp8_rows(query, TORCH_DTYPES[problem.kv_dtype])
    low, high = case.query_log2
    if (low, high) != (0, 0):
        exponents = torch.randint(
            low, high + 1, (rows, heads, 1), generator=generator, device=query.device
        )
        exponents.view(-1)[::2] = high - exponents.view(-1)[::2] % TOP_OCTAVES
        stored = stored * torch.exp2(exponents.float())
    fused = torch.nn.functional.pad(stored, (0, 0, 0, 2 * case.kv_heads, 1, 1), value=torch.nan)
    return stored_as(fused, TORCH_DTYPES[problem.query_dtype])[1:-1, :heads], scale


def _fp8_rows(query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``query`` rounded so that fp8 holds its rows exactly, whether scaled by a power of two or so that the largest element is fp8's."""
    limit = torch.finfo(dtype).max
    unit = 2.0 ** int(torch.tensor(limit / ROW_TOP).log2())
    rounded = stored_as(query * unit, dtype).float()
    largest = query.abs().argmax(-1, keepdim=True)
    return rounded.scatter(-1, largest, limit * query.gather(-1, largest).sign()) / unit


def _log_uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return torch.exp2(SCALE_LOG2 * (2 * uniform - 1))


def cache_scale(
    case: Case,
    problem: Problem,
    name: str,
    used: torch.Tensor,
    sequence_pages: Sequence[torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor | None:
    """Key or value scales [1] or [pages, block_size, kv_heads, 1]. Values of markers have scale 1: their sums stay exact.

    ``used`` [pages, block_size] says which slots hold tokens that are seen, ``sequence_pages`` the pages of each sequence.
    """
    if problem.kv_quant == "none":
        return None
    plain = case.kind == "markers" and name == "value_scale"
    if problem.kv_quant == "per_tensor":
        scales = EXTREME_TENSOR_SCALES if case.extreme_scales else TENSOR_SCALES
        if case.kind == "integers":
            scales = EXACT_TENSOR_SCALES
        return torch.tensor([1.0 if plain else scales[name]], device=used.device)
    shape = (*used.shape, case.kv_heads, 1)
    scale = _log_uniform(shape, generator)
    if case.kind == "integers":
        exponents = scale.log2().round()
        return torch.exp2(exponents if name == "key_scale" else exponents % 2)
    if case.extreme_scales:
        by_page = torch.ones(len(used), 1, 1, 1, device=used.device)
        if name == "value_scale":
            by_sequence = SEQUENCE_SCALES["fp16" if problem.query_dtype == "fp16" else "bf16"]
            for sequence, pages in enumerate(sequence_pages):
                by_page[pages] = by_sequence[sequence % len(by_sequence)]
        drawn = torch.randint(0, 16, shape, generator=generator, device=used.device)
        for value, extreme in enumerate(EXTREME_SCALES):
            scale = torch.where(drawn == value, extreme, scale)
        scale = torch.where(by_page == 1, scale, by_page * _log_uniform(shape, generator))
    # fp8 has to hold the offset keys, 70 and less
    if case.kind == "peaked" and name == "key_scale":
        scale = scale.clamp(min=1 / 4)
    return torch.ones_like(scale) if plain else scale


def stored_scale(
    scale: torch.Tensor | None, used: torch.Tensor, *, gap: int
) -> torch.Tensor | None:
    """The scale as kernels take it; NaN or Inf wherever no token is seen, in ``gap`` elements after each head, and after a lone scale."""
    if scale is None or scale.ndim == 1:
        return scale if scale is None else _lone(scale)
    pages, block, heads, _ = scale.shape
    odd = torch.arange(block + gap, device=used.device) % 2 == 1
    stored = torch.where(odd, torch.inf, torch.nan).expand(pages, heads, block + gap).clone()
    seen = used[:, None, :].expand(pages, heads, block)
    stored[..., :block] = torch.where(seen, scale[..., 0].transpose(1, 2), stored[..., :block])
    return stored[..., :block, None]


def _lone(scale: torch.Tensor) -> torch.Tensor:
    """The same values before NaN in memory: who takes one scale for many, or rows for more rows, reads it."""
    return torch.nn.functional.pad(scale, (0, GAP), value=torch.nan)[: len(scale)]


def stored_as(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast; beyond the largest fp8 number to that number, NaN to NaN."""
    if dtype.itemsize > 1:
        return values.to(dtype)
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)
