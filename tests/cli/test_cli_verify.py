"""`patune verify`: where it reads from, what it prints, and how it exits. What is run for it: tests/tuner/test_verify.py."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING

import check_fakes
import pytest
from check_fakes import SPILLS, WRONG, obey, rule
from verify_samples import GFX942, H100, H200, PROBLEM, older, pack, tune, winner

from patune.configs.dispatcher import PACKS
from patune.environment import current_environment

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import Run

SHIPPED = str(PACKS / "sm_90" / "nvidia_h200.json")
SWEEP = "patune sweep --block-size 16 --head-dim 64 --qg 4 --batch 1 --kv-heads 8 --context 512 --target gfx942"
ADOPT = "patune verify --adopt --block-size 16 --head-dim 64 --qg 4 --target gfx942"
DOCUMENT_FIELDS = {
    "schema", "source", "environments", "seconds", "exit_code", "outcomes", "statuses", "winners",
}  # fmt: skip
WINNER_FIELDS = {
    "target", "problem", "workload", "knobs", "evidence", "checked_on", "status", "outcome", "reason", "gate_cases",
    "error_rms", "stale", "changes", "stored", "run_next",
}  # fmt: skip
TOTALS = re.compile(
    r"^\d+ winners: \d+ pass, \d+ no longer pass, \d+ not verified; \d+ s$", re.MULTILINE
)


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that answer as they are told; without rules everything passes."""
    monkeypatch.setattr("patune.tuner.check_tasks.TASKS", check_fakes.TASKS)
    obey(monkeypatch)


@pytest.fixture
def tuned(database: Path) -> Path:
    """The usual database, with two winners that share a gate, and one whose environment is an older one."""
    database.parent.mkdir(parents=True)
    old = winner(num_stages=2, batch=128, environment=older(current_environment(GFX942)))
    tune(database, winner(), winner(batch=16), old)
    return database


def test_all_pass(run: Run, tuned: Path) -> None:
    result = run("verify", "--jobs", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "gfx942 (AMD Instinct MI300X, 304 CUs), emulated"
    assert lines[1] == "gate run in the ISA emulator; environment: same as stored"
    assert lines[2].split()[-2:] == ["cases", "error"]
    assert lines[3].split()[-3:] == ["verdict", "(stored)", "(stored)"]
    assert [line.split() for line in lines[4:6]] == [
        [
            *["16/64/4", batch, "x", "8", "512", "p128", "s4", "st1", "w4", "r16x4"],
            *["ok", "5", "(7)", "0.0010", "(0.0025)"],
        ]
        for batch in ("1", "16")
    ]
    now = current_environment(GFX942)
    assert (
        f"gate run in the ISA emulator; environment: triton 3.5.0 -> {now.triton}, "
        f"source ce69e675 -> {now.kernel_source_hash[:8]}"
    ) in lines
    assert f"database: {tuned}" in lines
    stale = "1 of those that pass were stored in another environment; to time them in this one, run: patune verify --adopt"
    assert stale in lines
    assert lines[-1].startswith("3 winners: 3 pass, 0 no longer pass, 0 not verified; ")
    assert "no longer passes" not in result.stdout
    assert len(result.stderr.splitlines()) == 2
    assert result.stderr.splitlines()[0].startswith("1/2 gfx942 block_size=16 head_dim=64 qg=4 p")
    assert not re.search(r"\d (us|ms)\b|slots", result.stdout)


def test_json_is_one_document(run: Run, tuned: Path) -> None:
    result = run("verify", "--json")
    document = json.loads(result.stdout)
    assert set(document) == DOCUMENT_FIELDS
    assert (document["schema"], document["source"], document["exit_code"]) == (1, str(tuned), 0)
    assert document["outcomes"] == {"passed": 3, "failed": 0, "not_verified": 0}
    assert all(set(found) == WINNER_FIELDS for found in document["winners"])
    assert [found["workload"]["batch"] for found in document["winners"]] == [1, 16, 128]
    assert [list(found["changes"]) for found in document["winners"]] == [
        [],
        [],
        ["triton", "compiler", "kernel_source_hash"],
    ]
    assert "1/2 gfx942" in result.stderr


def test_a_wrong_winner_exits_1_with_its_reason_and_the_next_command(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obey(monkeypatch, rule("gate", WRONG, num_stages=2))
    result = run("verify")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = lines.index(
        "no longer passes: gfx942 block_size=16 head_dim=64 qg=4 batch=128 kv_heads=8 context=512"
    )
    assert re.fullmatch(r"    p128 s4 st2 w4 \S+: wrong: row 3 is off", lines[at + 1])
    assert lines[at + 2] == f"    next: {ADOPT}"
    assert lines[-1].startswith("3 winners: 2 pass, 1 no longer pass, 0 not verified; ")
    assert "row 3 is off" in result.stderr
    as_json = run("verify", "--json")
    assert as_json.exit_code == json.loads(as_json.stdout)["exit_code"] == 1
    assert run("verify", "--block-size", "1024").exit_code == 0  # narrowed to none


def test_who_fails_in_the_same_environment_needs_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.db"
    tune(other, winner())
    obey(monkeypatch, rule("build", SPILLS))
    result = run("verify", "--db", str(other))
    assert result.exit_code == 1
    every = ADOPT.replace("--adopt", "--adopt --all")
    assert f"next: {every} --db {other}\n" in result.stdout
    assert "spills: decode spills 12 registers" in result.stdout
    file = tmp_path / "pack.json"
    pack(file, winner())
    packed = run("verify", "--pack", str(file))
    assert packed.exit_code == 1
    assert f"next: {SWEEP}\n" in packed.stdout
    assert f"pack: {file}" in packed.stdout


def test_the_shipped_pack_without_its_gpu_exits_4(run: Run, no_gpu: None, database: Path) -> None:
    result = run("verify", "--pack", SHIPPED)
    assert result.exit_code == 4
    rows = [line for line in result.stdout.splitlines() if line.startswith("1024/")]
    assert len(rows) == 32
    assert all("no_device" in row for row in rows)
    assert "gate not run: no sm_90 GPU here; environment: " in result.stdout
    assert "not verified: 32 winners of sm_90; run the same command on a machine" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("32 winners: 0 pass, 0 no longer pass, 32 not verified; ")
    assert not database.parent.exists()
    as_json = run("verify", "--pack", SHIPPED, "--json")
    assert as_json.exit_code == 4
    assert json.loads(as_json.stdout)["statuses"] == {"no_device": 32}


def test_a_failure_counts_more_than_a_missing_gpu(
    run: Run, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pack.json"
    pack(file, winner(H200), winner())
    assert run("verify", "--pack", str(file)).exit_code == 4
    obey(monkeypatch, rule("gate", WRONG))
    assert run("verify", "--pack", str(file)).exit_code == 1
    assert run("verify", "--pack", str(file), "--target", "sm_90").exit_code == 4


def test_another_gpu_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patune.tuner.verify.detect_target", lambda: H100)
    file = tmp_path / "pack.json"
    pack(file, winner(H200), winner(H200, num_stages=1, batch=2))
    obey(monkeypatch, rule("gate", WRONG, num_stages=1))
    result = run("verify", "--pack", str(file))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:3] == [
        "sm_90 (NVIDIA H200, 132 SMs), measured",
        "gate run on NVIDIA H100 80GB HBM3; environment: device NVIDIA H200 -> NVIDIA H100 80GB HBM3,",
        "    compute units 132 -> 114",
    ]
    assert "    next, on NVIDIA H200: patune sweep " in result.stdout


def test_what_the_emulator_does_not_know_is_not_verified(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {"status": "not_verified", "reason": "case x: `v_new v[0:3]`: not verified"}
    obey(monkeypatch, rule("gate", refused, num_stages=2))
    result = run("verify")
    assert result.exit_code == 4
    assert "not verified: gfx942 block_size=16 head_dim=64 qg=4 batch=128" in result.stdout
    assert "    case x: `v_new v[0:3]`: not verified\n" in result.stdout
    assert "winners of gfx942" not in result.stdout
    assert ": 2 pass, 0 no longer pass, 1 not verified; " in result.stdout.splitlines()[-1]


def test_nothing_is_wider_than_a_page_but_commands(
    run: Run, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = dataclasses.replace(
        PROBLEM, block_size=1024, qg=16, kv_dtype="fp8_e4m3fnuz", kv_quant="per_token", sinks=True
    )
    old = older(current_environment(GFX942))
    old = dataclasses.replace(old, torch="2.11.0+rocm6.4", python="3.12.12", driver="580.159.04")
    found = [
        winner(problem=problem, num_splits=128, waves_per_eu=2, batch=1024, environment=old),
        winner(problem=problem, num_splits=64, cache_modifier=".cg", batch=512),
        winner(H200),
    ]
    long = {"status": "out_of_resources", "reason": "a reason of some words " * 20, "facts": None}
    obey(monkeypatch, rule("build", long, num_splits=128))
    file = tmp_path / "p.json"
    pack(file, *found)
    lines = run("verify", "--pack", str(file)).stdout.splitlines()
    commands = [line for line in lines if line.startswith(("    next", "pack: "))]
    assert len(commands) == 2
    wide = [line for line in lines if len(line) > 100 and line not in commands]
    assert wide == []
    rows = [line for line in lines if line.startswith("1024/64/16 ")]
    assert len(rows) == 2
    (large,) = (row for row in rows if "1024 x 8" in row)
    assert "p128 s128 st1 w4 eu2 r16x4 " in large  # on one line
    assert "out_of_resources " in large
    assert TOTALS.search(lines[-1])


def test_a_narrow_terminal_shortens_the_progress(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    seen: list[Console] = []

    def console(**options: object) -> Console:
        seen.append(Console(width=40, force_terminal=True, **options))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr("patune.verify_table.Console", console)
    result = run("verify")
    assert result.exit_code == 0
    assert len(seen) == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.stderr)
    assert all(len(part) <= 40 for part in re.split(r"[\r\n]+", shown))
    assert result.stdout.splitlines()[-1].startswith("3 winners: 3 pass, ")


def test_no_winners_are_said_and_exit_0(run: Run, tuned: Path) -> None:
    result = run("verify", "--target", "gfx950")
    assert result.exit_code == run("list", "--target", "gfx950").exit_code == 0
    assert "no such winners are stored; to tune some, run: patune sweep" in result.stdout
    assert TOTALS.search(result.stdout)
    packed = run("verify", "--pack", SHIPPED, "--qg", "64")
    assert packed.exit_code == 0
    assert "no such winners are in the pack" in packed.stdout
    assert json.loads(run("verify", "--qg", "64", "--json").stdout)["winners"] == []


def test_nothing_is_written(run: Run, tuned: Path) -> None:
    before = tuned.read_bytes()
    assert run("verify").exit_code == 0
    assert tuned.read_bytes() == before
    left = {path.name for path in tuned.parent.iterdir()}
    assert left <= {"patune.db", "patune.db-wal", "patune.db-shm"}


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--db", "a.db", "--pack", "a.json"], "--db a.db and --pack a.json name two sources"),
        (["--pack", "missing.json"], "missing.json: there is no such pack file"),
        (["--db", "missing.db"], "There is no config database at "),
        (["--jobs", "0"], "x>=1"),
        (["--jobs", "many"], "'many'"),
        (["--batch", "1"], "--batch"),
    ],
)
def test_bad_values_exit_2(
    run: Run,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    seen: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("verify", *options)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert result.stdout == ""


def test_a_bad_pack_exits_2(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "pack.json"
    file.write_text('{"schema": 99, "winners": []}', encoding="utf-8")
    result = run("verify", "--pack", str(file))
    assert result.exit_code == 2
    assert "schema=99" in result.stderr
    assert result.stdout == ""
