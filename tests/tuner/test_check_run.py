"""A check's rows: verdicts, order, identical builds, workers that die, and the real thing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import check_fakes
import pytest
from check_fakes import AMD_FACTS, SPILLS, WRONG, obey, rule

from patune.errors import DocumentError, EmulatorError
from patune.kernels.defaults import default_knobs
from patune.problem import Problem, Workload
from patune.target import Target
from patune.tuner import tasks
from patune.tuner.check_cases import CheckCase, CheckOptions, select_cases
from patune.tuner.check_rows import CheckReport, CheckRow, count_rows, is_refusal, outcome_of
from patune.tuner.check_run import BUILDS_AHEAD, check, run_checks
from patune.tuner.check_tasks import build_case, gate_case
from patune.tuner.crew import Crew

if TYPE_CHECKING:
    from pathlib import Path

    from patune.kernels.knobs import Knobs

GFX942, SM90 = Target.named("gfx942"), Target.named("sm_90")
PROBLEM = Problem(block_size=16, head_dim=64, qg=4, query_length=2, windowed=True, sinks=True)
SMALL, LARGE = (Workload(batch=batch, kv_heads=8, context=4096) for batch in (1, 128))
PRELOAD = (
    "patune.tuner.workbench",
    "patune.kernels.space",
)  # as fake_tasks: the first crew decides


def case(target: Target = GFX942, **changed: Any) -> CheckCase:
    knobs: Knobs = replace(default_knobs(PROBLEM, SMALL, target), **changed)
    return CheckCase(target=target, problem=PROBLEM, knobs=knobs, changed=changed)


def run(cases: list[CheckCase], jobs: int = 1, **options: Any) -> list[CheckRow]:
    options = {"worker_tasks": check_fakes.TASKS} | options
    return list(run_checks(cases, jobs=jobs, preload=PRELOAD, **options))


def summary(rows: list[CheckRow]) -> list[tuple[str, str, str]]:
    return [(row.label, row.status, row.outcome) for row in rows]


def test_each_step_can_end_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"status": "not_verified", "reason": "`v_new`: not verified", "gate_cases": 1}
    obey(
        monkeypatch,
        rule("build", SPILLS, waves_per_eu=1),
        rule("gate", WRONG, waves_per_eu=2),
        rule("gate", refused, waves_per_eu=3),
        rule("build", {"status": "compile_error", "reason": "no", "facts": None}, waves_per_eu=4),
    )
    stuck = replace(case(num_warps=8), infeasible="too many warps")
    rows = run([case(), stuck, *(case(waves_per_eu=n) for n in (1, 2, 3, 4)), case(SM90)])
    assert [(row.status, row.outcome) for row in rows] == [
        ("ok", "passed"),
        ("infeasible", "skipped"),
        ("spills", "rejected"),
        ("wrong", "failed"),
        ("not_verified", "failed"),
        ("compile_error", "failed"),
        ("static_ok", "passed"),
    ]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.gate_cases for row in rows] == [5, 0, 0, 2, 1, 0, 0]
    assert (rows[0].facts, rows[0].error_rms, rows[0].reason) == ({"decode": AMD_FACTS}, 0.001, "")
    assert (rows[1].reason, rows[1].facts) == ("too many warps", None)
    assert rows[3].reason == "row 3 is off"
    assert rows[3].facts == {"decode": AMD_FACTS}
    assert [CheckRow.from_dict(json.loads(json.dumps(row.to_dict()))) for row in rows] == rows
    with pytest.raises(DocumentError, match="latency"):
        CheckRow.from_dict({**rows[0].to_dict(), "latency_us": 1.0})


def test_workers_that_die_hang_or_raise_cost_their_row_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "EMULATE_LIMIT_S", 0.5)
    obey(
        monkeypatch,
        rule("build", "abort", waves_per_eu=1),
        rule("gate", "abort", waves_per_eu=2),
        rule("gate", "hang", waves_per_eu=3),
        rule("build", "raise", waves_per_eu=4),
    )
    rows = run([case(waves_per_eu=n) for n in (1, 2, 3, 4, 0)])
    assert [row.status for row in rows] == ["crash", "crash", "hang", "error", "ok"]
    assert "build: the worker died (SIGABRT)" in rows[0].reason
    assert "gate: the worker died (SIGABRT)" in rows[1].reason
    assert "gate: killed after" in rows[2].reason
    assert rows[3].reason == "build: KeyError: 'no such thing'"
    assert [row.facts is None for row in rows] == [True, False, False, True, False]


@pytest.mark.parametrize("jobs", [1, 3])
def test_identical_builds_are_gated_once_and_name_the_first(
    monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    same, bad = {"identity": "A"}, {"identity": "B"}
    obey(
        monkeypatch,
        rule("build", same, num_stages=1),
        rule("build", bad, num_stages=2),
        rule("gate", WRONG, num_stages=2),
        rule("build", "dawdle", waves_per_eu=0),  # the first is built last
        rule("gate", "raise", waves_per_eu=2),  # never run: another speaks for it
    )
    first = case(num_stages=2)
    rows = run([case(), case(waves_per_eu=2), first, replace(first, changed={"other": 1})], jobs)
    assert [(r.status, r.outcome, r.same_as) for r in rows] == [
        ("ok", "passed", None),
        ("identical", "passed", 1),
        ("wrong", "failed", None),
        ("identical", "failed", 3),
    ]
    assert rows[1].reason == f"same build as {rows[0].label} (row 1)"
    assert rows[3].reason == "same build as num_stages=2 (row 3): wrong"
    assert (rows[1].gate_cases, rows[1].error_rms) == (5, 0.001)


def test_without_the_gate_rows_end_with_the_static_facts() -> None:
    assert [row.status for row in run([case(), case(num_stages=2)], gate=False)] == [
        "static_ok"
    ] * 2


def test_rows_come_while_later_ones_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[str] = []
    submit = Crew.submit

    def counted(self: Crew, task: str, payload: Any, limit_s: float) -> Any:
        submitted.append(task)
        return submit(self, task, payload, limit_s)

    monkeypatch.setattr(Crew, "submit", counted)
    cases = [case(num_splits=n) for n in range(1, 21)]
    rows = run_checks(cases, jobs=1, worker_tasks=check_fakes.TASKS, preload=PRELOAD)
    assert next(rows).status == "ok"
    assert submitted.count("build") < 2 + 2 * BUILDS_AHEAD
    assert len(list(rows)) == 19
    assert (submitted.count("build"), submitted.count("gate")) == (20, 20)


@pytest.mark.parametrize(
    ("status", "default", "outcome"),
    [
        ("spills", True, "failed"),
        ("spills", False, "rejected"),
        ("out_of_resources", True, "failed"),
        ("out_of_resources", False, "rejected"),
        ("infeasible", True, "skipped"),
        ("static_ok", True, "passed"),
        ("crash", False, "failed"),
        ("not_verified", False, "failed"),
    ],
)
def test_a_spill_fails_default_knobs_and_rejects_others(
    status: str, default: bool, outcome: str
) -> None:
    assert outcome_of(status, default=default) == outcome


def test_the_report_counts_and_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patune.tuner.check_tasks.TASKS", check_fakes.TASKS)
    options = CheckOptions(targets=(GFX942, SM90), problems=(PROBLEM,), workloads=(SMALL, LARGE))
    seen: list[CheckRow] = []
    report = check(options, jobs=1, notify=seen.append)
    assert tuple(seen) == report.rows
    assert (report.exit_code, report.failed) == (0, [])
    document = json.loads(json.dumps(report.to_dict()))
    assert (document["schema"], document["knobs"], document["exit_code"]) == (1, "default", 0)
    gfx942, sm90 = document["targets"]
    assert gfx942["target"] == GFX942.to_dict()
    assert gfx942["statuses"] == {"ok": 3}, "two defaults, and the safe knobs"
    assert gfx942["outcomes"] == {"passed": 3, "skipped": 0, "rejected": 0, "failed": 0}
    assert sm90["statuses"] == {"static_ok": len(report.rows_of(SM90))}
    assert sm90["environment"]["compiler"].startswith("ptxas")
    assert len(sm90["environment"]["kernel_source_hash"]) == 64
    assert [CheckRow.from_dict(row) for row in document["rows"]] == seen

    obey(monkeypatch, rule("build", SPILLS, num_splits=1))  # the default of the large batch
    failed = check(options, jobs=1, notify=lambda row: None)
    assert failed.exit_code == 1
    assert {row.status for row in failed.failed} == {"spills"}
    assert count_rows(failed.failed)["outcomes"]["failed"] == len(failed.failed) >= 1


def test_a_refusal_of_the_emulator_is_told_from_a_fault() -> None:
    from patune.emulator.assembly import Instruction

    refusal = Instruction("v_new_b32 v0, v1").refusal("")
    assert isinstance(refusal, EmulatorError)
    assert is_refusal(str(refusal))
    assert not is_refusal("out-of-bounds store: 4 bytes at 0x200000000")


# ---- the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gfx942_problem_end_to_end() -> None:
    options = CheckOptions(
        targets=(GFX942,),
        problems=(replace(PROBLEM, query_length=1),),
        workloads=(LARGE,),
    )
    chosen, _ = select_cases(options)
    assert chosen.knobs is not None
    smaller = replace(chosen.knobs, reduce_chunk=4)  # idle: there is one split
    idle = replace(chosen, knobs=smaller, changed={"reduce_chunk": 4})
    crowded = replace(chosen, changed={"num_warps": 8}, infeasible="no room")
    rows = run([chosen, idle, crowded], worker_tasks=None)
    assert [row.status for row in rows] == ["ok", "identical", "infeasible"]
    assert rows[0].gate_cases >= 5
    assert rows[0].error_rms is not None
    assert 0 < rows[0].error_rms < 0.02
    assert rows[0].facts is not None
    (facts,) = rows[0].facts.values()
    assert facts["spills"] == 0
    assert 0 < facts["vgpr"] <= 512
    assert facts["mix"]["mfma"] > 0
    assert rows[1].same_as == 1
    assert rows[1].facts == rows[0].facts


@pytest.mark.slow
def test_a_planted_bug_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECK_FAKE_FOLDER", str(tmp_path))
    monkeypatch.setenv(check_fakes.MUTANT, "causal_off_by_one")
    planted = case(num_splits=1)
    rows = run([planted], worker_tasks=check_fakes.MUTANT_TASKS)
    assert summary(rows) == [("num_splits=1", "wrong", "failed")]
    assert rows[0].reason.startswith("case ")
    assert "probably too little weight on token " in rows[0].reason
    assert rows[0].error_rms is not None
    assert rows[0].error_rms > 0.01
    report = CheckReport(
        options=CheckOptions(targets=(GFX942,), problems=(PROBLEM,), workloads=(SMALL,)),
        environments={},
        rows=tuple(rows),
        seconds=1.0,
    )
    assert report.exit_code == 1


def test_builds_of_other_splits_differ_by_their_launch() -> None:
    """The machine code of two and four splits is one, but another grid may go wrong where the first did not."""
    two, four = (build_case(case(num_splits=n).to_dict()) for n in (2, 4))
    assert two["status"] == four["status"] == "ok"
    assert two["facts"] == four["facts"]
    assert two["identity"] != four["identity"]
    assert two["identity"] == build_case(case(num_splits=2).to_dict())["identity"]


def test_sm_90_is_compiled_without_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("a check touched the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    answer = build_case(case(SM90, num_splits=1).to_dict())
    assert answer["status"] == "ok"
    (facts,) = answer["facts"].values()
    assert set(facts) == {"registers", "spills", "shared_b"}
    assert 0 < facts["registers"] <= 255


@pytest.mark.parametrize(
    ("report", "status"),
    [
        ("case x: instruction `v_new v0`: not verified. at pc 3", "not_verified"),
        ("case x: out-of-bounds load", "launch_error"),
    ],
)
def test_what_the_gate_reports(monkeypatch: pytest.MonkeyPatch, report: str, status: str) -> None:
    from patune.tuner.gate import GateReport

    seen = GateReport(status="launch_error", reason=report, cases=2)
    monkeypatch.setattr("patune.tuner.gate.run_gate", lambda *_, **__: seen)
    assert gate_case(case().to_dict()) == {
        "status": status,
        "reason": report,
        "gate_cases": 2,
        "error_rms": None,
    }


def test_a_gate_without_its_gpu_says_nothing_about_the_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("patune.tuner.executors.detect_target", lambda: None)
    answer = gate_case(case(SM90).to_dict())
    assert answer["status"] == "no_device"
    assert "this process sees no NVIDIA H200 (sm_90)" in answer["reason"]


def test_an_error_that_costs_the_device_context_is_left_to_the_crew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr("patune.tuner.gate.run_gate", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gate_case(case().to_dict())


def test_what_building_and_gating_raise_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr("patune.kernels.compile.compile_call", fail)
    assert build_case(case().to_dict()) == {
        "status": "compile_error",
        "reason": "build: RuntimeError: PassManager::run failed",
    }
    monkeypatch.setattr("patune.tuner.gate.run_gate", fail)
    assert gate_case(case().to_dict())["status"] == "compile_error"
