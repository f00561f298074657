"""Correctness cases of the gate: which lengths, windows, sinks and pages, and the poisoned tensors that carry them.

Every slot that no query token sees is NaN, every page that no sequence owns is NaN, and every block-table entry that is not needed is 2^30:
whatever a kernel reads beyond its right shows.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from patune.kernels.caches import to_layout
from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs
from patune.kernels.reference import visible_tokens
from patune.problem import Problem

if TYPE_CHECKING:
    from patune.kernels.knobs import Knobs

CaseKind = Literal["markers", "random", "peaked"]
KINDS: tuple[CaseKind, ...] = get_args(CaseKind)

UNUSED_ENTRY = 1 << 30  # no cache has so many pages: following it is an illegal access
LONGEST_ON_DEVICE = 3000  # tokens
EMULATED_BUDGET = (
    6144  # tokens walked per gate: the emulator takes about 0.1 s per 1024 on one core
)
BEYOND_CONTEXT = 5000  # a window larger than every context of a gate
RAGGED_SEQUENCES = 12
PEAK = 4.0  # the peak token's score is PEAK * sqrt(head_dim): e^32 over the others at head_dim 64
INT32_ELEMENTS = 1 << 31  # an element offset of this size no longer fits a signed 32-bit integer
SINK_NEGLIGIBLE, SINK_COMPARABLE, SINK_DOMINANT = -20.0, 5.0, 40.0  # against LSEs of 0 to 8


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
        far_pages: pages lie so far apart, key and value interleaved, that the offset of the last one in use does not fit 32 bits.
        peaks: the peak token of each sequence, for ``peaked``.
        checks_lse: also compare the LSE.
        repeats: further runs, which must give the same bits.
    """

    name: str
    kind: CaseKind
    contexts: tuple[int, ...]
    kv_heads: int = 1
    window: int = 0
    scale_factor: float = 1.0
    sink: float = 0.0
    shared_pages: bool = False
    far_pages: bool = False
    peaks: tuple[int, ...] = ()
    checks_lse: bool = False
    repeats: int = 0

    @property
    def seed(self) -> int:
        """The same for the same name, on every machine."""
        return zlib.crc32(self.name.encode())


def gate_cases(problem: Problem, knobs: Knobs, *, emulated: bool) -> list[Case]:
    """The cases that knobs have to pass for a problem, cheapest first."""
    if emulated:
        cases = _emulated_cases(problem, knobs.partition_tokens)
    else:
        cases = _device_cases(problem, knobs)
    if problem.kv_layout == "nhd":  # one KV head has the same strides as hnd
        cases = [replace(c, kv_heads=max(2, c.kv_heads)) for c in cases]

    def cost(case: Case) -> tuple[bool, int, int]:
        """Powers of two: among cases of about one cost, those that name the tokens come first. Far pages take a buffer of gigabytes."""
        walked = walked_tokens(case, problem, knobs.partition_tokens)
        return case.far_pages, walked.bit_length(), KINDS.index(case.kind)

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


def _device_cases(problem: Problem, knobs: Knobs) -> list[Case]:
    """The wide list: all edges, up to 4 KV heads (3 of them once: no power of two), contexts to 3000, everything run twice."""
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
             contexts=_edge_contexts(problem, knobs, narrow), checks_lse=True, repeats=1),
        Case(name=f"random/ragged/window{long}", kind="random", contexts=ragged, kv_heads=3, window=long,
             scale_factor=1.5, sink=SINK_NEGLIGIBLE, shared_pages=True, repeats=1),
        Case(name=f"random/far/window{narrow}", kind="random", contexts=(tile + 1, 1100), window=narrow,
             far_pages=True),
        _peaked_case(problem, tile, narrow),
    ]  # fmt: skip


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
                 shared_pages=True),
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
             shared_pages=True),
        Case(name="peaked/tile", kind="peaked", contexts=(tile + length,), peaks=(tile,), sink=SINK_DOMINANT,
             repeats=1),
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


def build_inputs(case: Case, problem: Problem, device: torch.device) -> DecodeInputs:
    """The poisoned tensors of a case; the same on every call."""
    generator = torch.Generator(device).manual_seed(case.seed)
    table, used = _pages_of(case, problem, device)
    slots = used.nonzero()  # [used slots, (page, slot)]
    rows = len(case.contexts) * problem.query_length
    heads, head_dim = case.kv_heads * problem.qg, problem.head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def cache(used_values: torch.Tensor, *, is_value: bool) -> torch.Tensor:
        logical = torch.full((*used.shape, case.kv_heads, head_dim), torch.nan, device=device)
        logical[slots[:, 0], slots[:, 1]] = used_values
        stored = logical.to(TORCH_DTYPES[problem.kv_dtype])
        return to_layout(stored, problem.kv_layout, is_value=is_value)

    query, keys = normal(rows, heads, head_dim), normal(len(slots), case.kv_heads, head_dim)
    values = normal(len(slots), case.kv_heads, head_dim)
    if case.kind == "markers":
        query = torch.zeros_like(query)
        values = _markers(slots[:, 0] * problem.block_size + slots[:, 1], case.kv_heads, head_dim)
    elif case.kind == "peaked":
        direction = normal(head_dim).sign()
        query = direction + 0.25 * query
        keys[_peak_slots(case, problem, table, slots)] = PEAK * direction
    key_cache, value_cache = cache(keys, is_value=False), cache(values, is_value=True)
    if case.far_pages:
        key_cache, value_cache = _spread(key_cache, value_cache)
    sinks = case.sink + 0.5 * normal(heads)
    fused = torch.nn.functional.pad(
        query, (0, 0, 0, 2 * case.kv_heads), value=torch.nan
    )  # as q of a q|k|v tensor
    return DecodeInputs(
        query=fused.to(TORCH_DTYPES[problem.query_dtype])[:, :heads],
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=table,
        context_lengths=torch.tensor(case.contexts, dtype=torch.int32, device=device),
        softmax_scale=case.scale_factor * head_dim**-0.5,
        query_length=problem.query_length,
        sliding_window=case.window,
        sinks=sinks.to(torch.bfloat16) if problem.sinks else None,
        **_scales(case, problem, used, generator),
    )


def _spread(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both caches in one buffer, with a page stride that puts the last page but one beyond 32-bit offsets. The gaps are never touched."""
    pages, page_elements = key.shape[0], key[0].numel()
    stride = 16 * -(-INT32_ELEMENTS // (16 * (pages - 2)))
    buffer = torch.empty(
        (pages - 1) * stride + 2 * page_elements, dtype=key.dtype, device=key.device
    )
    far_key, far_value = (
        buffer.as_strided(near.shape, (stride, *near.stride()[1:]), offset).copy_(near)
        for near, offset in ((key, 0), (value, page_elements))
    )
    return far_key, far_value


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
    prime = {32: 31, 64: 61}[half]
    ids = slot_ids[:, None] + 13 * torch.arange(kv_heads, device=slot_ids.device)
    channels = torch.stack((ids % half, half + ids // half % prime), dim=-1)
    return torch.zeros(*ids.shape, head_dim, device=ids.device).scatter_(-1, channels, 1.0)


def _peak_slots(
    case: Case, problem: Problem, table: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Row of ``slots`` that holds each sequence's peak token."""
    block = problem.block_size
    wanted = [int(table[b, t // block]) * block + t % block for b, t in enumerate(case.peaks)]
    return torch.searchsorted(slots[:, 0] * block + slots[:, 1], torch.tensor(wanted).to(slots))


def _scales(
    case: Case, problem: Problem, used: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The scales that the problem has: off 1, but 1 for markers, whose sums stay exact; NaN where no token is seen."""
    device, scales = used.device, {}
    if problem.query_dtype.startswith("fp8"):
        scales["query_scale"] = torch.tensor([0.75], device=device)
    if problem.kv_quant == "none":
        return scales
    for name in ("key_scale", "value_scale"):
        shape = (1,) if problem.kv_quant == "per_tensor" else (*used.shape, case.kv_heads, 1)
        scale = 0.5 + torch.rand(shape, generator=generator, device=device)
        if case.kind == "markers":
            scale = torch.ones_like(scale)
        if problem.kv_quant == "per_token":
            scale = to_layout(
                torch.where(used[:, :, None, None], scale, torch.nan), "hnd", is_value=False
            )
        scales[name] = scale
    return scales
