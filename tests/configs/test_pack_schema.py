"""The published JSON Schema of packs: made from the records, and what it refuses the parser refuses."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from config_samples import H100, MI300X, block, candidate, counted, robust_winner, winner
from config_strategies import whole_packs
from hypothesis import given, settings
from hypothesis import strategies as st

import patune
from patune.configs.candidate import Candidate
from patune.configs.pack import Pack
from patune.configs.packs import document_of, pack_text, parse_pack
from patune.configs.winner import Speedup
from patune.errors import DocumentError

ROOT = Path(patune.__file__).parents[1]
FILE = ROOT / "patune" / "configs" / "pack.schema.json"
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FULL = document_of(
    Pack(
        winners=[
            winner(speedup=Speedup(ratio=1.2, low=1.1, high=1.3)),
            winner(target=H100),
            winner(target=MI300X, slots=10.0),
        ],
        candidates={winner().key: (candidate(),)},
        robust=[robust_winner()],
        blocklist=[block()],
    )
)
VALUES = (None, True, 0, 1, -1, 1.5, 64, 2**63, "", "x", "x" * 301, "hang", [], {}, [1], {"a": 1})


def refused_by_the_schema(document: Any) -> bool:
    return not VALIDATOR.is_valid(document)


def refused_by_the_parser(document: Any) -> bool:
    try:
        parse_pack("test", json.dumps(document).encode())
    except DocumentError:
        return True
    return False


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: list[Any] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [at] * bool(at) + [p for name, child in children for p in places(child, (*at, name))]


PLACES = places(FULL)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_file_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "scripts" / "pack_schema.py"
    assert runpy.run_path(str(script))["schema_text"]() == FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0


@settings(max_examples=40, deadline=None)
@given(whole_packs())
def test_every_pack_satisfies_it(pack: Pack) -> None:
    document = json.loads(pack_text(document_of(pack)))
    VALIDATOR.validate(document)
    assert parse_pack("test", json.dumps(document).encode()) == pack


@pytest.mark.parametrize(
    "path",
    [
        *sorted((ROOT / "patune" / "configs" / "packs").rglob("*.json")),
        *sorted(Path(__file__).parent.glob("pack_schema_*.json")),
    ],
    ids=lambda path: path.stem,
)
def test_shipped_and_old_packs_satisfy_it(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text(encoding="utf-8")))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from(VALUES))
def test_what_the_schema_refuses_the_parser_refuses(at: tuple[Any, ...], value: Any) -> None:
    document: Any = copy.deepcopy(FULL)
    holder = document
    for step in at[:-1]:
        holder = holder[step]
    holder[at[-1]] = value
    assert refused_by_the_parser(document) >= refused_by_the_schema(document)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), st.booleans())
def test_no_field_is_missing_or_unknown_to_one_of_them(at: tuple[Any, ...], drop: bool) -> None:
    document: Any = copy.deepcopy(FULL)
    holder = document
    for step in at[:-1]:
        holder = holder[step]
    if drop:
        del holder[at[-1]]
    elif isinstance(holder, dict):
        holder["evil"] = 1
        assert refused_by_the_schema(document)
    assert refused_by_the_parser(document) >= refused_by_the_schema(document)


def test_they_refuse_the_same_plain_mistakes() -> None:
    """Without these the two tests above would pass with a schema that allows anything."""
    measured = ("winners", 1)
    mistakes: dict[tuple[Any, ...], Any] = {
        ("schema",): 5,
        ("robust",): {},
        (*measured, "problem", "query_length"): True,
        (*measured, "problem", "qg"): 65,
        (*measured, "problem", "block_size"): 100,
        (*measured, "workload", "batch"): 0,
        (*measured, "workload", "context"): 2**63,
        (*measured, "knobs", "num_splits"): 129,
        (*measured, "knobs", "family"): "cdna_mfma",
        (*measured, "evidence"): "emulated",
        (*measured, "timing"): None,
        (*measured, "timing", "median_us"): -1.0,
        (*measured, "created"): "yesterday",
        (*measured, "trials"): 0,
        (*measured, "imported_from"): "x.json",
        (*measured, "environment", "triton"): "",
        (*measured, "environment", "driver"): "x" * 301,
        (*measured, "environment", "fp_fusion"): 1,
        ("winners", 2, "candidates"): [candidate().to_dict()] * 6,
        ("winners", 2, "candidates", 0, "gate_cases"): 0,
        ("winners", 2, "candidates", 0, "timing"): None,
        ("robust", 0, "objective"): "best",
        ("robust", 0, "workloads"): [],
        ("robust", 0, "regrets"): [True],
        ("blocklist", 0, "status"): "wrong",
        ("blocklist", 0, "arch"): "sm_80",
    }
    for at, value in mistakes.items():
        document: Any = copy.deepcopy(FULL)
        holder = document
        for step in at[:-1]:
            holder = holder[step]
        holder[at[-1]] = value
        assert refused_by_the_schema(document), (at, value)
        assert refused_by_the_parser(document), (at, value)


def test_a_pack_of_another_schema_has_other_lists() -> None:
    for schema, present in ((3, True), (4, False)):
        document = copy.deepcopy(FULL) | {"schema": schema}
        if not present:
            del document["robust"]
        assert refused_by_the_schema(document)
        assert refused_by_the_parser(document)


def test_counted_work_of_a_candidate_is_looked_at() -> None:
    odd = Candidate(knobs=candidate().knobs, timing=None, counted=counted(), gate_cases=1).to_dict()
    document: Any = copy.deepcopy(FULL)
    document["winners"][2]["candidates"] = [odd | {"counted": {**odd["counted"], "mfma": -1}}]
    assert refused_by_the_schema(document)
    assert refused_by_the_parser(document)
