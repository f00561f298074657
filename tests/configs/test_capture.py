"""Captures of untuned keys: bucketed, written once, whole, and never a reason for a process not to end."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import H200, PROBLEM, at
from hypothesis import given
from hypothesis import strategies as st

import patune
from patune.configs import capture, dispatcher
from patune.configs.capture import bucket, flush_misses
from patune.errors import PatuneError
from patune.misses import read_capture
from patune.problem import Workload

if TYPE_CHECKING:
    from pathlib import Path

SIZES = st.integers(1, 1 << 20)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """What the dispatcher says it counted; nothing was written yet."""
    counts: Counter[Any] = Counter()
    monkeypatch.setattr(dispatcher, "missed", lambda: dict(counts), raising=False)
    monkeypatch.setattr(capture, "_written", Counter())
    return counts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATUNE_CAPTURE", str(tmp_path / "captured" / "here"))
    return tmp_path / "captured" / "here"


def calls_in(path: Path | None) -> dict[tuple[int, int, str], int]:
    assert path is not None
    read = read_capture(path)
    assert read.name == path.stem
    return {(m.key.workload.batch, m.key.workload.context, m.source): m.calls for m in read.misses}


@given(batch=SIZES, kv_heads=st.integers(1, 96), context=SIZES)
def test_a_bucket_holds_its_workload_and_is_its_own(
    batch: int, kv_heads: int, context: int
) -> None:
    asked = Workload(batch=batch, kv_heads=kv_heads, context=context)
    held = bucket(asked)
    assert held.kv_heads == kv_heads
    assert batch <= held.batch
    assert held.walks < 2 * asked.walks, "a neighbour may be at most twice as large"
    assert context <= held.context < 2 * context
    assert bucket(held) == held


def test_buckets() -> None:
    assert bucket(at(batch=128, kv_heads=8, context=4096)) == at(
        batch=128, kv_heads=8, context=4096
    )
    assert bucket(at(batch=5, kv_heads=8, context=4097)) == at(batch=8, kv_heads=8, context=8192)
    assert bucket(at(batch=5, kv_heads=3, context=1)) == at(batch=5, kv_heads=3, context=1)
    growing = {bucket(at(batch=1, context=context)) for context in range(1025, 2049)}
    assert growing == {at(batch=1, context=2048)}


def test_what_is_new_is_written(counted: Counter[Any], folder: Path) -> None:
    assert patune.flush_misses() is None
    assert not folder.exists()
    for context in range(1025, 1125):
        counted[H200, PROBLEM, at(batch=1, context=context), "heuristic"] += 2
    counted[H200, PROBLEM, at(batch=3), "safe"] += 7
    first = flush_misses()
    assert calls_in(first) == {(1, 2048, "heuristic"): 200, (4, 4096, "safe"): 7}
    assert flush_misses() is None, "nothing is new"
    counted[H200, PROBLEM, at(batch=4), "safe"] += 1
    second = flush_misses()
    assert calls_in(second) == {(4, 4096, "safe"): 1}
    assert {path.name for path in folder.iterdir()} == {first.name, second.name}  # type: ignore[union-attr]
    document = json.loads(second.read_text(encoding="utf-8"))  # type: ignore[union-attr]
    assert document == {
        "schema": 2,
        "capture": second.stem,  # type: ignore[union-attr]
        "misses": [{
            "target": H200.to_dict(), "problem": PROBLEM.to_dict(), "workload": at(batch=4).to_dict(), "source": "safe", "calls": 1,
        }],
    }  # fmt: skip


def test_none_is_written_where_none_is_wanted(
    counted: Counter[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted[H200, PROBLEM, at(), "safe"] = 1
    monkeypatch.setenv("PATUNE_CAPTURE", "0")
    assert flush_misses() is None
    monkeypatch.delenv("PATUNE_CAPTURE")
    path = flush_misses()
    assert path is not None
    assert path.parent == tmp_path / "misses", "beside the database"


def test_a_file_and_a_folder_are_bounded(
    counted: Counter[Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(capture, "MOST_KEYS", 3)
    monkeypatch.setattr(capture, "MOST_FILES", 2)
    for power in range(6):
        counted[H200, PROBLEM, at(batch=1 << power), "safe"] = power + 1
    assert calls_in(flush_misses()) == {
        (32, 4096, "safe"): 6,
        (16, 4096, "safe"): 5,
        (8, 4096, "safe"): 4,
    }
    counted[H200, PROBLEM, at(), "safe"] = 1
    assert flush_misses() is not None
    counted[H200, PROBLEM, at(), "safe"] = 3
    assert flush_misses() is None
    assert [r.message for r in caplog.records] == [
        f"{folder} holds 2 files of misses, so no more are written. Run: patune sweep --misses"
    ]
    next(folder.iterdir()).unlink()
    assert calls_in(flush_misses()) == {(128, 4096, "safe"): 2}, "what was not written is not lost"


def test_a_folder_that_cannot_be_written(
    counted: Counter[Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="patune")
    folder.parent.mkdir()
    folder.write_text("a file", encoding="utf-8")
    counted[H200, PROBLEM, at(), "safe"] = 1
    with pytest.raises(PatuneError, match="PATUNE_CAPTURE names another folder"):
        flush_misses()
    capture._at_exit()
    assert "Misses were not written: Misses cannot be written to" in caplog.text
    folder.unlink()
    assert calls_in(flush_misses()) == {(128, 4096, "safe"): 1}


def test_a_write_that_fails_leaves_nothing(
    counted: Counter[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted[H200, PROBLEM, at(), "safe"] = 1

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(PatuneError, match="No space left on device"):
            flush_misses()
    assert list(folder.iterdir()) == []
    assert flush_misses() is not None


PROCESS = """
    import os, sys
    from patune.configs import capture, dispatcher
    from patune.problem import Problem, Workload
    from patune.target import Target
    def key(batch):
        problem = Problem(block_size=1024, head_dim=128, qg=8)
        return Target.named("sm_90"), problem, Workload(batch=batch, kv_heads=8, context=4096), "safe"
    counts = {key(1): 5}
    dispatcher.missed = lambda: dict(counts)
    capture.arm()
    capture.arm()
"""


def end(code: str, folder: Path) -> list[dict[tuple[int, int, str], int]]:
    """What a process left in the folder."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROCESS) + textwrap.dedent(code)],
        capture_output=True, text=True, env={**os.environ, "PATUNE_CAPTURE": str(folder)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return sorted((calls_in(path) for path in folder.iterdir()), key=repr)


def test_a_process_writes_when_it_ends(tmp_path: Path) -> None:
    assert end("counts[key(2)] = 1", tmp_path) == [{(1, 4096, "safe"): 5, (2, 4096, "safe"): 1}]


def test_a_forked_child_writes_its_own(tmp_path: Path) -> None:
    code = """
        child = os.fork()
        counts[key(1)] += 2 if child == 0 else 1
        if child:
            os.waitpid(child, 0)
    """
    assert end(code, tmp_path) == [{(1, 4096, "safe"): 2}, {(1, 4096, "safe"): 6}]


def test_a_process_that_never_missed_writes_nothing(tmp_path: Path) -> None:
    assert end("counts.clear()", tmp_path) == []
