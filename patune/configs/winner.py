"""The configuration that serving uses for a key, with the evidence for it, and which of two winners stays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from patune.environment import Environment
from patune.errors import DocumentError, InvalidValueError, reject
from patune.kernels.knobs import Knobs, knobs_from_dict, knobs_to_dict
from patune.problem import Problem, Workload
from patune.record import Record, check_choice, check_int, check_number, check_text
from patune.target import Target
from patune.trial import EVIDENCE_RANK, CountedWork, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WinnerEvidence = Literal["measured", "emulated"]
WINNER_EVIDENCE: tuple[str, ...] = get_args(WinnerEvidence)
Verdict = Literal["added", "replaced", "kept"]
WinnerKey = tuple[Target, Problem, Workload]

ROBUST_OBJECTIVES = ("worst", "mean")

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def utc_now() -> str:
    """Now, as the ISO UTC seconds that records carry: ``2026-11-22T10:42:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_time(name: str, value: object) -> None:
    """Refuse anything but ISO UTC seconds. Such texts sort by time."""
    try:
        good = isinstance(value, str) and _TIME.fullmatch(value) is not None
        if good:
            datetime.fromisoformat(str(value))
    except ValueError:
        good = False
    if not good:
        raise reject(name, value, "UTC time to the second, such as 2026-11-22T10:42:00Z")


def _check_part(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        raise reject(name, value, f"a {kind.__name__}" + (" or null" if optional else ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup(Record):
    """The default's time over the winner's, from interleaved measurements of both.

    Attributes:
        ratio: above 1 when the winner is the faster one.
        low, high: 95 % interval of the ratio; the ratio lies inside.
    """

    ratio: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("ratio", "low", "high"):
            check_number(name, getattr(self, name), low=0.0)
        if not self.low <= self.ratio <= self.high:
            raise InvalidValueError(
                f"ratio={self.ratio!r} is outside of its interval; allowed: from low={self.low!r} to high={self.high!r}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner(Record):
    """What is served for one (target, problem, workload), and why.

    Attributes:
        evidence: ``measured`` (has a timing) or ``emulated`` (has counted work only).
        default_score: score of the default knobs, taken in the same way; None when unknown or when they failed.
        default_knobs: the default that the winner was compared with; None when it was not.
        trials: how many configurations the winner was chosen from, in its environment.
        gate_cases: correctness cases that it passed.
        error_rms: worst relative RMS error that the gate saw (dimensionless).
        created: when it was promoted, UTC to the second.
        imported_from: name of the pack that it came with; None when it was tuned here.
        speedup: over the default, where both were measured interleaved; else None.

    Raises:
        InvalidValueError: a field is outside of what is allowed, or two fields contradict each other.
    """

    target: Target
    environment: Environment
    problem: Problem
    workload: Workload
    knobs: Knobs
    evidence: str
    timing: Timing | None
    counted: CountedWork | None
    default_score: float | None
    default_knobs: Knobs | None
    trials: int
    gate_cases: int
    error_rms: float | None
    created: str
    imported_from: str | None = None
    speedup: Speedup | None = None

    def __post_init__(self) -> None:
        _check_part("target", self.target, Target)
        _check_part("environment", self.environment, Environment)
        _check_part("problem", self.problem, Problem)
        _check_part("workload", self.workload, Workload)
        _check_part("knobs", self.knobs, Knobs)
        _check_part("timing", self.timing, Timing, optional=True)
        _check_part("counted", self.counted, CountedWork, optional=True)
        _check_part("default_knobs", self.default_knobs, Knobs, optional=True)
        _check_part("speedup", self.speedup, Speedup, optional=True)
        check_choice("evidence", self.evidence, WINNER_EVIDENCE)
        check_int("trials", self.trials, low=1)
        check_int("gate_cases", self.gate_cases, low=1)
        check_time("created", self.created)
        for name in ("default_score", "error_rms"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0)
        if self.imported_from is not None:
            check_text("imported_from", self.imported_from)
        self._check_agreement()

    def _check_agreement(self) -> None:
        check_evidence(self.evidence, self.timing, self.counted)
        check_family(self.target, knobs=self.knobs, default_knobs=self.default_knobs)
        if self.default_score is not None and self.default_knobs is None:
            raise InvalidValueError("default_score is set and default_knobs is not; allowed: both.")
        if self.speedup is not None and (self.evidence != "measured" or self.default_knobs is None):
            raise InvalidValueError(
                f"speedup is set with evidence={self.evidence!r} and default_knobs={self.default_knobs!r}; "
                "allowed: of a measured winner that was compared with default knobs."
            )

    @property
    def score(self) -> float:
        """Microseconds when measured, counted issue slots when emulated; smaller is better."""
        if self.timing is not None:
            return self.timing.median_us
        assert self.counted is not None, "checked when built"
        return self.counted.busiest_simd_slots

    @property
    def speedup_over_default(self) -> float | None:
        """Default's score over this one's, interleaved where that was measured; None when there is nothing to compare with."""
        if self.speedup is not None:
            return self.speedup.ratio
        if self.default_score is None or self.score == 0:
            return None
        return self.default_score / self.score

    @property
    def key(self) -> WinnerKey:
        """What there is one winner for."""
        return self.target, self.problem, self.workload

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "target": self.target.to_dict(),
            "environment": self.environment.to_dict(),
            "problem": self.problem.to_dict(),
            "workload": self.workload.to_dict(),
            "knobs": knobs_to_dict(self.knobs),
            "evidence": self.evidence,
            "timing": self.timing.to_dict() if self.timing else None,
            "counted": self.counted.to_dict() if self.counted else None,
            "default_score": self.default_score,
            "default_knobs": knobs_to_dict(self.default_knobs) if self.default_knobs else None,
            "trials": self.trials,
            "gate_cases": self.gate_cases,
            "error_rms": self.error_rms,
            "created": self.created,
            "imported_from": self.imported_from,
            "speedup": self.speedup.to_dict() if self.speedup else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from :meth:`to_dict`.

        Raises:
            DocumentError: a part is not a JSON object, or has an unknown or missing field.
            InvalidValueError: a value is outside of what is allowed.
        """
        return super(Winner, cls).from_dict(parse_parts("Winner", data, _PARTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustWinner(Record):
    """The knobs that lose least over several workloads of one problem.

    Attributes:
        objective: ``worst`` or ``mean``: which regret over the workloads is smallest.
        workloads: what the knobs were chosen for, each once.
        regrets: per workload the time over that of the workload's best knobs; 1.0 is as good as the best.
        score: the objective's value, which the choice minimised.
        created: when it was chosen, UTC to the second.

    Raises:
        InvalidValueError: a field is outside of what is allowed, or two fields contradict each other.
    """

    target: Target
    environment: Environment
    problem: Problem
    objective: str
    workloads: tuple[Workload, ...]
    knobs: Knobs
    regrets: tuple[float, ...]
    score: float
    created: str

    def __post_init__(self) -> None:
        _check_part("target", self.target, Target)
        _check_part("environment", self.environment, Environment)
        _check_part("problem", self.problem, Problem)
        _check_part("knobs", self.knobs, Knobs)
        check_choice("objective", self.objective, ROBUST_OBJECTIVES)
        _check_part("workloads", self.workloads, tuple)
        for workload in self.workloads:
            _check_part("workloads", workload, Workload)
        _check_part("regrets", self.regrets, tuple)
        for regret in self.regrets:
            check_number("regrets", regret, low=0.0)
        check_number("score", self.score, low=0.0)
        check_time("created", self.created)
        check_family(self.target, knobs=self.knobs)
        if not self.workloads or len(set(self.workloads)) != len(self.workloads):
            raise InvalidValueError(
                f"workloads: {len(self.workloads)}, of which {len(set(self.workloads))} differ; allowed: one or more, each once."
            )
        if len(self.regrets) != len(self.workloads):
            raise InvalidValueError(
                f"regrets: {len(self.regrets)} for {len(self.workloads)} workloads; allowed: one of each."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "target": self.target.to_dict(),
            "environment": self.environment.to_dict(),
            "problem": self.problem.to_dict(),
            "objective": self.objective,
            "workloads": [workload.to_dict() for workload in self.workloads],
            "knobs": knobs_to_dict(self.knobs),
            "regrets": list(self.regrets),
            "score": self.score,
            "created": self.created,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from :meth:`to_dict`.

        Raises:
            DocumentError: a part is not of its JSON type, or has an unknown or missing field.
            InvalidValueError: a value is outside of what is allowed.
        """
        fields = parse_parts("RobustWinner", data, _PARTS)
        for name in ("workloads", "regrets"):
            if name in fields and not isinstance(fields[name], list | tuple):
                raise DocumentError(
                    f"RobustWinner: {name} is {fields[name]!r}; allowed: a JSON list."
                )
        if "regrets" in fields:
            fields["regrets"] = tuple(fields["regrets"])
        if "workloads" in fields:
            parts = [{"workload": part} for part in fields["workloads"]]
            fields["workloads"] = tuple(
                parse_parts("RobustWinner", part, _PARTS)["workload"] for part in parts
            )
        return super(RobustWinner, cls).from_dict(fields)


def check_evidence(evidence: str, timing: Timing | None, counted: CountedWork | None) -> None:
    """Refuse a kind of evidence that is not the one of the figures."""
    if evidence != ("measured" if timing else "emulated" if counted else None):
        raise InvalidValueError(
            f"evidence={evidence!r} does not agree with timing and counted; allowed: 'measured' with a timing, "
            "'emulated' with counted work and no timing."
        )


def check_family(target: Target, **named: Knobs | None) -> None:
    """Refuse knobs that the target's kernels do not have."""
    family = target.limits.family
    for name, knobs in named.items():
        if knobs is not None and knobs.family != family:
            raise InvalidValueError(
                f"{name}: family={knobs.family!r} does not run on {target.arch}; allowed: {family!r}."
            )


# Parts that the entries of a pack have in common. With each built once, the pack that we ship is read in 15 ms, else in 21.
_SHARED = ("target", "environment", "problem", "workload", "knobs", "default_knobs")
MAX_PARSED = 1024  # kept, at 2 kB
_PARSED: dict[tuple[str, str], object] = {}


def parse_parts(
    kind: str, data: Mapping[str, Any], parsers: Mapping[str, Callable[[dict[str, Any]], object]]
) -> dict[str, Any]:
    """The fields of a document, those with a parser parsed; absent and null ones stay so.

    Raises:
        DocumentError: a part is not a JSON object, or not a document of its kind.
    """
    fields = dict(data)
    for name, parse in parsers.items():
        part = fields.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise DocumentError(f"{kind}: {name} is {part!r}; allowed: a JSON object.")
        if name not in _SHARED:
            fields[name] = parse(part)
            continue
        spelling = name, repr(part)  # which tells 1 from True and 1.0
        found = _PARSED.get(spelling)
        if found is None:
            if len(_PARSED) >= MAX_PARSED:
                _PARSED.clear()
            found = _PARSED[spelling] = parse(part)
        fields[name] = found
    return fields


def parse_knobs(part: dict[str, Any]) -> Knobs:
    """Knobs of an untrusted document."""
    check_text("family", part.get("family"))
    return knobs_from_dict(part)


_PARTS = {
    "target": Target.from_dict,
    "environment": Environment.from_dict,
    "problem": Problem.from_dict,
    "workload": Workload.from_dict,
    "knobs": parse_knobs,
    "timing": Timing.from_dict,
    "counted": CountedWork.from_dict,
    "default_knobs": parse_knobs,
    "speedup": Speedup.from_dict,
}


def compare(incoming: Winner, standing: Winner | None) -> tuple[Verdict, str]:
    """Whether an imported winner takes the place of the standing one, and why, in words.

    The better kind of evidence stays, then the newer, then the faster.
    """
    if standing is None:
        return "added", "no winner for this key yet"
    ranks = EVIDENCE_RANK[incoming.evidence], EVIDENCE_RANK[standing.evidence]
    if ranks[0] != ranks[1]:
        words = f"{incoming.evidence} against {standing.evidence} here"
        return ("replaced" if ranks[0] > ranks[1] else "kept"), words
    if incoming.created != standing.created:
        words = f"of {incoming.created}, the one here of {standing.created}"
        return ("replaced" if incoming.created > standing.created else "kept"), words
    if incoming.score < standing.score:
        return "replaced", f"as old, and faster: {incoming.score:g} against {standing.score:g} here"
    return "kept", "the one here is as new and not slower"


def compare_robust(incoming: RobustWinner, standing: RobustWinner | None) -> tuple[Verdict, str]:
    """As :func:`compare`, of robust winners: the newer stays, and of equally old ones the one that is there.

    Their scores are regrets over workloads of their own, and are not compared.
    """
    if standing is None:
        return "added", "no robust winner for this problem yet"
    if incoming.created > standing.created:
        return "replaced", f"of {incoming.created}, the one here of {standing.created}"
    if incoming.created < standing.created:
        return "kept", f"of {incoming.created}, the one here of {standing.created}"
    return "kept", "the one here is as new"
