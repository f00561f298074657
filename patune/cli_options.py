"""Options that commands share, and how their values are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patune.errors import reject
from patune.problem import (
    BLOCK_SIZES,
    DTYPES,
    HEAD_DIMS,
    KV_LAYOUTS,
    KV_QUANTS,
    MAX_QUERY_LENGTH,
    MAX_ROWS,
)
from patune.record import check_choice, check_int
from patune.settings import parse_place
from patune.target import ARCHS, Target
from patune.tuner.efforts import EFFORTS as EFFORT_TABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from patune.settings import DatabasePlace

    Command = Callable[..., Any]
    Decorator = Callable[[Command], Command]

SECONDS_PER_UNIT = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
SAMPLERS = (
    "model",
    "local",
    "tpe",
    "gp",
    "random",
    "brute",
)  # of SweepOptions, without that import
REPLAYED = (*SAMPLERS, "model-alone")  # patune.tuner.simulate.REPLAYED, likewise
EFFORTS = tuple(EFFORT_TABLE)
DEFAULT_EFFORT = "standard"
EFFORT_HELP = "Trials per key, measured (emulated): " + ", ".join(
    f"{effort.name} {effort.trials['measured']} ({effort.trials['emulated']})"
    for effort in EFFORT_TABLE.values()
)
ROBUST = ("worst", "mean")  # likewise
COMMAND_LINE = "patune.command_line"
LISTING_SCHEMA = 1
KNOB_SETS = ("default", "grid")  # patune.tuner.check_cases.KNOB_SETS, likewise
CORE_AXES = {
    "block_size": f"Tokens per cache page: {', '.join(map(str, BLOCK_SIZES))}.",
    "head_dim": f"Elements per head: {', '.join(map(str, HEAD_DIMS))}.",
    "qg": f"Query heads per KV head: 1 to {MAX_ROWS}.",
}
SIZE_AXES = {
    "batch": "Sequences.",
    "context": "Tokens of the longest sequence; with a sliding window, of the window.",
    "kv_heads": "KV heads on one device.",
}
VARIANT_AXES = {"query_length": f"Query tokens per sequence: 1 to {MAX_QUERY_LENGTH}."}
TARGET_HELP = (
    f"Architecture: {', '.join(ARCHS)}. Default: PATUNE_TARGET, else the GPU here, else gfx942."
)
VARIANT = {  # text options of a problem: the values that Problem allows
    "query_dtype": DTYPES,
    "kv_dtype": DTYPES,
    "kv_quant": KV_QUANTS,
    "kv_layout": KV_LAYOUTS,
}
VARIANT_DEFAULTS = {
    "query_dtype": "the cache's, bf16 over an fp8 cache"
}  # the others: their first value
SHORT_FLAGS = {"kv_layout": ("--layout",)}


def print_json(document: Any) -> None:
    """The one JSON document of ``--json``."""
    import json

    click.echo(json.dumps(document, indent=2, allow_nan=False))


def parse_integers(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[int, ...]:
    """``--qg 1,8 --qg 16`` is (1, 8, 16).

    Raises:
        InvalidValueError: something else than integers and commas.
    """
    try:
        return tuple(int(part) for text in value for part in text.split(","))
    except ValueError:
        raise reject(param.opts[0], ",".join(value), "integers separated by commas") from None


def parse_archs(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    """``--target gfx942,sm_90`` is ("gfx942", "sm_90"), each once.

    Raises:
        InvalidValueError: no known architecture.
    """
    archs = dict.fromkeys(part for text in value for part in text.split(","))
    return tuple(Target.named(arch).arch for arch in archs)


def parse_samplers(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    """``--sampler model,tpe`` is ("model", "tpe"), each once.

    Raises:
        InvalidValueError: no known sampler.
    """
    samplers = dict.fromkeys(part for text in value for part in text.split(","))
    for sampler in samplers:
        check_choice(param.opts[0], sampler, REPLAYED)
    return tuple(samplers)


def parse_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """``90s``, ``10m``, ``1h`` or plain seconds, in seconds.

    Raises:
        InvalidValueError: anything else, or no time at all.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value)
    seconds = float(match[1]) * SECONDS_PER_UNIT[match[2]] if match else 0.0
    if seconds <= 0:
        raise reject(param.opts[0], value, "a time above zero, such as 90s, 10m or 1h")
    return seconds


def _stack(options: Iterable[Decorator]) -> Decorator:
    """One decorator out of several; help lists them in this order."""
    ordered = list(options)

    def decorate(command: Command) -> Command:
        for option in reversed(ordered):
            command = option(command)
        return command

    return decorate


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variant() -> list[Decorator]:
    texts = [
        click.option(
            *SHORT_FLAGS.get(name, ()),
            _flag(name),
            name,
            metavar="NAME",
            help=f"{', '.join(allowed)}. Default: {VARIANT_DEFAULTS.get(name, allowed[0])}.",
        )
        for name, allowed in VARIANT.items()
    ]
    window = click.option(
        "--window/--no-window", "windowed", default=None, help="With a sliding window. Default: no."
    )
    sinks = click.option(
        "--sinks/--no-sinks", default=None, help="With attention sinks. Default: no."
    )
    softcap = click.option(
        "--softcap/--no-softcap", default=None, help="With capped scores. Default: no."
    )
    fp8_math = click.option(
        "--fp8-math/--no-fp8-math",
        default=None,
        help="Products of an fp8 cache in fp8, less exact. Default: no, in 16 bits.",
    )
    return [*texts, window, sinks, softcap, fp8_math]


def many_keys(defaults: Mapping[str, str], *, sizes: bool = True) -> Decorator:
    """Options of a set of keys: every axis takes several integers; ``defaults`` says in words what it is without.

    Without ``sizes`` they are options of a set of problems.
    """

    def axis(name: str, text: str) -> Decorator:
        return click.option(
            _flag(name),
            multiple=True,
            metavar="INT,...",
            callback=parse_integers,
            help=f"{text} Default: {defaults[name]}.",
        )

    axes = CORE_AXES | VARIANT_AXES | (SIZE_AXES if sizes else {})
    return _stack([*(axis(name, text) for name, text in axes.items()), *_variant()])


def one_key(*, short: bool = False) -> Decorator:
    """Options of one key: the core is required, the rest is left to the library when not given.

    With ``short`` the core may be given as :data:`patune.cli_keys.key_argument` has it.
    """
    core = [
        click.option(_flag(name), type=int, required=not short, help=text)
        for name, text in CORE_AXES.items()
    ]
    rest = [
        click.option(_flag(name), type=int, help=text)
        for name, text in (VARIANT_AXES | SIZE_AXES).items()
    ]
    return _stack([*core, *rest, *_variant(), target_option])


def check_filter(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Refuse a filter that nothing can match.

    Raises:
        InvalidValueError: the value is not one that a key can have.
    """
    if value is not None:
        match param.name:
            case "block_size":
                check_choice("block_size", value, BLOCK_SIZES)
            case "head_dim":
                check_choice("head_dim", value, HEAD_DIMS)
            case "qg":
                check_int("qg", value, low=1, high=MAX_ROWS)
            case _:
                Target.named(value)
    return value


def filters() -> Decorator:
    """Options that narrow a listing."""
    core = [
        click.option(_flag(name), type=int, callback=check_filter, help=text)
        for name, text in CORE_AXES.items()
    ]
    archs = f"{', '.join(ARCHS)}."
    target = click.option("--target", metavar="ARCH", callback=check_filter, help=archs)
    return _stack([*core, target])


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given a value. A 16-bit cache's type is the query's too, unless that was given."""
    values = {name: value for name, value in options.items() if value is not None}
    if values.get("kv_dtype") in ("bf16", "fp16"):
        values.setdefault("query_dtype", values["kv_dtype"])
    return values


def split_variant(
    options: Mapping[str, Any],
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """A sweep's key options as its axes, and the rest of the problem as far as it was given."""
    axes = CORE_AXES | VARIANT_AXES | SIZE_AXES
    variant = {name: value for name, value in options.items() if name not in axes}
    return {name: options[name] for name in axes if name in options}, given(variant)


target_option = click.option("--target", metavar="ARCH", help=TARGET_HELP)
targets_option = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="ARCH,...",
    callback=parse_archs,
    help=f"Architectures: {', '.join(ARCHS)}. Default: all of them.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), help="Worker processes. Default: one per CPU."
)
pack_option = click.option(
    "--pack", type=click.Path(path_type=Path), help="A pack file in the place of the database."
)


def parse_database(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> DatabasePlace | None:
    """A file, or the URL of a database on a PostgreSQL server.

    Raises:
        InvalidValueError: the URL is of another kind of database.
    """
    return parse_place(value) if value is not None else None


db_option = click.option(
    "--db",
    metavar="FILE|URL",
    callback=parse_database,
    help="Config database: a file, or postgresql://USER@HOST/NAME. Default: PATUNE_DB, else patune.db in the user's data folder.",
)
