"""What a lookup answers: knobs, which layer they come from, how near, and whether they still hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from patune.configs.staleness import Change, changes_here, state_of
from patune.errors import DocumentError
from patune.kernels.knobs import Knobs, knobs_from_dict, knobs_to_dict
from patune.problem import Problem, Workload
from patune.record import check_choice
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 2

Source = Literal[
    "override", "pinned", "exact", "pack", "nearest", "robust", "other_device", "heuristic", "safe"
]
SOURCES: tuple[Source, ...] = get_args(Source)
# Nothing was tuned for the problem on this device near these sizes.
MISSES: tuple[Source, ...] = ("other_device", "heuristic", "safe")


class Tally:
    """How often something was answered.

    Adding one takes no lock: CPython changes threads at calls and backward jumps, and there is none in it.
    """

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Knobs for one request, and where they come from.

    Attributes:
        source: the layer that answered.
        evidence: ``measured``, ``emulated``, or ``default`` where nothing was tried for them.
        stored_workload: the sizes that they were tuned for, where one stored configuration answered.
        stored_target: the device that they were tuned on, where that is another one.
        neighbours: the sizes whose tables they were chosen from, the nearest first.
        environment: fields of the environment that they were tuned in; None for what was not tuned.
    """

    knobs: Knobs
    source: Source
    evidence: str
    target: Target
    problem: Problem
    workload: Workload
    stored_workload: Workload | None = None
    stored_target: Target | None = None
    neighbours: tuple[Workload, ...] = ()
    environment: Mapping[str, Any] | None = field(default=None, hash=False)
    # Shared by all answers of a layer, and of a key that is missed: the hot path finds it in the CPU's cache. Slots are sorted, so
    # this one lies beside the reference count, on the line that is touched anyway.
    _tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """By its document: a read-only mapping cannot be pickled."""
        return Answer.from_dict, (self.to_dict(),)

    @property
    def key(self) -> dict[str, Any]:
        """What was asked: target, problem and workload, as JSON types."""
        return {
            "target": self.target.to_dict(),
            "problem": self.problem.to_dict(),
            "workload": self.workload.to_dict(),
        }

    @property
    def distance(self) -> dict[str, float] | None:
        """Powers of two from the nearest stored sizes to those asked for, per axis and in total; None where no sizes were near."""
        stored = self.neighbours[0] if self.neighbours else self.stored_workload
        if stored is None:
            return None
        walks, context = distance_of(self.workload, stored)
        return {"walks": walks, "context": context, "total": math.hypot(walks, context)}

    @property
    def changes(self) -> tuple[Change, ...]:
        """What is otherwise here and now than where the knobs were tuned."""
        if self.environment is None:
            return ()
        return changes_here(self.environment, self.stored_target or self.target, self.target)

    @property
    def staleness(self) -> Literal["fresh", "reverify", "none"]:
        """``reverify``: something that may make the knobs slow or wrong has changed since. ``none``: they were never tuned."""
        return "none" if self.environment is None else state_of(self.changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        stored, device = self.stored_workload, self.stored_target
        return {
            "schema": SCHEMA,
            "source": self.source,
            "evidence": self.evidence,
            "knobs": knobs_to_dict(self.knobs),
            "key": self.key,
            "stored_workload": stored.to_dict() if stored else None,
            "stored_target": device.to_dict() if device else None,
            "neighbours": [workload.to_dict() for workload in self.neighbours],
            "distance": self.distance,
            "environment": None if self.environment is None else dict(self.environment),
            "staleness": self.staleness,
            "changes": [
                {"field": c.field, "kind": c.kind, "stored": c.stored, "present": c.present}
                for c in self.changes
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from :meth:`to_dict`; what can be computed from the rest is.

        Raises:
            DocumentError: it is no such document.
            InvalidValueError: a value is outside of what is allowed.
        """
        try:
            return cls._from_parts(dict(data))
        except (KeyError, TypeError, AttributeError) as error:
            raise DocumentError(
                f"{data!r:.300} is no answer of a lookup: {error!r}. Allowed: what Answer.to_dict() gives, of schema {SCHEMA}."
            ) from error

    @classmethod
    def _from_parts(cls, data: dict[str, Any]) -> Self:
        check_choice("schema", data["schema"], (SCHEMA,))
        check_choice("source", data["source"], SOURCES)
        check_choice("evidence", data["evidence"], ("measured", "emulated", "default"))
        key, stored, device = data["key"], data["stored_workload"], data["stored_target"]
        environment = data["environment"]
        return cls(
            knobs=knobs_from_dict(data["knobs"]),
            source=data["source"],
            evidence=data["evidence"],
            target=Target.from_dict(key["target"]),
            problem=Problem.from_dict(key["problem"]),
            workload=Workload.from_dict(key["workload"]),
            stored_workload=None if stored is None else Workload.from_dict(stored),
            stored_target=None if device is None else Target.from_dict(device),
            neighbours=tuple(Workload.from_dict(one) for one in data["neighbours"]),
            environment=None if environment is None else MappingProxyType(dict(environment)),
        )


def distance_of(workload: Workload, stored: Workload) -> tuple[float, float]:
    """Powers of two between a request and a stored workload: (walks, context), positive when the request is larger."""
    return (
        math.log2(workload.walks / stored.walks),
        math.log2(workload.context / stored.context),
    )
