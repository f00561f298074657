"""What `patune doctor` says of stored winners that need a second look, and of misses that wait."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from verify_samples import GFX942, H200, PROBLEM, older, tune, winner

from patune.configs import dispatcher
from patune.configs.store import Store
from patune.environment import current_environment

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import Run


@pytest.fixture
def tuned(database: Path, no_gpu: None) -> Path:
    """A fresh winner, four stale ones, and one of a GPU that is not here."""
    database.parent.mkdir(parents=True)
    old = older(current_environment(GFX942))
    stale = [winner(batch=batch, environment=old) for batch in (16, 32, 64, 128)]
    far = winner(H200, environment=older(current_environment(H200)))
    tune(database, winner(), *stale, far)
    dispatcher.reload()
    return database


def test_doctor_counts_second_looks_and_misses(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATUNE_CAPTURE")
    with Store.open(tuned) as store:
        workload = winner(batch=99).workload
        store.add_capture("one", [(GFX942, PROBLEM, workload, "heuristic", 120)])
    (tuned.parent / "misses").mkdir()
    (tuned.parent / "misses" / "two.json").write_text("{}", encoding="utf-8")
    document = json.loads(run("doctor", "--json").stdout)
    findings = {finding["name"]: finding for finding in document["findings"]}
    looks = findings["second looks"]
    assert looks["state"] == "note"
    assert looks["detail"].startswith(
        "5 of 6 stored winners need one; they are served (4 of gfx942: "
    )
    assert looks["advice"] == ("run: patune verify --adopt (4 of them can have it on this machine)")
    assert findings["misses"]["detail"] == (
        "1 keys that nothing was tuned for (120 calls) are stored, 1 capture files wait to be taken in"
    )
    assert findings["misses"]["advice"] == "run: patune sweep --misses"
    assert re.fullmatch(r"[0-9a-f]{64}", findings["fingerprint"]["detail"])
    assert document["run_next"] == "patune verify --adopt"
    assert document["healthy"] is True


def test_doctor_without_the_gpu_of_the_stale_ones_does_not_send_anybody(
    run: Run, database: Path, no_gpu: None
) -> None:
    database.parent.mkdir(parents=True)
    tune(database, winner(), winner(H200, environment=older(current_environment(H200))))
    document = json.loads(run("doctor", "--json").stdout)
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert findings["second looks"]["advice"].endswith("(0 of them can have it on this machine)")
    assert "misses" not in findings
    assert document["run_next"] == "patune list"
