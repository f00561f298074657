"""Lookups: which layer answers, and with which of its configurations."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CDNA_KNOBS,
    CORE,
    ENVIRONMENT,
    H100,
    H200,
    KNOBS,
    MI300X,
    OTHER_KNOBS,
    PROBLEM,
    WORKLOAD,
    at,
    serve,
    winner,
)

from patune.configs import dispatcher, layers
from patune.configs.dispatcher import lookup, lookup_problem, reload, stats
from patune.configs.packs import pack_document, pack_text
from patune.kernels.defaults import default_knobs
from patune.kernels.knobs import knobs_to_dict
from patune.problem import Problem

if TYPE_CHECKING:
    from patune.problem import Workload

pytestmark = pytest.mark.usefixtures("fresh_dispatcher")


def test_an_exact_answer(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    serve(database, winner())
    answer = lookup(**CORE, target="sm_90")
    assert (answer.knobs, answer.source, answer.evidence) == (KNOBS, "exact", "measured")
    assert answer.distance == {"walks": 0, "context": 0, "total": 0}
    assert json.loads(json.dumps(answer.to_dict())) == {
        "schema": 2,
        "source": "exact",
        "evidence": "measured",
        "knobs": knobs_to_dict(KNOBS),
        "key": {
            "target": H200.to_dict(),
            "problem": PROBLEM.to_dict(),
            "workload": WORKLOAD.to_dict(),
        },
        "stored_workload": WORKLOAD.to_dict(),
        "stored_target": None,
        "neighbours": [],
        "distance": {"walks": 0.0, "context": 0.0, "total": 0.0},
        "environment": ENVIRONMENT.to_dict(),
        "staleness": "reverify",  # no kernels of ours have the source hash 555...
        "changes": [
            {"field": c.field, "kind": c.kind, "stored": c.stored, "present": c.present}
            for c in answer.changes
        ],
    }
    assert ("kernel_source_hash", "reverify", "5" * 64) in [
        (c.field, c.kind, c.stored) for c in answer.changes
    ]
    assert lookup_problem(PROBLEM, WORKLOAD, H200) == answer
    assert caplog.text == ""


def test_the_same_walks_are_exact(database: Path) -> None:
    serve(database, winner())
    answer = lookup(**CORE, batch=256, kv_heads=4, target="sm_90")
    assert (answer.source, answer.stored_workload) == ("exact", WORKLOAD)


def test_among_exact_ones_evidence_then_batch_decides(database: Path) -> None:
    a, b, c = (dataclasses.replace(KNOBS, num_splits=n) for n in (1, 2, 3))
    serve(
        database,
        winner(workload=at(128, 8), knobs=a, slots=1.0, created="2026-11-22T12:00:00Z"),
        winner(workload=at(256, 4), knobs=b, created="2026-11-22T11:00:00Z"),
        winner(workload=at(512, 2), knobs=c, created="2026-11-22T10:00:00Z"),
    )
    assert lookup(**CORE, batch=128, kv_heads=8, target="sm_90").knobs == b
    assert lookup(**CORE, batch=512, kv_heads=2, target="sm_90").knobs == c
    assert lookup(**CORE, batch=1024, kv_heads=1, target="sm_90").knobs == b


@pytest.mark.parametrize(
    ("asked", "source"),
    [
        (at(batch=256), "nearest"),
        (at(batch=64), "nearest"),
        (at(context=8192), "nearest"),
        (at(context=2048), "nearest"),
        (at(batch=256, context=2048), "nearest"),
        (at(batch=257), "heuristic"),
        (at(batch=63), "heuristic"),
        (at(context=8193), "heuristic"),
        (at(context=2047), "heuristic"),
        (at(batch=129, context=8193), "heuristic"),
    ],
)
def test_a_neighbour_is_at_most_a_factor_of_two_away(
    database: Path, asked: Workload, source: str
) -> None:
    serve(database, winner())
    answer = lookup_problem(PROBLEM, asked, H200)
    assert answer.source == source
    assert answer.knobs == (KNOBS if source == "nearest" else default_knobs(PROBLEM, asked, H200))


def test_the_nearest_neighbour_answers(database: Path) -> None:
    serve(
        database,
        winner(workload=at(context=4096)),
        winner(workload=at(context=8192), knobs=OTHER_KNOBS),
    )
    nearest = lookup(**CORE, context=5000, target="sm_90")
    assert (nearest.knobs, nearest.stored_workload) == (KNOBS, None)
    assert nearest.neighbours == (at(context=4096), at(context=8192))
    assert nearest.distance == {
        "walks": 0.0,
        "context": pytest.approx(0.28771, rel=1e-4),
        "total": pytest.approx(0.28771, rel=1e-4),
    }
    assert lookup(**CORE, context=7000, target="sm_90").knobs == OTHER_KNOBS


OTHER_PROBLEMS = [
    {"block_size": 512},
    {"head_dim": 64},
    {"qg": 16},
    {"query_length": 2},
    {"query_dtype": "fp16"},
    {"kv_dtype": "fp16"},
    {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_tensor"},
    {"kv_layout": "hnd"},
    {"windowed": True},
    {"sinks": True},
    {"softcap": True},
    {"kv_layout": "aiter_5d"},
]


@pytest.mark.parametrize("change", OTHER_PROBLEMS)
def test_another_problem_is_never_answered_for(database: Path, change: dict[str, Any]) -> None:
    serve(database, winner())
    assert lookup(**(CORE | change), target="sm_90").source in ("heuristic", "safe")


@pytest.mark.parametrize("change", [*OTHER_PROBLEMS, {"fp8_math": True}])
def test_warm_answers_of_two_problems_are_never_mixed_up(change: dict[str, Any]) -> None:
    plain = CORE | {"kv_dtype": "fp8_e4m3fn"}
    for fields in (plain, plain | change):
        problem = Problem(**fields)
        for _ in ("cold", "warm"):
            assert lookup(**fields, target="sm_90").problem == problem
            assert lookup_problem(problem, WORKLOAD, H200).problem == problem
    reload()
    for fields in (plain, plain | change):  # without a target the two share their answers
        assert lookup_problem(Problem(**fields), WORKLOAD) is lookup(**fields)


def test_another_device_of_the_architecture_answers_with_a_flag(database: Path) -> None:
    serve(database, winner(target=H100), winner(target=MI300X))
    answer = lookup(**CORE, target="sm_90")
    assert (answer.source, answer.stored_target, answer.target) == ("other_device", H100, H200)
    assert ("device_name", "must_match") in [(c.field, c.kind) for c in answer.changes]
    assert lookup_problem(PROBLEM, WORKLOAD, H100).source == "exact"
    fewer = dataclasses.replace(H100, compute_units=114)
    assert lookup_problem(PROBLEM, WORKLOAD, fewer).stored_target == H100
    gfx950 = lookup(
        **CORE, target="gfx950"
    )  # of the same vendor and family, and yet another architecture
    assert gfx950.source == "heuristic"


def test_packs_answer_beside_the_database(database: Path, fresh_dispatcher: Path) -> None:
    folder = fresh_dispatcher / "sm_90"
    folder.mkdir()
    packed = [
        winner(knobs=OTHER_KNOBS),
        winner(knobs=OTHER_KNOBS, workload=at(context=512)),
        winner(knobs=OTHER_KNOBS, workload=at(context=64)),
        winner(target=MI300X, slots=5.0),
    ]
    (folder / "h200.json").write_text(pack_text(pack_document(packed)))
    serve(database, winner(workload=at(context=2048)), winner(workload=at(context=64), slots=9.0))
    same = lookup(**CORE, target="sm_90")
    assert (same.knobs, same.source, same.evidence) == (OTHER_KNOBS, "pack", "measured")
    own = lookup(**CORE, context=2048, target="sm_90")
    assert (own.knobs, own.source) == (KNOBS, "exact")
    near = lookup(**CORE, context=5000, target="sm_90")
    assert (near.knobs, near.source) == (OTHER_KNOBS, "nearest")
    better = lookup(**CORE, context=64, target="sm_90")  # measured, so before an emulated one here
    assert (better.knobs, better.source) == (OTHER_KNOBS, "pack")
    exact = lookup(**CORE, context=512, target="sm_90")
    assert (exact.source, exact.distance) == ("pack", {"walks": 0, "context": 0, "total": 0})
    amd = lookup(**CORE, target="gfx942")
    assert (amd.knobs, amd.source, amd.evidence) == (CDNA_KNOBS, "pack", "emulated")
    assert stats()["entries"] == {"db": 2, "packs": 4}


def test_a_bad_pack_costs_a_log_line(
    fresh_dispatcher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh_dispatcher / "a.json").write_text("{")
    (fresh_dispatcher / "b.json").write_text(pack_text(pack_document([winner()])))
    assert lookup(**CORE, target="sm_90").source == "pack"
    assert f"Answering without a pack: {fresh_dispatcher / 'a.json'} is not a pack" in caplog.text


def test_the_shipped_packs_can_be_read() -> None:
    from patune.configs.packs import read_pack

    for path in (Path(dispatcher.__file__).parent / "packs").rglob("*.json"):
        assert read_pack(path)


def test_what_the_kernels_refuse_is_skipped(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve(
        database,
        winner(),
        winner(workload=at(context=4000), knobs=OTHER_KNOBS),
    )
    monkeypatch.setattr(
        layers, "is_feasible", lambda knobs, p, t: "too many splits" if knobs == KNOBS else None
    )
    assert lookup(**CORE, target="sm_90").knobs == OTHER_KNOBS
    assert lookup(**CORE, context=4097, target="sm_90").knobs == OTHER_KNOBS
    assert caplog.text.count("too many splits") == 1
    monkeypatch.setattr(layers, "is_feasible", lambda knobs, p, t: "all of them")
    reload()
    assert lookup(**CORE, target="sm_90").source == "safe"


@pytest.mark.parametrize(
    "knobs",
    ["null", "[]", "{", "5", '{"family": []}', '{"family": "x"}', '{"family": "hopper_wgmma"}'],
)
def test_knobs_that_cannot_be_read_are_skipped(database: Path, knobs: str) -> None:
    serve(database, winner())
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("UPDATE patune_trial SET knobs = ?", (knobs,))
    connection.close()
    reload()
    assert lookup(**CORE, target="sm_90").source == "heuristic"


def test_retired_winners_are_not_served(database: Path) -> None:
    serve(database, winner())
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("UPDATE patune_winner SET state = 'retired'")
    reload()
    assert lookup(**CORE, target="sm_90").source == "heuristic"
    with connection:
        connection.execute("UPDATE patune_winner SET state = 'reverify'")
    connection.close()
    reload()
    assert lookup(**CORE, target="sm_90").source == "exact"
