"""Every change of what is served is told, once, with what was served before; nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from config_samples import (
    ENVIRONMENT,
    H100,
    H200,
    KEY,
    KNOBS,
    LATER_ENVIRONMENT,
    OTHER_KNOBS,
    PROBLEM,
    WORKLOAD,
    WRONG,
    add_trial,
    at,
    candidate,
    emulated,
    measured,
    raw,
    robust_winner,
    winner,
)

from patune.configs import ranking, rows
from patune.configs.candidate import MAX_CANDIDATES
from patune.kernels.knobs import knobs_to_dict
from patune.trial import TrialResult

if TYPE_CHECKING:
    from patune.configs.history import HistoryEvent
    from patune.configs.store import Store
    from patune.kernels.knobs import Knobs

HANG = TrialResult(status="hang", reason="gate: killed after 30 s")


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def told(events: list[HistoryEvent]) -> list[tuple[str, float | None, float | None, str]]:
    return [(e.event, e.score, e.previous_score, e.reason) for e in events]


def top(store: Store) -> list[tuple[float, Knobs]]:
    ((text,),) = raw(store, "SELECT top FROM patune_winner")
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return json.loads(text)


def test_a_key_tells_what_became_of_it(store: Store) -> None:
    assert (store.generation(), store.history(**KEY)) == (0, [])
    store.promote(add_trial(store, emulated(1000.0)), default_trial_id=None)
    store.promote(add_trial(store, measured(50.0)), default_trial_id=None)
    best = add_trial(store, measured(40.0), knobs=OTHER_KNOBS, environment=LATER_ENVIRONMENT)
    store.promote(best, default_trial_id=None)
    again = add_trial(store, measured(41.0), knobs=OTHER_KNOBS, environment=LATER_ENVIRONMENT)
    store.promote(again, default_trial_id=None)
    weak = add_trial(store, emulated(1.0))
    store.promote(weak, default_trial_id=None)
    store.merge([winner(created="2099-01-01T00:00:00Z")], imported_from="h200.json")
    retired = store.retire(**KEY, reason="wrong on the new driver")
    assert retired is not None
    assert retired.imported_from == "h200.json"
    assert store.winner(**KEY) is None
    assert store.retire(**KEY, reason="twice") is None
    store.promote(add_trial(store, emulated(900.0)), default_trial_id=None)
    events = store.history(**KEY)
    assert told(events) == [
        ("promoted", 1000.0, None, "nothing was served before"),
        ("promoted", 50.0, 1000.0, "measured, emulated before"),
        ("promoted", 40.0, 50.0, "40, 50 before"),
        ("kept", 41.0, 40.0, "the same configuration, scored anew: 41, 40 before"),
        ("kept", 41.0, 41.0, f"measured: the emulated trial {weak} does not take its place"),
        ("imported", 50.0, 41.0, "from h200.json; 50, 41 before"),
        ("retired", None, 50.0, "wrong on the new driver"),
        ("promoted", 900.0, None, "nothing was served before"),
    ]
    assert [e.id for e in events] == list(range(1, 9))
    assert store.generation() == 8
    third = events[2]
    assert (third.knobs, third.previous_knobs) == (OTHER_KNOBS, KNOBS)
    assert (third.evidence, third.previous_evidence) == ("measured", "measured")
    assert (third.environment, events[1].environment) == (LATER_ENVIRONMENT, ENVIRONMENT)
    assert (third.target, third.problem, third.workload) == (H200, PROBLEM, WORKLOAD)
    assert (events[6].knobs, events[6].environment, events[6].previous_knobs) == (None, None, KNOBS)
    assert json.loads(json.dumps(third.to_dict()))["knobs"] == knobs_to_dict(OTHER_KNOBS)
    assert list(third.to_dict()) == list(third.__slots__)
    assert store.history(**(KEY | {"target": H100})) == []


def test_what_is_of_a_whole_problem_is_told_to_all_its_sizes(store: Store) -> None:
    blocked = add_trial(store, HANG, workload=at(batch=1))
    store.block(blocked)
    store.block(blocked)
    store.put_robust(robust_winner())
    store.put_robust(robust_winner(knobs=OTHER_KNOBS, score=1.125, regrets=(1.0, 1.125)))
    store.promote(add_trial(store, measured(), workload=at(batch=2)), default_trial_id=None)
    add_trial(store, WRONG)
    events = store.history(**KEY)
    assert told(events) == [
        ("blocked", None, None, "hang: gate: killed after 30 s"),
        ("robust", 1.25, None, "worst of 2 workloads"),
        ("robust", 1.125, 1.25, "worst of 2 workloads"),
    ]
    assert [e.workload for e in events] == [None] * 3
    assert [e.previous_knobs for e in events] == [None, None, KNOBS]
    assert store.generation() == 4


def test_what_changes_nothing_is_not_told(store: Store) -> None:
    trial = add_trial(store, measured())
    store.promote(trial, default_trial_id=None)
    before = store.generation()
    add_trial(store, measured(1.0))
    store.merge([winner(created="2001-01-01T00:00:00Z")], imported_from="old.json")
    store.merge([winner(created="2099-01-01T00:00:00Z")], imported_from="new.json", dry_run=True)
    store.add_capture("c", [(H200, PROBLEM, WORKLOAD, "heuristic", 1)])
    assert store.generation() == before
    assert len(store.history(**KEY)) == 1


def test_a_change_that_fails_is_not_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(ranking, "fill_top", fail)
    with pytest.raises(RuntimeError, match="stop"):
        store.promote(add_trial(store, measured(1.0)), default_trial_id=None)
    monkeypatch.setattr(rows, "stored_winner", fail)
    with pytest.raises(RuntimeError, match="stop"):
        store.retire(**KEY, reason="")
    monkeypatch.undo()
    assert store.winner(**KEY) is not None
    assert store.generation() == 1


def with_splits(splits: int) -> Knobs:
    return replace(KNOBS, num_splits=splits)


def test_a_winner_has_its_runners_up_beside_it(store: Store) -> None:
    for splits, median in ((1, 70.0), (2, 55.0), (3, 65.0), (5, 60.0), (6, 75.0), (7, 80.0)):
        add_trial(store, measured(median), knobs=with_splits(splits))
    add_trial(store, measured(54.0), knobs=with_splits(2))  # again: the newest counts
    add_trial(store, measured(1.0), knobs=with_splits(8), environment=LATER_ENVIRONMENT)
    add_trial(store, measured(1.0), knobs=with_splits(9), workload=at(batch=1))
    add_trial(store, emulated(1.0), knobs=with_splits(10))
    add_trial(store, WRONG, knobs=with_splits(11))
    add_trial(store, measured(90.0))  # the winner's, earlier
    store.promote(add_trial(store, measured(50.0)), default_trial_id=None)
    expected = [(54.0, 2), (60.0, 5), (65.0, 3), (70.0, 1), (75.0, 6)]
    assert len(expected) == MAX_CANDIDATES
    assert top(store) == [[score, knobs_to_dict(with_splits(n))] for score, n in expected]
    ((key, found),) = store.runners_up(store.winners()).items()
    assert key == (H200, PROBLEM, WORKLOAD)
    assert [(c.score, c.knobs) for c in found] == [(s, with_splits(n)) for s, n in expected]


def test_an_imported_winner_has_its_packs_candidates_beside_it(store: Store) -> None:
    incoming = winner()
    beside = (candidate(51.0), candidate(52.0, knobs=with_splits(9)))
    store.merge([incoming], {incoming.key: beside}, imported_from="h200.json")
    assert top(store) == [
        [51.0, knobs_to_dict(OTHER_KNOBS)],
        [52.0, knobs_to_dict(with_splits(9))],
    ]
    store.promote(
        add_trial(store, measured(9.0), environment=LATER_ENVIRONMENT), default_trial_id=None
    )
    assert top(store) == []


FAILED = TrialResult(status="wrong", reason="a stricter gate", gate_cases=3)


def test_a_later_failure_vetoes_what_passed_before(store: Store) -> None:
    bad, good = with_splits(2), with_splits(3)
    add_trial(store, measured(40.0), knobs=bad)
    add_trial(store, measured(60.0), knobs=good)
    assert [t.knobs for t in store.top(**KEY)] == [bad, good]
    add_trial(store, FAILED, knobs=bad)
    assert [t.knobs for t in store.top(**KEY)] == [good]
    best = store.promote(add_trial(store, measured(50.0)), default_trial_id=None)
    assert [c.knobs for c in store.runners_up([best])[best.key]] == [good]
    assert top(store) == [[60.0, knobs_to_dict(good)]]
    assert store.candidates(arch="sm_90", problem=PROBLEM, workload=WORKLOAD) == [KNOBS, good]
    add_trial(store, measured(41.0), knobs=bad)  # passes again: the newest speaks
    assert [t.knobs for t in store.top(**KEY)] == [bad, KNOBS, good]


def test_a_winner_that_failed_since_is_no_candidate(store: Store) -> None:
    store.promote(add_trial(store, measured(50.0)), default_trial_id=None)
    add_trial(store, measured(60.0), knobs=OTHER_KNOBS)
    add_trial(store, FAILED)
    assert store.candidates(arch="sm_90", problem=PROBLEM, workload=WORKLOAD) == [OTHER_KNOBS]


def test_a_veto_is_of_its_environment_and_a_duplicate_is_none(store: Store) -> None:
    add_trial(store, measured(50.0))
    add_trial(store, FAILED, environment=LATER_ENVIRONMENT)
    add_trial(store, FAILED, workload=at(batch=1))
    add_trial(store, TrialResult(status="duplicate", reason="as trial 1"))
    assert [t.knobs for t in store.top(**KEY)] == [KNOBS]


def test_the_blocklist_is_listed(store: Store) -> None:
    crash = TrialResult(status="crash")
    store.block(add_trial(store, HANG, knobs=OTHER_KNOBS))
    store.block(add_trial(store, crash, target=H100))
    found = store.blocks(arch="sm_90")
    assert [(b.knobs, b.status, b.reason) for b in found] == [
        (KNOBS, "crash", ""),
        (OTHER_KNOBS, "hang", "gate: killed after 30 s"),
    ]
    assert {(b.arch, b.kernel_source_hash, b.problem) for b in found} == {
        ("sm_90", "5" * 64, PROBLEM)
    }
    assert store.blocks() == found
    assert store.blocks(arch="gfx942") == []
