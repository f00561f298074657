"""Where kernels go wrong: the edges of everything that is counted in tokens, from the problem and the knobs themselves, most telling first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patune.tuner.gate.case import first_seen, tiles_walked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem

LONGEST = 3000  # tokens of a context with edges
BEYOND = 5000  # a window larger than every such context


def _in_order(tokens: Iterable[int], low: int, high: int) -> tuple[int, ...]:
    """Each once, within [low, high]."""
    return tuple(t for t in dict.fromkeys(tokens) if low <= t <= high)


def grain_edges(problem: Problem, knobs: Knobs) -> tuple[int, ...]:
    """Multiples of what tokens come in, and their neighbours: tile, page, a warp's share of a tile, a 16-byte vector."""
    tile, page = knobs.partition_tokens, problem.block_size
    grains = (tile, page, 2 * tile, tile // knobs.num_warps, problem.kv_vector, 2 * page)
    return tuple(grain + step for grain in grains for step in (0, 1, -1))


def context_edges(problem: Problem, knobs: Knobs, num_splits: int) -> tuple[int, ...]:
    """Lengths around everything that is counted in tokens: nothing, the query, a tile, a page, the splits."""
    length, tile = problem.query_length, knobs.partition_tokens
    grains = grain_edges(problem, knobs)
    round_ = num_splits * tile  # one token more, and a split gets a second tile
    edges = (
        0, length, 1, length - 1,
        tile, tile + 1, tile + length - 1, tile - 1,
        *grains[3:6],
        round_ + 1, round_, round_ + length - 1, round_ - 1,
        *grains[9:],
        2 * round_ + 1, 2 * round_, *grains[6:9], length + 1,
    )  # fmt: skip
    return _in_order(edges, 0, LONGEST)


def windowed_edges(problem: Problem, knobs: Knobs, num_splits: int, window: int) -> tuple[int, ...]:
    """Lengths of which the window begins or the context ends at an edge."""
    length = problem.query_length
    at_first = window + length - 1  # its earliest query token's window begins at token 0
    grains = grain_edges(problem, knobs)
    starts = tuple(at_first + first for first in (0, 1, *grains))
    ends = (0, length, 1, length - 1, window, *context_edges(problem, knobs, num_splits))
    in_turn = (c for pair in zip(starts, ends, strict=False) for c in pair)
    return _in_order((*in_turn, *starts, *ends), 0, LONGEST)


def window_edges(problem: Problem, knobs: Knobs) -> tuple[int, ...]:
    """Windows of one token, around a tile and a page, across several tiles, and beyond every context; 0 for a problem without."""
    if not problem.windowed:
        return (0,)
    tile, page = knobs.partition_tokens, problem.block_size
    sizes = (1, tile + 3, 128, tile, tile + 1, tile - 1, page, page + 1, page - 1, LONGEST // 2)
    return (*_in_order(sizes, 1, LONGEST // 2), BEYOND)


def peak_edges(problem: Problem, knobs: Knobs, context: int, window: int) -> tuple[int, ...]:
    """Tokens at the ends of what is seen of a context, and at the edges inside."""
    first, tile = first_seen(context, problem, window), knobs.partition_tokens
    round_ = knobs.num_splits * tile
    inside = (tile, problem.block_size, 2 * tile, round_, tile // knobs.num_warps, problem.kv_vector)  # fmt: skip
    edges = (first, context - 1, *(edge - step for edge in inside for step in (0, 1)))
    return _in_order(edges, first, context - 1)


def split_edges(knobs: Knobs) -> tuple[int, ...]:
    """Numbers of splits: the knobs' own, and where the reduce kernel's chunks are full and begin anew. Empty for one split."""
    if knobs.one_shot:
        return ()
    chunk = knobs.reduce_chunk
    return _in_order((knobs.num_splits, 2, chunk + 1, chunk), 2, max(knobs.num_splits, chunk + 1))


def affordable(
    contexts: Sequence[int], problem: Problem, window: int, tile: int, tokens: int
) -> tuple[int, ...]:
    """The contexts that can be walked within ``tokens``, those that come first in preference; ascending."""
    kept = []
    for context in contexts:
        cost = tiles_walked(context, problem, window, tile) * tile
        if cost <= tokens:
            tokens -= cost
            kept.append(context)
    return tuple(sorted(kept))
