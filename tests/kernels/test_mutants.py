"""The planted bugs themselves: each changes exactly one place of the kernels as they are, on a problem that its family computes."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mutants import FAMILIES, MUTANTS, SOURCES, mutants_of, plant

import patune.kernels
from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.problem import Problem
from patune.target import Target

if TYPE_CHECKING:
    from mutants import Mutant

PROBLEM = Problem(block_size=16, head_dim=64, qg=4, query_length=2, windowed=True, sinks=True)
TILE = {"partition_tokens": 64, "num_splits": 2, "num_stages": 1}
ON = {
    "hopper_wgmma": (Target.named("sm_90"), HopperKnobs(num_warps=4, **TILE)),
    "cdna_mfma": (Target.named("gfx942"), CdnaKnobs(num_warps=2, **TILE)),
}
FOLDER = Path(patune.kernels.__path__[0])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module}-{m.name}")
def test_a_mutant_changes_one_place_of_what_a_family_computes(mutant: Mutant) -> None:
    text = (FOLDER / f"{mutant.module}.py").read_text()
    assert text.count(mutant.old) == 1
    before, after = ast.parse(text), ast.parse(text.replace(mutant.old, mutant.new))
    assert ast.dump(before) != ast.dump(after), "the place is code"
    assert mutant.module in SOURCES
    for family in mutant.families:
        target, knobs = ON[family]
        if family == "cdna_mfma":
            target = Target.named(mutant.cdna_arch)
        problem = replace(PROBLEM, **mutant.problem)
        assert is_feasible(replace(knobs, **mutant.knobs), problem, target) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_unique(family: str) -> None:
    names = [mutant.name for mutant in mutants_of(family)]
    assert len(set(names)) == len(names) > 15


@pytest.mark.parametrize("name", SOURCES)
def test_a_copy_uses_copies_only(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    used = set(re.findall(r"patune\.kernels\.(\w+)", text)) | set(re.findall(r"from patune.kernels import", text))  # fmt: skip
    assert used <= {*SOURCES, "gluon_compat"}


def test_a_planted_bug_is_in_the_module_that_is_launched(tmp_path: Path) -> None:
    import torch

    from patune.kernels.samples import sample_inputs
    from patune.problem import Workload

    mutant = next(m for m in MUTANTS if m.name == "lost_last_tile")
    inputs = sample_inputs(PROBLEM, Workload(batch=1, kv_heads=1, context=64), torch.device("cpu"))
    for target, knobs in ON.values():
        one_shot = replace(knobs, num_splits=1)
        (call,) = plant(mutant, tmp_path)(inputs, one_shot, target, out=inputs.query)
        module = Path(call.kernel.fn.__code__.co_filename)
        assert tmp_path in module.parents
        assert mutant.new in module.with_name("tiles.py").read_text()
        assert mutant.old not in module.with_name("tiles.py").read_text()
        called = call.kernel.fn.__globals__["tile_range"].fn.__code__.co_filename
        assert Path(called) == module.with_name("tiles.py")
