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
from patune.tuner.gate.case import Case, first_seen, role_of, walked_tokens
from patune.tuner.gate.cases import DEEPEST, RING_PAGES, gate_cases
from patune.tuner.gate.edges import (
    LONGEST,
    affordable,
    context_edges,
    peak_edges,
    split_edges,
    window_edges,
    windowed_edges,
)
from patune.tuner.gate.seed_plan import seed_plan_cases
from patune.tuner.gate.tensors import PRIMES, UNUSED_ENTRY, build_inputs

CPU = torch.device("cpu")
HOPPER = HopperKnobs(partition_tokens=128, num_splits=4, num_stages=2, num_warps=4)
EMULATED_TOKENS = 28_672  # walked by a whole gate, at 30 us per token on one core
QUANTISED_TOKENS = 5 * 256  # more for an fp8 cache: five tiles
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
    for page, length, splits, layout in itertools.product(
        (16, 128, 1024), (1, 2, 4, 16), (1, 4, 128), ("aiter", "nhd")
    ):
        problem = make_problem(
            block_size=page, query_length=length, windowed=windowed, kv_layout=layout
        )
        knobs = make_knobs(tile, splits)
        cases = gate_cases(problem, knobs, emulated=True)
        costs = [walked_tokens(case, problem, tile) for case in cases]
        assert EMULATED_TOKENS // 6 < sum(costs) <= EMULATED_TOKENS
        near = [c.bit_length() for c, case in zip(costs, cases, strict=True) if not case.far]
        assert near == sorted(near), "cheapest first"
        assert [bool(case.far) for case in cases] == sorted(bool(case.far) for case in cases)
        quantised = replace(problem, kv_dtype="fp8_e4m3fn", kv_quant="per_token", softcap=True)
        more = gate_cases(quantised, knobs, emulated=True)
        total = sum(walked_tokens(case, quantised, tile) for case in more)
        heads = 2 if layout == "nhd" else 1
        assert total <= EMULATED_TOKENS + QUANTISED_TOKENS * heads
        assert len(more) == len(cases) + 3, "extreme scales, large rows, small rows"


def test_wide_heads_and_rings_walk_less_in_the_emulator() -> None:
    problem = make_problem(block_size=1024, head_dim=128)
    knobs = make_knobs(128, 4)
    plain = longest_list(problem, knobs)
    assert plain > longest_list(replace(problem, head_dim=256), knobs)
    assert plain > longest_list(problem, replace(knobs, lds_ring=True, num_stages=2))


def longest_list(problem: Problem, knobs: CdnaKnobs) -> int:
    cases = gate_cases(problem, knobs, emulated=True)
    (edges,) = (c for c in cases if role_of(c.name) == "markers/edges")
    return walked_tokens(edges, problem, knobs.partition_tokens)


def test_walked_tokens_are_whole_tiles_of_what_is_seen() -> None:
    case = Case(name="x", kind="random", contexts=(0, 1, 128, 129, 1000), kv_heads=2, repeats=1)
    assert walked_tokens(case, make_problem(), 128) == (0 + 1 + 1 + 2 + 8) * 128 * 2 * 2
    windowed = Case(name="x", kind="random", contexts=(1000,), window=128)
    again = replace(case, repeats=0, splits=(2, 3), regrouped=True)  # every second: 1000, 128, 0
    assert walked_tokens(again, make_problem(), 128) == (12 * 2 + 8 + 1 + 0) * 128 * 2
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
def test_every_list_has_every_kind_of_case(fields: dict[str, Any], emulated: bool) -> None:
    problem = make_problem(**fields)
    knobs = make_knobs(128, 4) if emulated else HOPPER
    cases = gate_cases(problem, knobs, emulated=emulated)
    contexts = {c for case in cases for c in case.contexts}
    length = problem.query_length
    assert {0, length, 1024 + length} & contexts
    assert {case.kind for case in cases} == {"markers", "integers", "random", "peaked"}
    assert {role_of(case.name) for case in cases} >= {
        "markers/edges", "integers/splits", "peaked/edges", "random/edges", "random/ragged", "random/far_pages",
        "random/far_heads",
    }  # fmt: skip
    assert {role_of(case.name) for case in cases if case.checks_lse} >= {
        "integers/splits", "peaked/edges", "random/edges",
    }  # fmt: skip
    assert any(case.tail for case in cases) == (not emulated)
    assert any(case.repeats for case in cases)
    assert any(case.regrouped and len(case.contexts) > 1 for case in cases)
    assert any(case.scale_factor != 1.0 for case in cases)
    assert any(case.offset for case in cases)
    assert any(case.shared_pages for case in cases)
    assert any(case.interleaved for case in cases)
    assert any(case.wide_values for case in cases)
    assert max(case.kv_heads for case in cases) >= 3
    assert len({case.name for case in cases}) == len(cases)
    assert all((case.window > 0) == problem.windowed for case in cases)
    if problem.windowed:
        assert {1, 128, 131} <= {case.window for case in cases}
    else:
        assert {128, 128 + length - 1} <= contexts
        assert (emulated and problem.head_dim > 128) or {1024, 1025} <= contexts
    if not emulated:
        assert {1, length - 1, 127, 128, 129, 1023, 1024, 1025, 511, 512, 513} <= contexts
        assert sorted(contexts)[-2] <= LONGEST < max(contexts)
        assert {2, 3, 4} <= {case.kv_heads for case in cases}


def test_edges_follow_the_problem_and_the_knobs() -> None:
    problem = make_problem(block_size=512, query_length=3)
    knobs = make_knobs(64, 5)
    edges = context_edges(problem, knobs, 5)
    # tile, two warps' shares of it, page, 16-byte vector, a round of all splits, each with its neighbours; the query
    for edge in (64, 32, 128, 512, 8, 5 * 64):
        assert {edge - 1, edge, edge + 1} <= set(edges)
    assert {0, 1, 2, 3, 4, 64 + 2, 5 * 64 + 2, 2 * 5 * 64, 2 * 5 * 64 + 1} <= set(edges)
    assert edges[:3] == (0, 3, 1), "the most telling first"
    assert len(set(edges)) == len(edges)
    assert max(context_edges(problem, replace(knobs, num_splits=128), 128)) <= LONGEST
    assert window_edges(problem, knobs) == (0,)
    windowed = replace(problem, windowed=True)
    assert window_edges(windowed, knobs) == (1, 67, 128, 64, 65, 63, 512, 513, 511, 1500, 5000)
    # the window of the first of three query tokens starts at token 0, 1, 64 and 512 of these
    starts = windowed_edges(windowed, knobs, 5, 67)
    assert {69, 70, 69 + 64, 69 + 512} <= set(starts)
    for context in (69, 70, 133, 581):
        assert first_seen(context, windowed, 67) == context - 69


def test_split_edges_are_those_of_the_reduce_chunk() -> None:
    knobs = replace(make_knobs(64, 5), reduce_chunk=8)
    assert split_edges(knobs) == (5, 2, 9, 8)
    assert split_edges(replace(knobs, num_splits=1)) == ()
    assert split_edges(replace(knobs, num_splits=128)) == (128, 2, 9, 8)
    problem = make_problem(block_size=64)

    def integers(knobs: CdnaKnobs, *, emulated: bool) -> Case:
        (found,) = (c for c in gate_cases(problem, knobs, emulated=emulated) if c.kind == "integers")  # fmt: skip
        return found

    assert integers(knobs, emulated=False).splits == (5, 2, 9, 8)
    assert integers(knobs, emulated=True).splits == (), "as many as the knobs"
    assert integers(knobs, emulated=True).contexts[-1] == 5 * 64 - 3, "each split has a tile"
    many = replace(knobs, num_splits=100)
    assert integers(many, emulated=True).splits == (9,)
    for emulated in (True, False):
        assert integers(many, emulated=emulated).contexts[-1] == 9 * 64 - 3, "so has a second chunk"
    splits = {c.name: c.splits for c in gate_cases(problem, many, emulated=True)}
    assert splits.pop("random/ragged") == (), "as many as the knobs"
    assert splits.pop("integers/splits") == (9,)
    assert set(splits.values()) == {(2,)}
    windowed = gate_cases(replace(problem, windowed=True), many, emulated=True)
    assert {c.name for c in windowed if not c.splits} == {"random/ragged", "random/long"}
    one_shot = gate_cases(problem, replace(knobs, num_splits=1), emulated=True)
    assert {c.splits for c in one_shot} == {()}


def test_peaks_lie_at_the_ends_of_what_is_seen_and_at_edges_inside() -> None:
    problem, knobs = make_problem(block_size=256), make_knobs(128, 2)
    assert set(peak_edges(problem, knobs, 300, 0)) == {
        0, 299, 127, 128, 255, 256, 63, 64, 7, 8,
    }  # fmt: skip
    assert set(peak_edges(replace(problem, windowed=True), knobs, 300, 100)) == {
        200, 299, 255, 256,
    }  # fmt: skip


def test_affordable_keeps_the_most_telling() -> None:
    problem = make_problem()
    assert affordable((300, 0, 128, 129, 1), problem, 0, 128, 640) == (0, 1, 128, 300)
    assert affordable((300,), problem, 0, 128, 383) == ()


def test_roles_are_names_without_numbers() -> None:
    assert role_of("markers/edges/window128") == "markers/edges"
    assert role_of("random/far_pages") == "random/far_pages"


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
        assert max(entry.case.contexts) <= LONGEST
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
        assert (deep.splits or (knobs.num_splits,)) == (splits,)
        tiles_of_the_last_split = deep.contexts[0] // 64 // splits
        assert tiles_of_the_last_split > RING_PAGES + ring.num_stages - 1
        assert deep.window == 0
    windowed = replace(problem, windowed=True)
    (deep,) = (c for c in gate_cases(windowed, ring, emulated=True) if c.name == "random/deep")
    first = first_seen(deep.contexts[0], windowed, deep.window)
    assert first > 0
    assert (deep.contexts[0] - first) // 64 // 2 > RING_PAGES + ring.num_stages - 1


def test_the_ring_of_pages_is_as_long_as_the_kernels() -> None:
    from patune.kernels.cdna_ring import PAGES_HELD

    assert PAGES_HELD.value == RING_PAGES
