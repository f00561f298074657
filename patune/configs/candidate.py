"""Knobs that were good for a key besides the winner's: what another machine tries first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from patune.configs.winner import (
    Winner,
    WinnerKey,
    check_evidence,
    check_family,
    parse_knobs,
    parse_parts,
)
from patune.errors import InvalidValueError, reject
from patune.kernels.knobs import Knobs, knobs_to_dict
from patune.record import Record, canonical_json, check_int
from patune.trial import CountedWork, Timing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_CANDIDATES = 5  # of one winner in a pack
MAX_ADOPTED = 8  # of one key of an architecture: winners and candidates of every device


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Record):
    """Knobs with their score, measured or counted in the environment of the winner that they stand beside.

    Attributes:
        gate_cases: correctness cases that they passed.

    Raises:
        InvalidValueError: a field is outside of what is allowed, or there is no score.
    """

    knobs: Knobs
    timing: Timing | None
    counted: CountedWork | None
    gate_cases: int

    def __post_init__(self) -> None:
        for name, kind in (("knobs", Knobs), ("timing", Timing), ("counted", CountedWork)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (name == "knobs" or value is not None):
                raise reject(name, value, f"a {kind.__name__}")
        check_int("gate_cases", self.gate_cases, low=1)
        if self.timing is None and self.counted is None:
            raise InvalidValueError(
                "timing and counted are both null; allowed: a timing, or counted work."
            )

    @property
    def score(self) -> float:
        """Microseconds when measured, counted issue slots when emulated; smaller is better."""
        if self.timing is not None:
            return self.timing.median_us
        assert self.counted is not None, "checked when built"
        return self.counted.busiest_simd_slots

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "knobs": knobs_to_dict(self.knobs),
            "timing": self.timing.to_dict() if self.timing else None,
            "counted": self.counted.to_dict() if self.counted else None,
            "gate_cases": self.gate_cases,
        }

    @property
    def order(self) -> tuple[float, str]:
        """What candidates are sorted by: the score, and equal ones by their knobs' spelling, which does not tell when they were tried."""
        return self.score, canonical_json(knobs_to_dict(self.knobs))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from :meth:`to_dict`.

        Raises:
            DocumentError: a part is not a JSON object, or has an unknown or missing field.
            InvalidValueError: a value is outside of what is allowed.
        """
        return super(Candidate, cls).from_dict(parse_parts("Candidate", data, _PARTS))


_PARTS = {
    "knobs": parse_knobs,
    "timing": Timing.from_dict,
    "counted": CountedWork.from_dict,
}

Candidates = dict[WinnerKey, tuple[Candidate, ...]]


def check_candidates(winner: Winner, candidates: Sequence[Candidate]) -> None:
    """Refuse candidates that cannot stand beside a winner.

    Raises:
        InvalidValueError: too many, one twice or the winner's, of another kernel family, or scored in another way than the winner.
    """
    if len(candidates) > MAX_CANDIDATES:
        raise InvalidValueError(
            f"candidates: {len(candidates)} are too many; allowed: up to {MAX_CANDIDATES}."
        )
    seen = {winner.knobs}
    for index, candidate in enumerate(candidates):
        where = f"candidates[{index}]"
        check_family(winner.target, **{f"{where}.knobs": candidate.knobs})
        if candidate.knobs in seen:
            raise InvalidValueError(
                f"{where}: its knobs are the winner's or an earlier candidate's; allowed: other ones."
            )
        seen.add(candidate.knobs)
        try:
            check_evidence(winner.evidence, candidate.timing, candidate.counted)
        except InvalidValueError as error:
            raise InvalidValueError(f"{where}: {error}") from error
        if candidate.timing and winner.timing:
            protocols = candidate.timing.protocol, winner.timing.protocol
            if protocols[0] != protocols[1]:
                raise InvalidValueError(
                    f"{where}: protocol={protocols[0]!r} is not the winner's; allowed: {protocols[1]!r}, "
                    "because times of different protocols are not compared."
                )
