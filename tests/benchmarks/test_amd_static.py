"""benchmarks/amd_static.py: which builds it looks at, and that its document says what they were made with."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import amd_static  # noqa: E402
import check_fakes  # noqa: E402

from patune.kernels.defaults import default_knobs, safe_knobs  # noqa: E402
from patune.kernels.feasibility import unsupported  # noqa: E402

if TYPE_CHECKING:
    import pytest


def test_every_feasible_problem_has_each_number_of_waves_and_its_default_otherwise() -> None:
    cases = amd_static.cases_of(("gfx942", "gfx950"), (0, 1, 4))
    built = [case for case in cases if case.knobs is not None]
    assert {case.target.arch for case in built} == {"gfx942", "gfx950"}
    assert {case.problem.rows for case in built} == {8, 64}
    assert {case.problem.block_size for case in built} == {16, 1024}
    for case in built:
        defaults = [default_knobs(case.problem, w, case.target) for w in amd_static.WORKLOADS]
        defaults.append(safe_knobs(case.problem, case.target))
        plain = {type(k).from_dict({**k.to_dict(), "waves_per_eu": 0}) for k in defaults}
        assert type(case.knobs).from_dict({**case.knobs.to_dict(), "waves_per_eu": 0}) in plain
    assert {case.knobs.waves_per_eu for case in built} == {0, 1, 4}
    for case in cases:
        if case.knobs is None:
            assert case.infeasible == unsupported(case.problem, case.target)


def test_the_document_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = check_fakes.AMD_FACTS | {"total_vgpr": 112, "sgpr": 40, "scratch_b": 0, "code_b": 900}
    monkeypatch.setattr("patune.tuner.check_tasks.TASKS", check_fakes.TASKS)
    spilled = {"facts": {"decode": facts | {"spills": 7}}} | check_fakes.SPILLS
    check_fakes.obey(
        monkeypatch,
        check_fakes.rule("build", {"facts": {"decode": facts}}, waves_per_eu=0),
        check_fakes.rule("build", spilled, waves_per_eu=4),
    )
    path = tmp_path / "static.json"
    status = amd_static.main(
        ["--arch", "gfx942", "--waves", "0,4", "--jobs", "1", "--json", str(path)]
    )
    assert status == 0
    document = json.loads(path.read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["date"])
    assert re.fullmatch(r"[0-9a-f]{64}", document["kernel_source_hash"])
    assert document["triton"] == document["environment"]["triton"]
    rows = [amd_static.StaticRow.from_dict(row) for row in document["rows"]]
    for row in rows:
        if row.knobs is None:
            assert (row.status, row.facts) == ("infeasible", None)
            assert row.reason
        else:
            spills = 7 if row.knobs["waves_per_eu"] == 4 else 0
            assert row.status == ("spills" if spills else "ok")
            assert row.facts is not None
            assert (row.facts["spills"], row.facts["mfma"], row.facts["vgpr"]) == (spills, 32, 100)
    printed = capsys.readouterr().out
    assert document["kernel_source_hash"][:12] in printed.splitlines()[0]
    assert "gfx942 has fp8_e4m3fnuz only" in printed
    assert not re.search(r"\d (us|ms)\b", printed)
