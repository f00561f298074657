"""`patune check`: what it asks the workers for, what it prints, and how it exits. The kernels themselves: tests/tuner/test_check_run.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import check_fakes
import pytest
from check_fakes import SPILLS, WRONG, obey, rule

from patune import sweep_request

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import Run

ONE = ("check", "--block-size", "1024", "--head-dim", "128", "--qg", "8", "--jobs", "1")
GFX942 = (*ONE, "--target", "gfx942")
ROW_FIELDS = {
    "number", "target", "problem", "knobs", "changed", "default", "status", "outcome", "reason", "same_as",
    "facts", "gate_cases", "error_rms",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that answer as they are told; without rules every build passes."""
    monkeypatch.setattr("patune.tuner.check_tasks.TASKS", check_fakes.TASKS)
    obey(monkeypatch)


def test_the_defaults_are_all_targets_and_the_sweeps_problems(run: Run, database: Path) -> None:
    result = run("check", "--jobs", "1", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [entry["target"]["arch"] for entry in document["targets"]] == [
        "gfx942",
        "gfx950",
        "sm_90",
    ]
    problems = {json.dumps(row["problem"], sort_keys=True) for row in document["rows"]}
    assert len(problems) == len(sweep_request.problems_of({}, {}))
    assert all(row["default"] for row in document["rows"])
    wanted = {"gfx942": {"ok"}, "gfx950": {"ok"}, "sm_90": {"static_ok"}}
    for arch, statuses in wanted.items():
        rows = [row for row in document["rows"] if row["target"] == arch]
        assert {row["status"] for row in rows} == statuses
        assert {row["problem"]["qg"] for row in rows} == {1, 4, 8, 16}
    assert not database.parent.exists()


def test_json_is_one_document(run: Run) -> None:
    result = run(*GFX942, "--json", "--knobs", "grid")
    document = json.loads(result.stdout)
    assert set(document) == {"schema", "knobs", "seconds", "exit_code", "targets", "rows"}
    assert (document["schema"], document["knobs"], document["exit_code"]) == (1, "grid", 0)
    assert all(set(row) == ROW_FIELDS for row in document["rows"])
    assert [row["number"] for row in document["rows"]] == list(range(1, len(document["rows"]) + 1))
    (target,) = document["targets"]
    assert set(target) == {"target", "environment", "outcomes", "statuses"}
    assert {"triton", "compiler", "kernel_source_hash"} <= set(target["environment"])
    assert sum(target["statuses"].values()) == len(document["rows"])
    assert len(result.stderr.splitlines()) == len(document["rows"])


def test_the_grid_has_infeasible_rows_with_reasons_and_exits_0(run: Run) -> None:
    result = run(*GFX942, "--knobs", "grid", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["rows"]
    assert sum(row["default"] for row in rows) < len(rows)
    assert all((len(row["changed"]) == 1) != row["default"] for row in rows)
    skipped = [row for row in rows if row["outcome"] == "skipped"]
    assert skipped
    for row in skipped:
        ((name, value),) = row["changed"].items()
        assert row["status"] == "infeasible"
        assert f"{name}={value}" in row["reason"]
        assert row["facts"] is None


def test_the_table_has_rows_counts_and_a_verdict(run: Run) -> None:
    result = run(*ONE, "--target", "gfx942,sm_90")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("gfx942 (AMD Instinct MI300X, 304 CUs): compiled, and run in the")
    assert lines[1].split() == [
        "status", "knobs", "vgpr+agpr", "spills", "LDS", "B", "waves/SIMD", "MFMA", "cases",
    ]  # fmt: skip
    assert lines[2] == "block_size=1024 head_dim=128 qg=8"
    assert lines[3].split()[0] == "ok"
    assert lines[3].split()[-7:] == ["100+8", "0", "4096", "4", "vgpr", "32", "5"]
    static = next(line for line in lines if line.startswith("static_ok "))
    assert static.split()[-3:] == ["103", "0", "101760"]
    ok = sum(line.split()[:1] == ["ok"] for line in lines)
    assert f"gfx942: {ok} passed ({ok} ok)" in lines
    assert lines[-1].startswith("nothing failed; ")
    assert re.search(r"^gfx942: patune .* kernel source [0-9a-f]{12}$", result.stdout, re.MULTILINE)
    assert not re.search(r"\d (us|ms)\b|slots", result.stdout)


def test_a_wrong_kernel_exits_1_and_is_named_at_the_end(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    obey(monkeypatch, rule("gate", WRONG, waves_per_eu=2), rule("build", "abort", num_stages=2))
    result = run(*GFX942, "--knobs", "grid")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("2 of ")
    assert " failed: 1 crash, 1 wrong; " in lines[-1]
    name = "gfx942 block_size=1024 head_dim=128 qg=8"
    assert f"wrong: {name} waves_per_eu=2: row 3 is off" in lines[-6:]
    assert any(
        line.startswith(f"crash: {name} num_stages=2: build: the worker died")
        for line in lines[-6:]
    )
    assert "2 failed (1 crash, 1 wrong)" in lines[-2]
    as_json = run(*GFX942, "--knobs", "grid", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["exit_code"] == 1


def test_spills_fail_default_knobs_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    obey(monkeypatch, rule("build", SPILLS, waves_per_eu=2))
    rejected = run(*GFX942, "--knobs", "grid")
    assert rejected.exit_code == 0
    assert "1 rejected (1 spills)" in rejected.stdout
    assert rejected.stdout.splitlines()[-1].startswith("nothing failed; ")
    obey(monkeypatch, rule("build", SPILLS, waves_per_eu=0, num_splits=1))
    failed = run(*GFX942)
    assert failed.exit_code == 1
    assert " failed: 2 spills; " in failed.stdout.splitlines()[-1]


def test_identical_builds_name_the_row_that_speaks_for_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    obey(monkeypatch, rule("build", {"identity": "A"}, num_stages=1, waves_per_eu=0))
    result = run(*GFX942, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [row["status"] for row in rows] == ["ok"] + ["identical"] * (len(rows) - 1)
    assert {row["same_as"] for row in rows[1:]} == {1}
    text = run(*GFX942).stdout
    assert "same build as p128" in text
    assert "(row 1)" in text


def test_nothing_feasible_is_said(run: Run) -> None:
    result = run(*ONE, "--target", "sm_90", "--kv-dtype", "fp8_e4m3fnuz")
    assert result.exit_code == 0
    assert "infeasible" in result.stdout
    assert "fp8_e4m3fn only" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1].startswith("nothing was checked: no row is feasible")


@pytest.mark.parametrize("columns", [80, 120])
def test_no_table_row_is_wider_than_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    from rich.console import Console

    monkeypatch.setattr("patune.check_table.result_console", lambda: Console(width=columns))
    table = run(*ONE, "--target", "gfx950", "--knobs", "grid").stdout.split("\n\n")[0]
    assert len(table.splitlines()) > 10
    assert max(map(len, table.splitlines())) <= columns
    assert "p128 s32 st1 w4 r32x4 " in table  # on one line


@pytest.mark.parametrize(
    ("options", "seen", "allowed"),
    [
        (["--target", "gfx942,gfx90a"], "target='gfx90a'", "sm_90, gfx942, gfx950"),
        (["--block-size", "16,1000"], "block_size=1000", "16, 32, 64, 128, 256, 512, 1024"),
        (["--qg", "65"], "qg=65", "an integer from 1 to 64"),
        (["--kv-layout", "nope"], "kv_layout='nope'", "aiter, aiter_5d, nhd, hnd"),
        (["--knobs", "all"], "'all'", "'default', 'grid'"),
        (["--jobs", "0"], "0", "x>=1"),
        (["--batch", "1"], "--batch", "patune check --help"),
    ],
)
def test_bad_values_exit_2(run: Run, options: list[str], seen: str, allowed: str) -> None:
    result = run("check", *options)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert allowed in result.stderr
    assert result.stdout == ""


def test_help_states_the_rule_for_spills(run: Run) -> None:
    text = " ".join(run("check", "--help").stdout.split())
    assert "A build that spills is a failure with default knobs; with others it is rejected" in text


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "patune", *GFX942, "--knobs", "grid"],  # far more than the first row
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("ok "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.strip() == "interrupted"
