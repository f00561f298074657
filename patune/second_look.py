"""Which stored winners need a second look in the present environment, and whether it can be had here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.configs.staleness import changes_between, state_of
from patune.environment import current_environment, present_fields
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from patune.configs.staleness import Change, State
    from patune.configs.winner import Winner
    from patune.environment import Environment
    from patune.target import Target


def evidence_of(target: Target) -> str:
    """The kind of evidence that a sweep of a target yields: NVIDIA is measured, AMD emulated."""
    return "measured" if target.vendor == "nvidia" else "emulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLook:
    """A stored winner beside the environment that builds have now.

    Attributes:
        changes: what differs.
    """

    winner: Winner
    changes: tuple[Change, ...]

    @property
    def state(self) -> State:
        """``fresh`` or ``reverify``."""
        return state_of(self.changes)

    @property
    def texts(self) -> list[str]:
        """The changes that made it need one, as tables print them; a note is none."""
        from patune import wording

        made = {c.field: (c.stored, c.present) for c in self.changes if c.kind == "reverify"}
        return wording.change_texts(made)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        from patune.kernels.knobs import knobs_to_dict

        winner = self.winner
        return {
            "target": winner.target.to_dict(),
            "problem": winner.problem.to_dict(),
            "workload": winner.workload.to_dict(),
            "knobs": knobs_to_dict(winner.knobs),
            "evidence": winner.evidence,
            "created": winner.created,
            "staleness": self.state,
            "changes": {c.field: {"stored": c.stored, "present": c.present} for c in self.changes},
        }


class Present:
    """The environments of this process, by architecture, each asked for once.

    Args:
        known: those that are known already.
        quick: look at what is known without importing Triton: an NVIDIA target's compiler is not compared.
    """

    def __init__(
        self, known: Mapping[str, Environment] | None = None, *, quick: bool = False
    ) -> None:
        self._known = dict(known or {})
        self._quick = quick
        self._fields_of: dict[Target, Mapping[str, Any]] = {}

    def environment(self, target: Target) -> Environment:
        """What builds for a target depend on now."""
        if target.arch not in self._known:
            self._known[target.arch] = current_environment(target)
        return self._known[target.arch]

    def look(self, winner: Winner) -> SecondLook:
        """A winner beside the present."""
        changes = changes_between(winner.environment.to_dict(), self._fields(winner.target))
        return SecondLook(winner=winner, changes=changes)

    def _fields(self, target: Target) -> Mapping[str, Any]:
        if not self._quick:
            return self.environment(target).to_dict()
        if target not in self._fields_of:
            self._fields_of[target] = present_fields(target)
        return self._fields_of[target]

    def stale(self, winners: Iterable[Winner]) -> list[SecondLook]:
        """Those that need a second look."""
        looks = (self.look(winner) for winner in winners)
        return [look for look in looks if look.state == "reverify"]


def why_not_here(winner: Winner, device: Target | None) -> str:
    """Why a sweep here cannot give a winner new evidence; empty when it can.

    Args:
        winner: what is served.
        device: the GPU that is here, if any.
    """
    target = winner.target
    if EVIDENCE_RANK[winner.evidence] > EVIDENCE_RANK[evidence_of(target)]:
        return f"it was measured on {target.device_name}; here {target.arch} is only emulated"
    if target.vendor == "amd" or target == device:
        return ""
    if device is not None and device.arch == target.arch:
        return f"it is of {target.device_name}, and the GPU here is {device.device_name}"
    return f"there is no {target.arch} GPU here"
