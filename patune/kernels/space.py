"""The knobs worth trying: choices per knob, and the enumerated pool of what is feasible for a key."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from patune.kernels.defaults import default_knobs, tiles_of
from patune.kernels.feasibility import DIRECT_TO_LDS, is_feasible
from patune.kernels.knobs import CACHE_MODIFIERS, FAMILIES

if TYPE_CHECKING:
    from patune.kernels.knobs import CdnaKnobs, HopperKnobs
    from patune.problem import Problem, Workload
    from patune.target import Target

SPLIT_CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_WORKGROUPS_PER_CU = (
    8  # more splits than that only add partial results: 2 per SM was already slower than 1 (H200)
)
REDUCE_KNOBS = ("reduce_chunk", "reduce_warps")

CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "hopper_wgmma": {
        "num_splits": SPLIT_CHOICES,
        "partition_tokens": (64, 128, 256),
        "num_stages": (1, 2, 3, 4),
        "num_warps": (4, 8),
        "maxnreg": (0, 128),  # 96..128 within 1.2 %, 64 never good (H200, 2026-11-22)
        "probs_k_major": (True, False),
        "reduce_chunk": (8, 16, 32),
        "reduce_warps": (1, 4),
    },
    "cdna_mfma": {
        "num_splits": SPLIT_CHOICES,
        "partition_tokens": (64, 128, 256),
        "num_stages": (1, 2, 3, 4),
        "num_warps": (1, 2, 4, 8),
        "waves_per_eu": (0, 1, 2, 3, 4),
        "mfma_rows": (16, 32),
        "program_rows": (0, 16, 32),
        "lds_ring": (False, True),
        "cache_modifier": CACHE_MODIFIERS,
        "reduce_chunk": (8, 16, 32),
        "reduce_warps": (1, 4),
    },
}


def knob_choices(
    problem: Problem, workload: Workload, target: Target
) -> dict[str, tuple[Any, ...]]:
    """Values per knob, ascending; the default knobs' own values are always among them, and none that no other knob could make feasible."""
    default = default_knobs(problem, workload, target)
    return {
        name: tuple(sorted({*(v for v in values if _possible(name, v, problem, target)), getattr(default, name)}))
        for name, values in CHOICES[target.limits.family].items()
    }  # fmt: skip


def _possible(name: str, value: Any, problem: Problem, target: Target) -> bool:
    """Whether some knobs with this value are feasible, as far as one knob alone can tell."""
    match name:
        case "program_rows":
            return bool(value < problem.rows)
        case "mfma_rows":
            return value == 16 or problem.rows > 16
        case "lds_ring":
            return not value or target.arch in DIRECT_TO_LDS
    return True


def feasible_pool(
    problem: Problem, workload: Workload, target: Target
) -> list[HopperKnobs | CdnaKnobs]:
    """Every feasible combination once, the default first. Knobs of the reduce kernel stay at their default for one split."""
    default = default_knobs(problem, workload, target)
    family = FAMILIES[target.limits.family]
    choices = knob_choices(problem, workload, target)
    idle = {f.name: f.default for f in dataclasses.fields(family) if f.name in REDUCE_KNOBS}
    pool = {default: None}
    for values in itertools.product(*choices.values()):
        picked = dict(zip(choices, values, strict=True))
        if picked["num_splits"] == 1:
            picked |= idle
        knobs = family(**picked)
        if (
            knobs not in pool
            and is_feasible(knobs, problem, target) is None
            and _fits(knobs, workload, target)
        ):
            pool[knobs] = None
    return list(pool)


def _fits(knobs: HopperKnobs | CdnaKnobs, workload: Workload, target: Target) -> bool:
    """No split is empty by construction, and the grid is not absurdly large for the device."""
    if knobs.one_shot:
        return True
    most = max(1, MAX_WORKGROUPS_PER_CU * target.compute_units // workload.walks)
    return knobs.num_splits <= min(tiles_of(workload, knobs.partition_tokens), most)
