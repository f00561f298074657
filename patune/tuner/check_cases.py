"""What a check looks at: targets x problems x knobs, chosen by pure functions before anything is compiled."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from patune import wording
from patune.errors import InvalidValueError, reject
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.feasibility import is_feasible, unsupported
from patune.kernels.knobs import knobs_to_dict
from patune.kernels.space import CHOICES
from patune.record import check_choice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target

KnobSet = Literal["default", "grid"]
KNOB_SETS: tuple[KnobSet, ...] = get_args(KnobSet)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What to check.

    Attributes:
        targets: architectures, by their reference parts: no device is looked for.
        problems: checked on each target.
        workloads: whose default knobs are checked; equal ones once.
        knobs: ``default``: the default knobs and the safe ones. ``grid``: also each knob of the search space moved alone away from the first of them.

    Raises:
        InvalidValueError: nothing to check, or an unknown set of knobs.
    """

    targets: tuple[Target, ...]
    problems: tuple[Problem, ...]
    workloads: tuple[Workload, ...]
    knobs: KnobSet = "default"

    def __post_init__(self) -> None:
        check_choice("knobs", self.knobs, KNOB_SETS)
        for name in ("targets", "problems", "workloads"):
            if not getattr(self, name):
                raise reject(name, (), "at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckCase:
    """One row to be.

    Attributes:
        knobs: None when the problem has none on this target, or when no value of the knobs can be made.
        changed: the knob that differs from the first default of the problem, with its value; empty for default knobs.
        infeasible: why the knobs cannot work; empty when they can.
    """

    target: Target
    problem: Problem
    knobs: Knobs | None
    changed: dict[str, Any] = field(default_factory=dict)
    infeasible: str = ""

    @property
    def default(self) -> bool:
        """The default knobs of some workload, or the safe ones: what is answered where nothing is stored."""
        return self.knobs is not None and not self.changed

    @property
    def label(self) -> str:
        """The knob that was moved, else the default knobs in short; a dash where there are none."""
        return label_of(None if self.knobs is None else knobs_to_dict(self.knobs), self.changed)

    def to_dict(self) -> dict[str, Any]:
        """What a worker needs; JSON types only."""
        return {
            "target": self.target.to_dict(),
            "problem": self.problem.to_dict(),
            "knobs": None if self.knobs is None else knobs_to_dict(self.knobs),
        }


def label_of(knobs: dict[str, Any] | None, changed: dict[str, Any]) -> str:
    """How the knobs of a row read: ``waves_per_eu=2``, ``p128 s32 st1 w4 r32x4``, or a dash."""
    if changed:
        return " ".join(f"{name}={value}" for name, value in changed.items())
    return "-" if knobs is None else wording.knobs_text(knobs)


def select_cases(options: CheckOptions) -> list[CheckCase]:
    """Every row of a check in its order: by target, then problem, default knobs first."""
    return [
        case
        for target in dict.fromkeys(options.targets)
        for problem in dict.fromkeys(options.problems)
        for case in _cases_of(problem, target, options)
    ]


def _cases_of(problem: Problem, target: Target, options: CheckOptions) -> Iterator[CheckCase]:
    if reason := unsupported(problem, target):
        yield CheckCase(target=target, problem=problem, knobs=None, infeasible=reason)
        return
    defaults: dict[Knobs, None] = dict.fromkeys(
        default_knobs(problem, w, target) for w in options.workloads
    )
    defaults[safe_knobs(problem, target)] = None  # last resort of the launch path: in every check
    for knobs in defaults:
        yield _case(problem, target, knobs, {})
    if options.knobs == "grid":
        yield from _moved_cases(problem, target, list(defaults))


def _moved_cases(problem: Problem, target: Target, defaults: list[Knobs]) -> Iterator[CheckCase]:
    """Each knob of the space moved alone away from the first default, all its values; what is a default itself is there already."""
    base = defaults[0]
    for name, values in CHOICES[target.limits.family].items():
        for value in values:
            if value == getattr(base, name):
                continue
            changed = {name: value}
            try:
                knobs = dataclasses.replace(base, **changed)
            except InvalidValueError as error:  # a value that these other knobs exclude
                yield CheckCase(
                    target=target,
                    problem=problem,
                    knobs=None,
                    changed=changed,
                    infeasible=str(error),
                )
                continue
            if knobs not in defaults:
                yield _case(problem, target, knobs, changed)


def _case(problem: Problem, target: Target, knobs: Knobs, changed: dict[str, Any]) -> CheckCase:
    return CheckCase(
        target=target,
        problem=problem,
        knobs=knobs,
        changed=changed,
        infeasible=is_feasible(knobs, problem, target) or "",
    )
