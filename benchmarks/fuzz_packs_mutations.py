"""Random damage to packs, of bytes and of structure, for fuzz_packs.py. The same generator gives the same mutant."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patune.configs.block import Block
from patune.configs.pack import document_of, pack_text
from patune.configs.packs import Pack, load_pack
from patune.configs.winner import RobustWinner
from patune.kernels.knobs import HopperKnobs
from patune.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

SHIPPED = Path(__file__).parents[1] / "patune" / "configs" / "packs" / "sm_90" / "nvidia_h200.json"
TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"1e400", b"-0.0", b"NaN")
TOKENS += (b"\\u0000", b"\\ud800", b"\xff", b"\x00", b"9" * 5000, b"[" * 2000, b"\xe2\x80\xae")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 64, 128, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 64.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "0", "1", "true", "sm_90", "gfx942", "measured", "emulated", "hopper_wgmma", "hang"),
    *("\x00", "\x1b[2J", "\u202e", "\ud800", "é", "\ufeff", "x" * 300, "x" * 301, "../../x"),
    *("2026-11-22T10:42:00Z", "9999-12-31T23:59:59Z", "2026-02-30T00:00:00Z", "0000-00-00"),
    *([], {}, [[]], [{}], [1], {"": 0}, {"schema": 4}, {"__class__": "os.system"}),
)
NAMES = ("evil", "__proto__", "imported_from", "softcap", "schema", "winners", "knobs", "\u200bqg")


def base_texts() -> list[str]:
    """What is mutated: small packs with every kind of entry, and one of each earlier schema."""
    pack = load_pack(SHIPPED)
    first, second, third = (w for w in pack.winners[:9:4])
    robust = RobustWinner(
        target=first.target,
        environment=first.environment,
        problem=first.problem,
        objective="worst",
        workloads=(first.workload, dataclasses.replace(first.workload, batch=2)),
        knobs=first.knobs,
        regrets=(1.0, 1.25),
        score=1.25,
        created=first.created,
    )
    assert isinstance(first.knobs, HopperKnobs)
    blocks = [
        Block(
            arch="sm_90",
            kernel_source_hash=first.environment.kernel_source_hash,
            problem=problem,
            knobs=dataclasses.replace(first.knobs, num_splits=7),
            status=status,
            reason="an illegal memory access was encountered",
            created=first.created,
        )
        for problem, status in (
            (first.problem, "hang"),
            (Problem(block_size=16, head_dim=64, qg=8), "illegal_access"),
        )
    ]

    def document(*winners: Any, most: int, **rest: Any) -> dict[str, Any]:
        beside = {w.key: pack.candidates[w.key][:most] for w in winners}
        return document_of(Pack(winners=list(winners), candidates=beside, **rest))

    whole = document(first, second, most=2, robust=[robust], blocklist=blocks)
    plain = document(third, most=5)
    older = [_downgraded(document(first, most=1), schema) for schema in (1, 2, 3)]
    return [pack_text(document) for document in (whole, whole, plain, *older)]


def _downgraded(document: dict[str, Any], schema: int) -> dict[str, Any]:
    older = copy.deepcopy(document)
    older["schema"] = schema
    del older["robust"], older["blocklist"]
    for entry in older["winners"]:
        if schema < 3:
            del entry["candidates"], entry["speedup"]
            for name in ("low_us", "high_us", "protocol"):
                del entry["timing"][name]
        if schema < 2:
            del entry["problem"]["softcap"], entry["problem"]["fp8_math"]
    return older


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside of a document."""
    children: list[Any] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [at] * bool(at) + [p for name, child in children for p in places(child, (*at, name))]


def _holder(document: Any, at: tuple[Any, ...]) -> Any:
    for step in at[:-1]:
        document = document[step]
    return document


def _at(document: Any, random: Random) -> tuple[Any, Any]:
    """What holds a random value, and the value's name in it."""
    place = random.choice(places(document))
    return _holder(document, place), place[-1]


def replace_value(document: Any, random: Random) -> None:
    holder, name = _at(document, random)
    holder[name] = copy.deepcopy(random.choice(VALUES))


def nudge_value(document: Any, random: Random) -> None:
    """Another value of the same type, or of one that is nearly the same: much of this is accepted."""
    numbers = [p for p in places(document) if isinstance(_holder(document, p)[p[-1]], int | float)]
    if not numbers:
        return
    place = random.choice(numbers)
    holder, name = _holder(document, place), place[-1]
    value = holder[name]
    ways: list[Callable[[], Any]] = [
        lambda: value * 2,
        lambda: value + 1,
        lambda: float(value),
        lambda: str(value),
        lambda: bool(value),
        lambda: -value,
        lambda: value / 2,
    ]
    holder[name] = random.choice(ways)()


def drop_value(document: Any, random: Random) -> None:
    holder, name = _at(document, random)
    del holder[name]


def add_field(document: Any, random: Random) -> None:
    holder, name = _at(document, random)
    target = holder if isinstance(holder, dict) else holder[name]
    if isinstance(target, dict):
        target[random.choice(NAMES)] = copy.deepcopy(random.choice(VALUES))


def rename_field(document: Any, random: Random) -> None:
    holder, name = _at(document, random)
    if isinstance(holder, dict):
        holder[random.choice((name.upper(), name + " ", random.choice(NAMES)))] = holder.pop(name)


def move_value(document: Any, random: Random) -> None:
    """The value of one place in another one, too."""
    holder, name = _at(document, random)
    source, other = _at(document, random)
    holder[name] = copy.deepcopy(source[other])  # which may hold the place itself: a copy of before


def repeat_entry(document: Any, random: Random) -> None:
    lists = [p for p in places(document) if isinstance(_holder(document, p)[p[-1]], list)]
    filled = [place for place in lists if _holder(document, place)[place[-1]]]
    if filled:
        place = random.choice(filled)
        entries = _holder(document, place)[place[-1]]
        entries.insert(random.randrange(len(entries) + 1), copy.deepcopy(random.choice(entries)))


def shuffle_entries(document: Any, random: Random) -> None:
    holder, name = _at(document, random)
    if isinstance(holder[name], list):
        random.shuffle(holder[name])
    elif isinstance(holder[name], dict):
        items = list(holder[name].items())
        random.shuffle(items)
        holder[name] = dict(items)


STRUCTURE = (replace_value, replace_value, nudge_value, nudge_value, drop_value, add_field)
STRUCTURE += (rename_field, move_value, repeat_entry, shuffle_entries)


def _range(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 1, 2, 8, 64, 512)))


def flip_bit(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def cut_range(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:start] + data[end:]


def repeat_range(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:end] + data[start:end] + data[end:]


def insert_token(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data) + 1)
    return data[:place] + random.choice(TOKENS) + data[place:]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def change_digit(data: bytes, random: Random) -> bytes:
    digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    place = random.choice(digits)
    return data[:place] + str(random.randrange(10)).encode() + data[place + 1 :]


def repeat_line(data: bytes, random: Random) -> bytes:
    """A field twice, mostly."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    return b"\n".join([*lines[: place + 1], *lines[place:]])


BYTES = (flip_bit, cut_range, repeat_range, insert_token, truncate, change_digit, change_digit)
BYTES += (repeat_line,)


def mutant(bases: list[str], random: Random) -> tuple[str, bytes]:
    """The name of what was done, and the bytes of a damaged pack."""
    text = random.choice(bases)
    if random.random() < 0.3:
        damage = random.choice(BYTES)
        return damage.__name__, damage(text.encode(), random)
    document = json.loads(text)
    names = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(STRUCTURE)
        if places(document):
            change(document, random)
            names.append(change.__name__)
    return names[0], json.dumps(document, indent=random.choice((None, None, None, 2))).encode()
