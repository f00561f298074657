"""``patune sweep --misses``: from the files of serving processes to winners, and nothing left of what was tuned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from patune.configs.capture import document
from patune.configs.store import Store
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import FakeSweep, Run

pytestmark = pytest.mark.usefixtures("no_gpu")
GFX942 = ("sweep", "--misses", "--target", "gfx942")
MI300X, H200 = Target.named("gfx942"), Target.named("sm_90")
PROBLEM = Problem(block_size=1024, head_dim=128, qg=8)


def at(batch: int) -> Workload:
    return Workload(batch=batch, kv_heads=8, context=4096)


@pytest.fixture
def captured(database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two captures beside the database; 64 sequences were only asked for on another device."""
    monkeypatch.delenv("PATUNE_CAPTURE")
    folder = database.parent / "misses"
    folder.mkdir(parents=True)
    for name, counts in {
        "a": {(MI300X, PROBLEM, at(1), "heuristic"): 10, (MI300X, PROBLEM, at(16), "safe"): 3},
        "b": {(MI300X, PROBLEM, at(1), "heuristic"): 5, (H200, PROBLEM, at(64), "safe"): 99},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(document(name, counts)), encoding="utf-8")
    return folder


def asked(fake_sweep: FakeSweep) -> list[int]:
    assert fake_sweep.options is not None
    return [key.workload.batch for key in fake_sweep.options.keys]


def stored(database: Path) -> list[tuple[Any, ...]]:
    with Store.open(database, create=False) as store:
        return [(m.target.arch, m.workload.batch, m.source, m.calls) for m in store.misses()]


def test_captures_are_swept_and_forgotten(
    run: Run, fake_sweep: FakeSweep, captured: Path, database: Path
) -> None:
    result = run(*GFX942)
    assert result.exit_code == 0, result.output
    assert asked(fake_sweep) == [16, 1]
    assert "Keys that other devices asked for: 1. Sweep there." in result.stderr
    assert list(captured.iterdir()) == []
    assert stored(database) == [("sm_90", 64, "safe", 99)]
    again = run(*GFX942)
    assert again.exit_code == 0
    assert again.stdout == "No key was asked for in vain that is not tuned by now. Nothing to do.\n"
    assert json.loads(run(*GFX942, "--json", "--quiet").stdout) == {
        "schema": 1,
        "database": str(database),
        "keys": [],
    }


def test_keys_without_a_winner_stay(
    run: Run, fake_sweep: FakeSweep, captured: Path, database: Path
) -> None:
    fake_sweep.passes = False
    assert run(*GFX942).exit_code == 3
    assert stored(database) == [
        ("gfx942", 1, "heuristic", 15),
        ("gfx942", 16, "safe", 3),
        ("sm_90", 64, "safe", 99),
    ]
    assert run(*GFX942).exit_code == 3
    assert asked(fake_sweep) == [16, 1]


def test_a_dry_run_takes_nothing(
    run: Run, fake_sweep: FakeSweep, captured: Path, database: Path
) -> None:
    plan = json.loads(run(*GFX942, "--dry-run", "--json").stdout)
    assert [key["key"]["workload"]["batch"] for key in plan["keys"]] == [16, 1]
    assert sorted(path.name for path in captured.iterdir()) == ["a.json", "b.json"]
    assert not database.exists()
    assert fake_sweep.options is None


def test_a_device_that_is_not_here_takes_nothing(
    run: Run, fake_sweep: FakeSweep, captured: Path, database: Path
) -> None:
    assert run("sweep", "--misses", "--target", "sm_90").exit_code == 4
    assert len(list(captured.iterdir())) == 2
    assert not database.exists()


def test_what_cannot_be_tuned_is_said(run: Run, fake_sweep: FakeSweep, captured: Path) -> None:
    (captured / "c.json").write_text("dear diary", encoding="utf-8")
    result = run(*GFX942)
    assert result.exit_code == 0
    assert "c.json is no JSON" in result.stderr
    assert [path.name for path in captured.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1"], "--batch and --misses contradict each other"),
        (["--models", "phi-4"], "--models and --misses contradict each other"),
        (["--from", "m.json"], "--from and --misses contradict each other"),
        (["--no-window"], "--window and --misses contradict each other"),
        (["--target", "gfx9"], "gfx9"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Run,
    fake_sweep: FakeSweep,
    captured: Path,
    database: Path,
    options: list[str],
    message: str,
) -> None:
    result = run(*GFX942, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert fake_sweep.options is None
    assert len(list(captured.iterdir())) == 2
    assert not database.exists()
