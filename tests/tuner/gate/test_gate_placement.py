"""Where caches lie: the same numbers everywhere, poison around them, and offsets that do not fit 32 bits where a case wants them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from patune.kernels.validate import check_inputs
from patune.problem import KV_LAYOUTS, Problem
from patune.tuner.gate.case import Case
from patune.tuner.gate.tensors import AROUND, NO_CONTEXT, UNUSED_ENTRY, build_inputs

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs

CPU = torch.device("cpu")
NEAR = Case(name="f", kind="random", contexts=(40, 17), kv_heads=3)


def inputs_of(case: Case, **fields: Any) -> DecodeInputs:
    problem = Problem(**({"block_size": 16, "head_dim": 64, "qg": 2, "sinks": True} | fields))
    inputs = build_inputs(case, problem, CPU)
    check_inputs(inputs)
    assert inputs.problem == problem
    return inputs


def caches_of(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.key_cache, inputs.value_cache


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("page", [16, 1024])
def test_far_pages_lie_beyond_32_bit_offsets(layout: str, page: int) -> None:
    far = inputs_of(replace(NEAR, far="pages"), kv_layout=layout, block_size=page)
    table = far.block_tables
    owned = table[table != UNUSED_ENTRY].long()
    for cache in caches_of(far):
        stride = cache.stride(0)
        assert stride % 16 == 0
        assert stride < 2**31, "a stride of 64 bits would hide the bug"
        assert int(owned.max()) * stride >= 2**31
    assert len(far.key_cache) >= 5
    same_values(far, inputs_of(replace(NEAR, name="f"), kv_layout=layout, block_size=page))


@pytest.mark.parametrize("layout", [layout for layout in KV_LAYOUTS if layout != "nhd"])
def test_far_heads_lie_beyond_32_bit_offsets(layout: str) -> None:
    far = inputs_of(replace(NEAR, far="heads"), kv_layout=layout)
    near = inputs_of(NEAR, kv_layout=layout)
    for seen, plain in zip(caches_of(far), caches_of(near), strict=True):
        assert seen.stride(1) % 16 == 0
        assert seen.stride(1) < 2**31 <= 2 * seen.stride(1)
        assert seen.stride()[2:] == plain.stride()[2:]
    same_values(far, near)


def same_values(one: DecodeInputs, other: DecodeInputs) -> None:
    """Of the tokens that are seen, read through the tables."""
    for sequence, context in enumerate(one.context_lengths.tolist()):
        for column in range(-(-context // one.block_size)):
            pages = [int(inputs.block_tables[sequence, column]) for inputs in (one, other)]
            for mine, its in zip(caches_of(one), caches_of(other), strict=True):
                assert torch.equal(mine[pages[0]].nan_to_num(7.0), its[pages[1]].nan_to_num(7.0))


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("place", ["guarded", "interleaved", "wide"])
def test_caches_lie_in_poison(
    layout: str, place: Literal["guarded", "interleaved", "wide"]
) -> None:
    case = replace(NEAR, interleaved=place == "interleaved", wide_values=place == "wide")
    inputs = inputs_of(case, kv_layout=layout)
    for cache in caches_of(inputs):
        memory = torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage())
        page = cache[0].numel()
        begin = cache.storage_offset()
        end = begin + 1 + sum((n - 1) * s for n, s in zip(cache.shape, cache.stride(), strict=True))
        if place != "interleaved" or inputs.key_cache.ndim == 5:
            assert begin >= page
            assert memory[:begin].isnan().all()
            assert len(memory) - end >= page
            assert memory[end:].isnan().all()
    assert not inputs_of(case, kv_layout=layout).key_cache[1].isnan().all()


def test_short_tensors_lie_in_poison_as_aligned_as_serving_passes_them() -> None:
    inputs = inputs_of(NEAR)
    lengths, table, sinks = inputs.context_lengths, inputs.block_tables, inputs.sinks
    assert sinks is not None
    for tensor in (lengths, table, sinks, inputs.query, *caches_of(inputs)):
        assert tensor.data_ptr() % 16 == 0
    around = lengths.as_strided((2 + 2 * AROUND,), (1,), lengths.storage_offset() - AROUND)
    assert around.tolist() == [NO_CONTEXT] * AROUND + [40, 17] + [NO_CONTEXT] * AROUND
    beside = sinks.as_strided((6 + 2 * AROUND,), (1,), sinks.storage_offset() - AROUND)
    assert beside.isnan().tolist() == [True] * AROUND + [False] * 6 + [True] * AROUND
    before = table.as_strided((AROUND,), (1,), table.storage_offset() - AROUND)
    assert (before == UNUSED_ENTRY).all()
    query = inputs.query
    row = query.as_strided((query.stride(0),), (1,), query.storage_offset() - query.stride(0))
    assert row.isnan().all(), "the row before the first"


@pytest.mark.parametrize("length", [1, 3])
def test_far_query_rows_lie_beyond_32_bit_offsets(length: int) -> None:
    case = replace(NEAR, contexts=(40, 17, 9))
    far, near = (inputs_of(c, query_length=length) for c in (replace(case, far="rows"), case))
    stride = far.query.stride(0)
    assert stride % 16 == 0
    assert stride < 2**31 <= (len(far.query) - 1) * stride
    assert far.query.stride()[1:] == near.query.stride()[1:]
    assert torch.equal(far.query, near.query)
