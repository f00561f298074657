"""Planted kernel bugs: copies of the real kernel sources with a text replaced, behind the real plan; and the problems that show them."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutants_base import FAMILIES, PLACES, Mutant
from mutants_cdna import CDNA
from mutants_hopper import HOPPER
from mutants_shared import SHARED

import patune.kernels
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.kernels.plan import plan_decode
from patune.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.kernels.calls import KernelCall

__all__ = [
    "CDNA_KNOBS", "CDNA_PROBLEM", "FAMILIES", "HOPPER_KNOBS", "HOPPER_PROBLEM", "MUTANTS", "PLACES", "SOURCES", "Mutant",
    "mutants_of", "plant", "posed",
]  # fmt: skip

SOURCES = (
    "tiles", "overlap", "query", "epilogue", "reduce", "hopper_layouts", "hopper_copy", "hopper_operands", "hopper",
    "cdna_layouts", "cdna_loads", "cdna_ring", "cdna",
)  # fmt: skip
_serial = itertools.count()

MUTANTS = SHARED + HOPPER + CDNA
# Every mutant shows here: windowed, several query tokens, sinks, pages smaller than a tile, several splits; and what it asks for besides.
CDNA_PROBLEM = Problem(block_size=16, head_dim=64, qg=4, query_length=2, windowed=True, sinks=True)
CDNA_KNOBS = CdnaKnobs(
    partition_tokens=64, num_splits=2, num_stages=1, num_warps=2, reduce_chunk=8, reduce_warps=1
)
HOPPER_PROBLEM = replace(CDNA_PROBLEM, head_dim=128)
HOPPER_KNOBS = HopperKnobs(
    partition_tokens=64, num_splits=6, num_stages=3, num_warps=4, reduce_chunk=4
)


def mutants_of(family: str, *, shown_by: str | None = None) -> list[Mutant]:
    """Every bug that can be planted in a family's kernels, or those that a place shows."""
    assert shown_by is None or shown_by in PLACES
    return [m for m in MUTANTS if family in m.families and (shown_by or m.shows[0]) in m.shows]


def posed(mutant: Mutant, family: str) -> tuple[Problem, HopperKnobs | CdnaKnobs, str]:
    """The problem, the knobs and the architecture on which a mutant shows."""
    if family == "cdna_mfma":
        problem, arch = CDNA_PROBLEM, mutant.cdna_arch
        knobs: HopperKnobs | CdnaKnobs = CDNA_KNOBS
    else:
        problem, knobs, arch = HOPPER_PROBLEM, HOPPER_KNOBS, "sm_90"
    return replace(problem, **mutant.problem), replace(knobs, **mutant.knobs), arch


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
            text = mutant.planted_in(text)
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
