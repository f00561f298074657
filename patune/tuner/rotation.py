"""KV data for timing with a cold L2: sets of pages that calls take in turn, out of one pool of random values.

A set is what one call reads. Sets are disjoint, so the pages between two uses of a set are what has to be larger than the L2; block
tables are random permutations, as they are in a server that has run for a while.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs
from patune.kernels.samples import sequence_tokens

if TYPE_CHECKING:
    from patune.problem import Problem, Workload

COLD_B = 450_000_000  # 7 times the 60 MB L2 of an H200
MIN_SETS = 4
LARGE_SETS = 2  # of sets that are larger than COLD_B
MAX_SETS = 512  # nodes of a CUDA graph: smaller rotations are flushed out of the L2 between replays
ALIGN_INTS = 4  # int32 in the 16 bytes that Triton specialises pointers on
FILL_CHUNK = 1 << 26  # elements per randn: its fp32 result takes 256 MB
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How the calls of a graph rotate over data.

    Attributes:
        sets: calls before data is used again.
        table_pages: entries per row of a block table.
        first_page: entries before it are outside of the window.
        pool_pages: pages of the pool; fewer than the sets need where memory is short.
        page_b: bytes of K and V of one page.
    """

    sets: int
    table_pages: int
    first_page: int
    pool_pages: int
    page_b: int

    @property
    def flushes(self) -> bool:
        """The pages may still be in the L2 when they are read again: it has to be flushed between replays."""
        return self.pool_pages * self.page_b < COLD_B


def plan_rotation(problem: Problem, workload: Workload, memory_b: int) -> Rotation:
    """Enough sets for a cold L2, within ``memory_b`` bytes."""
    tokens = sequence_tokens(problem, workload)
    visible = tokens
    if problem.windowed:  # the oldest query token sees a window of its own
        visible = min(tokens, workload.context + problem.query_length - 1)
    table_pages = math.ceil(tokens / problem.block_size)
    first_page = (tokens - visible) // problem.block_size
    page_b = 2 * workload.kv_heads * problem.block_size * problem.head_dim * problem.kv_itemsize
    set_pages = workload.batch * (table_pages - first_page)
    set_b = set_pages * page_b
    least = MIN_SETS if set_b <= COLD_B else LARGE_SETS
    sets = min(MAX_SETS, max(least, math.ceil(COLD_B / set_b)))
    return Rotation(
        sets=sets,
        table_pages=table_pages,
        first_page=first_page,
        pool_pages=max(1, min(sets * set_pages, memory_b // page_b)),
        page_b=page_b,
    )


def make_tables(rotation: Rotation, batch: int, device: torch.device) -> list[torch.Tensor]:
    """Block tables [batch, table_pages] int32, one per set, each 16-byte aligned."""
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(rotation.pool_pages, generator=generator).to(torch.int32)
    entries = batch * rotation.table_pages
    row = math.ceil(entries / ALIGN_INTS) * ALIGN_INTS
    storage = torch.empty(rotation.sets, row, dtype=torch.int32)
    tables = storage[:, :entries].view(rotation.sets, batch, rotation.table_pages)
    # pages outside of the window are not read: they need not be pages of their own
    tables.copy_(order[torch.arange(tables.numel()) % len(order)].view_as(tables))
    seen = tables[:, :, rotation.first_page :]
    seen.copy_(order[torch.arange(seen.numel()) % len(order)].view_as(seen))
    storage = storage.to(device)
    return [storage[i, :entries].view(batch, rotation.table_pages) for i in range(rotation.sets)]


class FlatPool:
    """Random values on a device, allocated once and shared by all problems of a process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: torch.Tensor | None = None

    @property
    def held_b(self) -> int:
        """Bytes that it has allocated."""
        return 0 if self._values is None else self._values.numel() * self._values.element_size()

    def take(self, dtype: torch.dtype, elements: int) -> torch.Tensor:
        """The first ``elements`` values [elements]; callers must not write them."""
        values = self._values
        if values is None or values.dtype != dtype or values.numel() < elements:
            del values
            self._values = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            values = torch.empty(elements, dtype=dtype, device=self._device)
            for start in range(0, elements, FILL_CHUNK):
                chunk = values[start : start + FILL_CHUNK]
                chunk.copy_(torch.randn(chunk.shape, device=self._device))
            self._values = values
        return values[:elements]


def _shaped(flat: torch.Tensor, problem: Problem, kv_heads: int, *, is_value: bool) -> torch.Tensor:
    """A flat run of values as a cache of the problem's layout."""
    size, dim = problem.block_size, problem.head_dim
    if problem.kv_layout == "nhd":
        return flat.view(-1, size, kv_heads, dim).permute(0, 2, 1, 3)
    if problem.kv_layout == "hnd":
        return flat.view(-1, kv_heads, size, dim)
    if is_value:
        return flat.view(-1, kv_heads, dim, size)
    return flat.view(-1, kv_heads, dim // problem.kv_vector, size, problem.kv_vector)


def make_inputs(
    problem: Problem, workload: Workload, rotation: Rotation, pool: FlatPool, table: torch.Tensor
) -> DecodeInputs:
    """Inputs of full-length sequences over the pool's pages, through one of the rotation's tables."""
    assert problem.kv_quant == "none", "no kernel takes scales yet"
    device = table.device
    dtype = TORCH_DTYPES[problem.kv_dtype]
    half = rotation.pool_pages * workload.kv_heads * problem.block_size * problem.head_dim
    flat = pool.take(dtype, 2 * half)
    generator = torch.Generator().manual_seed(SEED)
    q_heads = workload.kv_heads * problem.qg
    query = torch.randn(
        workload.batch * problem.query_length, q_heads, problem.head_dim, generator=generator
    )
    tokens = sequence_tokens(problem, workload)
    return DecodeInputs(
        query=query.to(TORCH_DTYPES[problem.query_dtype]).to(device),
        key_cache=_shaped(flat[:half], problem, workload.kv_heads, is_value=False),
        value_cache=_shaped(flat[half:], problem, workload.kv_heads, is_value=True),
        block_tables=table,
        context_lengths=torch.full((workload.batch,), tokens, dtype=torch.int32, device=device),
        softmax_scale=problem.head_dim**-0.5,
        query_length=problem.query_length,
        sliding_window=workload.context if problem.windowed else 0,
        sinks=torch.zeros(q_heads, device=device) if problem.sinks else None,
    )
