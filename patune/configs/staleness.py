"""What a change of the environment means for a stored configuration: nothing, a second look, or that it is another one's.

A configuration that needs a second look is served all the same, and says so: a default in its place would be slower without a word.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patune.target import Target

FieldClass = Literal["must_match", "reverify", "note"]
State = Literal["fresh", "reverify"]

FIELD_CLASSES: dict[str, FieldClass] = {
    # The kernel family is the ABI of the kernels: knobs of another family are never read as these.
    "family": "must_match",
    "arch": "must_match",
    "device_name": "must_match",
    "compute_units": "must_match",
    # What machine code is made from, and by what: it may be slower now, or wrong.
    "kernel_source_hash": "reverify",
    "triton": "reverify",
    "compiler": "reverify",
    "fp_fusion": "reverify",
    # What neither makes machine code nor runs on the device.
    "patune": "note",
    "torch": "note",
    "python": "note",
    "driver": "note",
}
BY_MINOR = ("triton", "compiler")  # a third number of a version is a bug fix
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.\d+)*\S*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A field that is otherwise now than when the configuration was stored."""

    field: str
    kind: FieldClass
    stored: str | bool | int
    present: str | bool | int

    def __str__(self) -> str:
        short = self.field == "kernel_source_hash"
        stored, present = (str(v)[:12] if short else v for v in (self.stored, self.present))
        return f"{self.field} {stored} -> {present}"


def changes_between(stored: Mapping[str, Any], present: Mapping[str, Any]) -> tuple[Change, ...]:
    """What differs, among the fields that both have; versions that are compared by major and minor number differ in these.

    Args:
        stored: fields of a target and an environment, as stored.
        present: those of here and now; what is not known is left out.
    """
    found = []
    for field, kind in FIELD_CLASSES.items():
        if field not in stored or field not in present:
            continue
        if _told(field, stored[field]) != _told(field, present[field]):
            found.append(
                Change(field=field, kind=kind, stored=stored[field], present=present[field])
            )
    return tuple(found)


def state_of(changes: Sequence[Change]) -> State:
    """``reverify`` when a change may have made the configuration slow or wrong."""
    return "reverify" if any(change.kind == "reverify" for change in changes) else "fresh"


def _told(field: str, value: Any) -> Any:
    if field not in BY_MINOR or not isinstance(value, str):
        return value
    return _VERSION.sub(r"\1.\2", value)


def changes_here(
    environment: Mapping[str, Any], stored: Target, here: Target
) -> tuple[Change, ...]:
    """What differs between the environment and device of a stored configuration and those of this process.

    The compiler is compared where Triton is imported: asking it takes that import.
    """
    return _changes_here(tuple(sorted(environment.items())), stored, here)


@functools.lru_cache(maxsize=1024)
def _changes_here(
    environment: tuple[tuple[str, Any], ...], stored: Target, here: Target
) -> tuple[Change, ...]:
    from patune.environment import present_fields

    then = {**dict(environment), **stored.to_dict(), "family": stored.limits.family}
    return changes_between(then, present_fields(here))
