"""What a key's search tries before it asks the sampler: what serves it now, what others found for it, and what serves its neighbours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs
    from patune.target import Target
    from patune.tuner.progress import Key

PACKED_SEEDS = 3
NEIGHBOUR_SEEDS = 1  # the model has learned from all of them; each costs a trial


def seeds_for(
    key: Key,
    *,
    target: Target,
    winners: Sequence[Winner] = (),
    candidates: Iterable[Knobs] = (),
    packed: int = PACKED_SEEDS,
    neighbours: int = NEIGHBOUR_SEEDS,
) -> list[tuple[str, Knobs]]:
    """(source, knobs) in the order of trial, each once.

    Args:
        key: what is searched.
        target: where; the key's winner there is the incumbent.
        winners: everything that is served; those of near keys are seeds.
        candidates: the key's best configurations elsewhere: packs, other devices, other environments; best first.
        packed: how many candidates to take.
        neighbours: how many near keys' winners to take.
    """
    mine = (target, key.problem, key.workload)
    incumbent = next((w.knobs for w in winners if w.key == mine), None)
    seeds = [("incumbent", incumbent)] if incumbent is not None else []
    taken = {knobs for _, knobs in seeds}
    fresh = [knobs for knobs in dict.fromkeys(candidates) if knobs not in taken][:packed]
    seeds += [("candidate", knobs) for knobs in fresh]
    taken.update(fresh)
    near = sorted((d, i) for i, w in enumerate(winners) if (d := distance(key, w)) is not None)
    nearby = dict.fromkeys(winners[i].knobs for _, i in near)
    fresh = [knobs for knobs in nearby if knobs not in taken][:neighbours]
    return seeds + [("neighbour", knobs) for knobs in fresh]


def distance(key: Key, winner: Winner) -> float | None:
    """How far a winner's key is, in doublings; None for the key itself, and for problems that differ in more than one field."""
    mine, theirs = key.problem.to_dict(), winner.problem.to_dict()
    differing = [name for name in mine if mine[name] != theirs[name]]
    if len(differing) > 1 or (not differing and winner.workload == key.workload):
        return None
    steps = abs(math.log2(key.workload.walks / winner.workload.walks))
    steps += abs(math.log2(key.workload.context / winner.workload.context))
    return steps + 2.0 * len(differing)
