"""What is worth trying first: the best trials of a key, what packs carry beside a winner, and who reads it again."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CDNA_KNOBS,
    ENVIRONMENT,
    H100,
    H200,
    KEY,
    KNOBS,
    LATER_ENVIRONMENT,
    MI300X,
    OTHER_KNOBS,
    PROBLEM,
    WORKLOAD,
    WRONG,
    add_trial,
    at,
    candidate,
    emulated,
    measured,
    timing,
    winner,
)
from config_strategies import hopper_knobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs import packs
from patune.configs.packs import (
    export_pack,
    import_pack,
    load_pack,
    pack_document,
    pack_text,
    packed_candidates,
)
from patune.configs.store import Store
from patune.errors import InvalidValueError
from patune.kernels import feasibility
from patune.kernels.knobs import CdnaKnobs, HopperKnobs, Knobs
from patune.problem import Problem
from patune.trial import TrialResult

if TYPE_CHECKING:
    from pathlib import Path

    from patune.target import Target

PLACE: dict[str, Any] = {"arch": "sm_90", "problem": PROBLEM, "workload": WORKLOAD}


def knobs(splits: int) -> HopperKnobs:
    return replace(KNOBS, num_splits=splits)


def slow(median_us: float) -> TrialResult:
    return TrialResult(status="slow", gate_cases=12, timing=timing(median_us))


def by_protocol(median_us: float, protocol: str) -> TrialResult:
    return TrialResult(
        status="ok", gate_cases=12, timing=replace(timing(median_us), protocol=protocol)
    )


def top(store: Store, k: int = 5) -> list[tuple[Knobs, float | None]]:
    return [(t.knobs, t.result.score) for t in store.top(**KEY, k=k)]


@pytest.fixture(autouse=True)
def everything_is_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "is_feasible", lambda knobs, problem, target: None)


def test_the_best_trials_have_different_knobs_and_passed(store: Store) -> None:
    for splits, median_us in ((1, 50.0), (2, 40.0), (3, 60.0), (4, 45.0), (5, 70.0), (6, 80.0)):
        add_trial(store, measured(median_us), knobs=knobs(splits))
    add_trial(store, slow(1.0), knobs=knobs(7))
    add_trial(store, WRONG, knobs=knobs(8))
    add_trial(store, measured(1.0), knobs=knobs(9), target=H100)
    add_trial(store, measured(1.0), knobs=knobs(9), workload=at(batch=1))
    best = [(knobs(2), 40.0), (knobs(4), 45.0), (knobs(1), 50.0), (knobs(3), 60.0)]
    assert top(store) == [*best, (knobs(5), 70.0)]
    assert top(store, 3) == best[:3]
    assert len(top(store, 100)) == 6
    assert store.top(target=MI300X, problem=PROBLEM, workload=WORKLOAD) == []
    with pytest.raises(InvalidValueError, match="k=0 is not allowed"):
        store.top(**KEY, k=0)


def test_of_knobs_measured_twice_the_newest_counts(store: Store) -> None:
    add_trial(store, measured(30.0), knobs=knobs(1))
    add_trial(store, measured(40.0), knobs=knobs(2))
    add_trial(store, measured(50.0), knobs=knobs(1), environment=LATER_ENVIRONMENT)
    assert top(store) == [(knobs(2), 40.0), (knobs(1), 50.0)]
    assert store.top(**KEY)[1].environment_key == LATER_ENVIRONMENT.key


def test_scores_of_different_kinds_are_not_compared(store: Store) -> None:
    add_trial(store, emulated(1.0), knobs=knobs(1))
    add_trial(store, by_protocol(10.0, "graph-cold-1"), knobs=knobs(2))
    add_trial(store, by_protocol(90.0, "graph-cold-2"), knobs=knobs(3))
    add_trial(store, by_protocol(80.0, "graph-cold-2"), knobs=knobs(4))
    assert [k for k, _ in top(store)] == [knobs(4), knobs(3), knobs(2), knobs(1)]


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(hopper_knobs, st.integers(1, 9)), max_size=12), st.integers(1, 9))
def test_the_best_trials_are_those_of_a_plain_sort(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[HopperKnobs, int]], k: int
) -> None:
    with Store.open(tmp_path_factory.mktemp("top") / "patune.db") as store:
        for one, score in found:
            add_trial(store, measured(float(score)), knobs=one)
        last = {one: float(score) for one, score in found}
        stored = top(store, k)
        assert [score for _, score in stored] == sorted(last.values())[:k]
        assert all(last[one] == score for one, score in stored)  # type: ignore[index]


def test_candidates_are_winners_first_then_trials_of_every_device_in_turn(store: Store) -> None:
    targets: dict[Target, range] = {H200: range(10, 20), H100: range(20, 30)}
    for target, found in targets.items():
        ids = [add_trial(store, measured(float(n)), knobs=knobs(n), target=target) for n in found]
        store.promote(ids[3], default_trial_id=None)
    add_trial(store, measured(1.0), knobs=knobs(99), problem=replace(PROBLEM, windowed=True))
    add_trial(store, measured(1.0), knobs=knobs(98), workload=at(batch=1))
    add_trial(store, emulated(), target=MI300X)
    first, second, *rest = store.candidates(**PLACE)
    assert {first, second} == {knobs(13), knobs(23)}
    assert rest == [knobs(n) for n in (10, 20, 11, 21, 12, 22)]
    assert store.candidates(**(PLACE | {"arch": "gfx942"})) == [CDNA_KNOBS]
    assert store.candidates(**(PLACE | {"arch": "gfx950"})) == []


def test_a_pack_carries_what_was_scored_as_its_winner_was(store: Store, tmp_path: Path) -> None:
    best = add_trial(store, measured(40.0), knobs=knobs(1))
    for splits, median_us in ((2, 47.0), (3, 46.0), (4, 45.0), (5, 44.0), (6, 43.0), (7, 42.0)):
        add_trial(store, measured(median_us), knobs=knobs(splits))
    add_trial(store, measured(41.5), knobs=knobs(7))  # timed again
    add_trial(store, measured(1.0), knobs=knobs(8), environment=LATER_ENVIRONMENT)
    add_trial(store, emulated(1.0), knobs=knobs(9))
    add_trial(store, by_protocol(1.0, "graph-cold-2"), knobs=knobs(10))
    add_trial(store, slow(1.0), knobs=knobs(11))
    found = store.promote(best, default_trial_id=None)
    export_pack(store, tmp_path / "pack.json")
    beside = load_pack(tmp_path / "pack.json").candidates
    assert beside == store.runners_up([found])
    assert [(c.knobs, c.score, c.gate_cases) for c in beside[found.key]] == [
        (knobs(7), 41.5, 12),
        (knobs(6), 43.0, 12),
        (knobs(5), 44.0, 12),
        (knobs(4), 45.0, 12),
        (knobs(3), 46.0, 12),
    ]


def test_equal_scores_do_not_tell_in_which_order_they_were_tried(store: Store) -> None:
    best = add_trial(store, measured(1.0), knobs=knobs(1))
    for splits in (4, 2, 3):
        add_trial(store, measured(5.0), knobs=knobs(splits))
    found = store.promote(best, default_trial_id=None)
    assert [c.knobs for c in store.runners_up([found])[found.key]] == [knobs(n) for n in (2, 3, 4)]


def written(folder: Path, name: str = "pack.json") -> Path:
    """A pack of one winner with two candidates."""
    beside = (candidate(51.0, knobs=knobs(8)), candidate(52.0, knobs=OTHER_KNOBS))
    path = folder / name
    path.write_text(pack_text(pack_document([winner()], {winner().key: beside})))
    return path


def test_imported_candidates_are_trials_that_another_machine_can_adopt(
    store: Store, tmp_path: Path
) -> None:
    import_pack(store, written(tmp_path))
    found = [(t.knobs, t.source, t.result.score, t.result.status) for t in store.trials(**KEY)]
    assert found == [
        (KNOBS, "pack", 50.0, "ok"),
        (knobs(8), "pack", 51.0, "ok"),
        (OTHER_KNOBS, "pack", 52.0, "ok"),
    ]
    assert {t.environment_key for t in store.trials(**KEY)} == {ENVIRONMENT.key}
    assert store.candidates(**PLACE) == [KNOBS, knobs(8), OTHER_KNOBS]
    before = store.trials(**KEY)
    import_pack(store, tmp_path / "pack.json")
    assert store.trials(**KEY) == before


def test_candidates_of_a_winner_that_is_not_taken_stay_out(store: Store, tmp_path: Path) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)  # newer than the pack's
    assert import_pack(store, written(tmp_path)).kept == 1
    assert len(store.trials(**KEY)) == 1


def test_candidates_that_these_kernels_cannot_run_stay_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        feasibility, "is_feasible", lambda k, p, t: "too many" if k.num_splits == 8 else None
    )
    path = tmp_path / "pack.json"
    beside = (candidate(51.0, knobs=knobs(8)), candidate(52.0, knobs=knobs(9)))
    path.write_text(pack_text(pack_document([winner()], {winner().key: beside})))
    import_pack(store, path)
    assert [t.knobs for t in store.trials(**KEY)] == [KNOBS, knobs(9)]


def test_a_dry_run_takes_no_candidates(store: Store, tmp_path: Path) -> None:
    assert import_pack(store, written(tmp_path), dry_run=True).added == 1
    assert store.trials(**KEY) == []


def test_shipped_candidates_are_winners_first_of_every_device(
    fresh_dispatcher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh_dispatcher / "sm_90").mkdir()
    written(fresh_dispatcher / "sm_90", "a.json")
    other = winner(target=H100, knobs=knobs(7))
    sized = winner(workload=at(batch=1), knobs=knobs(6))
    amd = winner(target=MI300X, slots=1.0)
    path = fresh_dispatcher / "sm_90" / "b.json"
    path.write_text(pack_text(pack_document([other, sized, amd])))
    (fresh_dispatcher / "bad.json").write_text("{}")
    assert packed_candidates(**PLACE) == [KNOBS, knobs(7), knobs(8), OTHER_KNOBS]
    assert "Going on without a pack" in caplog.text
    assert packed_candidates(**(PLACE | {"workload": at(batch=2)})) == []
    assert packed_candidates(**(PLACE | {"arch": "gfx942"})) == [CDNA_KNOBS]


def test_a_shipped_pack_is_parsed_once_until_it_changes(
    fresh_dispatcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(packs, "load_pack", lambda path: read.append(path.name) or load_pack(path))
    path = written(fresh_dispatcher, "a.json")
    for size in (1, 2, 128, 128):
        packed_candidates(**(PLACE | {"workload": at(batch=size)}))
    assert read == ["a.json"]
    path.write_text(pack_text(pack_document([winner(knobs=knobs(7))])))
    assert packed_candidates(**PLACE) == packed_candidates(**PLACE) == [knobs(7)]
    assert read == ["a.json", "a.json"]
    path.unlink()
    assert packed_candidates(**PLACE) == []


def test_candidates_of_a_pack_have_one_order(tmp_path: Path) -> None:
    beside = (candidate(52.0), candidate(51.0, knobs=knobs(8)), candidate(51.0, knobs=knobs(6)))
    texts = {
        pack_text(pack_document([winner()], {winner().key: order}))
        for order in itertools.permutations(beside)
    }
    assert len(texts) == 1
    path = tmp_path / "pack.json"
    path.write_text(texts.pop())
    assert [c.knobs for c in load_pack(path).candidates[winner().key]] == [
        knobs(6),
        knobs(8),
        OTHER_KNOBS,
    ]


def test_the_shipped_pack_is_read() -> None:
    problem = Problem(block_size=1024, head_dim=128, qg=8)
    found = packed_candidates(arch="sm_90", problem=problem, workload=at(batch=128))
    assert len(set(found)) == len(found) == 6  # the winner and five beside it
    assert {type(knobs) for knobs in found} == {HopperKnobs}


def test_a_candidate_says_what_it_is() -> None:
    document = candidate(51.0).to_dict()
    assert document["knobs"]["family"] == "hopper_wgmma"
    assert (document["timing"]["median_us"], document["counted"]) == (51.0, None)
    assert packs.Candidate.from_dict(document) == candidate(51.0)
    with pytest.raises(InvalidValueError, match="knobs=None is not allowed; allowed: a Knobs"):
        candidate(knobs=None)  # type: ignore[arg-type]
    assert isinstance(CDNA_KNOBS, CdnaKnobs)
