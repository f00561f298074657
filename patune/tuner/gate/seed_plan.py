"""The test plan of the kernel that this project began with, under our checks: its own tolerance passed an output of zeros at 4096 keys."""

from __future__ import annotations

import random
from dataclasses import dataclass

from patune.problem import Problem
from patune.tuner.gate.case import Case
from patune.tuner.gate.edges import LONGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedCase:
    """A case of the seed kernel's own test plan, with the problem and the partition that it is for."""

    problem: Problem
    partition_tokens: int
    case: Case


def seed_plan_cases(*, longest: int = LONGEST) -> list[SeedCase]:
    """The seed's test plan: page 1024, partition 256, ragged contexts up to ``longest``, 4-D values, window 0 and 128, batch 1 and 128,
    1 and 4 query tokens; then page 16 with the same harness as a spot check.
    """
    shapes = [(1024, batch, length) for batch in (1, 128) for length in (1, 4)] + [(16, 3, 1)]
    plan = []
    for page, batch, length in shapes:
        for window in (0, 128):
            name = f"seed/page{page}/batch{batch}/length{length}/window{window}"
            low = length if batch > 1 else longest // 2
            rng = random.Random(name)
            case = Case(
                name=name,
                kind="random",
                contexts=tuple(rng.randint(low, longest) for _ in range(batch)),
                kv_heads=1 if batch == 1 else 2,
                window=window,
                repeats=1,
            )
            problem = Problem(
                block_size=page, head_dim=128, qg=8, query_length=length, windowed=window > 0
            )
            plan.append(SeedCase(problem=problem, partition_tokens=256, case=case))
    return plan
