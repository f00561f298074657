"""The poisoned tensors of a gate case.

Every slot that no query token sees is NaN, its scales are NaN or Inf, every page that no sequence owns is NaN, every block-table entry
that is not needed is 2^30, and what lies around a tensor is poison too: whatever a kernel reads beyond its right shows.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch

from patune.kernels.caches import to_layout
from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs
from patune.tuner.gate.case import Case, first_seen
from patune.tuner.gate.placement import place_caches, place_far_rows, place_far_scales
from patune.tuner.gate.scales import VALUE_GAP, cache_scale, stored_as, stored_query, stored_scale

if TYPE_CHECKING:
    from patune.problem import Problem

LN2 = 0.6931471805599453
UNUSED_ENTRY = 1 << 30  # no cache has so many pages: following it is an illegal access
NO_CONTEXT = -(1 << 31)  # around the lengths: a sequence that is not there has no tiles
# The peak token's score is PEAK * sqrt(head_dim), 128 and more over the others: exp() of it is beyond float32, and who takes the maximum over
# tokens that a row does not see is left with nothing.
PEAK = 16.0
TAIL_PEAK = 10.6 * LN2  # score of a tail's peak over the others
# of the scores of a tail: so little that nearly all of them are below 2^-10 of the peak's
TAIL_SPREAD = 0.15
PRIMES = {32: 31, 64: 61, 128: 127}  # the largest below half a head
# Integers: a query row has a 1 in this many channels, channel 0 among them, keys are 1, 0 or -1 and softmax_scale is ln 2. So scores in log2
# units are integers within +-4, probabilities are powers of two from 2^-8 on, and with values up to 3 sums over 3000 tokens keep within
# 23 bits: exact in float32 in any order, and each factor exact in fp16, bf16 and fp8. A sequence's last token alone has the score 4, as
# keys have no 1 in channel 0: the last split has a maximum of its own.
QUERY_CHANNELS = 4
LARGEST_VALUE = 3
AROUND = 16  # poisoned elements before and after a short tensor
FAR_PAGES = 5  # a far cache has at least so many: the stride between them has to fit 32 bits


def build_inputs(case: Case, problem: Problem, device: torch.device) -> DecodeInputs:
    """The poisoned tensors of a case; the same on every call."""
    generator = torch.Generator(device).manual_seed(case.seed)
    table, used = _pages_of(case, problem, device)
    slots = used.nonzero()  # [used slots, (page, slot)]
    rows = len(case.contexts) * problem.query_length
    heads, head_dim = case.kv_heads * problem.qg, problem.head_dim
    query, keys, values = _numbers(case, problem, table, slots, rows, generator)
    sinks = case.sink + 0.5 * torch.randn(heads, generator=generator, device=device)
    if case.kind == "integers":  # exp(0) is exact
        sinks = torch.zeros_like(sinks)
    query, query_scale = stored_query(case, problem, query, generator)
    if case.far == "rows":
        query = place_far_rows(query)
    owned = [row[row != UNUSED_ENTRY].long() for row in table]
    key_scale, value_scale = (
        cache_scale(case, problem, name, used, owned, generator)
        for name in ("key_scale", "value_scale")
    )
    if key_scale is not None:
        keys = keys / (key_scale[used] if key_scale.ndim > 1 else key_scale)
    key_cache, value_cache = _caches(case, problem, used, keys, values)
    key_scale = stored_scale(key_scale, used, gap=0)
    value_scale = stored_scale(value_scale, used, gap=VALUE_GAP)
    if (
        case.far == "pages"
        and key_scale is not None
        and value_scale is not None
        and key_scale.ndim > 1
    ):
        key_scale, value_scale = place_far_scales(key_scale, value_scale)
    lengths = torch.tensor(case.contexts, dtype=torch.int32, device=device)
    scale = LN2 if case.kind == "integers" else case.scale_factor * head_dim**-0.5
    return DecodeInputs(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=table,
        context_lengths=_between(lengths, NO_CONTEXT),
        softmax_scale=scale * 2.0 ** -case.query_log2[1],
        query_length=problem.query_length,
        sliding_window=case.window,
        sinks=_between(sinks.to(torch.bfloat16), torch.nan) if problem.sinks else None,
        query_scale=query_scale,
        key_scale=key_scale,
        value_scale=value_scale,
        softcap=case.softcap,
        fp8_math=problem.fp8_math,
    )


def _pages_of(
    case: Case, problem: Problem, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables, a slice of a larger one, and which slots hold tokens that are seen, [pages, block_size].

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
    if case.far == "pages":  # the last ones of them are the far ones
        spare = max(0, FAR_PAGES - 2 - len(pages))
        pages = [page + spare for page in pages]
    rng.shuffle(pages)
    pool, own = pages[:pool_size], iter(pages[pool_size:])
    width = 1 + max(-(-context // block) for context in case.contexts)
    entries = np.full(2 * AROUND + len(case.contexts) * (width + 2), UNUSED_ENTRY, np.int32)
    table = entries[AROUND:-AROUND].reshape(-1, width + 2)
    used = np.zeros((max(pages, default=0) + 2, block), np.bool_)
    for sequence, column, begin, end in pieces:
        page = rng.choice(pool) if pool and end - begin == block else next(own)
        table[sequence, column] = page
        used[page, begin:end] = True
    on_device = torch.from_numpy(entries).to(device)[AROUND:-AROUND].view(table.shape)
    return on_device[:, :width], torch.from_numpy(used).to(device)


def _numbers(
    case: Case,
    problem: Problem,
    table: torch.Tensor,
    slots: torch.Tensor,
    rows: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [rows, heads, head_dim], keys and values [used slots, kv_heads, head_dim], as what is stored stands for."""
    device, head_dim, kv_heads = slots.device, problem.head_dim, case.kv_heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, device=device).float()

    heads = kv_heads * problem.qg
    if case.kind == "integers":
        query = _few_channels(normal(rows, heads, head_dim))
        if problem.softcap:  # tanh is not exact: flat scores, which a cap leaves alone
            query = torch.zeros_like(query)
        keys = integers(-1, 1, len(slots), kv_heads, head_dim)
        keys[..., 0] = -keys[..., 0].abs()
        last = {b: context - 1 for b, context in enumerate(case.contexts) if context}
        keys[_slots_of(last, problem, table, slots)] = 1.0
        return query, keys, integers(-LARGEST_VALUE, LARGEST_VALUE, len(slots), kv_heads, head_dim)
    query, keys = normal(rows, heads, head_dim), normal(len(slots), kv_heads, head_dim)
    values = normal(len(slots), kv_heads, head_dim)
    if case.kind == "markers":
        query = torch.zeros_like(query)
        values = _markers(slots[:, 0] * problem.block_size + slots[:, 1], kv_heads, head_dim)
    elif case.kind == "peaked":
        direction = normal(head_dim).sign()
        spread = TAIL_SPREAD if case.tail else 1.0
        query, keys = direction + 0.25 * spread * query, spread * keys
        keys[_slots_of(dict(enumerate(case.peaks)), problem, table, slots)] = (
            _peak(case, head_dim) * direction
        )
        if case.tail:  # one sum: random values would cancel, whether they are there or not
            values += 1.0
        if case.offset:
            keys += _offsets(case, table, slots)[:, None, None] * direction * head_dim**-0.5
    return query, keys, values


def _few_channels(noise: torch.Tensor) -> torch.Tensor:
    """1 in QUERY_CHANNELS channels of each row, the first one among them, else 0."""
    drawn = torch.cat((torch.full_like(noise[..., :1], torch.inf), noise[..., 1:]), dim=-1)
    return torch.zeros_like(noise).scatter_(-1, drawn.topk(QUERY_CHANNELS).indices, 1.0)


def _markers(slot_ids: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Values [slots, kv_heads, head_dim] with two ones each: one half of the channels counts slots modulo that half, the other counts
    runs of slots modulo a prime, so that no tile or page (powers of two) looks like another.
    """
    half = head_dim // 2
    ids = slot_ids[:, None] + 13 * torch.arange(kv_heads, device=slot_ids.device)
    channels = torch.stack((ids % half, half + ids // half % PRIMES[half]), dim=-1)
    return torch.zeros(*ids.shape, head_dim, device=ids.device).scatter_(-1, channels, 1.0)


def _slots_of(
    tokens: dict[int, int], problem: Problem, table: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Row of ``slots`` that holds a token of each sequence."""
    block = problem.block_size
    entries = table.cpu()
    wanted = [int(entries[b, t // block]) * block + t % block for b, t in tokens.items()]
    return torch.searchsorted(slots[:, 0] * block + slots[:, 1], torch.tensor(wanted).to(slots))


def _peak(case: Case, head_dim: int) -> float:
    """Elements of the peak token's key: its score is this times sqrt(head_dim)."""
    return TAIL_PEAK * head_dim**-0.5 if case.tail else PEAK


def _offsets(case: Case, table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """By used slot: the offset of its sequence's scores, natural log; up and down in turn. Sequences must not share pages."""
    by_page = torch.zeros(1 + int(slots[:, 0].max()), device=slots.device)
    for sequence, row in enumerate(table):
        by_page[row[row != UNUSED_ENTRY].long()] = case.offset * (1 - 2 * (sequence % 2))
    return by_page[slots[:, 0]]


def _between(values: torch.Tensor, poison: float) -> torch.Tensor:
    """The same values between poison in memory, as aligned as before: Triton builds another kernel for pointers that are not."""
    return torch.nn.functional.pad(values, (AROUND, AROUND), value=poison)[AROUND:-AROUND]


def _caches(
    case: Case, problem: Problem, used: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both caches in the problem's layout: keys and values [used slots, kv_heads, head_dim] in place, NaN elsewhere."""

    def cache(used_values: torch.Tensor, *, is_value: bool) -> torch.Tensor:
        shape = (*used.shape, case.kv_heads, problem.head_dim)
        logical = torch.full(shape, torch.nan, device=used.device)
        slots = used.nonzero()
        logical[slots[:, 0], slots[:, 1]] = used_values
        stored = stored_as(logical, TORCH_DTYPES[problem.kv_dtype])
        return to_layout(stored, problem.kv_layout, is_value=is_value)

    key, value = cache(keys, is_value=False), cache(values, is_value=True)
    return place_caches(case, key, value)
