"""Ctrl-C and kill -9 against a sweep in a process of its own, and what the next sweep finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_kernels import TARGET, environment
from landscape import DEFAULT, LARGE, PROBLEM, SMALL

from patune.configs.store import Store

SCRIPT = Path(__file__).parent / "fake_kernels.py"
TRIALS = 12


@pytest.fixture
def start(tmp_path):
    processes = []

    def start(delay_s: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path / "patune.db", str(TRIALS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "FAKE_LOG": str(tmp_path / "log"),
                "TMPDIR": str(tmp_path),  # a killed sweep leaves its folder
                "FAKE_DELAY_S": str(delay_s),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], word: str, times: int) -> None:
    while times:
        line = process.stderr.readline()
        assert line, f"the sweep ended before {word}"
        times -= line.strip() == word


def stored(tmp_path: Path) -> dict:
    with Store.open(tmp_path / "patune.db") as store:
        return {
            workload: store.trials(
                target=TARGET, problem=PROBLEM, workload=workload, environment=environment()
            )
            for workload in (SMALL, LARGE)
        }


def group_is_gone(pid: int) -> bool:
    """Nobody of a process's session is left."""
    for _ in range(200):
        sessions = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                sessions.append(int(fields[3]))
        if pid not in sessions:
            return True
        time.sleep(0.05)
    return False


def finish(start, tmp_path: Path, before: int) -> None:
    """A second sweep does exactly what is missing."""
    process = start(0.0)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    report = json.loads(stdout)
    assert report["trials"] == 2 * TRIALS - before
    for trials in stored(tmp_path).values():
        assert len({t.knobs for t in trials}) == len(trials) == TRIALS
    assert [key["trials"] for key in report["keys"]] == [TRIALS, TRIALS]


def test_ctrl_c_keeps_the_trials_promotes_the_best_and_the_next_sweep_goes_on(start, tmp_path):
    process = start(0.3)
    read_until(process, "TrialEnded", 4)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    report = json.loads(stdout)
    assert report["interrupted"] is True
    trials = stored(tmp_path)
    before = sum(map(len, trials.values()))
    assert before == report["trials"] == 4 + stderr.count("TrialEnded")
    for key, workload in zip(report["keys"], (SMALL, LARGE), strict=True):
        best = min(trials[workload], key=lambda t: t.result.score)
        assert key["winner"]["knobs"] == {"family": "cdna_mfma", **best.knobs.to_dict()}
        assert trials[workload][0].knobs == DEFAULT
    assert group_is_gone(process.pid)
    finish(start, tmp_path, before)


def test_kill_9_loses_at_most_what_was_in_flight_and_the_next_sweep_goes_on(start, tmp_path):
    process = start(0.3)
    read_until(process, "TrialEnded", 5)
    process.kill()
    _, stderr = process.communicate()
    seen = 5 + stderr.count("TrialEnded")
    before = sum(map(len, stored(tmp_path).values()))
    # a trial is stored before it is announced
    assert seen <= before <= seen + 1
    assert group_is_gone(process.pid)
    finish(start, tmp_path, before)
