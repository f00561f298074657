"""Which knobs benchmarks/decode.py tries for a row: the default, the stored winner, and a small grid around the default."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

from patune.kernels.defaults import default_knobs, tiles_of
from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import MAX_SPLITS, REDUCE_CHUNKS, HopperKnobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target

TILES = (64, 128, 256)
STAGES = (1, 2, 3, 4)
WARPS = (4, 8)
SPLIT_FACTORS = (1.0, 2.0, 0.5, 4.0)
REDUCE_WARPS = (1, 4)
# How far a candidate is from the default: the near ones come first where not all fit.
WEIGHTS = {"tile": 1.0, "stages": 0.75, "warps": 1.25, "splits": 1.0, "reduce": 0.5}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Knobs to try, and where they come from: ``default``, ``stored`` (a database or the shipped pack) or ``grid``."""

    knobs: Knobs
    source: str


def candidates(problem: Problem, workload: Workload, target: Target, limit: int) -> list[Candidate]:
    """At most ``limit`` feasible knobs: the default, the stored winner, then the grid by distance from the default."""
    default = default_knobs(problem, workload, target)
    found: dict[Knobs, str] = {default: "default"}
    if (stored := _stored(problem, workload, target)) is not None:
        found.setdefault(stored, "stored")
    if isinstance(default, HopperKnobs):
        grid = sorted(set(_grid(default, workload)), key=lambda k: (_distance(k, default), str(k)))
        for knobs in grid:
            found.setdefault(knobs, "grid")
    feasible = [
        Candidate(knobs=knobs, source=source)
        for knobs, source in found.items()
        if is_feasible(knobs, problem, target) is None
    ]
    return feasible[:limit]


def _stored(problem: Problem, workload: Workload, target: Target) -> Knobs | None:
    from patune.configs.dispatcher import lookup_problem

    answer = lookup_problem(problem, workload, target)
    return None if answer.source == "default" else answer.knobs


def _grid(default: HopperKnobs, workload: Workload) -> Iterator[HopperKnobs]:
    for tile, stages, warps, factor in itertools.product(TILES, STAGES, WARPS, SPLIT_FACTORS):
        most = min(MAX_SPLITS, tiles_of(workload, tile))
        splits = max(1, min(round(default.num_splits * factor), most))
        for reduce_warps in REDUCE_WARPS if splits > 1 else (default.reduce_warps,):
            yield dataclasses.replace(
                default,
                partition_tokens=tile,
                num_stages=stages,
                num_warps=warps,
                num_splits=splits,
                reduce_chunk=_reduce_chunk(splits, default),
                reduce_warps=reduce_warps,
                overlap_launch=True,
            )


def _reduce_chunk(splits: int, default: HopperKnobs) -> int:
    """As in the default knobs: the smallest chunk of 16 or more that takes all splits in one step, up to 32."""
    if splits == default.num_splits:
        return default.reduce_chunk
    return next((chunk for chunk in REDUCE_CHUNKS if chunk >= max(splits, 16)), 32)


def _distance(knobs: HopperKnobs, default: HopperKnobs) -> float:
    return (
        WEIGHTS["tile"] * abs(math.log2(knobs.partition_tokens / default.partition_tokens))
        + WEIGHTS["stages"] * abs(knobs.num_stages - default.num_stages)
        + WEIGHTS["warps"] * (knobs.num_warps != default.num_warps)
        + WEIGHTS["splits"] * abs(math.log2(knobs.num_splits / default.num_splits))
        + WEIGHTS["reduce"] * (knobs.reduce_warps != default.reduce_warps)
    )
