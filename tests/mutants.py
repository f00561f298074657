"""Planted kernel bugs: copies of the real kernel sources with one text replaced, behind the real plan."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patune.kernels
from patune.kernels.plan import plan_decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.kernels.calls import KernelCall

SOURCES = ("tiles", "epilogue", "reduce", "hopper_layouts", "hopper", "cdna")
_serial = itertools.count()


@dataclass(frozen=True)
class Mutant:
    """One planted bug: in ``module``, ``old`` becomes ``new``."""

    name: str
    module: str
    old: str
    new: str


# Text that both families run through, so every mutant is planted for each of them.
MUTANTS = (
    Mutant("causal_off_by_one", "tiles", "position <= limit", "position < limit"),
    Mutant("sees_past_context", "tiles", "position <= limit", "position <= limit + 1"),
    Mutant(
        "window_one_short", "tiles", "position > limit - window", "position > limit - window + 1"
    ),
    Mutant(
        "window_one_long", "tiles", "position > limit - window", "position > limit - window - 1"
    ),
    Mutant(
        "lost_last_tile",
        "tiles",
        "n_tiles = (context + TILE - 1) // TILE",
        "n_tiles = context // TILE",
    ),
    Mutant(
        "tile_in_two_splits",
        "tiles",
        "end = gl.minimum(begin + per_split, n_tiles)",
        "end = gl.minimum(begin + per_split + 1, n_tiles)",
    ),
    Mutant(
        "sum_not_rescaled", "tiles", "sums * gl.expand_dims(rescale, AXIS) + probs", "sums + probs"
    ),
    Mutant("sink_in_wrong_base", "tiles", ".to(gl.float32) * LOG2E", ".to(gl.float32)"),
    Mutant("lse_in_base_2", "tiles", ") * LN2, NEG_INF)", "), NEG_INF)"),
    Mutant(
        "head_map_transposed",
        "tiles",
        "row // GROUP) * stride_token + (kv_head * GROUP + row % GROUP)",
        "row % QUERY_LENGTH) * stride_token + (kv_head * GROUP + row // QUERY_LENGTH)",
    ),
    Mutant("reduce_reads_empty_splits", "reduce", "wrote = part_sum > 0.0", "wrote = in_range"),
    Mutant(
        "reduce_drops_last_chunk",
        "reduce",
        "range(0, num_splits, CHUNK)",
        "range(0, num_splits - CHUNK + 1, CHUNK)",
    ),
    Mutant(
        "split_slot_collision",
        "epilogue",
        "* num_splits + split) * ROWS",
        "* num_splits + split // 2) * ROWS",
    ),
)


def plant(mutant: Mutant, folder: Path) -> Callable[..., list[KernelCall]]:
    """A plan whose kernels carry the bug. The copies are real modules in ``folder``: Triton reads the source of what it compiles."""
    package = f"mutant_{next(_serial)}"
    root = folder / package
    root.mkdir()
    (root / "__init__.py").write_text("")
    for name in SOURCES:
        text = (Path(patune.kernels.__path__[0]) / f"{name}.py").read_text()
        for other in SOURCES:
            text = text.replace(f"patune.kernels.{other} import", f"{package}.{other} import")
        if name == mutant.module:
            assert text.count(mutant.old) == 1, (
                f"{mutant.name}: {text.count(mutant.old)} places to plant it"
            )
            text = text.replace(mutant.old, mutant.new)
        (root / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    modules = {
        f"patune.kernels.{name}": importlib.import_module(f"{package}.{name}") for name in SOURCES
    }

    def plan(*args: Any, **kwargs: Any) -> list[KernelCall]:
        calls = plan_decode(*args, **kwargs)
        return [
            replace(
                call, kernel=getattr(modules[call.kernel.fn.__module__], call.kernel.fn.__name__)
            )
            for call in calls
        ]

    return plan
