"""What a check looks at: chosen from the tables of the kernels, nothing is compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patune.errors import InvalidValueError
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.feasibility import is_feasible, unsupported
from patune.kernels.space import CHOICES
from patune.problem import Problem, Workload
from patune.target import ARCHS, Target
from patune.tuner.check_cases import CheckOptions, select_cases

PROBLEM = Problem(block_size=1024, head_dim=128, qg=8)
SMALL, LARGE = (Workload(batch=batch, kv_heads=8, context=4096) for batch in (1, 128))


def options(arch: str, **changes: object) -> CheckOptions:
    fields = {"problems": (PROBLEM,), "workloads": (SMALL, LARGE)} | changes
    return CheckOptions(targets=(Target.named(arch),), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHS)
def test_default_knobs_are_those_of_each_workload_once(arch: str) -> None:
    target = Target.named(arch)
    cases = select_cases(options(arch, workloads=(SMALL, LARGE, replace(LARGE, batch=256))))
    expected = [default_knobs(PROBLEM, workload, target) for workload in (SMALL, LARGE)]
    expected.append(safe_knobs(PROBLEM, target))
    assert len(set(expected)) == 3
    assert [case.knobs for case in cases] == expected
    assert all(case.default and not case.changed and not case.infeasible for case in cases)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_grid_moves_each_knob_alone_to_all_its_values(arch: str) -> None:
    target = Target.named(arch)
    base = default_knobs(PROBLEM, SMALL, target)
    cases = select_cases(options(arch, knobs="grid", workloads=(SMALL,)))
    assert [case.knobs for case in cases[:2]] == [base, safe_knobs(PROBLEM, target)]
    moved = cases[2:]
    seen: dict[str, set[object]] = {name: {getattr(base, name)} for name in base.to_dict()}
    for case in moved:
        ((name, value),) = case.changed.items()
        assert case.knobs == replace(base, **{name: value})
        assert not case.default
        assert case.label == f"{name}={value}"
        seen[name].add(value)
    wanted = CHOICES[target.limits.family]
    for name, values in seen.items():
        assert values == {*wanted.get(name, ()), getattr(base, name)}, name
    assert len(moved) == sum(len(set(v) - {getattr(base, n)}) for n, v in wanted.items())


def test_the_grid_has_what_is_infeasible_with_its_reason() -> None:
    target = Target.named("gfx942")
    cases = select_cases(options("gfx942", knobs="grid"))
    reasons = {case.label: case.infeasible for case in cases if case.infeasible}
    assert reasons
    for case in cases:
        assert case.knobs is not None
        assert case.infeasible == (is_feasible(case.knobs, PROBLEM, target) or "")


def test_moved_knobs_that_are_a_default_anyway_stay_one_default_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Target.named("gfx942")
    base = default_knobs(PROBLEM, SMALL, target)
    one_shot = replace(base, num_splits=1)
    monkeypatch.setattr(
        "patune.tuner.check_cases.default_knobs",
        lambda problem, workload, target: base if workload == SMALL else one_shot,
    )
    cases = select_cases(options("gfx942", knobs="grid"))
    assert [case.default for case in cases if case.knobs == one_shot] == [True]
    assert [case.knobs for case in cases[:3]] == [base, one_shot, safe_knobs(PROBLEM, target)]


def test_a_value_that_the_other_knobs_exclude_is_an_infeasible_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CHOICES, "cdna_mfma", {"num_stages": (1, 9)})
    base, safe, moved = select_cases(options("gfx942", knobs="grid", workloads=(SMALL,)))
    assert base.default
    assert safe.default
    assert (moved.knobs, moved.default, moved.changed) == (None, False, {"num_stages": 9})
    assert moved.infeasible.startswith("num_stages=9 is not allowed")


def test_a_problem_that_no_kernel_computes_is_one_row() -> None:
    capped = replace(PROBLEM, kv_dtype="fp8_e4m3fnuz", query_dtype="fp8_e4m3fnuz")
    target = Target.named("sm_90")
    (case,) = select_cases(options("sm_90", problems=(capped,), knobs="grid"))
    assert (case.knobs, case.label, case.default) == (None, "-", False)
    assert case.infeasible == unsupported(capped, target)
    assert "fp8_e4m3fn only" in case.infeasible


def test_rows_go_by_target_then_problem() -> None:
    other = replace(PROBLEM, qg=1)
    both = CheckOptions(
        targets=(Target.named("sm_90"), Target.named("gfx950")),
        problems=(PROBLEM, other, PROBLEM),
        workloads=(SMALL,),
    )
    seen = [(case.target.arch, case.problem.qg) for case in select_cases(both)]
    keys = [("sm_90", 8), ("sm_90", 1), ("gfx950", 8), ("gfx950", 1)]
    assert seen == [key for key in keys for _ in range(2)], "a default and the safe knobs of each"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"knobs": "all"}, "default, grid"), ({"problems": ()}, r"problems=\(\) is not allowed")],
)
def test_bad_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        options("gfx942", **changes)
