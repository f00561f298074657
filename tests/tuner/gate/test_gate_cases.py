"""The cases' own promises: within budget, the same every time, and poison wherever nothing may be read."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from patune.kernels.caches import from_layout
from patune.kernels.hopper_copy import PAGE_SLOTS
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.kernels.reference import reference_decode, visible_tokens
from patune.problem import KV_LAYOUTS, Problem
from patune.tuner.gate.cases import (
    DEEPEST,
    EMULATED_BUDGET,
    LONGEST_ON_DEVICE,
    QUANTISED_BUDGET,
    RING_PAGES,
    Case,
    first_seen,
    gate_cases,
    seed_plan_cases,
    walked_tokens,
)
from patune.tuner.gate.tensors import PRIMES, UNUSED_ENTRY, build_inputs

CPU = torch.device("cpu")
torch.set_num_threads(
    1
)  # small tensors: on a busy machine threads that wait for each other take 4 times as long


def make_problem(**fields: Any) -> Problem:
    return Problem(**({"block_size": 1024, "head_dim": 64, "qg": 2} | fields))


def make_knobs(tile: int, splits: int) -> CdnaKnobs:
    return CdnaKnobs(partition_tokens=tile, num_splits=splits, num_stages=1, num_warps=2)


@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("windowed", [False, True])
def test_emulated_cases_stay_within_their_budget(tile: int, windowed: bool) -> None:
    for page, length, splits in itertools.product((16, 128, 1024), (1, 2, 4, 16), (1, 4, 128)):
        problem = make_problem(block_size=page, query_length=length, windowed=windowed)
        knobs = make_knobs(tile, splits)
        cases = gate_cases(problem, knobs, emulated=True)
        costs = [walked_tokens(case, problem, tile) for case in cases]
        assert EMULATED_BUDGET // 4 < sum(costs) <= EMULATED_BUDGET
        assert [c.bit_length() for c in costs] == sorted(c.bit_length() for c in costs)
        quantised = replace(problem, kv_dtype="fp8_e4m3fn", kv_quant="per_token", fp8_math=True)
        more = gate_cases(replace(quantised, softcap=True), knobs, emulated=True)
        total = sum(walked_tokens(case, problem, tile) for case in more)
        assert sum(costs) < total <= EMULATED_BUDGET + QUANTISED_BUDGET


def test_walked_tokens_are_whole_tiles_of_what_is_seen() -> None:
    case = Case(name="x", kind="random", contexts=(0, 1, 128, 129, 1000), kv_heads=2, repeats=1)
    assert walked_tokens(case, make_problem(), 128) == (0 + 1 + 1 + 2 + 8) * 128 * 2 * 2
    windowed = Case(name="x", kind="random", contexts=(1000,), window=128)
    # tokens 872..999 lie in tiles 6 and 7; three query tokens earlier it is 869
    assert walked_tokens(windowed, make_problem(windowed=True), 128) == 2 * 128
    assert walked_tokens(windowed, make_problem(windowed=True, query_length=4), 64) == 3 * 64


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"query_length": 4},
        {"windowed": True},
        {"windowed": True, "query_length": 3},
        {"query_length": 16, "head_dim": 256},
        {"windowed": True, "query_length": 16, "head_dim": 256},
    ],
    ids=str,
)
def test_every_list_has_the_edges(fields: dict[str, Any], emulated: bool) -> None:
    problem = make_problem(**fields)
    cases = gate_cases(problem, make_knobs(128, 4), emulated=emulated)
    contexts = {c for case in cases for c in case.contexts}
    length = problem.query_length
    assert {0, length} <= contexts
    assert {case.kind for case in cases} == {"markers", "random", "peaked"}
    assert sum(case.checks_lse for case in cases) == 1
    assert any(case.repeats for case in cases)
    assert any(case.scale_factor != 1.0 for case in cases)
    assert any(case.shared_pages for case in cases)
    assert max(case.kv_heads for case in cases) >= 2
    assert len({case.name for case in cases}) == len(cases)
    if problem.windowed:
        assert {1, 128, 131, 5000} <= {case.window for case in cases}
        assert all(case.window > 0 for case in cases)
    else:
        assert {128, 1024, 128 + length - 1} <= contexts
        assert all(case.window == 0 for case in cases)
    if not emulated:
        assert {1, length - 1, 127, 128, 129, 1023, 1024, 1025, 511, 512, 513} <= contexts
        assert sorted(contexts)[-2] <= LONGEST_ON_DEVICE < max(contexts)
        assert {2, 3, 4} <= {case.kv_heads for case in cases}


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("tile", [64, 256])
def test_every_ring_of_every_split_comes_round_in_the_deep_case(tile: int, windowed: bool) -> None:
    problem = make_problem(block_size=256, windowed=windowed)
    for splits, stages in ((1, 1), (6, 3), (16, 4), (128, 3)):
        knobs = HopperKnobs(
            partition_tokens=tile, num_splits=splits, num_stages=stages, num_warps=4
        )
        (deep,) = (c for c in gate_cases(problem, knobs, emulated=False) if c.name == "random/deep")
        (context,) = deep.contexts
        begin, end = first_seen(context, problem, deep.window) // tile, -(-context // tile)
        fewest = len(range(begin + splits - 1, end, splits))
        if splits * tile * (stages + 18) <= DEEPEST:
            assert fewest > PAGE_SLOTS.value + stages
        else:
            assert fewest >= DEEPEST // tile // splits
        assert context <= DEEPEST + tile + 3
        assert (deep.window > 0) == windowed


def seen_slots(case: Case, problem: Problem, table: torch.Tensor, pages: int) -> torch.Tensor:
    """Which slots some query token sees, by walking every token."""
    seen = torch.zeros(pages, problem.block_size, dtype=torch.bool)
    for sequence, context in enumerate(case.contexts):
        for query_token in range(problem.query_length):
            start, stop = visible_tokens(context, query_token, problem.query_length, case.window)
            for token in range(start, stop):
                page = int(table[sequence, token // problem.block_size])
                seen[page, token % problem.block_size] = True
    return seen


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["random", "markers"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn", "fp8_e4m3fnuz"])
def test_what_is_not_seen_is_poison(layout: str, shared: bool, kind: Any, dtype: str) -> None:
    problem = make_problem(
        block_size=16, query_length=2, windowed=True, kv_layout=layout, kv_dtype=dtype
    )
    contexts = (0, 1, 16, 33, 100, 70)
    case = Case(
        name="poison", kind=kind, contexts=contexts, window=20, kv_heads=2, shared_pages=shared,
        interleaved=not shared,
    )  # fmt: skip
    inputs = build_inputs(case, problem, CPU)
    assert inputs.problem == problem
    table, pages = inputs.block_tables, inputs.key_cache.shape[0]
    seen = seen_slots(case, problem, table, pages)
    for cache, is_value in ((inputs.key_cache, False), (inputs.value_cache, True)):
        logical = from_layout(cache, layout, is_value=is_value).float()
        assert torch.equal(logical.isnan().all(-1).all(-1), ~seen)
        assert torch.equal(logical.isnan().any(-1).any(-1), ~seen)
    assert not seen[0].any()
    assert not seen[-1].any()
    for sequence, context in enumerate(contexts):
        first = visible_tokens(context, 0, 2, 20)[0]
        for column in range(table.shape[1]):
            needed = first < (column + 1) * 16 and column * 16 < context
            assert (table[sequence, column] == UNUSED_ENTRY) == (not needed)
    owners = table[table != UNUSED_ENTRY]
    assert (len(owners.unique()) < len(owners)) == shared
    out, _ = reference_decode(inputs)
    assert out.isfinite().all()


def test_inputs_are_strided_as_a_serving_stack_passes_them() -> None:
    case = Case(name="strides", kind="random", contexts=(40, 3), kv_heads=2)
    inputs = build_inputs(case, make_problem(block_size=16), CPU)
    assert inputs.query.shape == (2, 4, 64)
    assert inputs.query.stride() == ((4 + 2 * 2) * 64, 64, 1)
    assert inputs.block_tables.stride(0) > inputs.block_tables.shape[1]


def test_inputs_are_the_same_on_every_call_and_differ_by_name() -> None:
    problem = make_problem(block_size=16, sinks=True)
    case = Case(name="a", kind="random", contexts=(40, 3))
    one, same = build_inputs(case, problem, CPU), build_inputs(case, problem, CPU)
    other = build_inputs(Case(name="b", kind="random", contexts=(40, 3)), problem, CPU)
    assert torch.equal(one.query, same.query)
    assert torch.equal(one.key_cache.nan_to_num(), same.key_cache.nan_to_num())
    assert torch.equal(one.block_tables, same.block_tables)
    assert not torch.equal(one.query, other.query)


def test_markers_tell_every_token_and_every_run_of_tokens() -> None:
    for head_dim in (64, 128, 256):
        half = head_dim // 2
        problem = make_problem(head_dim=head_dim, block_size=16)
        case = Case(name="m", kind="markers", contexts=(3000,), kv_heads=1)
        inputs = build_inputs(case, problem, CPU)
        assert not inputs.query.any()
        pages = inputs.block_tables[0, : 3000 // 16].long()
        marks = from_layout(inputs.value_cache, "aiter", is_value=True)[pages].float().flatten(0, 2)
        assert torch.equal(marks[:, :half].sum(1), torch.ones(len(marks)))
        assert torch.equal(marks[:, half:].sum(1), torch.ones(len(marks)))
        assert int(marks[:, :half].sum(0).max()) <= 3000 / half + 2
        codes = marks.view(-1, 16, head_dim).flatten(1)
        assert len(codes.unique(dim=0)) == min(len(codes), half // 16 * PRIMES[half])


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_far_pages_lie_beyond_32_bit_offsets(layout: str) -> None:
    problem = make_problem(block_size=16, kv_layout=layout)
    near = Case(name="f", kind="random", contexts=(40, 17), kv_heads=2)
    far_inputs = build_inputs(replace(near, far_pages=True), problem, CPU)
    inputs = build_inputs(near, problem, CPU)
    table = far_inputs.block_tables
    last = int(table[table != UNUSED_ENTRY].max())
    for far, cache in (
        (far_inputs.key_cache, inputs.key_cache),
        (far_inputs.value_cache, inputs.value_cache),
    ):
        assert far.stride(0) * last >= 2**31
        assert far.stride(0) % 16 == 0
        assert far.stride()[1:] == cache.stride()[1:]
        assert torch.equal(far.nan_to_num(7.0), cache.nan_to_num(7.0))
    assert far_inputs.problem == problem


def test_the_peak_takes_the_weight() -> None:
    problem = make_problem(block_size=16, head_dim=128)
    case = Case(name="p", kind="peaked", contexts=(50, 50), peaks=(0, 33))
    inputs = build_inputs(case, problem, CPU)
    out, _ = reference_decode(inputs)
    values = from_layout(inputs.value_cache, "aiter", is_value=True)
    for sequence, token in enumerate(case.peaks):
        page = int(inputs.block_tables[sequence, token // 16])
        torch.testing.assert_close(out[sequence, 0], values[page, token % 16, 0].float())


def test_the_seed_plan_is_complete() -> None:
    plan = seed_plan_cases()
    page_1024 = [s for s in plan if s.problem.block_size == 1024]
    seen = {(len(s.case.contexts), s.case.window, s.problem.query_length) for s in page_1024}
    assert seen == set(itertools.product((1, 128), (0, 128), (1, 4)))
    assert {s.case.window for s in plan if s.problem.block_size == 16} == {0, 128}
    assert {s.partition_tokens for s in plan} == {256}
    assert {s.problem.kv_layout for s in plan} == {"aiter"}
    for entry in plan:
        assert entry.problem.windowed == (entry.case.window > 0)
        assert max(entry.case.contexts) <= LONGEST_ON_DEVICE
        assert min(entry.case.contexts) >= entry.problem.query_length
    ragged = next(s.case for s in plan if len(s.case.contexts) == 128)
    assert len(set(ragged.contexts)) > 100
    short = seed_plan_cases(longest=300)
    assert max(c for s in short for c in s.case.contexts) <= 300


def test_a_ring_of_pages_comes_round_in_every_emulated_list() -> None:
    problem = Problem(block_size=1024, head_dim=128, qg=8)
    plain = CdnaKnobs(partition_tokens=64, num_splits=128, num_stages=3, num_warps=2)
    ring = replace(plain, lds_ring=True)
    assert {c.name for c in gate_cases(problem, plain, emulated=True)} == {
        c.name for c in gate_cases(problem, ring, emulated=True)
    } - {"random/deep"}
    for knobs, splits in ((ring, 2), (replace(ring, num_splits=1), 1)):
        (deep,) = (c for c in gate_cases(problem, knobs, emulated=True) if c.name == "random/deep")
        assert deep.most_splits == 2
        tiles_of_the_last_split = deep.contexts[0] // 64 // splits
        assert tiles_of_the_last_split > RING_PAGES + ring.num_stages - 1
        assert deep.window == 0
    windowed = replace(problem, windowed=True)
    (deep,) = (c for c in gate_cases(windowed, ring, emulated=True) if c.name == "random/deep")
    assert first_seen(deep.contexts[0], windowed, deep.window) == 1


def test_the_ring_of_pages_is_as_long_as_the_kernels() -> None:
    from patune.kernels.cdna_ring import PAGES_HELD

    assert PAGES_HELD.value == RING_PAGES
