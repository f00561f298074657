"""What benchmarks/decode.py measures: classes of decode steps with their goals, and the rows (class, layout, page) of its table.

Everywhere 64 query heads over 8 KV heads of 128 channels. A goal is a ratio to the cold read of the same bytes of K and V.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from patune.problem import Problem, Workload

QG, KV_HEADS, HEAD_DIM = 8, 8, 128
LAYOUTS = ("hnd", "nhd", "aiter", "aiter_5d")
PAGES = (16, 64, 1024)
EVERY_CACHE = tuple(itertools.product(("hnd", "nhd", "aiter"), (64, 16, 1024)))
SOME_CACHES = (("hnd", 64), ("aiter", 1024), ("nhd", 16))
WINDOW = 128
RAGGED_LENGTHS = (64, 8191)
RAGGED_CONTEXT = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeClass:
    """One class of decode steps.

    Attributes:
        goal: time over the floor that is wanted; ``page16_goal`` where page 16 has one of its own.
        ragged: lengths are uniformly random, else all are ``context``.
        caches: (layout, page) that are measured when none are chosen.
    """

    name: str
    batch: int
    context: int
    goal: float
    page16_goal: float | None = None
    query_length: int = 1
    windowed: bool = False
    fp8: bool = False
    fp8_math: bool = False
    ragged: bool = False
    caches: tuple[tuple[str, int], ...] = SOME_CACHES


CLASSES = (
    DecodeClass(
        name="b128_c4096", batch=128, context=4096, goal=1.02, page16_goal=1.04, caches=EVERY_CACHE
    ),
    DecodeClass(
        name="b128_c32768",
        batch=128,
        context=32768,
        goal=1.02,
        page16_goal=1.04,
        caches=EVERY_CACHE,
    ),
    DecodeClass(
        name="b16_c32768", batch=16, context=32768, goal=1.02, page16_goal=1.04, caches=EVERY_CACHE
    ),
    DecodeClass(name="b16_c4096", batch=16, context=4096, goal=1.04, caches=EVERY_CACHE),
    DecodeClass(name="b1_c32768", batch=1, context=32768, goal=1.12, caches=EVERY_CACHE),
    DecodeClass(name="b1_c4096", batch=1, context=4096, goal=1.45, caches=EVERY_CACHE),
    DecodeClass(name="fp8_b128_c4096", batch=128, context=4096, goal=1.12, fp8=True),
    DecodeClass(name="fp8_b16_c32768", batch=16, context=32768, goal=1.12, fp8=True),
    DecodeClass(name="fp8_b1_c32768", batch=1, context=32768, goal=1.4, fp8=True),
    DecodeClass(
        name="fp8native_b128_c4096", batch=128, context=4096, goal=1.05, fp8=True, fp8_math=True
    ),
    DecodeClass(
        name="fp8native_b16_c32768", batch=16, context=32768, goal=1.05, fp8=True, fp8_math=True
    ),
    DecodeClass(
        name="fp8native_b1_c32768", batch=1, context=32768, goal=1.35, fp8=True, fp8_math=True
    ),
    DecodeClass(name="window128_b16", batch=16, context=32768, goal=1.25, windowed=True),
    DecodeClass(name="window128_b128", batch=128, context=32768, goal=1.12, windowed=True),
    DecodeClass(name="ql4_b16_c4096", batch=16, context=4096, goal=1.06, query_length=4),
    DecodeClass(name="ql4_b128_c4096", batch=128, context=4096, goal=1.03, query_length=4),
    DecodeClass(name="ql4_b1_c32768", batch=1, context=32768, goal=1.15, query_length=4),
    DecodeClass(name="ragged_b128", batch=128, context=RAGGED_CONTEXT, goal=1.08, ragged=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A class over one kind of cache: what one line of the table is about."""

    decode_class: DecodeClass
    layout: str
    page: int

    @property
    def name(self) -> str:
        """``b1_c4096/hnd/64``."""
        return f"{self.decode_class.name}/{self.layout}/{self.page}"

    @property
    def goal(self) -> float:
        """Time over the floor that is wanted of this page."""
        of_page = self.decode_class.page16_goal if self.page == 16 else None
        return of_page or self.decode_class.goal

    @property
    def problem(self) -> Problem:
        """What is computed. An fp8 cache has one scale for keys and one for values."""
        kind = self.decode_class
        return Problem(
            block_size=self.page,
            head_dim=HEAD_DIM,
            qg=QG,
            query_length=kind.query_length,
            kv_dtype="fp8_e4m3fn" if kind.fp8 else "bf16",
            kv_quant="per_tensor" if kind.fp8 else "none",
            kv_layout=self.layout,
            windowed=kind.windowed,
            fp8_math=kind.fp8_math,
        )

    @property
    def workload(self) -> Workload:
        """The sizes; a windowed problem's context is its window."""
        kind = self.decode_class
        context = WINDOW if kind.windowed else kind.context
        return Workload(batch=kind.batch, kv_heads=KV_HEADS, context=context)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        kind = self.decode_class
        if not kind.ragged:
            return (kind.context,) * kind.batch
        rng = random.Random(0)
        return tuple(rng.randint(*RAGGED_LENGTHS) for _ in range(kind.batch))

    def payload(self) -> dict[str, Any]:
        """The row for a worker process, JSON types only."""
        return {
            "problem": self.problem.to_dict(),
            "workload": self.workload.to_dict(),
            "lengths": list(self.lengths),
        }


def choose_rows(classes: list[str], caches: list[str], *, one_cache: bool = False) -> list[Row]:
    """The rows of classes whose names start with one of ``classes``, over the caches chosen; empty lists choose nothing in particular.

    Args:
        classes: names or beginnings of names.
        caches: ``hnd``, ``hnd/64`` or ``64``.
        one_cache: only the first cache of each class.

    Raises:
        ValueError: a choice fits nothing.
    """
    for wanted in classes:
        if not any(c.name.startswith(wanted) for c in CLASSES):
            raise ValueError(f"no class {wanted!r}; there are {', '.join(c.name for c in CLASSES)}")
    chosen = [c for c in CLASSES if not classes or c.name.startswith(tuple(classes))]
    picked = [cache for text in caches for cache in _caches_of(text)]
    rows = []
    for kind in chosen:
        own = tuple(dict.fromkeys(picked)) or kind.caches
        rows += [
            Row(decode_class=kind, layout=layout, page=page)
            for layout, page in (own[:1] if one_cache else own)
        ]
    return rows


def _caches_of(text: str) -> list[tuple[str, int]]:
    layout, _, page = text.partition("/")
    if layout.isdigit():
        layout, page = "", layout
    found = [
        (a, b)
        for a, b in itertools.product(LAYOUTS if layout else LAYOUTS[:3], PAGES)
        if layout in ("", a) and page in ("", str(b))
    ]
    if not found:
        raise ValueError(
            f"no cache {text!r}; layouts {', '.join(LAYOUTS)}, pages {', '.join(map(str, PAGES))}"
        )
    return found
