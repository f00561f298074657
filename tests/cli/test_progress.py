"""What a running sweep shows on stderr."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from cli_fakes import counted
from rich.console import Console

from patune import progress
from patune.kernels.knobs import CdnaKnobs
from patune.problem import Problem, Workload
from patune.target import Target
from patune.trial import TrialResult
from patune.tuner.progress import Key, Note, SweepStarted, TrialEnded

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = Key(
    problem=Problem(block_size=1024, head_dim=128, qg=8),
    workload=Workload(batch=1, kv_heads=8, context=4096),
)
KNOBS = CdnaKnobs(partition_tokens=128, num_splits=1, num_stages=1, num_warps=4)
STARTED = SweepStarted(
    keys=(KEY, KEY), trials_per_key=8, target=Target.named("gfx942"), evidence="emulated"
)
SPILLED = TrialResult(status="spills", reason="12 registers")
PASSED = TrialResult(status="ok", gate_cases=9, counted=counted(500.0))


def ended(result: TrialResult, *, done: int, best: float | None) -> TrialEnded:
    return TrialEnded(
        key=KEY, knobs=KNOBS, result=result, source="search", best=best, done=done, total=16
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr("patune.progress.time.monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()


def test_the_watch_counts_and_estimates_from_its_own_pace(clock: list[float]) -> None:
    said: list[str] = []
    follower = progress.SweepWatch(said.append)
    follower(STARTED)
    assert said == ["gfx942 (AMD Instinct MI300X, 304 CUs), emulated: 2 keys, 8 trials each"]
    assert follower.left_s is None
    clock[0] += 30
    follower(ended(SPILLED, done=5, best=None))  # four trials are of an earlier run
    assert follower.left_s == pytest.approx(30 * 11)
    assert follower.line() == (
        "5/16 trials, 30 s so far, about 5 min 30 s left; block_size=1024 head_dim=128 qg=8 batch=1 "
        "kv_heads=8 context=4096: none passed yet; not ok so far: 1 spills"
    )
    clock[0] += 30
    follower(ended(PASSED, done=6, best=500.0))
    assert follower.left_s == pytest.approx(30 * 10)
    assert "best so far 500 slots" in follower.line()


def test_plain_lines_come_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.watch(Console(file=stream, width=100)) as notify:
        notify(STARTED)
        for step in range(1, 9):
            clock[0] += 4
            notify(ended(PASSED, done=step, best=500.0))
        notify(Note(text="The budget of 60 s is used up."))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("gfx942")
    assert [line.split(" trials")[0] for line in lines[1:-1]] == ["4/16", "8/16"]
    assert lines[-1] == "The budget of 60 s is used up."


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None)
    with progress.watch(console) as notify:
        notify(STARTED)
        notify(ended(PASSED, done=1, best=500.0))
    text = stream.getvalue()
    assert "━" in text
    assert "1/16 trials" in text
    assert "best so far 500 slots" in text
    assert text.endswith("\x1b[1A\x1b[2K") or "\x1b[2K" in text.rsplit("best so far", 1)[1]
