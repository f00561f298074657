"""A verification: who is built and gated and where, what is said of each winner, and that nothing is written."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import check_fakes
import pytest
from check_fakes import SPILLS, WRONG, obey, rule
from fake_tasks import PRELOAD
from verify_samples import GFX942, H100, H200, PROBLEM, older, pack, tune, winner

from patune.configs import dispatcher
from patune.configs.packs import import_pack, read_pack
from patune.configs.store import Store
from patune.environment import current_environment
from patune.errors import DatabaseError
from patune.target import Target, detect_target
from patune.tuner import tasks
from patune.tuner.crew import Crew
from patune.tuner.verify import read_winners, verify_winners
from patune.tuner.verify_rows import Source, VerifyReport

if TYPE_CHECKING:
    from patune.configs.winner import Winner
    from patune.tuner.check_rows import CheckRow

SHIPPED = dispatcher.PACKS / "sm_90" / "nvidia_h200.json"
DATABASE = Source(path=Path("/tuned/here.db"), kind="database")
Submitted = list[tuple[int, str, dict[str, Any], float]]  # crew, task, payload, limit
See = Callable[[Target | None], None]


@pytest.fixture(autouse=True)
def _no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    obey(monkeypatch)


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    """``see(H100)``: that is the GPU of this process."""
    return lambda device: monkeypatch.setattr("patune.tuner.verify.detect_target", lambda: device)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """What workers were asked for."""
    seen: Submitted = []
    submit = Crew.submit

    def counted(self: Crew, task: str, payload: Any, limit_s: float) -> Any:
        seen.append((id(self), task, payload, limit_s))
        return submit(self, task, payload, limit_s)

    monkeypatch.setattr(Crew, "submit", counted)
    return seen


def verify(*winners: Winner, source: Source = DATABASE, **options: Any) -> VerifyReport:
    options = {"worker_tasks": check_fakes.TASKS, "notify": lambda row, total: None} | options
    return verify_winners(source, winners, jobs=1, preload=PRELOAD, **options)


def test_every_step_can_end_a_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"status": "not_verified", "reason": "`v_new`: not verified", "error_rms": None}
    obey(
        monkeypatch,
        rule("build", SPILLS, waves_per_eu=1),
        rule("build", {"status": "compile_error", "reason": "no", "facts": None}, waves_per_eu=2),
        rule("gate", WRONG, waves_per_eu=3),
        rule("gate", "abort", waves_per_eu=4),
        rule("gate", refused, waves_per_eu=5),
    )
    found = [winner(waves_per_eu=n) for n in range(6)]
    stuck = winner(partition_tokens=64, num_warps=4)  # 16 tokens a warp: is_feasible says no
    report = verify(*found, stuck)
    assert [w.winner for w in report.winners] == [*found, stuck]
    assert [(w.status, w.outcome) for w in report.winners] == [
        ("ok", "passed"),
        ("spills", "failed"),
        ("compile_error", "failed"),
        ("wrong", "failed"),
        ("crash", "failed"),
        ("not_verified", "not_verified"),
        ("infeasible", "failed"),
    ]
    assert [w.reason for w in report.winners[:4]] == [
        "",
        "decode spills 12 registers",
        "no",
        "row 3 is off",
    ]
    assert "gate: the worker died (SIGABRT)" in report.winners[4].reason
    assert "leaves a warp fewer than" in report.winners[6].reason
    assert [w.gate_cases for w in report.winners] == [5, 0, 0, 2, 0, 5, 0]
    assert [w.error_rms for w in report.winners] == [0.001, None, None, 0.5, None, None, None]
    assert {w.checked_on for w in report.winners} == {"emulator"}
    assert report.exit_code == 1


def test_workloads_of_one_problem_share_a_gate(
    monkeypatch: pytest.MonkeyPatch, submitted: Submitted
) -> None:
    obey(monkeypatch, rule("gate", WRONG, waves_per_eu=2))
    rows: list[tuple[CheckRow, int]] = []
    report = verify(
        *(winner(batch=batch, waves_per_eu=eu) for eu in (0, 2) for batch in (1, 16, 128)),
        winner(problem=replace(PROBLEM, qg=8)),  # the same knobs of another problem
        notify=lambda row, total: rows.append((row, total)),
    )
    assert [w.status for w in report.winners] == ["ok"] * 3 + ["wrong"] * 3 + ["ok"]
    assert [w.winner.workload.batch for w in report.winners] == [1, 16, 128] * 2 + [1]
    assert [task for _, task, _, _ in submitted].count("build") == 3
    assert [task for _, task, _, _ in submitted].count("gate") == 3
    assert [(row.number, total) for row, total in rows] == [(1, 3), (2, 3), (3, 3)]


def test_the_row_of_an_identical_build_is_that_of_the_one_gated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    obey(
        monkeypatch,
        rule("build", {"identity": "A"}),
        rule("gate", WRONG, reduce_chunk=16),
        rule("gate", "raise", reduce_chunk=32),  # never run
    )
    first, second = verify(winner(reduce_chunk=16), winner(reduce_chunk=32)).winners
    verdict = ("wrong", "row 3 is off", 2, 0.5)
    assert (first.status, first.reason, first.gate_cases, first.error_rms) == verdict
    assert (second.status, second.reason, second.gate_cases, second.error_rms) == verdict


def test_without_the_gpu_nothing_is_run_and_nothing_passes(see: See, submitted: Submitted) -> None:
    see(None)
    shipped = read_pack(SHIPPED)
    report = verify(*shipped, source=Source(path=SHIPPED, kind="pack"))
    assert len(report.winners) == len(shipped) == 32
    assert {(w.status, w.outcome, w.checked_on) for w in report.winners} == {
        ("no_device", "not_verified", None)
    }
    assert {w.reason for w in report.winners} == {"there is no sm_90 GPU here"}
    assert submitted == []
    assert report.exit_code == 4


def test_an_infeasible_winner_fails_without_its_gpu_too(see: See) -> None:
    see(None)
    report = verify(winner(H200), winner(H200, num_warps=8, partition_tokens=64))
    assert [w.status for w in report.winners] == ["no_device", "infeasible"]
    assert report.exit_code == 1
    assert not report.winners[1].tunable_here


def test_emulated_winners_look_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> None:
        raise AssertionError("a GPU was looked for")

    monkeypatch.setattr("patune.tuner.verify.detect_target", touched)
    assert verify(winner()).exit_code == 0


def test_another_gpu_of_the_architecture_runs_the_gate(see: See, submitted: Submitted) -> None:
    """One at a time in a worker of its own, under the device's time limit."""
    see(H100)
    report = verify(winner(H200), winner(H200, num_stages=2), winner(H100), winner(GFX942))
    assert [w.status for w in report.winners] == ["ok"] * 4
    on_h200, _, on_h100, emulated = report.winners
    assert on_h200.checked_on == on_h100.checked_on == "NVIDIA H100 80GB HBM3"
    assert on_h200.changes == {
        "device_name": ("NVIDIA H200", "NVIDIA H100 80GB HBM3"),
        "compute_units": (132, 114),
    }
    assert on_h100.changes == emulated.changes == {}
    assert (on_h200.tunable_here, on_h100.tunable_here, emulated.tunable_here) == (
        False,
        True,
        True,
    )
    gates = [(crew, p, limit) for crew, task, p, limit in submitted if task == "gate"]
    assert [p["target"] for _, p, _ in gates] == [H100.to_dict()] * 2 + [GFX942.to_dict()]
    assert [limit for _, _, limit in gates] == [
        tasks.DEVICE_LIMIT_S,
        tasks.DEVICE_LIMIT_S,
        tasks.EMULATE_LIMIT_S,
    ]
    builders = {crew for crew, task, _, _ in submitted if task == "build"}
    assert len(builders) == 1
    assert gates[0][0] == gates[1][0] != gates[2][0]
    assert builders == {gates[2][0]}


@pytest.mark.parametrize("there", [None, GFX942])
def test_a_gpu_of_another_kind_is_none(see: See, there: Target | None) -> None:
    see(there)
    assert [w.status for w in verify(winner(H200)).winners] == ["no_device"]


def test_the_changed_parts_of_the_environment_are_named() -> None:
    now = current_environment(GFX942)
    changed, same = verify(winner(environment=older(now)), winner(num_stages=2)).winners
    assert changed.changes == {
        "triton": ("3.5.0", now.triton),
        "compiler": ("llvm of triton 3.5.0", now.compiler),
        "kernel_source_hash": ("ce69e675" * 8, now.kernel_source_hash),
    }
    assert same.changes == {}


def test_the_report_is_one_json_document(monkeypatch: pytest.MonkeyPatch) -> None:
    obey(monkeypatch, rule("gate", WRONG, num_stages=2))
    now = current_environment(GFX942)
    passed, failed = winner(), winner(num_stages=2, environment=older(now))
    report = verify(passed, failed)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["environments"] == {"gfx942": now.to_dict()}
    assert (document["schema"], document["source"], document["exit_code"]) == (
        1,
        "/tuned/here.db",
        1,
    )
    assert document["outcomes"] == {"passed": 1, "failed": 1, "not_verified": 0}
    assert document["statuses"] == {"ok": 1, "wrong": 1}
    first, second = document["winners"]
    for part in ("target", "problem", "workload", "knobs", "evidence"):
        assert first[part] == passed.to_dict()[part]
    assert (first["gate_cases"], first["error_rms"], first["reason"]) == (5, 0.001, "")
    assert first["stored"] == {
        "environment": now.to_dict(),
        "gate_cases": 7,
        "error_rms": 0.0025,
        "created": "2026-11-22T10:42:00Z",
        "imported_from": None,
    }
    assert (first["changes"], first["run_next"]) == ({}, None)
    assert second["changes"]["triton"] == {"stored": "3.5.0", "present": now.triton}
    assert second["run_next"].startswith("patune verify --adopt --")


# ---- what is stored stays as it is -------------------------------------------------------------------------------


def test_a_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    tune(path, winner())
    before = path.read_bytes()
    source, winners = read_winners(path, None)
    assert verify(*winners, source=source).exit_code == 0
    assert path.read_bytes() == before
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE patune_meta SET schema = 1")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"has schema 1 .* run: patune list --db"):
        read_winners(path, None)
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.bak")) == []


def test_an_imported_winner_is_verified_like_any_other(tmp_path: Path) -> None:
    file, path = tmp_path / "a.json", tmp_path / "a.db"
    pack(file, winner(environment=older(current_environment(GFX942))))
    with Store.open(path) as store:
        import_pack(store, file)
    _, (imported,) = read_winners(path, None)
    (verified,) = verify(imported).winners
    assert verified.to_dict(DATABASE)["stored"]["imported_from"] == "a.json"
    assert verified.changes["triton"][0] == "3.5.0"


# ---- the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_emulated_winner_passes_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    tune(path, winner(), winner(batch=64))
    source, winners = read_winners(path, None)
    rows: list[CheckRow] = []
    report = verify(
        *winners,
        source=source,
        worker_tasks=None,
        notify=lambda row, total: rows.append(row),
    )
    assert report.exit_code == 0
    assert len(rows) == 1
    for verified in report.winners:
        assert (verified.status, verified.reason, verified.changes) == ("ok", "", {})
        assert verified.gate_cases >= 5
        assert verified.error_rms is not None
        assert 0 < verified.error_rms < 0.02


@pytest.mark.slow
def test_a_kernel_that_has_gone_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECK_FAKE_FOLDER", str(tmp_path))
    monkeypatch.setenv(check_fakes.MUTANT, "causal_off_by_one")
    problem = replace(PROBLEM, query_length=2)
    report = verify(winner(problem=problem, num_splits=1), worker_tasks=check_fakes.MUTANT_TASKS)
    (verified,) = report.winners
    assert (verified.status, report.exit_code) == ("wrong", 1)
    assert verified.reason.startswith("case ")
    assert verified.error_rms is not None
    assert verified.error_rms > 0.01


@pytest.mark.gpu
def test_a_shipped_winner_passes_on_a_gpu() -> None:
    _, winners = read_winners(None, SHIPPED, head_dim=64, qg=8)
    report = verify(*winners, worker_tasks=None)
    assert {w.status for w in report.winners} == {"ok"}, [w.reason for w in report.winners]
    here = detect_target()
    assert here is not None
    assert {w.checked_on for w in report.winners} == {here.device_name}
    assert all(w.error_rms is not None and 0 < w.error_rms < 0.02 for w in report.winners)
