"""Frozen value records that go to JSON and back without losing or inventing anything."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Self

from patune.errors import DocumentError, reject

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Record:
    """Mixin for ``@dataclass(frozen=True, slots=True, kw_only=True)`` values whose fields are JSON scalars."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, in declaration order."""
        return {name: getattr(self, name) for name in _fields(type(self))[0]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the record from :meth:`to_dict` output.

        Raises:
            DocumentError: a field is unknown or missing, or a value is refused.
        """
        known, required = _fields(cls)
        if unknown := sorted(data.keys() - known.keys()):
            raise DocumentError(
                f"{cls.__name__}: unknown field {unknown[0]!r}; known fields: {', '.join(known)}."
            )
        if missing := [name for name in required if name not in data]:
            raise DocumentError(
                f"{cls.__name__}: field {missing[0]!r} is missing; known fields: {', '.join(known)}."
            )
        return cls(**data)


_FIELDS: dict[type[Record], tuple[dict[str, None], tuple[str, ...]]] = {}


def _fields(kind: type[Record]) -> tuple[dict[str, None], tuple[str, ...]]:
    """Names of a record's fields, and of those without a default: 8 us each time, 768 times in the pack that we ship."""
    found = _FIELDS.get(kind)
    if found is None:
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]
        required = (f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING)
        found = _FIELDS[kind] = dict.fromkeys(f.name for f in fields), tuple(required)
    return found


def canonical_json(data: object) -> str:
    """One spelling per value: sorted keys, no blanks, no NaN. Hashes and unique keys are made from it."""
    import json

    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: object) -> str:
    """sha256 hex of :func:`canonical_json`."""
    import hashlib  # 7 ms with OpenSSL, which `patune --help` does not need

    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Refuse anything but an int in [low, high] (a bool is not an int here)."""
    bound = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        raise reject(name, value, bound)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse anything that is not one of ``allowed``, compared by type as well as by value."""
    for one in allowed:
        if type(value) is type(one) and value == one:
            return
    raise reject(name, value, allowed)


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True or False."""
    if not isinstance(value, bool):
        raise reject(name, value, "true, false")


def check_text(name: str, value: object) -> None:
    """Refuse anything but a non-empty string."""
    if not isinstance(value, str) or not value:
        raise reject(name, value, "a non-empty string")


def check_number(name: str, value: object, *, low: float) -> None:
    """Refuse anything but a finite number >= low."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < low
    ):
        raise reject(name, value, f"a finite number >= {low}")
