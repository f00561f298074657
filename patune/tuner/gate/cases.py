"""Correctness cases of the gate: which lengths, windows, sinks, pages, scales and caps. Their tensors: :mod:`patune.tuner.gate.tensors`."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from patune.kernels.knobs import CdnaKnobs
from patune.kernels.reference import visible_tokens
from patune.problem import Problem

if TYPE_CHECKING:
    from patune.kernels.knobs import Knobs

CaseKind = Literal["markers", "random", "peaked"]
KINDS: tuple[CaseKind, ...] = get_args(CaseKind)

LONGEST_ON_DEVICE = 3000  # tokens
EMULATED_BUDGET = (
    6144  # tokens walked per gate: the emulator takes about 0.03 s per 1024 on one core
)
RING_PAGES = 32  # tiles whose pages the LDS ring looks up at a time (cdna_ring.PAGES_HELD)
DEEP_SPLITS = 2
# Rounds of a split besides num_stages, so that every ring comes round: page numbers of 16 tiles are held, 8 of them ahead of their copy
# (hopper_copy.PAGE_SLOTS, PAGES_AHEAD), which is num_stages - 1 ahead of the products.
DEEP_ROUNDS = 18
# Tokens. Beyond it splits get fewer rounds: num_splits is no constant of the kernels, so fewer splits run the same code.
DEEPEST = 65_536
BEYOND_CONTEXT = 5000  # a window larger than every context with edges
RAGGED_SEQUENCES = 12
SINK_NEGLIGIBLE, SINK_COMPARABLE, SINK_DOMINANT = -20.0, 5.0, 40.0  # against LSEs of 0 to 8
# Caps that matter. Random scores have a standard deviation of CAPPED_SCALE and reach 4 times that; a peak of 32 and more stays one at 18.
CAP_RANDOM, CAP_PEAKED, CAP_MARKERS = 5.0, 20.0, 30.0
CAPPED_SCALE, CAPPED_SINK = 5.0, 20.0
# Powers of two over which the rows of 16-bit queries of fp8 caches are spread: a plain cast to fp16 or fp8 overflows, or goes to zero.
LARGE_ROWS = {"bf16": (-20, 20), "fp16": (-10, 12)}
SMALL_ROWS = {"bf16": (-24, -20), "fp16": (-13, -10)}
QUANTISED_BUDGET = 5 * 256  # emulated tokens more for an fp8 cache: five tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One set of inputs.

    Attributes:
        name: unique in its list; also the seed.
        kind: ``markers``: zero query, so every visible token weighs the same, and values that mark their slot: the output tells which
            tokens a row saw. ``random``: normal data. ``peaked``: one token of each sequence takes nearly all weight.
        contexts: tokens of each sequence.
        kv_heads: KV heads.
        window: sliding window, 0 is none.
        scale_factor: softmax_scale is this over sqrt(head_dim).
        sink: mean of the sink logits, when the problem has sinks.
        shared_pages: full pages are drawn with repetition from a pool of half as many.
        row_scales: an fp8 query has a scale per row, else one.
        query_log2: rows of a 16-bit query are multiplied by powers of two in this range, softmax_scale is divided by the largest.
        rounded_query: with fp8_math, a 16-bit query that the kernel has to round to fp8. In other cases fp8 holds its rows exactly.
        extreme_scales: some scales are 0, 1e-6 or 1e3, and whole sequences have small or large value scales.
        softcap: cap of the scores, 0 is none.
        wide_values: the value cache has one KV head more in memory, so that its strides are not the key's.
        interleaved: key and value are halves of one tensor [pages, 2, ...] when they go by strides.
        far_pages: pages lie so far apart, key and value interleaved, that the offset of the last one in use does not fit 32 bits.
        peaks: the peak token of each sequence, for ``peaked``.
        checks_lse: also compare the LSE.
        repeats: further runs, which must give the same bits.
        most_splits: run with at most that many splits, 0 for as many as the knobs say: their number is no constant of the kernels.
    """

    name: str
    kind: CaseKind
    contexts: tuple[int, ...]
    kv_heads: int = 1
    window: int = 0
    scale_factor: float = 1.0
    sink: float = 0.0
    shared_pages: bool = False
    row_scales: bool = False
    query_log2: tuple[int, int] = (0, 0)
    rounded_query: bool = False
    extreme_scales: bool = False
    softcap: float = 0.0
    wide_values: bool = False
    interleaved: bool = False
    far_pages: bool = False
    peaks: tuple[int, ...] = ()
    checks_lse: bool = False
    repeats: int = 0
    most_splits: int = 0

    @property
    def seed(self) -> int:
        """The same for the same name, on every machine."""
        return zlib.crc32(self.name.encode())


def gate_cases(problem: Problem, knobs: Knobs, *, emulated: bool) -> list[Case]:
    """The cases that knobs have to pass for a problem, cheapest first."""
    if emulated:
        cases = _emulated_cases(problem, knobs.partition_tokens) + _ring_cases(problem, knobs)
    else:
        cases = _device_cases(problem, knobs)
    cases += _quantised_cases(problem, knobs.partition_tokens, emulated=emulated)
    if problem.softcap:
        cases = [_capped(c) for c in cases]
    if problem.kv_layout == "nhd":  # one KV head has the same strides as hnd
        cases = [replace(c, kv_heads=max(2, c.kv_heads)) for c in cases]

    def cost(case: Case) -> tuple[bool, bool, int, int]:
        """Powers of two: among cases of about one cost, those that name the tokens come first. Far pages take a buffer of gigabytes.

        A deep sequence names no tokens, so it comes after all that do.
        """
        walked = walked_tokens(case, problem, knobs.partition_tokens)
        deep = max(case.contexts) > LONGEST_ON_DEVICE
        return case.far_pages, deep, walked.bit_length(), KINDS.index(case.kind)

    return sorted(cases, key=cost)


def walked_tokens(case: Case, problem: Problem, tile: int) -> int:
    """Tokens of all tiles that a case walks, over sequences, KV heads and runs: what the emulator's time goes with."""
    tiles = 0
    for context in case.contexts:
        first = first_seen(context, problem, case.window)
        tiles += -(-context // tile) - first // tile
    return tiles * tile * case.kv_heads * (1 + case.repeats)


def first_seen(context: int, problem: Problem, window: int) -> int:
    """Earliest token of a sequence that any of its query tokens sees."""
    return visible_tokens(context, 0, problem.query_length, window)[0]


def _edge_contexts(problem: Problem, knobs: Knobs, window: int) -> tuple[int, ...]:
    """Lengths around everything that is counted in tokens: nothing, the query, a tile, a page, the splits, the window."""
    length, page, tile = problem.query_length, problem.block_size, knobs.partition_tokens
    splits = knobs.num_splits * tile  # one token more, and a split gets a second tile
    edges = {0, 1, length - 1, length, tile + length - 1, 2 * splits, 2 * splits + 1}
    for edge in (tile, page, splits, window):
        edges |= {edge - 1, edge, edge + 1}
    return tuple(sorted(c for c in edges if 0 <= c <= LONGEST_ON_DEVICE))


def _ragged_contexts(name: str, count: int, low: int, high: int) -> tuple[int, ...]:
    rng = random.Random(name)
    return tuple(rng.randint(low, high) for _ in range(count))


def _peaked_case(problem: Problem, tile: int, window: int) -> Case:
    """A sequence for each visible token at an end of the visible range, a tile's or a page's edge."""
    pairs = []
    for context in (2 * tile + 1, 1100):
        first = first_seen(context, problem, window)
        tokens = {first, context - 1}
        tokens |= {e - step for e in (tile, 2 * tile, problem.block_size) for step in (0, 1)}
        pairs += [(context, token) for token in sorted(tokens) if first <= token < context]
    return Case(
        name=f"peaked/edges/window{window}",
        kind="peaked",
        contexts=tuple(context for context, _ in pairs),
        peaks=tuple(token for _, token in pairs),
        window=window,
        kv_heads=2,
        sink=SINK_DOMINANT,
        repeats=1,
    )


def _deep_case(problem: Problem, knobs: Knobs) -> Case:
    """One long sequence: every split walks more tiles than it has in flight and looked up."""
    rounds = knobs.num_stages + DEEP_ROUNDS
    walked = min(knobs.num_splits * knobs.partition_tokens * rounds, DEEPEST)
    walked = max(walked, LONGEST_ON_DEVICE)
    context = walked + knobs.partition_tokens + 3
    return Case(
        name="random/deep", kind="random", contexts=(context,), window=walked if problem.windowed else 0
    )  # fmt: skip


def _device_cases(problem: Problem, knobs: Knobs) -> list[Case]:
    """The wide list: all edges, up to 4 KV heads (3 of them once: no power of two), contexts to 3000 and a deep one, most run twice."""
    tile, length = knobs.partition_tokens, problem.query_length
    ragged = _ragged_contexts("ragged", RAGGED_SEQUENCES, length, LONGEST_ON_DEVICE)
    windows = (1, 128, tile + 3, BEYOND_CONTEXT) if problem.windowed else (0,)
    # the long window spans several tiles of a split, so that its online softmax rescales
    narrow, wide, long = (128, tile + 3, LONGEST_ON_DEVICE // 2) if problem.windowed else (0, 0, 0)
    markers = [
        Case(name=f"markers/edges/window{window}", kind="markers", window=window, kv_heads=2, repeats=1,
             contexts=_edge_contexts(problem, knobs, window))
        for window in windows
    ]  # fmt: skip
    return [
        *markers,
        Case(name=f"markers/ragged/window{wide}", kind="markers", contexts=ragged, kv_heads=2,
             window=wide, shared_pages=True, repeats=1),
        Case(name=f"random/edges/window{narrow}", kind="random", kv_heads=4, window=narrow, sink=SINK_COMPARABLE,
             contexts=_edge_contexts(problem, knobs, narrow), checks_lse=True, repeats=1,
             interleaved=True),
        Case(name=f"random/ragged/window{long}", kind="random", contexts=ragged, kv_heads=3, window=long,
             scale_factor=1.5, sink=SINK_NEGLIGIBLE, shared_pages=True, row_scales=True, wide_values=True, repeats=1),
        Case(name=f"random/far/window{narrow}", kind="random", contexts=(tile + 1, 1100), window=narrow,
             far_pages=True),
        _peaked_case(problem, tile, narrow),
        _deep_case(problem, knobs),
    ]  # fmt: skip


def _quantised_cases(problem: Problem, tile: int, *, emulated: bool) -> list[Case]:
    """What only an fp8 cache can get wrong: extreme scales, and a 16-bit query's way to fp16 or fp8."""
    if not problem.kv_dtype.startswith("fp8"):
        return []
    length = problem.query_length
    window = 128 if problem.windowed else 0
    mixed = (tile,) if emulated else (1, tile + length, 300)
    cases = []
    if problem.kv_quant != "none":
        scaled = (20, tile) if emulated else (1, 20, 2 * tile + 1, 40, 300, 1100, length, 70, 700)
        cases = [Case(name="random/extreme_scales", kind="random", contexts=scaled, window=window,
                      row_scales=True, extreme_scales=True, checks_lse=True)]  # fmt: skip
    if problem.query_dtype in LARGE_ROWS:
        cases += [
            Case(name=f"random/{name}_rows", kind="random", contexts=mixed, window=window, scale_factor=2.0,
                 query_log2=rows[problem.query_dtype])
            for name, rows in (("large", LARGE_ROWS), ("small", SMALL_ROWS))
        ]  # fmt: skip
        if problem.fp8_math:
            cases += [Case(name="random/rounded_query", kind="random", contexts=mixed, window=window,
                           scale_factor=0.5, rounded_query=True)]  # fmt: skip
    return cases


def _capped(case: Case) -> Case:
    """The case with a cap that changes its weights, its LSE, or (markers) nothing."""
    if case.kind == "markers":
        return replace(case, softcap=CAP_MARKERS)
    if case.kind == "peaked":
        return replace(case, softcap=CAP_PEAKED, sink=CAPPED_SINK, checks_lse=True)
    # rounding the query to fp8 moves a score by 2.6 % of its spread, which larger scores would turn into more than the tolerance
    factor = case.scale_factor * (1.0 if case.rounded_query else CAPPED_SCALE)
    return replace(case, softcap=CAP_RANDOM, scale_factor=factor, checks_lse=not case.rounded_query)


def _emulated_cases(problem: Problem, tile: int) -> list[Case]:
    """The same kinds within EMULATED_BUDGET: the edges of one tile, contexts at page 1024's edge, one case repeated."""
    length = problem.query_length
    if problem.windowed:
        several_tiles = tile + 1 if tile == 256 else 700  # more would be over the budget
        return [
            Case(name="markers/window1", kind="markers", window=1,
                 contexts=tuple(sorted({0, length - 1, length, tile + 1, 1025}))),
            Case(name="markers/crossing", kind="markers", contexts=(tile + 3, tile + 4, 1100), window=tile + 3),
            Case(name="random/window128", kind="random", contexts=(129, 1024), window=128, kv_heads=2,
                 sink=SINK_COMPARABLE, checks_lse=True),
            Case(name="random/crossing", kind="random", contexts=(1100,), window=tile + 3, scale_factor=1.5,
                 shared_pages=True, row_scales=True),
            Case(name="random/beyond", kind="random", contexts=(several_tiles,), window=BEYOND_CONTEXT,
                 sink=SINK_NEGLIGIBLE, shared_pages=True),
            Case(name="peaked/window128", kind="peaked", contexts=(1088,), peaks=(960,), window=128,
                 sink=SINK_DOMINANT, repeats=1),
        ]  # fmt: skip
    around = (
        (1, tile - 1, tile, tile + 1)
        if length == 1
        else (length - 1, length, tile, tile + length - 1)
    )
    page_edge = (1024,) if tile == 256 else (1024, 1025)  # both would be over the budget
    return [
        Case(name="markers/edges", kind="markers", contexts=(0, *around)),
        Case(name="markers/long", kind="markers", contexts=(1100,)),
        Case(name="random/heads", kind="random", contexts=(tile + 1,), kv_heads=2, sink=SINK_COMPARABLE,
             checks_lse=True),
        Case(name="random/pages", kind="random", contexts=page_edge, scale_factor=1.5, sink=SINK_NEGLIGIBLE,
             shared_pages=True, row_scales=True),
        Case(name="peaked/tile", kind="peaked", contexts=(tile + length,), peaks=(tile,), sink=SINK_DOMINANT,
             repeats=1),
    ]  # fmt: skip


def _ring_cases(problem: Problem, knobs: Knobs) -> list[Case]:
    """A sequence long enough that a split looks up pages a second time, beyond the budget."""
    if not isinstance(knobs, CdnaKnobs) or not knobs.lds_ring:
        return []
    tiles = (RING_PAGES + knobs.num_stages + 1) * min(knobs.num_splits, DEEP_SPLITS)
    context = tiles * knobs.partition_tokens + 3
    return [
        Case(name="random/deep", kind="random", contexts=(context,), window=context - 1 if problem.windowed else 0,
             shared_pages=True, most_splits=DEEP_SPLITS)
    ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedCase:
    """A case of the seed kernel's own test plan, with the problem and the partition that it is for."""

    problem: Problem
    partition_tokens: int
    case: Case


def seed_plan_cases(*, longest: int = LONGEST_ON_DEVICE) -> list[SeedCase]:
    """The seed's test plan: page 1024, partition 256, ragged contexts up to ``longest``, 4-D values, window 0 and 128, batch 1 and 128,
    1 and 4 query tokens; then page 16 with the same harness as a spot check.
    """
    shapes = [(1024, batch, length) for batch in (1, 128) for length in (1, 4)] + [(16, 3, 1)]
    plan = []
    for page, batch, length in shapes:
        for window in (0, 128):
            name = f"seed/page{page}/batch{batch}/length{length}/window{window}"
            low = length if batch > 1 else longest // 2
            problem = Problem(
                block_size=page, head_dim=128, qg=8, query_length=length, windowed=window > 0
            )
            case = Case(
                name=name,
                kind="random",
                contexts=_ragged_contexts(name, batch, low, longest),
                kv_heads=1 if batch == 1 else 2,
                window=window,
                repeats=1,
            )
            plan.append(SeedCase(problem=problem, partition_tokens=256, case=case))
    return plan
