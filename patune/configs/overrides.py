"""Knobs that the caller sets for a block of code, or the user for a process (``PATUNE_KNOBS``), whatever is stored.

Overrides lie on each other: the environment's at the bottom, then every ``with patune.override(...)`` around the call. Each sets all knobs, or
some of them on top of what the layers below it answer. One that does not fit a problem is left out for it, with a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from patune import settings
from patune.errors import InvalidValueError, reject
from patune.kernels.feasibility import is_feasible
from patune.kernels.forced import forced
from patune.kernels.knobs import FAMILIES, CdnaKnobs, HopperKnobs, Knobs, knobs_from_dict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from patune.problem import Problem, Workload
    from patune.target import Target

__all__ = ["Layer", "Override", "current", "from_environment", "override"]

LOGGER = logging.getLogger("patune")
VARIABLE = "PATUNE_KNOBS"
# Any valid value of each family: what a single knob is tried on.
_SAMPLES: dict[str, HopperKnobs | CdnaKnobs] = {
    name: family(partition_tokens=64, num_splits=1, num_stages=1, num_warps=4)
    for name, family in FAMILIES.items()
}
_KNOBS = tuple(dict.fromkeys(f.name for k in FAMILIES.values() for f in dataclasses.fields(k)))
_TRUTHS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One override.

    Attributes:
        name: what messages call it.
        whole: all knobs, or None.
        changes: (knob, value) pairs set on top of the answer below; empty where ``whole`` is given.
    """

    name: str
    whole: Knobs | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    def over(self, below: Knobs, problem: Problem, target: Target) -> Knobs | str:
        """The knobs, or why this layer has none for the problem."""
        knobs = self.whole
        if knobs is None:
            names = {field.name for field in dataclasses.fields(below)}
            if unknown := [name for name, _ in self.changes if name not in names]:
                return f"knobs of family {below.family} have no {unknown[0]}"
            try:
                knobs = dataclasses.replace(below, **dict(self.changes))
            except InvalidValueError as error:
                return str(error)
        return is_feasible(knobs, problem, target) or knobs


@dataclass(frozen=True, slots=True)
class Override:
    """All overrides that hold here, the lowest first."""

    layers: tuple[Layer, ...]

    def apply(
        self, problem: Problem, workload: Workload, target: Target, below: Knobs
    ) -> Knobs | str:
        """The knobs for a problem, or why no layer fits it. Where some do, the others are left out with one warning each.

        Args:
            problem: what is asked for.
            workload: its sizes; no override depends on them.
            target: the device that will run.
            below: what is answered without any override.
        """
        knobs, refusals = below, []
        for layer in self.layers:
            answer = layer.over(knobs, problem, target)
            if isinstance(answer, str):
                refusals.append((layer, answer))
            else:
                knobs = answer
        if len(refusals) == len(self.layers):
            return "; ".join(f"{layer.name}: {reason}" for layer, reason in refusals)
        for layer, reason in refusals:
            _warn(layer.name, problem, target, reason)
        return knobs


def override(knobs: Knobs | None = None, /, **changes: Any) -> AbstractContextManager[None]:
    """Set knobs for the lookups and calls of a block of code, in this thread or task only.

    ``knobs=`` of a call beats it. Overrides nest: the inner one lies on top of the outer one::

        with patune.override(num_splits=8):
            patune.paged_attention_decode(...)

    Args:
        knobs: all knobs, of one kernel family; problems of other devices are answered without it.
        changes: single knobs, set on top of ``knobs``, else of what would have been answered.

    Raises:
        InvalidValueError: an unknown knob, a value that is not allowed, or nothing to set.
    """
    layer = _layer("patune.override", knobs, changes)
    return _entered(layer)


def current() -> Override | None:
    """What holds for this thread or task, or None.

    Raises:
        InvalidValueError: PATUNE_KNOBS cannot be read.
    """
    inside = cast("tuple[Layer, ...]", forced.get() or ())
    bottom = from_environment()
    layers = inside if bottom is None else (bottom, *inside)
    return Override(layers) if layers else None


def from_environment() -> Layer | None:
    """What PATUNE_KNOBS sets, or None.

    Raises:
        InvalidValueError: it cannot be read.
    """
    text = settings.knobs_text()
    return None if text is None else _parsed(text)


@contextlib.contextmanager
def _entered(layer: Layer) -> Iterator[None]:
    from patune.configs import dispatcher

    inside = cast("tuple[Layer, ...]", forced.get() or ())
    dispatcher.bypass()
    try:
        token = forced.set((*inside, layer))
        try:
            yield
        finally:
            forced.reset(token)
    finally:
        dispatcher.unbypass()


def _layer(name: str, knobs: object, changes: Mapping[str, Any]) -> Layer:
    """A checked layer."""
    if knobs is None:
        if not changes:
            raise InvalidValueError(f"{name} sets nothing; allowed: a Knobs value, or any of {', '.join(_KNOBS)}.")  # fmt: skip
        _check(name, changes)
        return Layer(name=name, changes=tuple(sorted(changes.items())))
    if not isinstance(knobs, tuple(FAMILIES.values())):
        raise reject(name, knobs, (f"a {family.__name__}" for family in FAMILIES.values()))
    assert isinstance(knobs, HopperKnobs | CdnaKnobs)
    own = [field.name for field in dataclasses.fields(knobs)]
    if unknown := [knob for knob in changes if knob not in own]:
        raise reject(f"{name}: knob", unknown[0], own)
    return Layer(name=name, whole=dataclasses.replace(knobs, **changes))


def _check(name: str, changes: Mapping[str, Any]) -> None:
    """Refuse changes that no family of knobs can have, one by one and together."""
    if unknown := [knob for knob in changes if knob not in _KNOBS]:
        raise reject(f"{name}: knob", unknown[0], _KNOBS)
    for knob, value in changes.items():
        samples = [sample for sample in _SAMPLES.values() if hasattr(sample, knob)]
        refusals = [refusal for sample in samples if (refusal := _refusal(sample, knob, value))]
        if len(refusals) == len(samples):
            raise InvalidValueError(f"{name}: {refusals[0]}")
    if not any(all(hasattr(s, knob) for knob in changes) for s in _SAMPLES.values()):
        raise InvalidValueError(
            f"{name}: no kernel family has all of {', '.join(sorted(changes))}; allowed: knobs of one of "
            + "; ".join(f"{family}: {', '.join(s.to_dict())}" for family, s in _SAMPLES.items())
            + "."
        )


def _refusal(sample: HopperKnobs | CdnaKnobs, knob: str, value: object) -> str | None:
    try:
        dataclasses.replace(sample, **{knob: value})  # type: ignore[arg-type]
    except InvalidValueError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Layer:
    """The layer that a text stands for: a JSON object with all knobs, or ``name=value`` with commas between."""
    if text.lstrip().startswith("{"):
        try:
            return Layer(name=VARIABLE, whole=knobs_from_dict(json.loads(text)))
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidValueError(
                f"{VARIABLE}: {error} It is a JSON object with the family and all knobs, or single knobs: num_splits=8,num_stages=2."
            ) from None
    changes: dict[str, Any] = {}
    for part in text.split(","):
        knob, found, value = (piece.strip() for piece in part.partition("="))
        if not found or knob in changes:
            raise reject(VARIABLE, text, "each knob once, such as num_splits=8,num_stages=2")
        changes[knob] = _value(knob, value)
    return _layer(VARIABLE, None, changes)


def _value(knob: str, text: str) -> Any:
    """The value of the knob's own type; what cannot be one stays a text, which the check refuses by its name."""
    kinds = {type(getattr(s, knob)) for s in _SAMPLES.values() if hasattr(s, knob)}
    if bool in kinds:
        return _TRUTHS.get(text.lower(), text)
    if int in kinds:
        with contextlib.suppress(ValueError):
            return int(text)
    return text


@functools.lru_cache(maxsize=4096)
def _warn(name: str, problem: Problem, target: Target, reason: str) -> None:
    """Say it, once per process."""
    LOGGER.warning(
        "%s does not fit block_size=%d head_dim=%d qg=%d on %s and is left out: %s",
        name, problem.block_size, problem.head_dim, problem.qg, target.arch, reason,
    )  # fmt: skip
