"""Which of the stored configurations answer for a request's sizes: those of the very sizes in order, or the best over near ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from patune.configs.answer import distance_of
from patune.configs.table import others_of
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from patune.configs.table import Entry
    from patune.kernels.knobs import Knobs
    from patune.problem import Workload

MAX_NEIGHBOURS = 8  # tables that a choice is made over, the nearest ones: a cold lookup amid hundreds takes no longer
# A neighbour counts by the inverse of its distance in powers of two, from here on: a context of 4,100 weighs 4,096 no more than this.
LEAST_DISTANCE = 1 / 16


class Choice(NamedTuple):
    """The configuration that does best over near sizes.

    Attributes:
        neighbours: whose tables it was chosen from, the nearest first.
        regret: geometric mean of its scores over the best ones, weighted; 1.0 is the best everywhere.
    """

    knobs: Knobs
    neighbours: tuple[Entry, ...]
    regret: float


def exact_ones(same: Iterable[Entry], workload: Workload) -> list[Entry]:
    """Configurations of the same walks and context, the one to serve first.

    The better evidence comes first, then the database, then the very same batch, then the newer.
    """
    found = sorted(same, key=_newest, reverse=True)
    return sorted(found, key=lambda e: (-_rank(e), e.packed, e.workload.batch != workload.batch))


def near_ones(near: Iterable[Entry], workload: Workload) -> list[list[Entry]]:
    """The nearest of configurations near these sizes, a list per kind of evidence, the better kind and the nearer one first.

    A database's entry hides the pack's of the same device and sizes.
    """
    found = list(near)
    own = {(e.target, e.workload, e.evidence) for e in found if not e.packed}
    seen = [e for e in found if not e.packed or (e.target, e.workload, e.evidence) not in own]
    seen.sort(key=_newest, reverse=True)
    seen.sort(key=lambda e: (math.hypot(*distance_of(workload, e.workload)), e.packed))
    kinds = sorted({_rank(e) for e in seen}, reverse=True)
    return [[e for e in seen if _rank(e) == kind][:MAX_NEIGHBOURS] for kind in kinds]


def best_over(
    neighbours: Sequence[Entry], workload: Workload, usable: Callable[[Entry, str], Knobs | None]
) -> Choice | None:
    """The usable configuration with the smallest weighted geometric mean of score over best score; None without any.

    A table's best is its winner, whatever scores others had: it was timed against them once more, and a tie is one. A configuration that
    a table lacks counts as its worst. Equal ones: of the nearest table, its winner first.

    Args:
        neighbours: the nearest first, of one kind of evidence.
        workload: what is asked for.
        usable: the knobs of a text, or None where they must not be served.
    """
    tables = [dict(_regrets(entry)) for entry in neighbours]
    logs = [{text: math.log(regret) for text, regret in table.items()} for table in tables]
    worst = [max(table.values()) for table in logs]
    distances = [math.hypot(*distance_of(workload, e.workload)) for e in neighbours]
    weights = [1 / max(distance, LEAST_DISTANCE) for distance in distances]
    means: dict[str, float] = {}
    homes: dict[str, Entry] = {}
    for entry, table in zip(neighbours, logs, strict=True):
        for text in table:
            if text not in means:
                homes[text] = entry
                means[text] = sum(
                    weight * other.get(text, most)
                    for weight, other, most in zip(weights, logs, worst, strict=True)
                )
    for text in sorted(means, key=means.__getitem__):  # stable: the nearest table's first
        knobs = usable(homes[text], text)
        if knobs is not None:
            mean = means[text] / sum(weights)
            return Choice(knobs, tuple(neighbours), math.exp(mean))
    return None


def _regrets(entry: Entry) -> Iterator[tuple[str, float]]:
    """Each configuration with its score over the winner's, the winner first; a score of zero says nothing."""
    yield entry.knobs, 1.0
    for score, text in others_of(entry.others):
        if text != entry.knobs:
            yield text, max(1.0, score / entry.score) if entry.score > 0 else 1.0


def _newest(entry: Entry) -> tuple[object, ...]:
    """An order that leaves nothing to the order of rows: ranks that read other copies have to choose alike."""
    target, sizes = entry.target, entry.workload
    device = target.device_name, target.compute_units
    workload = sizes.batch, sizes.kv_heads, sizes.context
    return entry.created, entry.knobs, *device, *workload, entry.score, entry.others


def _rank(entry: Entry) -> int:
    return EVIDENCE_RANK.get(entry.evidence, 0)
