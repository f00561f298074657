"""examples/capture_and_tune.py: from misses in production to tuned answers on the fleet, checked in the databases that it leaves."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

import pytest
from example_programs import is_readable, load, run

from patune.configs.store import Store
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from pathlib import Path

example = load("capture_and_tune")
MI300X = Target.named("gfx942")
PROBLEM = Problem(block_size=16, head_dim=64, qg=5)
TUNED = Workload(batch=128, kv_heads=8, context=2048)
TABLE = """\
batch context  source     evidence  knobs
  128    2048  {}      emulated  partition_tokens=128
  100    1500  {}      emulated  partition_tokens=128
"""


@pytest.mark.slow
def test_what_production_missed_is_tuned_and_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATUNE_KNOBS", "num_splits=7")  # whoever runs it has settings of their own
    monkeypatch.setenv("PATUNE_STRICT", "1")
    done = run("capture_and_tune", str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert is_readable(done.stdout.replace(str(tmp_path), "").replace(str(example.__file__), ""))
    assert done.stdout.endswith("fleet: heuristic, heuristic -> exact, nearest\n")

    commands = re.findall(r"^(\w+)\$ (\w+) (.*)$", done.stdout, re.MULTILINE)
    steps = [(machine, rest.split()[0]) for machine, program, rest in commands if program == "patune"]  # fmt: skip
    assert steps == [("tuner", "sweep"), ("tuner", "export"), ("fleet", "import")]
    assert [m for m, program, _ in commands if program == "python"] == ["production", "fleet", "fleet"]  # fmt: skip

    tables = re.findall(r"^ +(\d+) +(\d+)  (\w+) +(\w+) +partition_tokens=(\d+) num_splits=(\d+) num_warps=(\d+)$", done.stdout, re.MULTILINE)  # fmt: skip
    assert [row[:2] for row in tables] == [("128", "2048"), ("100", "1500")] * 3
    assert [row[2:4] for row in tables[:4]] == [("heuristic", "default")] * 4
    assert [row[2:4] for row in tables[4:]] == [("exact", "emulated"), ("nearest", "emulated")]

    # one key was captured, tuned and taken in; nothing waits any more
    winners = {}
    for machine in ("tuner", "fleet"):
        with Store.read(tmp_path / machine / "patune.db") as store:
            (winner,) = store.winners()
            assert list(store.misses()) == []
        assert winner.key == (MI300X, PROBLEM, TUNED)
        assert (winner.evidence, winner.trials) == ("emulated", 3)
        winners[machine] = winner.knobs
    assert winners["tuner"] == winners["fleet"]
    knobs = winners["fleet"]
    served = (str(knobs.partition_tokens), str(knobs.num_splits), str(knobs.num_warps))
    assert [row[4:] for row in tables[4:]] == [served, served]
    assert list((tmp_path / "captured").iterdir()) == []
    assert not (tmp_path / "production" / "patune.db").exists(), "lookups create nothing"
    assert not (tmp_path / "fleet" / "misses").exists()
    pack = json.loads((tmp_path / "winners.json").read_text("utf-8"))
    assert [w["workload"] for w in pack["winners"]] == [TUNED.to_dict()]


def test_serving_writes_down_what_it_missed(tmp_path: Path) -> None:
    (tmp_path / "production").mkdir()
    printed = example.run(tmp_path, "production", "python", str(example.__file__), "--serve")
    assert example.sources(printed) == ["heuristic", "heuristic"]
    (capture,) = (tmp_path / "captured").iterdir()
    (miss,) = json.loads(capture.read_text("utf-8"))["misses"]
    assert miss["workload"] == TUNED.to_dict(), "both sizes are of one bucket"
    assert (miss["source"], miss["calls"]) == ("heuristic", 2000)
    assert Problem.from_dict(miss["problem"]) == PROBLEM
    assert miss["target"] == MI300X.to_dict()


def test_a_machine_has_its_own_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATUNE_WATCH", "9")
    monkeypatch.setenv("PATUNE_DB", "elsewhere.db")
    code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k[:7] == 'PATUNE_'}))"
    seen = json.loads(example.run(tmp_path, "fleet", "python", "-c", code))
    assert seen == {
        "PATUNE_TARGET": "gfx942",
        "PATUNE_DB": "fleet/patune.db",
        "PATUNE_CAPTURE": "0",
    }
    said = capsys.readouterr().out
    assert said.startswith("\nfleet$ python -c 'import json")


def test_long_results_are_wrapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"word{n}" for n in range(40))
    result = example.run(tmp_path, "fleet", "python", "-c", f"print({words!r}); print('short  x')")
    assert result == f"{words}\nshort  x\n"
    printed = capsys.readouterr().out.splitlines()[2:]
    assert is_readable("\n".join(printed))
    assert printed[-1] == "short  x"
    assert " ".join(" ".join(printed[:-1]).split()) == words


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (("heuristic", "heuristic"), ("exact", "nearest"), 0),
        (("heuristic", "heuristic"), ("heuristic", "heuristic"), 1),
        (("heuristic", "heuristic"), ("exact", "heuristic"), 1),
        (("exact", "nearest"), ("exact", "nearest"), 1),
    ],
)
def test_the_exit_code_is_that_of_the_answers(
    before: tuple[str, str],
    after: tuple[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[tuple[str, ...]] = []

    def run(folder: Path, *command: str) -> str:
        ran.append(command)
        imported = any(words[:3] == ("fleet", "patune", "import") for words in ran)
        return TABLE.format(*(after if imported else before))

    monkeypatch.setattr(example, "run", run)
    monkeypatch.setattr(sys, "argv", ["capture_and_tune.py", str(tmp_path)])
    assert example.main() == code
    assert [words[0] for words in ran] == ["production", "tuner", "tuner", "fleet", "fleet", "fleet"]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["fleet", "production", "tuner"]  # fmt: skip


def test_its_own_folder_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def ship(folder: Path) -> int:
        assert folder.is_dir()
        seen.append(folder)
        return 3

    monkeypatch.setattr(example, "ship", ship)
    monkeypatch.setattr(sys, "argv", ["capture_and_tune.py"])
    assert example.main() == 3
    assert not seen[0].exists()
