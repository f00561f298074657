"""Promotion: what a winner says, and that only the better evidence wins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    emulated,
    measured,
    raw,
    winner,
)

from patune.configs.winner import Speedup, Winner
from patune.errors import InvalidValueError
from patune.problem import Problem, Workload

if TYPE_CHECKING:
    from patune.configs.store import Store
    from patune.trial import TrialResult


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def test_promotion_describes_the_winner(store: Store) -> None:
    default = add_trial(store, measured(60.0), knobs=OTHER_KNOBS, source="default")
    add_trial(store, WRONG)
    best = add_trial(store, measured(40.0))
    add_trial(store, measured(1.0), environment=LATER_ENVIRONMENT)
    promoted = store.promote(best, default_trial_id=default)
    assert promoted == Winner(
        target=H200,
        environment=ENVIRONMENT,
        problem=PROBLEM,
        workload=WORKLOAD,
        knobs=KNOBS,
        evidence="measured",
        timing=measured(40.0).timing,
        counted=None,
        default_score=60.0,
        default_knobs=OTHER_KNOBS,
        trials=2,  # configurations: the wrong run and the best one are of the same knobs
        gate_cases=12,
        error_rms=1e-3,
        created=promoted.created,
    )
    assert promoted.speedup_over_default == 1.5
    assert store.winner(**KEY) == promoted
    assert store.winners() == [promoted]


FASTER = Speedup(ratio=1.25, low=1.2, high=1.3)


def test_a_promotion_keeps_the_speedup_that_was_measured(store: Store) -> None:
    default = add_trial(store, measured(60.0), knobs=OTHER_KNOBS, source="default")
    best = add_trial(store, measured(40.0))
    promoted = store.promote(best, default_trial_id=default, speedup=FASTER)
    assert (promoted.speedup, promoted.speedup_over_default) == (FASTER, 1.25)
    assert promoted.default_score == 60.0
    assert store.winners() == [promoted]
    again = store.promote(best, default_trial_id=default)
    assert (again.speedup, again.speedup_over_default) == (None, 1.5)


def test_a_speedup_needs_two_measured_trials(store: Store) -> None:
    best = add_trial(store, measured(40.0))
    unmeasured = add_trial(store, emulated(), knobs=OTHER_KNOBS)
    cases = [(best, None), (best, unmeasured), (unmeasured, best), (best, add_trial(store, WRONG))]
    for trial, default in cases:
        with pytest.raises(InvalidValueError, match=r"speedup is set, .*allowed: both measured"):
            store.promote(trial, default_trial_id=default, speedup=FASTER)
    assert store.winners() == []


def test_an_imported_speedup_is_kept(store: Store) -> None:
    store.merge([winner(speedup=FASTER)], imported_from="h200.json")
    found = store.winner(**KEY)
    assert found is not None
    assert found.speedup == FASTER


def test_a_failed_default_is_named_without_a_score(store: Store) -> None:
    default = add_trial(store, WRONG, knobs=OTHER_KNOBS, source="default")
    promoted = store.promote(add_trial(store, measured()), default_trial_id=default)
    assert promoted.default_knobs == OTHER_KNOBS
    assert promoted.default_score is None
    assert promoted.speedup_over_default is None


def test_a_score_of_the_other_kind_is_not_compared(store: Store) -> None:
    default = add_trial(store, emulated(1000.0))
    assert (
        store.promote(add_trial(store, measured()), default_trial_id=default).default_score is None
    )


def test_a_default_of_another_key_is_refused(store: Store) -> None:
    best = add_trial(store, measured())
    elsewhere: dict[str, dict[str, Any]] = {
        "target": {"target": H100},
        "environment": {"environment": LATER_ENVIRONMENT},
        "problem": {"problem": Problem(block_size=16, head_dim=64, qg=1)},
        "workload": {"workload": Workload(batch=1, kv_heads=1, context=1)},
    }
    for name, change in elsewhere.items():
        other = add_trial(store, measured(), **change)
        with pytest.raises(InvalidValueError, match=f"is of another {name} than trial {best}"):
            store.promote(best, default_trial_id=other)
    with pytest.raises(InvalidValueError, match="default_trial_id=99 is not in"):
        store.promote(best, default_trial_id=99)
    assert store.winners() == []


def test_a_failed_trial_cannot_win(store: Store) -> None:
    failed = add_trial(store, WRONG)
    with pytest.raises(InvalidValueError, match=f"trial_id={failed} ended as 'wrong'"):
        store.promote(failed, default_trial_id=None)
    assert store.winner(**KEY) is None


def test_weaker_evidence_never_replaces_stronger(store: Store) -> None:
    strong = store.promote(add_trial(store, measured(40.0)), default_trial_id=None)
    weak = add_trial(store, emulated(1.0), environment=LATER_ENVIRONMENT, knobs=OTHER_KNOBS)
    assert store.promote(weak, default_trial_id=None) == strong
    assert store.winner(**KEY) == strong


def test_stronger_evidence_replaces_weaker(store: Store) -> None:
    store.promote(add_trial(store, emulated(1.0)), default_trial_id=None)
    strong = store.promote(
        add_trial(store, measured(40.0), knobs=OTHER_KNOBS), default_trial_id=None
    )
    assert strong.evidence == "measured"
    assert store.winners() == [strong]


@pytest.mark.parametrize("result", [measured(80.0), emulated(80.0)])
def test_a_promotion_replaces_an_older_environment(store: Store, result: TrialResult) -> None:
    faster = measured(40.0) if result.timing else emulated(40.0)
    store.promote(add_trial(store, faster), default_trial_id=None)
    newer = add_trial(store, result, environment=LATER_ENVIRONMENT)
    promoted = store.promote(newer, default_trial_id=None)
    assert promoted.environment == LATER_ENVIRONMENT
    assert promoted.score == 80.0
    assert store.winners() == [promoted]


def test_a_retired_winner_is_not_served_and_yields_to_anything(store: Store) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    raw(store, "UPDATE patune_winner SET state = 'retired'")
    assert store.winner(**KEY) is None
    assert store.winners() == []
    promoted = store.promote(add_trial(store, emulated()), default_trial_id=None)
    assert promoted.evidence == "emulated"
    assert store.winner(**KEY) == promoted


def test_a_promotion_after_an_import_is_ours(store: Store) -> None:
    store.merge([winner()], imported_from="h200.json")
    imported = store.winner(**KEY)
    assert imported == winner(imported_from="h200.json")
    promoted = store.promote(add_trial(store, measured()), default_trial_id=None)
    assert promoted.imported_from is None
    assert promoted.default_knobs is None
    assert store.winner(**KEY) == promoted
