from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from decode_candidates import candidates
from decode_classes import CLASSES, EVERY_CACHE, RAGGED_LENGTHS, choose_rows

from patune.kernels.defaults import default_knobs
from patune.kernels.feasibility import is_feasible
from patune.problem import Problem, Workload
from patune.target import Target
from patune.tuner.rotation import plan_rotation

H200 = Target.named("sm_90")
ROWS = choose_rows([], [])


def row_of(name):
    (row,) = [row for row in ROWS if row.name == name]
    return row


def test_all_classes_have_rows_and_names_of_their_own():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.decode_class.name for row in ROWS} == {c.name for c in CLASSES}
    plain = [row for row in ROWS if row.decode_class.name == "b16_c32768"]
    assert [(row.layout, row.page) for row in plain] == list(EVERY_CACHE)


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("b128_c4096/hnd/64", 1.02),
        ("b128_c4096/hnd/16", 1.04),
        ("b16_c4096/hnd/16", 1.04),
        ("b1_c4096/nhd/16", 1.45),
        ("window128_b128/nhd/16", 1.12),
        ("fp8native_b1_c32768/hnd/64", 1.35),
    ],
)
def test_goals_follow_the_class_and_the_page(name, goal):
    assert row_of(name).goal == goal


def test_rows_pose_what_their_names_say():
    plain = row_of("b16_c32768/aiter/1024")
    assert plain.problem == Problem(block_size=1024, head_dim=128, qg=8, kv_layout="aiter")
    assert plain.workload == Workload(batch=16, kv_heads=8, context=32768)
    native = row_of("fp8native_b128_c4096/hnd/64").problem
    assert (native.kv_dtype, native.kv_quant, native.fp8_math) == ("fp8_e4m3fn", "per_tensor", True)
    assert native.query_dtype == "bf16"
    assert row_of("ql4_b1_c32768/hnd/64").problem.query_length == 4
    ragged = row_of("ragged_b128/hnd/64")
    assert min(ragged.lengths) >= RAGGED_LENGTHS[0]
    assert max(ragged.lengths) <= RAGGED_LENGTHS[1] < ragged.workload.context
    assert len(set(ragged.lengths)) > 100
    assert row_of("ragged_b128/hnd/64").lengths == ragged.lengths


def test_bytes_are_those_of_peers_md():
    """Batch 16 x 4096 is 268.4 MB, window 128 at batch 128 67.1 MB, fp8 at batch 1 x 32768 67.1 MB."""
    for name, megabytes in (
        ("b16_c4096/hnd/64", 268.4),
        ("window128_b128/hnd/64", 67.1),
        ("fp8_b1_c32768/hnd/64", 67.1),
        ("b128_c32768/hnd/64", 17179.9),
    ):
        row = row_of(name)
        rotation = plan_rotation(row.problem, row.workload, 10**12, row.lengths)
        assert rotation.kv_b / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_choices_narrow_the_rows():
    assert {row.decode_class.name for row in choose_rows(["fp8_"], [])} == {
        "fp8_b128_c4096",
        "fp8_b16_c32768",
        "fp8_b1_c32768",
    }
    assert [row.name for row in choose_rows(["b1_c4096"], ["hnd/64", "aiter_5d/16"])] == [
        "b1_c4096/hnd/64",
        "b1_c4096/aiter_5d/16",
    ]
    pages = [(row.layout, row.page) for row in choose_rows(["ragged"], ["64"])]
    assert pages == [("hnd", 64), ("nhd", 64), ("aiter", 64)]
    assert len(choose_rows([], [], one_cache=True)) == len(CLASSES)
    for classes, caches in ((["b7"], []), ([], ["hnd/17"]), ([], ["rows"])):
        with pytest.raises(ValueError, match="no c"):
            choose_rows(classes, caches)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_candidates_are_feasible_distinct_and_led_by_the_default(row):
    found = candidates(row.problem, row.workload, H200, 24)
    knobs = [c.knobs for c in found]
    default = default_knobs(row.problem, row.workload, H200)
    assert is_feasible(default, row.problem, H200) is None
    assert (knobs[0], found[0].source) == (default, "default")
    assert len(knobs) == len(set(knobs)) <= 24
    assert len(knobs) >= 8
    assert all(is_feasible(k, row.problem, H200) is None for k in knobs)
    shapes = {(k.partition_tokens, k.num_stages, k.num_warps) for k in knobs}
    assert len(shapes) >= 4
    assert candidates(row.problem, row.workload, H200, 24) == found
    assert candidates(row.problem, row.workload, H200, 3) == found[:3]


def test_candidates_vary_splits_and_reduce_warps_where_there_are_several():
    row = row_of("b1_c4096/hnd/64")
    knobs = [c.knobs for c in candidates(row.problem, row.workload, H200, 24)]
    assert len({k.num_splits for k in knobs}) >= 3
    assert {k.reduce_warps for k in knobs} == {1, 4}
    assert all(k.overlap_launch for k in knobs)
    one_shot = row_of("b128_c4096/hnd/64")
    alone = [c.knobs for c in candidates(one_shot.problem, one_shot.workload, H200, 24)]
    assert {k.num_splits for k in alone} >= {1, 2}
    assert {k.reduce_warps for k in alone if k.one_shot} == {4}


def test_a_stored_winner_is_tried_second_and_once(monkeypatch):
    row = row_of("b1_c4096/aiter/1024")
    default = default_knobs(row.problem, row.workload, H200)
    for knobs, sources in (
        (replace(default, maxnreg=128), ["default", "stored"]),
        (default, ["default", "grid"]),
    ):
        answer = Mock(return_value=SimpleNamespace(source="pack", knobs=knobs))
        monkeypatch.setattr("patune.configs.dispatcher.lookup_problem", answer)
        found = candidates(row.problem, row.workload, H200, 100)
        assert [c.source for c in found[:2]] == sources
        assert knobs in [c.knobs for c in found[:2]]
        assert len(found) > 60
