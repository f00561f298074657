"""One case of the gate as a value: which lengths, windows, sinks, pages, scales and caps. Its tensors: :mod:`patune.tuner.gate.tensors`."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from patune.kernels.reference import visible_tokens

if TYPE_CHECKING:
    from patune.problem import Problem

CaseKind = Literal["markers", "integers", "peaked", "random"]
Far = Literal["", "pages", "heads", "rows"]
KINDS: tuple[CaseKind, ...] = get_args(CaseKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One set of inputs, and how often and in what variations it is run.

    Attributes:
        name: ``role``, or ``role/parameter`` where a list has the role several times; unique in its list, and the seed.
        kind: ``markers``: zero query, so every visible token weighs the same, and values that mark their slot: the output tells which
            tokens a row saw. ``integers``: small integers whose scores, weights and sums are exact in the compute type, so the output is
            the exact result rounded once. ``peaked``: one token of each sequence takes nearly all weight. ``random``: normal data.
        contexts: tokens of each sequence.
        kv_heads: KV heads.
        window: sliding window, 0 is none.
        scale_factor: softmax_scale is this over sqrt(head_dim); ``integers`` have a scale of their own.
        sink: mean of the sink logits, when the problem has sinks; ``integers`` have sinks of 0.
        offset: added to all scores of even sequences and taken from those of odd ones, in units of the natural log: who does not subtract
            the maximum overflows, who starts from a maximum of 0 underflows.
        shared_pages: full pages are drawn with repetition from a pool of half as many.
        row_scales: an fp8 query has a scale per row, else one.
        query_log2: rows of a 16-bit query are multiplied by powers of two in this range, softmax_scale is divided by the largest.
        rounded_query: with fp8_math, a 16-bit query that the kernel has to round to fp8. In other cases fp8 holds its rows exactly.
        extreme_scales: some scales are 0, 1e-6 or 1e3, and whole sequences have small or large value scales.
        softcap: cap of the scores, 0 is none.
        wide_values: the value cache has gaps between its KV heads, so that none of its outer strides are the key's.
        interleaved: key and value are halves of one tensor [pages, 2, ...] when they go by strides.
        far: ``pages`` of the caches and of scales per token, or ``heads`` of the caches, key and value interleaved, or ``rows`` of the
            query lie so far apart that the offset of the last one does not fit 32 bits.
        peaks: the peak token of each sequence, for ``peaked``.
        tail: the peak is no higher than that all other tokens together weigh more, each of them very little.
        checks_lse: also compare the LSE.
        repeats: further runs, which must give the same bits; on a device they are replays of a graph.
        splits: numbers of splits to run with, where the knobs have more than one split; empty: the knobs' own. Their number is no
            constant of the kernels. Every result is checked; repeats and groups are those of the first.
        regrouped: also run every second sequence alone, in reverse order: its rows must have the same bits in any batch.
    """

    name: str
    kind: CaseKind
    contexts: tuple[int, ...]
    kv_heads: int = 1
    window: int = 0
    scale_factor: float = 1.0
    sink: float = 0.0
    offset: float = 0.0
    shared_pages: bool = False
    row_scales: bool = False
    query_log2: tuple[int, int] = (0, 0)
    rounded_query: bool = False
    extreme_scales: bool = False
    softcap: float = 0.0
    wide_values: bool = False
    interleaved: bool = False
    far: Far = ""
    peaks: tuple[int, ...] = ()
    tail: bool = False
    checks_lse: bool = False
    repeats: int = 0
    splits: tuple[int, ...] = ()
    regrouped: bool = False

    @property
    def seed(self) -> int:
        """The same for the same name, on every machine."""
        return zlib.crc32(self.name.encode())


def role_of(case_name: str) -> str:
    """What a case is there for: its name without parts that hold a number, ``markers/edges`` of ``markers/edges/window128``."""
    return "/".join(part for part in case_name.split("/") if not re.search(r"\d", part))


def first_seen(context: int, problem: Problem, window: int) -> int:
    """Earliest token of a sequence that any of its query tokens sees."""
    return visible_tokens(context, 0, problem.query_length, window)[0]


def walked_tokens(case: Case, problem: Problem, tile: int) -> int:
    """Tokens of all tiles that a case walks, over sequences, KV heads and runs: what the emulator's time goes with."""
    by_sequence = [tiles_walked(context, problem, case.window, tile) for context in case.contexts]
    runs = max(1, len(case.splits)) + case.repeats
    again = sum(by_sequence[::-2]) if case.regrouped else 0
    return (sum(by_sequence) * runs + again) * tile * case.kv_heads


def tiles_walked(context: int, problem: Problem, window: int, tile: int) -> int:
    """Tiles that the splits of a walk visit together."""
    return -(-context // tile) - first_seen(context, problem, window) // tile
