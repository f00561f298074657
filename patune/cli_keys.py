"""Which key a command is about: its options, or the short form that tables print, and what both say together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from patune.cli_options import CORE_AXES, SIZE_AXES, given
from patune.errors import InvalidValueError, reject
from patune.sweep_request import option_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patune.configs.dispatcher import Answer
    from patune.problem import Problem, Workload
    from patune.target import Target

FORM = "1024/128/8[/BATCHxKV_HEADS[/CONTEXT]]"
SHORT_KEY = re.compile(r"(\d+)/(\d+)/(\d+)(?:[/ ] *(\d+) *x *(\d+)(?:[/x ] *(\d+))?)?")
SHORT_FIELDS = (*CORE_AXES, "batch", "kv_heads", "context")

key_argument = click.argument("key_words", nargs=-1, metavar="[KEY]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedKey:
    """A key as a command was asked for it."""

    target: Target
    problem: Problem
    workload: Workload

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        parts = {"target": self.target, "problem": self.problem, "workload": self.workload}
        return {name: part.to_dict() for name, part in parts.items()}


def parse_key(words: Sequence[str]) -> dict[str, int]:
    """``1024/128/8/128x8/4096``, or a row of a table: ``1024/128/8 128 x 8 4096``.

    Raises:
        InvalidValueError: it is neither.
    """
    text = " ".join(words)
    match = SHORT_KEY.fullmatch(text)
    if match is None:
        raise reject("KEY", text, f"{FORM}: block_size/head_dim/qg, and sizes")
    found = zip(SHORT_FIELDS, match.groups(), strict=True)
    return {name: int(value) for name, value in found if value is not None}


def key_values(options: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The fields of a key that the options or the short form give.

    Raises:
        InvalidValueError: they contradict each other, or the core is not whole.
    """
    short = parse_key(words) if words else {}
    values = given(options)
    for name, value in short.items():
        if values.get(name, value) != value:
            raise InvalidValueError(
                f"KEY {' '.join(words)} and {option_name(name)} {values[name]} contradict each other: {name} is {value} in one and "
                f"{values[name]} in the other. Leave one of them out."
            )
    values = {**values, **short}
    if missing := [option_name(name) for name in CORE_AXES if name not in values]:
        raise InvalidValueError(
            f"No key: {', '.join(missing)} not given. Name it as tables print it, {FORM}, or by options."
        )
    return values


def answer_for(options: Mapping[str, Any], words: Sequence[str]) -> Answer:
    """What serving uses for a key, and nobody counts it as a miss."""
    from patune.configs import dispatcher

    values = key_values(options, words)
    dispatcher.suspend_capture()
    return dispatcher.lookup(**values)


def asked_key(options: Mapping[str, Any], words: Sequence[str] = ()) -> AskedKey:
    """The key itself: sizes that are not given are those of a lookup, and so is the target.

    Raises:
        InvalidValueError: a value is not allowed.
    """
    from patune.configs.dispatcher import local_target
    from patune.problem import Problem, Workload

    values = key_values(options, words)
    arch = values.pop("target", None)
    sizes = {name: values.pop(name, usual) for name, usual in USUAL_SIZES.items()}
    return AskedKey(
        target=local_target(arch),
        problem=Problem.from_dict(values),
        workload=Workload.from_dict(sizes),
    )


USUAL_SIZES = {"batch": 128, "context": 4096, "kv_heads": 8}  # of patune.lookup
assert USUAL_SIZES.keys() == SIZE_AXES.keys()
