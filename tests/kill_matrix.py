"""Arithmetic of the kill matrix: which gate case rejects which planted bug, what a case's role is, and who is the only one to see a bug."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.tuner.gate.case import role_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NO_VERDICT = (
    "error",
)  # the case did not run to an end for a reason of its own: neither killed nor missed


@dataclass(frozen=True)
class CaseVerdict:
    """What one case said of one mutant: a status of the gate, ``crash`` or ``hang`` of its process, or ``error``."""

    case: str
    status: str
    reason: str = ""

    @property
    def killed(self) -> bool:
        return self.status != "ok" and self.status not in NO_VERDICT


@dataclass(frozen=True)
class MutantRow:
    """A mutant and the verdicts of all cases, in the gate's order."""

    name: str
    module: str
    arch: str
    verdicts: tuple[CaseVerdict, ...]

    @property
    def killers(self) -> tuple[CaseVerdict, ...]:
        return tuple(v for v in self.verdicts if v.killed)

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(v.case for v in self.verdicts if v.status == "ok")

    @property
    def errors(self) -> tuple[CaseVerdict, ...]:
        return tuple(v for v in self.verdicts if v.status in NO_VERDICT)

    @property
    def survives(self) -> bool:
        return not self.killers

    def to_dict(self) -> dict[str, Any]:
        killers = [{"case": v.case, "verdict": v.status, "reason": v.reason} for v in self.killers]
        errors = [{"case": v.case, "reason": v.reason} for v in self.errors]
        return {
            "name": self.name,
            "module": self.module,
            "arch": self.arch,
            "first": killers[0]["case"] if killers else None,
            "killers": killers,
            "missed": list(self.missed),
            "errors": errors,
        }


@dataclass(frozen=True)
class RoleRow:
    """A role of cases: the mutants that a case of it ran on, those that one of them kills, and those that no other role kills."""

    role: str
    met: tuple[str, ...]
    kills: tuple[str, ...]
    alone: tuple[str, ...]


def role_rows(rows: Iterable[MutantRow]) -> list[RoleRow]:
    """Every role, in the order in which the gate's cases first name it."""
    met: dict[str, list[str]] = {}
    kills: dict[str, list[str]] = {}
    alone: dict[str, list[str]] = {}
    for row in rows:
        killing = {role_of(v.case) for v in row.killers}
        ran = (v.case for v in row.verdicts if v.status not in NO_VERDICT)
        for role in dict.fromkeys(map(role_of, ran)):
            met.setdefault(role, []).append(row.name)
            if role in killing:
                kills.setdefault(role, []).append(row.name)
                if len(killing) == 1:
                    alone.setdefault(role, []).append(row.name)
    return [
        RoleRow(role, tuple(names), tuple(kills.get(role, ())), tuple(alone.get(role, ())))
        for role, names in met.items()
    ]


def mutants_table(rows: Sequence[MutantRow]) -> str:
    lines = ["| mutant | module | first killer | verdict | killed by |", "|---|---|---|---|---|"]
    for row in rows:
        first = row.killers[0] if row.killers else CaseVerdict("none", "survives")
        cases = f"{len(row.killers)} of {len(row.verdicts)}"
        lines.append(f"| {row.name} | {row.module} | {first.case} | {first.status} | {cases} |")
    return "\n".join(lines)


def roles_table(rows: Sequence[RoleRow]) -> str:
    lines = ["| cases | kill | of | that no other cases kill |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.role} | {len(row.kills)} | {len(row.met)} | {', '.join(row.alone)} |")
    return "\n".join(lines)


def shard(items: Sequence[Any], part: tuple[int, int]) -> list[Any]:
    """Part i of n, 1 <= i <= n: every n-th item, so that neighbours, which cost alike, spread over the parts."""
    index, count = part
    assert 1 <= index <= count
    return list(items[index - 1 :: count])
