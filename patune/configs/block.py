"""An entry of the blocklist: knobs whose fault of the device or its driver was confirmed. No SQLAlchemy: packs are read with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from patune.configs.winner import check_time, parse_knobs, parse_parts
from patune.errors import InvalidValueError, reject
from patune.kernels.knobs import Knobs, knobs_to_dict
from patune.problem import Problem
from patune.record import Record, check_choice, check_text
from patune.target import ARCHS

if TYPE_CHECKING:
    from collections.abc import Mapping

FAULTS = ("launch_error", "illegal_access", "crash", "hang")  # of patune.configs.models
BlockKey = tuple[str, str, Problem, Knobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(Record):
    """Knobs that must not be tried for a problem, with this kernel source, on any device of this architecture.

    Attributes:
        status: how they failed, twice: ``launch_error``, ``illegal_access``, ``crash`` or ``hang``.
        reason: the fault's own message; may be empty.
        created: when they were blocked, UTC to the second.

    Raises:
        InvalidValueError: a field is outside of what is allowed, or the architecture has other knobs.
    """

    arch: str
    kernel_source_hash: str
    problem: Problem
    knobs: Knobs
    status: str
    reason: str
    created: str

    def __post_init__(self) -> None:
        check_choice("arch", self.arch, tuple(ARCHS))
        check_text("kernel_source_hash", self.kernel_source_hash)
        for name, kind in (("problem", Problem), ("knobs", Knobs)):
            if not isinstance(getattr(self, name), kind):
                raise reject(name, getattr(self, name), f"a {kind.__name__}")
        check_choice("status", self.status, FAULTS)
        if not isinstance(self.reason, str):
            raise reject("reason", self.reason, "a text")
        check_time("created", self.created)
        if self.knobs.family != ARCHS[self.arch].family:
            raise InvalidValueError(
                f"knobs: family={self.knobs.family!r} does not run on {self.arch}; allowed: {ARCHS[self.arch].family!r}."
            )

    @property
    def key(self) -> BlockKey:
        """What there is one entry for."""
        return self.arch, self.kernel_source_hash, self.problem, self.knobs

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "arch": self.arch,
            "kernel_source_hash": self.kernel_source_hash,
            "problem": self.problem.to_dict(),
            "knobs": knobs_to_dict(self.knobs),
            "status": self.status,
            "reason": self.reason,
            "created": self.created,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from :meth:`to_dict`.

        Raises:
            DocumentError: a part is not a JSON object, or has an unknown or missing field.
            InvalidValueError: a value is outside of what is allowed.
        """
        return super(Block, cls).from_dict(parse_parts("Block", data, _PARTS))


_PARTS = {"problem": Problem.from_dict, "knobs": parse_knobs}
