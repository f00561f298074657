"""The poisoned tensors of a gate case.

Every slot that no query token sees is NaN, its scales are NaN or Inf, every page that no sequence owns is NaN, and every block-table entry
that is not needed is 2^30: whatever a kernel reads beyond its right shows.

What an fp8 cache stands for is as random as a 16-bit one: keys are divided by their scales before they are stored, so that every token
keeps a say in the softmax whatever its scale; values are not, so that the scales show in the output.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from patune.kernels.caches import to_layout
from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs
from patune.tuner.gate.cases import Case, first_seen

if TYPE_CHECKING:
    from patune.problem import Problem

UNUSED_ENTRY = 1 << 30  # no cache has so many pages: following it is an illegal access
PEAK = 4.0  # the peak token's score is PEAK * sqrt(head_dim): e^32 over the others at head_dim 64
INT32_ELEMENTS = 1 << 31  # an element offset of this size no longer fits a signed 32-bit integer
GAP = 64  # poisoned elements after a lone scale, and between the halves of an interleaved page
PRIMES = {32: 31, 64: 61, 128: 127}  # the largest below half a head
SCALE_LOG2 = 6.0  # scales per token or row are log-uniform over 2^-6 to 2^6
TENSOR_SCALES = {"key_scale": 0.3, "value_scale": 1.7, "query_scale": 0.75}
EXTREME_TENSOR_SCALES = {"key_scale": 1 / 64, "value_scale": 250.0}  # 1/64: keys fill fp8's range
EXTREME_SCALES = (0.0, 1e-6, 1e3)  # of one slot in 16 each; a token of zeros is often given scale 0
# Value scales of whole sequences, by output type: unnormalised, fp16 probabilities times 1e-8 are lost and times 1e4 * 2^6 they overflow.
# Sequences of scale 1 have slots with EXTREME_SCALES besides. fp16 outputs could hold neither 1e-8 nor 1e4.
SEQUENCE_SCALES = {"bf16": (1e-8, 1e4, 1.0, 0.0), "fp16": (1e-3, 1e2, 1.0, 0.0)}
TOP_OCTAVES = 4  # every second row lies so close to the largest: the others' scores may be too small to matter
ROW_TOP = 3.5  # largest element of a row that fp8 holds exactly: 448 / 128


def build_inputs(case: Case, problem: Problem, device: torch.device) -> DecodeInputs:
    """The poisoned tensors of a case; the same on every call."""
    generator = torch.Generator(device).manual_seed(case.seed)
    table, used = _pages_of(case, problem, device)
    slots = used.nonzero()  # [used slots, (page, slot)]
    rows = len(case.contexts) * problem.query_length
    heads, head_dim = case.kv_heads * problem.qg, problem.head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    query, keys = normal(rows, heads, head_dim), normal(len(slots), case.kv_heads, head_dim)
    values = normal(len(slots), case.kv_heads, head_dim)
    if case.kind == "markers":
        query = torch.zeros_like(query)
        values = _markers(slots[:, 0] * problem.block_size + slots[:, 1], case.kv_heads, head_dim)
    elif case.kind == "peaked":
        direction = normal(head_dim).sign()
        query = direction + 0.25 * query
        keys[_peak_slots(case, problem, table, slots)] = PEAK * direction
    sinks = case.sink + 0.5 * normal(heads)
    query, query_scale = _query(case, problem, query, generator)
    key_scale, value_scale = (
        _cache_scale(case, problem, name, used, table, generator)
        for name in ("key_scale", "value_scale")
    )
    if key_scale is not None:
        keys = keys / (key_scale[used] if key_scale.ndim > 1 else key_scale)
    key_cache, value_cache = _caches(case, problem, used, keys, values)
    return DecodeInputs(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=table,
        context_lengths=torch.tensor(case.contexts, dtype=torch.int32, device=device),
        softmax_scale=case.scale_factor * head_dim**-0.5 * 2.0 ** -case.query_log2[1],
        query_length=problem.query_length,
        sliding_window=case.window,
        sinks=sinks.to(torch.bfloat16) if problem.sinks else None,
        query_scale=query_scale,
        key_scale=_stored_scale(key_scale, used, spare_heads=0),
        value_scale=_stored_scale(value_scale, used, spare_heads=1),
        softcap=case.softcap,
        fp8_math=problem.fp8_math,
    )


def _pages_of(
    case: Case, problem: Problem, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables, a slice of wider rows, and which slots hold tokens that are seen, [pages, block_size].

    The first and the last page are nobody's.
    """
    rng = random.Random(case.seed)
    block = problem.block_size
    pieces = []  # (sequence, table column, first slot, end slot)
    for sequence, context in enumerate(case.contexts):
        first = first_seen(context, problem, case.window)
        for column in range(first // block, -(-context // block)):
            begin = column * block
            pieces.append((sequence, column, max(first - begin, 0), min(context - begin, block)))
    full = sum(end - begin == block for _, _, begin, end in pieces)
    pool_size = max(1, full // 2) if case.shared_pages and full else 0
    pages = list(range(1, 1 + len(pieces) + (pool_size - full if pool_size else 0)))
    rng.shuffle(pages)
    pool, own = pages[:pool_size], iter(pages[pool_size:])
    width = 1 + max(-(-context // block) for context in case.contexts)
    table = torch.full((len(case.contexts), width + 2), UNUSED_ENTRY, dtype=torch.int32)
    used = torch.zeros(len(pages) + 2, block, dtype=torch.bool)
    for sequence, column, begin, end in pieces:
        page = rng.choice(pool) if pool and end - begin == block else next(own)
        table[sequence, column] = page
        used[page, begin:end] = True
    return table.to(device)[:, :width], used.to(device)


def _markers(slot_ids: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Values [slots, kv_heads, head_dim] with two ones each: one half of the channels counts slots modulo that half, the other counts
    runs of slots modulo a prime, so that no tile or page (powers of two) looks like another.
    """
    half = head_dim // 2
    ids = slot_ids[:, None] + 13 * torch.arange(kv_heads, device=slot_ids.device)
    channels = torch.stack((ids % half, half + ids // half % PRIMES[half]), dim=-1)
    return torch.zeros(*ids.shape, head_dim, device=ids.device).scatter_(-1, channels, 1.0)


def _peak_slots(
    case: Case, problem: Problem, table: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Row of ``slots`` that holds each sequence's peak token."""
    block = problem.block_size
    wanted = [int(table[b, t // block]) * block + t % block for b, t in enumerate(case.peaks)]
    return torch.searchsorted(slots[:, 0] * block + slots[:, 1], torch.tensor(wanted).to(slots))


def _query(
    case: Case, problem: Problem, query: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stored query, a slice of a q|k|v tensor whose rest is NaN, and its scale. Scale times stored query is ``query``, but for rounding."""
    scale, stored = None, query
    rows, heads, _ = query.shape
    if problem.query_dtype.startswith("fp8"):
        scale = _lone(torch.tensor([TENSOR_SCALES["query_scale"]], device=query.device))
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
    fused = torch.nn.functional.pad(stored, (0, 0, 0, 2 * case.kv_heads), value=torch.nan)
    return _stored(fused, TORCH_DTYPES[problem.query_dtype])[:, :heads], scale


def _fp8_rows(query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``query`` rounded so that fp8 holds its rows exactly, whether scaled by a power of two or so that the largest element is fp8's."""
    limit = torch.finfo(dtype).max
    unit = 2.0 ** int(torch.tensor(limit / ROW_TOP).log2())
    rounded = _stored(query * unit, dtype).float()
    largest = query.abs().argmax(-1, keepdim=True)
    return rounded.scatter(-1, largest, limit * query.gather(-1, largest).sign()) / unit


def _log_uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return torch.exp2(SCALE_LOG2 * (2 * uniform - 1))


def _cache_scale(
    case: Case,
    problem: Problem,
    name: str,
    used: torch.Tensor,
    table: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor | None:
    """Key or value scales [1] or [pages, block_size, kv_heads, 1]. Values of markers have scale 1: their sums stay exact."""
    if problem.kv_quant == "none":
        return None
    plain = case.kind == "markers" and name == "value_scale"
    if problem.kv_quant == "per_tensor":
        scales = EXTREME_TENSOR_SCALES if case.extreme_scales else TENSOR_SCALES
        return torch.tensor([1.0 if plain else scales[name]], device=used.device)
    shape = (*used.shape, case.kv_heads, 1)
    scale = _log_uniform(shape, generator)
    if case.extreme_scales:
        by_page = torch.ones(len(used), 1, 1, 1, device=used.device)
        if name == "value_scale":
            by_sequence = SEQUENCE_SCALES["fp16" if problem.query_dtype == "fp16" else "bf16"]
            for sequence, pages in enumerate(table):
                owned = pages[pages != UNUSED_ENTRY].long()
                by_page[owned] = by_sequence[sequence % len(by_sequence)]
        drawn = torch.randint(0, 16, shape, generator=generator, device=used.device)
        for value, extreme in enumerate(EXTREME_SCALES):
            scale = torch.where(drawn == value, extreme, scale)
        scale = torch.where(by_page == 1, scale, by_page * _log_uniform(shape, generator))
    return torch.ones_like(scale) if plain else scale


def _stored_scale(
    scale: torch.Tensor | None, used: torch.Tensor, *, spare_heads: int
) -> torch.Tensor | None:
    """The scale as kernels take it; NaN or Inf wherever no token is seen, in the spare heads, and after a lone scale."""
    if scale is None or scale.ndim == 1:
        return scale if scale is None else _lone(scale)
    pages, block, heads, _ = scale.shape
    odd = torch.arange(block, device=used.device) % 2 == 1
    poison = torch.where(odd, torch.inf, torch.nan)
    stored = poison.expand(pages, heads + spare_heads, block).clone()
    seen = used[:, None, :].expand(pages, heads, block)
    stored[:, :heads] = torch.where(seen, scale[..., 0].transpose(1, 2), stored[:, :heads])
    return stored[:, :heads, :, None]


def _lone(scale: torch.Tensor) -> torch.Tensor:
    """The same values before NaN in memory: who takes one scale for many, or rows for more rows, reads it."""
    return torch.nn.functional.pad(scale, (0, GAP), value=torch.nan)[: len(scale)]


def _stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast; beyond the largest fp8 number to that number, NaN to NaN."""
    if dtype.itemsize > 1:
        return values.to(dtype)
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def _caches(
    case: Case, problem: Problem, used: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both caches in the problem's layout: keys and values [used slots, kv_heads, head_dim] in place, NaN elsewhere."""

    def cache(used_values: torch.Tensor, *, is_value: bool) -> torch.Tensor:
        heads = case.kv_heads + (case.wide_values and is_value)
        shape = (*used.shape, heads, problem.head_dim)
        logical = torch.full(shape, torch.nan, device=used.device)
        slots = used.nonzero()
        logical[slots[:, 0], slots[:, 1], : case.kv_heads] = used_values
        stored = _stored(logical, TORCH_DTYPES[problem.kv_dtype])
        return to_layout(stored, problem.kv_layout, is_value=is_value)[:, : case.kv_heads]

    key, value = cache(keys, is_value=False), cache(values, is_value=True)
    elements = key[0].numel()
    if case.far_pages:
        # the last page but one lies beyond 32-bit offsets; the gaps are never touched
        stride = 16 * -(-INT32_ELEMENTS // (16 * (len(key) - 2)))
        buffer = key.new_empty((len(key) - 1) * stride + 2 * elements)
        return _in_one(buffer, key, value, stride, elements)
    if case.interleaved and key.ndim == 4:
        stride = 2 * (elements + GAP)
        buffer = torch.full((len(key) * stride,), torch.nan, device=key.device).to(key.dtype)
        return _in_one(buffer, key, value, stride, elements + GAP)
    return key, value


def _in_one(
    buffer: torch.Tensor, key: torch.Tensor, value: torch.Tensor, page_stride: int, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the caches in one buffer, the value ``offset`` elements after the key."""
    spread_key, spread_value = (
        buffer.as_strided(near.shape, (page_stride, *near.stride()[1:]), start).copy_(near)
        for near, start in ((key, 0), (value, offset))
    )
    return spread_key, spread_value
