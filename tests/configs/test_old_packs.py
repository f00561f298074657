"""Packs of earlier versions: read with what they could not say at its default, and written as packs of today."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import H100, KNOBS, MI300X, OTHER_KNOBS, winner

from patune.configs.packs import SCHEMA, import_pack, pack_document, pack_text, read_pack
from patune.errors import DocumentError
from patune.problem import Problem

if TYPE_CHECKING:
    from patune.configs.store import Store

SCHEMA_1 = Path(__file__).with_name("pack_schema_1.json")  # written by commit 225f187
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
    assert again["schema"] == SCHEMA == 2
    assert {(e["problem"]["softcap"], e["problem"]["fp8_math"]) for e in again["winners"]} == {
        (False, False)
    }
    assert read_pack(written(tmp_path, again)) == WINNERS


def test_a_pack_of_schema_1_is_imported(store: Store) -> None:
    report = import_pack(store, SCHEMA_1)
    assert report.added + report.skipped == 3
    assert replace(WINNERS[0], imported_from=SCHEMA_1.name) in store.winners()


def test_the_new_fields_go_out_and_come_in(tmp_path: Path) -> None:
    fp8 = Problem(
        block_size=1024, head_dim=128, qg=8, kv_dtype="fp8_e4m3fn", softcap=True, fp8_math=True
    )
    found = [winner(problem=fp8), winner()]
    document = pack_document(found)
    assert [e["problem"]["softcap"] for e in document["winners"]] == [True, False]
    assert [e["problem"]["fp8_math"] for e in document["winners"]] == [True, False]
    path = tmp_path / "pack.json"
    path.write_text(pack_text(document))
    assert read_pack(path) == found


@pytest.mark.parametrize("name", ["softcap", "fp8_math"])
def test_a_pack_of_schema_1_cannot_say_what_came_later(tmp_path: Path, name: str) -> None:
    document: Any = copy.deepcopy(json.loads(SCHEMA_1.read_text()))
    document["winners"][1]["problem"][name] = False
    message = rf"winners\[1\]: Problem: unknown field '{name}' in a pack of schema 1; allowed: from schema 2 on"
    with pytest.raises(DocumentError, match=message):
        read_pack(written(tmp_path, document))


@pytest.mark.parametrize("schema", [0, -1, 1.0, 2.0])
def test_schemas_that_never_were_are_refused(tmp_path: Path, schema: float) -> None:
    document = pack_document([winner()]) | {"schema": schema}
    with pytest.raises(DocumentError, match=rf"schema={schema} is not allowed; allowed: 1 to 2\.$"):
        read_pack(written(tmp_path, document))
