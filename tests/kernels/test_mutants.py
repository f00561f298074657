"""The planted bugs themselves: each changes the kernels as they are, in one place per edit, on a problem that its family computes."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mutants import FAMILIES, MUTANTS, PLACES, SOURCES, mutants_of, plant, posed

import patune.kernels
from patune.kernels.feasibility import is_feasible
from patune.target import Target

if TYPE_CHECKING:
    from mutants import Mutant

FOLDER = Path(patune.kernels.__path__[0])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module}-{m.name}")
def test_a_mutant_changes_what_a_family_computes(mutant: Mutant) -> None:
    assert mutant.module in SOURCES
    text = (FOLDER / f"{mutant.module}.py").read_text()
    for old, new in mutant.edits:
        assert text.count(old) == 1, "one place, and the same with or without the other edits"
        if len(mutant.edits) == 1:
            assert mutant.planted_in(text) == text.replace(old, new)
    before, after = ast.parse(text), ast.parse(mutant.planted_in(text))
    assert ast.dump(before) != ast.dump(after), "the place is code"
    for family in mutant.families:
        problem, knobs, arch = posed(mutant, family)
        assert is_feasible(knobs, problem, Target.named(arch)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_unique_and_so_are_bugs(family: str) -> None:
    mutants = mutants_of(family)
    assert len({m.name for m in mutants}) == len(mutants) > 130
    planted = Counter((m.module, m.edits, posed(m, family)) for m in mutants)
    assert max(planted.values()) == 1


def test_who_can_see_a_mutant_runs_its_kernels() -> None:
    for mutant in MUTANTS:
        assert set(mutant.shows) <= set(PLACES)
        assert mutant.shows
    compiled = {m.name for m in MUTANTS if "cdna_mfma" in m.families}
    assert compiled - {m.name for m in mutants_of("cdna_mfma", shown_by="emulator")} == {"reduce_order_by_sequence"}  # fmt: skip
    on_device = mutants_of("hopper_wgmma", shown_by="device")
    assert {m.name for m in on_device} == {m.name for m in MUTANTS if "hopper_wgmma" in m.families}
    by_hardware = {m.name for m in on_device} - {m.name for m in mutants_of("hopper_wgmma", shown_by="evaluator")}  # fmt: skip
    assert by_hardware == {
        "kernel_before_not_waited_for", "reduce_order_by_sequence", "sum_of_fp8_probabilities",
    }  # fmt: skip


def test_a_text_that_is_not_there_once_is_refused() -> None:
    mutant = next(m for m in MUTANTS if m.name == "lost_last_tile")
    with pytest.raises(AssertionError, match="lost_last_tile: 2 places"):
        mutant.planted_in(f"{mutant.old}; {mutant.old}")


@pytest.mark.parametrize("name", SOURCES)
def test_a_copy_uses_copies_only(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    used = set(re.findall(r"patune\.kernels\.(\w+)", text)) | set(re.findall(r"from patune.kernels import", text))  # fmt: skip
    assert used <= {*SOURCES, "gluon_compat"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_bug_is_in_the_module_that_is_launched(family: str, tmp_path: Path) -> None:
    import torch

    from patune.kernels.samples import sample_inputs
    from patune.problem import Workload

    mutant = next(m for m in MUTANTS if m.name == "lost_last_tile")
    problem, knobs, arch = posed(mutant, family)
    inputs = sample_inputs(problem, Workload(batch=1, kv_heads=1, context=64), torch.device("cpu"))
    one_shot = replace(knobs, num_splits=1)
    (call,) = plant(mutant, tmp_path)(inputs, one_shot, Target.named(arch), out=inputs.query)
    module = Path(call.kernel.fn.__code__.co_filename)
    assert tmp_path in module.parents
    tiles = module.with_name("tiles.py")
    assert tiles.read_text().replace(mutant.new, mutant.old) == (FOLDER / "tiles.py").read_text()
    called = call.kernel.fn.__globals__["tile_range"].fn.__code__.co_filename
    assert Path(called) == tiles
