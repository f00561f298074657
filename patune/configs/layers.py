"""The layers below an override, first hit wins: which of them answers a request, and why those before it did not."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patune.configs.answer import Answer
from patune.configs.neighbours import best_over, exact_ones, near_ones
from patune.configs.table import knobs_of, problem_fields, target_fields
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.feasibility import is_feasible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from patune.configs.answer import Source
    from patune.configs.neighbours import Choice
    from patune.configs.table import Entry, Group, Robust, Tables
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target

LOGGER = logging.getLogger("patune")
EMULATED_DRIVER = "none"  # of an environment in which nothing was measured
ROBUST_ORDER = ("worst", "mean")
_ENDED = {"pinned": "nothing is pinned for this key", "robust": "the problem has no robust configuration"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What decides an answer besides the request; nothing of it changes.

    Attributes:
        pins: by (target, problem, workload).
        failed: reasons by (target, problem) and knobs: what could not be launched in this process.
        first_time: whether something was not logged yet.
    """

    tables: Tables
    pins: Mapping[tuple[Target, Problem, Workload], Answer]
    failed: Mapping[tuple[Target, Problem], Mapping[Knobs, str]]
    first_time: Callable[..., bool]


@dataclass(slots=True)
class Search:
    """One request going through the layers.

    Attributes:
        notes: (layer, why it did not answer), in the order of the layers.
    """

    view: View
    problem: Problem
    workload: Workload
    target: Target
    notes: list[tuple[Source, str]] = field(default_factory=list)
    _refused: list[str] = field(default_factory=list)

    def answer(self) -> Answer:
        """The first layer's that has one."""
        steps: tuple[tuple[Source, Callable[[], Answer | None]], ...] = (
            ("pinned", self._pinned),
            ("exact", self._exact),
            ("nearest", self._nearest),
            ("robust", self._robust),
            ("other_device", self._other_device),
            ("heuristic", self._heuristic),
        )
        for source, step in steps:
            self._refused = []
            found = step()
            if found is not None:
                return found
            self.notes.append((source, "; ".join(self._refused) or self._nothing(source)))
        return self._made("safe", safe_knobs(self.problem, self.target))

    def _pinned(self) -> Answer | None:
        pin = self.view.pins.get((self.target, self.problem, self.workload))
        if pin is None or self._refusal(pin.knobs, "pinned") is not None:
            return None
        return pin

    def _own(self) -> list[Group]:
        fields, device = problem_fields(self.problem), target_fields(self.target)
        return [table.group(fields, device) for table in self.view.tables]

    def _same(self, groups: list[Group]) -> list[Entry]:
        same = [e for group in groups for e in group.same(self.workload)]
        return exact_ones(same, self.workload)

    def _exact(self) -> Answer | None:
        for entry in self._same(self._own()):
            if (knobs := self._usable(entry, entry.knobs)) is not None:
                if entry.packed:
                    nothing = "your database has nothing of this evidence for the same batch x KV heads and the same context"
                    self.notes.append(("exact", "; ".join(self._refused) or nothing))
                return self._made("pack" if entry.packed else "exact", knobs, entry)
        return None

    def _nearest(self) -> Answer | None:
        choice = self._best(self._own())
        return None if choice is None else self._chosen("nearest", choice)

    def _best(self, groups: list[Group]) -> Choice | None:
        near = [e for group in groups for e in group.near(self.workload)]
        for neighbours in near_ones(near, self.workload):
            if choice := best_over(neighbours, self.workload, self._usable):
                return choice
        return None

    def _robust(self) -> Answer | None:
        fields, device = problem_fields(self.problem), target_fields(self.target)
        for table in self.view.tables:
            stored = table.robust.get(fields, {}).get(device, [])
            known = [one for one in stored if one.objective in ROBUST_ORDER]
            for one in sorted(known, key=lambda r: (ROBUST_ORDER.index(r.objective), r.knobs)):
                if (knobs := self._usable(one, one.knobs)) is not None:
                    return self._made(
                        "robust", knobs, environment=one.environment, evidence=_evidence(one)
                    )
        return None

    def _other_device(self) -> Answer | None:
        fields, here = problem_fields(self.problem), target_fields(self.target)
        groups = [
            table.group(fields, device)
            for table in self.view.tables
            for device in table.devices(fields)
            if device != here
        ]
        for entry in self._same(groups):
            if (knobs := self._usable(entry, entry.knobs)) is not None:
                return self._made("other_device", knobs, entry, stored_target=entry.target)
        choice = self._best(groups)
        if choice is None:
            return None
        return self._chosen("other_device", choice, stored_target=choice.neighbours[0].target)

    def _heuristic(self) -> Answer | None:
        knobs = default_knobs(self.problem, self.workload, self.target)
        if refusal := self._why_not(knobs):
            self._refused.append(refusal)
            return None
        return self._made("heuristic", knobs)

    def _chosen(self, source: Source, choice: Choice, **more: Any) -> Answer:
        nearest = choice.neighbours[0]
        alone = len(choice.neighbours) == 1
        return self._made(
            source,
            choice.knobs,
            evidence=nearest.evidence,
            environment=nearest.environment,
            stored_workload=nearest.workload if alone else None,
            neighbours=tuple(entry.workload for entry in choice.neighbours),
            **more,
        )

    def _made(
        self, source: Source, knobs: Knobs, entry: Entry | None = None, **more: Any
    ) -> Answer:
        if entry is not None:
            more |= {
                "evidence": entry.evidence,
                "environment": entry.environment,
                "stored_workload": entry.workload,
            }
        return Answer(
            knobs=knobs,
            source=source,
            target=self.target,
            problem=self.problem,
            workload=self.workload,
            **({"evidence": "default"} | more),
        )

    def _usable(self, entry: Entry | Robust, text: str) -> Knobs | None:
        try:
            knobs = knobs_of(text)
        except (TypeError, ValueError, RecursionError) as error:  # another version's, or hand-made
            self._skip(text, str(error))
            return None
        return knobs if self._refusal(knobs, text) is None else None

    def _refusal(self, knobs: Knobs, text: str) -> str | None:
        """Why these knobs are not served. What failed here was told when it did; the rest is logged once."""
        failed = self.view.failed.get((self.target, self.problem), {})
        refusal = self._why_not(knobs)
        if refusal is not None and knobs in failed:
            self._refused.append(f"{text} {refusal}")
        elif refusal is not None:
            self._skip(text, refusal)
        return refusal

    def _why_not(self, knobs: Knobs) -> str | None:
        failed = self.view.failed.get((self.target, self.problem), {})
        if knobs in failed:
            return f"failed in this process: {failed[knobs]}"
        fields = problem_fields(self.problem)
        if any(knobs in table.blocked(fields) for table in self.view.tables):
            return "on the blocklist for these kernels"
        return is_feasible(knobs, self.problem, self.target)

    def _skip(self, text: str, refusal: str) -> None:
        self._refused.append(f"{text}: {refusal}")
        if self.view.first_time("refused", self.target, self.problem, text):
            LOGGER.warning("Skipped stored knobs %s: %s", text, refusal)

    def _nothing(self, source: Source) -> str:
        if source in _ENDED:
            return _ENDED[source]
        if source == "exact":
            return "nothing is stored for the same batch x KV heads and the same context"
        if source == "nearest":
            return "nothing is stored within a factor of two of batch x KV heads and of the context"
        return f"nothing near is stored for another device of {self.target.arch}"


def _evidence(robust: Robust) -> str:
    """Robust winners do not name their evidence: where nothing was measured there was no driver."""
    environment = robust.environment or {}
    return (
        "emulated" if environment.get("driver", EMULATED_DRIVER) == EMULATED_DRIVER else "measured"
    )
