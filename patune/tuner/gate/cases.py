"""The cases that knobs have to pass for a problem, generated from the edges of both, cheapest first.

One list for all targets. A device runs it whole; in the emulator, where a token costs 30 microseconds and a workgroup without tiles half a
millisecond, each case walks no more than its budget, what a list has several times (windows, ragged batches) it has once or twice, and
only those cases run with all splits that are there for them: their number is no constant of the kernels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patune.kernels.knobs import CdnaKnobs
from patune.tuner.gate.case import KINDS, Case, tiles_walked, walked_tokens
from patune.tuner.gate.edges import (
    BEYOND,
    LONGEST,
    affordable,
    context_edges,
    peak_edges,
    split_edges,
    window_edges,
    windowed_edges,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem

RING_PAGES = 32  # tiles whose pages the LDS ring looks up at a time (cdna_ring.PAGES_HELD)
# Rounds of a split besides num_stages, so that every ring comes round: page numbers of 16 tiles are held, 8 of them ahead of their copy
# (hopper_copy.PAGE_SLOTS, PAGES_AHEAD), which is num_stages - 1 ahead of the products.
DEEP_ROUNDS = 18
# Tokens. Beyond it splits get fewer rounds: num_splits is no constant of the kernels, so fewer splits run the same code.
DEEPEST = 65_536
TAIL = 2900  # tokens
RAGGED_SEQUENCES = 12
FAR_HEADS = 3  # the third is the first whose offset can leave 32 bits while the stride does not
SINK_NEGLIGIBLE, SINK_COMPARABLE, SINK_DOMINANT = -20.0, 5.0, 40.0  # against LSEs of 0 to 8
OFFSET = 400.0  # of scores, natural log: exp() of them is beyond float32 both ways, peaks of up to 256 included
# Caps that matter. Random scores have a standard deviation of CAPPED_SCALE and reach 4 times that; a peak of 128 and more stays one at 20.
CAP_RANDOM, CAP_PEAKED, CAP_FLAT = 5.0, 20.0, 30.0
CAPPED_SCALE, CAPPED_SINK = 5.0, 20.0
# Powers of two over which the rows of 16-bit queries of fp8 caches are spread: a plain cast to fp16 or fp8 overflows, or goes to zero.
LARGE_ROWS = {"bf16": (-20, 20), "fp16": (-10, 12)}
SMALL_ROWS = {"bf16": (-24, -20), "fp16": (-13, -10)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much a gate walks.

    Attributes:
        edges, integers, peaked: tokens that cases of that kind may walk, over KV heads and runs.
        windows: window sizes of the exact-set cases, as many of the most telling as this.
        most_splits: of cases that are not there for them; 0 is as many as the knobs have.
        repeats: further runs of most cases; 0 in the emulator, where one case is run twice.
        heads: KV heads of cases that are not there for them.
    """

    edges: int
    integers: int
    peaked: int
    windows: int
    most_splits: int
    repeats: int
    heads: int

    @property
    def wide(self) -> bool:
        """The whole list, as a device runs it."""
        return self.repeats > 0

    def splits(self, knobs: Knobs) -> tuple[int, ...]:
        """Numbers of splits of a case that is not there for them."""
        most = self.most_splits
        return (most,) if 0 < most < knobs.num_splits else ()


UNBOUNDED = 1 << 60
DEVICE_REPEATS = 2
DEVICE = Scale(
    edges=UNBOUNDED, integers=UNBOUNDED, peaked=UNBOUNDED, windows=64, most_splits=0, repeats=DEVICE_REPEATS, heads=2
)  # fmt: skip
EMULATED = Scale(
    edges=4096, integers=3072, peaked=3072, windows=2, most_splits=2, repeats=0, heads=1
)  # fmt: skip
# the emulated cases that are there for them
ALL_SPLITS = ("random/ragged", "random/long", "integers/splits")
MOST_WORKGROUPS = 48  # of the emulated case that runs with all splits
WIDE_HEADS = 128  # channels beyond which the emulator's budgets shrink, as its instructions grow


def gate_cases(problem: Problem, knobs: Knobs, *, emulated: bool) -> list[Case]:
    """The cases that knobs have to pass for a problem, cheapest first."""
    scale = EMULATED if emulated else DEVICE
    if problem.kv_layout == "nhd":  # one KV head has the same strides as hnd
        scale = replace(scale, heads=2)
    if emulated and problem.head_dim > WIDE_HEADS:
        scale = replace(scale, edges=scale.edges // 2, integers=scale.integers // 2, peaked=scale.peaked // 2)  # fmt: skip
    if emulated and isinstance(knobs, CdnaKnobs) and knobs.lds_ring:  # its deep case costs as much
        scale = replace(scale, edges=scale.edges // 2)
    cases = [
        *_marker_cases(problem, knobs, scale),
        *_integer_cases(problem, knobs, scale),
        _peaked_case(problem, knobs, scale),
        *([_tail_case(problem, knobs)] if scale.wide or problem.fp8_math else []),
        *(_emulated_random if emulated else _device_random)(problem, knobs),
        *_deep_cases(problem, knobs, scale),
        *_quantised_cases(problem, knobs, emulated=emulated),
    ]
    if problem.softcap:
        cases = [_capped(c) for c in cases]
    cases = [replace(c, kv_heads=max(scale.heads, c.kv_heads)) for c in cases]
    if scale.splits(knobs):
        few = {c.name: c.splits or scale.splits(knobs) for c in cases if c.name not in ALL_SPLITS}
        cases = [replace(c, splits=few.get(c.name, c.splits)) for c in cases]

    def cost(case: Case) -> tuple[bool, bool, int, int]:
        """Powers of two: among cases of about one cost, those that name the tokens come first. Far caches take gigabytes of a device,
        and what they alone show is of no use before the rest is right.

        A deep sequence names no tokens, so it comes after all that do.
        """
        walked = walked_tokens(case, problem, knobs.partition_tokens)
        deep = max(case.contexts) > LONGEST
        return bool(case.far), deep, walked.bit_length(), KINDS.index(case.kind)

    return sorted(cases, key=cost)


def _ragged(name: str, count: int, low: int, high: int) -> tuple[int, ...]:
    rng = random.Random(name)
    return tuple(rng.randint(low, high) for _ in range(count))


def _marker_cases(problem: Problem, knobs: Knobs, scale: Scale) -> list[Case]:
    """Exact sets: contexts and windows at every edge; on a device a ragged batch with repeated pages too."""
    tile = knobs.partition_tokens
    num_splits = (*scale.splits(knobs), knobs.num_splits)[0]
    cases = []
    windows = window_edges(problem, knobs)[: scale.windows]
    for window in windows:
        edges = context_edges(problem, knobs, num_splits)
        if window:
            edges = windowed_edges(problem, knobs, num_splits, window)
        cases.append(
            Case(name=f"markers/edges/window{window}", kind="markers", window=window, repeats=scale.repeats,
                 contexts=affordable(edges, problem, window, tile, scale.edges // len(windows) // scale.heads))
        )  # fmt: skip
    if scale.wide:
        window = tile + 3 if problem.windowed else 0
        cases.append(
            Case(name="markers/ragged", kind="markers", window=window, shared_pages=True, repeats=scale.repeats,
                 contexts=_ragged("ragged", RAGGED_SEQUENCES, problem.query_length, LONGEST))
        )  # fmt: skip
    return cases


def _integer_cases(problem: Problem, knobs: Knobs, scale: Scale) -> list[Case]:
    """Exact sums, with several numbers of splits. Not for fp8 products: sm_90 sums them with 14 bits (markers stay within those)."""
    if problem.fp8_math:
        return []
    tile, length = knobs.partition_tokens, problem.query_length
    splits = split_edges(knobs)
    most = min(knobs.num_splits, knobs.reduce_chunk + 1)
    if scale.most_splits and most < knobs.num_splits:
        splits = (most,)
    elif scale.most_splits:
        splits = ()
    window = max(BEYOND, (most + 1) * tile) if problem.windowed else 0
    lengths: Sequence[int] = (tile + 1 + length, length, 2 * tile - 1, 3 * tile + 5, 7 * tile + 9, 0)  # fmt: skip
    if scale.most_splits:
        lengths = lengths[: max(1, MOST_WORKGROUPS // most)]
    runs = max(1, len(splits)) + scale.repeats
    tokens = scale.integers // runs // scale.heads
    contexts = affordable(lengths, problem, window, tile, max(tokens, 2 * tile))
    if most > 1:
        # whatever it costs: each split has a tile, and the last token, whose score is the highest, is the last split's: where there is a
        # second chunk, what the first one left has to be rescaled
        contexts = (*contexts, most * tile - 3)
    return [
        Case(name="integers/splits", kind="integers", contexts=contexts, window=window,
             splits=splits, checks_lse=True, repeats=scale.repeats)
    ]  # fmt: skip


def _peaked_case(problem: Problem, knobs: Knobs, scale: Scale) -> Case:
    """A sequence for each visible token at an end of the visible range, or at an edge inside."""
    tile = knobs.partition_tokens
    window = tile + 3 if problem.windowed else 0
    lengths = [2 * tile + 1, 1100, min(knobs.num_splits * tile + 1, LONGEST)]
    if not scale.wide:
        lengths = [1088 if problem.windowed else tile + problem.query_length]
    runs = 2
    pairs, tokens = [], scale.peaked // (runs * scale.heads)
    for context in dict.fromkeys(lengths):
        for peak in peak_edges(problem, knobs, context, window):
            cost = tiles_walked(context, problem, window, tile) * tile
            if cost <= tokens:
                tokens -= cost
                pairs.append((context, peak))
    return Case(
        name="peaked/edges",
        kind="peaked",
        contexts=tuple(context for context, _ in pairs),
        peaks=tuple(peak for _, peak in pairs),
        window=window,
        sink=SINK_DOMINANT,
        # sm_90 sums fp8 products with 14 bits: of an offset that is 4 % of a probability
        offset=0.0 if problem.fp8_math else OFFSET,
        checks_lse=not problem.fp8_math,
        repeats=runs - 1,
    )


def _tail_case(problem: Problem, knobs: Knobs) -> Case:
    """Most of the weight on 2900 tokens of 2^-10.6 of the peak's each: an fp8 probability of at most 1 is 0 below 2^-10.

    A warp or a split that has not seen the peak has a maximum of its own, among the tail: with two splits enough of the tail meets the peak.
    """
    return Case(
        name="peaked/tail",
        kind="peaked",
        contexts=(TAIL,),
        peaks=(TAIL // 3,),
        tail=True,
        window=BEYOND if problem.windowed else 0,
        splits=(2,) if knobs.num_splits > 2 else (),
        sink=SINK_NEGLIGIBLE,
        checks_lse=not problem.fp8_math,
    )


def _device_random(problem: Problem, knobs: Knobs) -> list[Case]:
    """Random data over all edges, over a ragged batch of 3 KV heads (no power of two), and far apart in memory."""
    tile = knobs.partition_tokens
    # the long window spans several tiles of a split, so that its online softmax rescales
    narrow, long = (128, LONGEST // 2) if problem.windowed else (0, 0)
    edges = context_edges(problem, knobs, knobs.num_splits)
    if problem.windowed:
        edges = windowed_edges(problem, knobs, knobs.num_splits, narrow)
    ragged = _ragged("ragged", RAGGED_SEQUENCES, problem.query_length, LONGEST)
    return [
        Case(name="random/edges", kind="random", contexts=tuple(sorted(edges)), kv_heads=4, window=narrow,
             sink=SINK_COMPARABLE, checks_lse=True, repeats=DEVICE_REPEATS, interleaved=True),
        Case(name="random/ragged", kind="random", contexts=ragged, kv_heads=3, window=long, scale_factor=1.5,
             sink=SINK_NEGLIGIBLE, shared_pages=True, row_scales=True, wide_values=True, repeats=DEVICE_REPEATS, regrouped=True),
        *_far_cases(problem, (tile + 1, 1100), narrow),
    ]  # fmt: skip


def _emulated_random(problem: Problem, knobs: Knobs) -> list[Case]:
    """The same within a budget."""
    tile = knobs.partition_tokens
    narrow, wide = (128, tile + 3) if problem.windowed else (0, 0)
    edges = (20, 1024) if problem.windowed else (20, tile + 1)
    cases = [
        Case(name="random/edges", kind="random", contexts=edges, kv_heads=2, window=narrow, sink=SINK_COMPARABLE,
             checks_lse=True, row_scales=True, wide_values=True, regrouped=True),
        Case(name="random/ragged", kind="random", contexts=(1100,), window=wide, scale_factor=1.5,
             sink=SINK_NEGLIGIBLE, shared_pages=True, interleaved=True),
        *_far_cases(problem, (tile,), narrow),
    ]  # fmt: skip
    if problem.windowed:  # several tiles of a split, so that its online softmax rescales
        cases.append(
            Case(name="random/long", kind="random", contexts=(max(700, 2 * tile + 1),), window=BEYOND,
                 sink=SINK_NEGLIGIBLE, shared_pages=True)
        )  # fmt: skip
    return cases


def _far_cases(problem: Problem, contexts: tuple[int, ...], window: int) -> list[Case]:
    """Offsets beyond 32 bits: of pages, of KV heads (those of an NHD page lie side by side by definition), of query rows."""
    pages = Case(name="random/far_pages", kind="random", contexts=contexts, window=window, far="pages")  # fmt: skip
    heads = replace(pages, name="random/far_heads", kv_heads=FAR_HEADS, far="heads")
    few = (20, problem.query_length, 40)
    rows = replace(pages, name="random/far_rows", contexts=few, far="rows")
    return [pages, rows] if problem.kv_layout == "nhd" else [pages, heads, rows]


def _ring_rounds(knobs: Knobs) -> int:
    """Tiles of a split after which every ring has come round; 0 where registers hold what comes next."""
    if isinstance(knobs, CdnaKnobs):
        return RING_PAGES + knobs.num_stages + 2 if knobs.lds_ring else 0
    return knobs.num_stages + DEEP_ROUNDS


def _deep_cases(problem: Problem, knobs: Knobs, scale: Scale) -> list[Case]:
    """One sequence so long that every split walks more tiles than it has in flight and looked up."""
    rounds = _ring_rounds(knobs)
    if not rounds:
        return []
    walked = (*scale.splits(knobs), knobs.num_splits)[0] * knobs.partition_tokens * rounds
    if scale.wide:
        walked = max(min(walked, DEEPEST), LONGEST)
    context = walked + knobs.partition_tokens + 3
    return [
        Case(name="random/deep", kind="random", contexts=(context,), window=walked if problem.windowed else 0,
             shared_pages=not scale.wide, repeats=scale.repeats)
    ]  # fmt: skip


def _quantised_cases(problem: Problem, knobs: Knobs, *, emulated: bool) -> list[Case]:
    """What only an fp8 cache can get wrong: extreme scales, and a 16-bit query's way to fp16 or fp8."""
    if not problem.kv_dtype.startswith("fp8"):
        return []
    tile, length = knobs.partition_tokens, problem.query_length
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
                           scale_factor=0.25, rounded_query=True)]  # fmt: skip
    return cases


def _capped(case: Case) -> Case:
    """The case with a cap that changes its weights, its LSE, or (flat scores) nothing."""
    if case.kind in ("markers", "integers"):
        return replace(case, softcap=CAP_FLAT)
    if case.tail:
        return replace(case, softcap=CAP_PEAKED)
    if case.kind == "peaked":
        return replace(case, softcap=CAP_PEAKED, sink=CAPPED_SINK, offset=0.0)
    # rounding the query to fp8 moves a score by 2.6 % of its spread, which larger scores would turn into more than the tolerance
    factor = case.scale_factor * (1.0 if case.rounded_query else CAPPED_SCALE)
    return replace(case, softcap=CAP_RANDOM, scale_factor=factor, checks_lse=not case.rounded_query)
