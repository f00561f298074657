"""The recorded kill matrices: every planted bug is in them and rejected, and every role of cases rejects one alone or docs/gate.md says why it stays."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from mutants import mutants_of

from patune.problem import Problem
from patune.tuner.gate.case import role_of
from patune.tuner.gate.cases import gate_cases

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = {
    "device": ("hopper_wgmma", "2026-11-22_gate_mutations_h200.json.gz"),
    "emulator": ("cdna_mfma", "2026-11-22_gate_mutations_emulated.json.gz"),
}
STAY = ("markers/ragged", "random/long", "random/rounded_query")  # docs/gate.md says why
TIMING = ("keys_not_waited_for",)  # rejected in two runs of three


def recorded(place: str) -> dict[str, Any]:
    path = RESULTS / RECORDS[place][1]
    document: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return document


@pytest.mark.parametrize("place", RECORDS)
def test_every_planted_bug_was_rejected(place: str) -> None:
    rows = {row["name"]: row for row in recorded(place)["mutants"]}
    planted = {m.name for m in mutants_of(RECORDS[place][0], shown_by=place)}
    assert set(rows) == planted
    assert [name for name, row in rows.items() if not row["killers"] and name not in TIMING] == []
    assert [name for name, row in rows.items() if row["errors"]] == []


def test_every_role_of_cases_rejects_a_bug_that_no_other_does() -> None:
    from mutants import HOPPER_KNOBS

    alone: dict[str, list[str]] = {}
    for place in RECORDS:
        for role, row in recorded(place)["roles"].items():
            alone.setdefault(role, []).extend(row["alone"])
    idle = {role for role, names in alone.items() if not names}
    assert idle == set(STAY)
    text = (ROOT / "docs" / "gate.md").read_text()
    for role in STAY:
        assert f"`{role}`" in text
    fp8 = {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_token", "fp8_math": True}
    for fields in ({}, fp8):
        problem = Problem(block_size=64, head_dim=64, qg=8, windowed=True, **fields)
        for emulated in (True, False):
            cases = gate_cases(problem, HOPPER_KNOBS, emulated=emulated)
            assert {role_of(case.name) for case in cases} <= set(alone)
