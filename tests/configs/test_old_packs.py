"""Packs of earlier versions: read with what they could not say at its default, and written as packs of today."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import H100, KNOBS, MI300X, OTHER_KNOBS, candidate, timing, winner

from patune.configs.pack import winner_order
from patune.configs.packs import (
    SCHEMA,
    import_pack,
    load_pack,
    pack_document,
    pack_text,
    read_pack,
)
from patune.configs.winner import Speedup
from patune.errors import DocumentError
from patune.problem import Problem

if TYPE_CHECKING:
    from patune.configs.store import Store

SCHEMA_1 = Path(__file__).with_name("pack_schema_1.json")  # written by commit 225f187
SCHEMA_2 = Path(__file__).with_name("pack_schema_2.json")  # of the pack that commit c1d0f67 shipped
LATER = {  # field -> schema that it came with, and where it is
    "softcap": (2, "problem", "Problem", False),
    "fp8_math": (2, "problem", "Problem", False),
    "low_us": (3, "timing", "Timing", None),
    "high_us": (3, "timing", "Timing", None),
    "protocol": (3, "timing", "Timing", "graph-cold-1"),
    "speedup": (3, None, "Winner", None),
    "candidates": (3, None, "Winner", []),
}
VARIANT = Problem(
    block_size=16,
    head_dim=64,
    qg=4,
    query_length=4,
    query_dtype="fp16",
    kv_dtype="fp8_e4m3fn",
    kv_quant="per_token",
    kv_layout="hnd",
    windowed=True,
    sinks=True,
    softcap=False,
    fp8_math=False,
)
ALONE = replace(KNOBS, overlap_launch=False)  # what had no overlapped launch was launched in turn
WINNERS = [
    winner(knobs=ALONE, default_knobs=replace(OTHER_KNOBS, overlap_launch=False)),
    winner(target=H100, problem=VARIANT, knobs=ALONE, default_knobs=None, default_score=None),
    winner(target=MI300X, slots=1000.0),
]


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "pack.json"
    path.write_text(json.dumps(document))
    return path


def test_a_pack_of_schema_1_is_read(tmp_path: Path) -> None:
    document = json.loads(SCHEMA_1.read_text())
    assert document["schema"] == 1
    assert not any("softcap" in entry["problem"] for entry in document["winners"])
    assert read_pack(SCHEMA_1) == WINNERS
    again = pack_document(read_pack(SCHEMA_1))
    assert again["schema"] == SCHEMA == 4
    assert {(e["problem"]["softcap"], e["problem"]["fp8_math"]) for e in again["winners"]} == {
        (False, False)
    }
    assert read_pack(written(tmp_path, again)) == sorted(WINNERS, key=winner_order)


def test_a_pack_of_schema_1_is_imported(store: Store) -> None:
    report = import_pack(store, SCHEMA_1)
    assert report.added + report.skipped == 3
    assert replace(WINNERS[0], imported_from=SCHEMA_1.name) in store.winners()


def test_the_new_fields_go_out_and_come_in(tmp_path: Path) -> None:
    fp8 = Problem(
        block_size=1024, head_dim=128, qg=8, kv_dtype="fp8_e4m3fn", softcap=True, fp8_math=True
    )
    found = [winner(), winner(problem=fp8)]
    document = pack_document(found)
    assert [e["problem"]["softcap"] for e in document["winners"]] == [False, True]
    assert [e["problem"]["fp8_math"] for e in document["winners"]] == [False, True]
    path = tmp_path / "pack.json"
    path.write_text(pack_text(document))
    assert read_pack(path) == found


@pytest.mark.parametrize("path", [SCHEMA_1, SCHEMA_2], ids=["1", "2"])
@pytest.mark.parametrize("name", LATER)
def test_a_pack_cannot_say_what_came_later(tmp_path: Path, path: Path, name: str) -> None:
    document: Any = copy.deepcopy(json.loads(path.read_text()))
    schema = document["schema"]
    since, part, kind, value = LATER[name]
    entry = document["winners"][1]
    (entry[part] if part else entry)[name] = value
    if since <= schema:
        assert read_pack(written(tmp_path, document)) == read_pack(path)
        return
    message = rf"winners\[1\]: {kind}: unknown field '{name}' in a pack of schema {schema}; allowed: from schema {since} on"
    with pytest.raises(DocumentError, match=message):
        read_pack(written(tmp_path, document))


def test_a_pack_of_schema_2_is_read_and_written_as_one_of_today(tmp_path: Path) -> None:
    document = json.loads(SCHEMA_2.read_text())
    assert document["schema"] == 2
    pack = load_pack(SCHEMA_2)
    assert pack.candidates == {}
    assert [w.speedup for w in pack.winners] == [None, None]
    timings = [w.timing for w in pack.winners if w.timing]
    assert [(t.low_us, t.high_us, t.protocol) for t in timings] == [
        (None, None, "graph-cold-1")
    ] * 2
    assert [t.median_us for t in timings] == [6.113540905493277, 19.211428506033762]
    again = pack_document(pack.winners)
    assert again["schema"] == SCHEMA
    assert load_pack(written(tmp_path, again)) == pack
    for entry in again["winners"]:
        for name in ("speedup", "candidates"):
            del entry[name]
        for name in ("low_us", "high_us", "protocol"):
            del entry["timing"][name]
    assert again["winners"] == document["winners"]


def test_a_pack_of_schema_2_is_imported(store: Store) -> None:
    report = import_pack(store, SCHEMA_2)
    assert (report.added, report.skipped) == (2, 0)
    found = [replace(w, imported_from=SCHEMA_2.name) for w in read_pack(SCHEMA_2)]
    assert sorted(store.winners(), key=lambda w: w.created) == found


def test_interval_speedup_and_candidates_go_out_and_come_in(tmp_path: Path) -> None:
    timed = replace(timing(50.0), low_us=49.5, high_us=50.5, protocol="graph-cold-2")
    found = winner(timing=timed, speedup=Speedup(ratio=1.2, low=1.1, high=1.3))
    times = [replace(timed, median_us=us) for us in (51.0, 52.0)]
    beside = (
        candidate(timing=times[0]),
        candidate(timing=times[1], knobs=replace(KNOBS, num_splits=8)),
    )
    document = pack_document([found], {found.key: beside})
    assert document["winners"][0]["timing"]["protocol"] == "graph-cold-2"
    assert document["winners"][0]["speedup"] == {"ratio": 1.2, "low": 1.1, "high": 1.3}
    pack = load_pack(written(tmp_path, document))
    assert pack.winners == [found]
    assert pack.candidates == {found.key: beside}


@pytest.mark.parametrize("schema", [0, -1, 1.0, 3.0])
def test_schemas_that_never_were_are_refused(tmp_path: Path, schema: float) -> None:
    document = pack_document([winner()]) | {"schema": schema}
    with pytest.raises(DocumentError, match=rf"schema={schema} is not allowed; allowed: 1 to 4\.$"):
        read_pack(written(tmp_path, document))
