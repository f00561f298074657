"""Confirmed faults hold for an architecture, a kernel source and a problem, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    ENVIRONMENT,
    H100,
    KNOBS,
    LATER_ENVIRONMENT,
    MI300X,
    OTHER_KNOBS,
    PROBLEM,
    add_trial,
    at,
    dump,
    measured,
)

from patune.configs.models import FAULTS
from patune.environment import Environment
from patune.errors import InvalidValueError
from patune.problem import Problem
from patune.trial import STATUSES, WITH_EVIDENCE, TrialResult

if TYPE_CHECKING:
    from patune.configs.store import Store

HANG = TrialResult(status="hang", reason="gate: killed after 30 s", seconds=30.0)
PLACE: dict[str, Any] = {
    "arch": "sm_90",
    "kernel_source_hash": ENVIRONMENT.kernel_source_hash,
    "problem": PROBLEM,
}


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def test_a_blocked_fault_is_told_with_its_reason(store: Store) -> None:
    assert store.blocked(**PLACE) == {}
    crash = TrialResult(status="crash")
    store.block(add_trial(store, HANG, knobs=OTHER_KNOBS))
    store.block(add_trial(store, crash))
    add_trial(store, HANG, knobs=replace(KNOBS, num_splits=9))  # not confirmed
    assert store.blocked(**PLACE) == {
        OTHER_KNOBS: TrialResult(status="hang", reason="gate: killed after 30 s"),
        KNOBS: crash,
    }


def test_it_holds_for_other_devices_sizes_and_versions(store: Store) -> None:
    store.block(
        add_trial(store, HANG, target=H100, environment=LATER_ENVIRONMENT, workload=at(batch=1))
    )
    assert list(store.blocked(**PLACE)) == [KNOBS]


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "gfx942"},
        {"kernel_source_hash": "6" * 64},
        {"problem": replace(PROBLEM, windowed=True)},
        {"problem": Problem(block_size=16, head_dim=64, qg=1)},
    ],
)
def test_it_holds_for_nothing_else(store: Store, change: dict[str, Any]) -> None:
    store.block(add_trial(store, HANG))
    add_trial(store, measured(), problem=replace(PROBLEM, windowed=True))
    assert store.blocked(**(PLACE | change)) == {}


def test_another_source_is_blocked_by_itself(store: Store) -> None:
    newer = Environment(**(ENVIRONMENT.to_dict() | {"kernel_source_hash": "6" * 64}))
    launch = TrialResult(status="launch_error", reason="refused")
    for environment, result in ((ENVIRONMENT, HANG), (newer, launch)):
        store.block(add_trial(store, result, environment=environment))
    assert store.blocked(**PLACE)[KNOBS].status == "hang"
    assert store.blocked(**(PLACE | {"kernel_source_hash": "6" * 64})) == {KNOBS: launch}
    store.block(add_trial(store, HANG, target=MI300X))
    assert len(store.blocked(**PLACE)) == 1


def test_blocking_twice_changes_nothing(store: Store) -> None:
    first = add_trial(store, HANG)
    second = add_trial(store, TrialResult(status="crash", reason="later"), workload=at(batch=1))
    store.block(first)
    before = dump(store.place)
    store.block(first)
    store.block(second)
    assert dump(store.place) == before
    assert store.blocked(**PLACE)[KNOBS].status == "hang"


@pytest.mark.parametrize("status", STATUSES)
def test_only_faults_are_blocked(store: Store, status: str) -> None:
    result = TrialResult(status=status, reason="so") if status not in WITH_EVIDENCE else measured()
    trial = add_trial(store, result)
    if status in FAULTS:
        store.block(trial)
        assert store.blocked(**PLACE) == {KNOBS: TrialResult(status=status, reason="so")}
        return
    with pytest.raises(
        InvalidValueError, match=f"ended as '{result.status}' and cannot be blocked"
    ):
        store.block(trial)
    assert store.blocked(**PLACE) == {}


def test_an_unknown_trial_is_refused(store: Store) -> None:
    with pytest.raises(InvalidValueError, match="trial_id=99 is not in"):
        store.block(99)
