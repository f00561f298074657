"""Pruning deletes losers and what only they referred to, and nothing that anything stands on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from config_samples import (
    ENVIRONMENT,
    H100,
    H200,
    KEY,
    KNOBS,
    LATER_ENVIRONMENT,
    PROBLEM,
    WORKLOAD,
    WRONG,
    add_trial,
    at,
    dump,
    emulated,
    measured,
    raw,
    robust_winner,
)

from patune.configs.prune import Pruned
from patune.errors import InvalidValueError
from patune.trial import TrialResult

if TYPE_CHECKING:
    from patune.configs.store import Store
    from patune.kernels.knobs import Knobs

HANG = TrialResult(status="hang", reason="gate: killed after 30 s")
FAILED = TrialResult(status="wrong", reason="a stricter gate", gate_cases=3)


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def splits(n: int) -> Knobs:
    return replace(KNOBS, num_splits=n)


def ids(store: Store) -> list[int]:
    return [id for (id,) in raw(store, "SELECT id FROM patune_trial ORDER BY id")]


def test_losers_go_and_what_counts_stays(store: Store) -> None:
    run = store.begin_run(
        target=H200, environment=ENVIRONMENT, sampler="auto", seed=7, command="patune sweep"
    )
    losers = [add_trial(store, measured(50.0 + n), knobs=splits(n + 1), run=run) for n in range(6)]
    failed = add_trial(store, WRONG, knobs=splits(20), run=run)
    slow_default = add_trial(store, measured(99.0), knobs=splits(30), run=run)
    hung = add_trial(store, HANG, knobs=splits(31), run=run)
    best = add_trial(store, measured(40.0), knobs=splits(40), run=run)
    store.end_run(run)
    counted = [add_trial(store, emulated(n), knobs=splits(n)) for n in (50, 51, 52)]
    elsewhere = add_trial(store, measured(70.0), knobs=splits(60), environment=LATER_ENVIRONMENT)
    store.block(hung)
    winner = store.promote(best, default_trial_id=slow_default)
    told = store.generation()
    expected = Pruned(trials=9, messages=1, runs=4, environments=0, misses=0, bytes=0)
    before = dump(store.place)
    counts = store.prune(keep=3, dry_run=True)
    assert dump(store.place) == before
    done = store.prune(keep=3)
    assert replace(done, bytes=0) == counts
    assert ids(store) == sorted([best, *losers[:2], slow_default, hung, elsewhere])
    assert (counts.trials, counts.messages) == (4 + 1 + 3, 1)
    assert counts == replace(expected, trials=8, runs=3)
    assert {failed, *losers[2:], *counted}.isdisjoint(ids(store))
    assert store.winner(**KEY) == winner
    assert [b.reason for b in store.blocks()] == ["gate: killed after 30 s"]
    assert [c.knobs for c in store.runners_up([winner])[winner.key]] == [
        splits(1),
        splits(2),
        splits(30),
    ]
    event = store.history(**KEY)[-1]
    assert (event.event, event.reason, store.generation()) == (
        "pruned",
        "8 trials deleted",
        told + 1,
    )
    assert store.prune(keep=3) == Pruned(
        trials=0, messages=0, runs=0, environments=0, misses=0, bytes=0
    )


def test_what_nothing_refers_to_goes_with_it(store: Store) -> None:
    add_trial(store, WRONG, environment=LATER_ENVIRONMENT)
    add_trial(store, WRONG)
    store.put_robust(robust_winner())
    found = store.prune()
    assert replace(found, bytes=0) == Pruned(
        trials=2, messages=1, runs=2, environments=1, misses=0, bytes=0
    )
    keys = raw(store, "SELECT key FROM patune_environment")
    assert keys == [(ENVIRONMENT.key,)]  # of the robust winner
    assert raw(store, "SELECT count(*) FROM patune_message") == [(0,)]


def test_an_age_spares_what_is_newer(store: Store) -> None:
    old = add_trial(store, WRONG)
    new = add_trial(store, WRONG, workload=at(batch=1))
    raw(store, f"UPDATE patune_trial SET created = '2026-01-01T00:00:00Z' WHERE id = {old}")
    found = store.prune(before="2026-01-01T00:00:01Z")
    assert (found.trials, found.messages, found.runs) == (1, 0, 1)
    assert ids(store) == [new]


def test_a_veto_stays_as_long_as_what_it_vetoes(store: Store) -> None:
    best = add_trial(store, measured(40.0))
    store.promote(best, default_trial_id=None)
    veto = add_trial(store, FAILED)
    other = add_trial(store, FAILED, knobs=splits(9))
    assert store.prune(keep=0).trials == 1
    assert ids(store) == [best, veto]
    assert other not in ids(store)
    assert store.top(**KEY) == []


def test_vetoed_trials_go_with_their_veto(store: Store) -> None:
    add_trial(store, measured(40.0))
    add_trial(store, FAILED)
    good = add_trial(store, measured(50.0), knobs=splits(9))
    assert store.prune(keep=5).trials == 2
    assert ids(store) == [good]


def test_a_running_sweep_is_spared(store: Store) -> None:
    begin = {
        "target": H200,
        "environment": ENVIRONMENT,
        "sampler": "auto",
        "seed": 1,
        "command": "",
    }
    running, killed = store.begin_run(**begin), store.begin_run(**begin)
    empty = store.begin_run(**begin)
    kept = add_trial(store, WRONG, run=running)
    add_trial(store, WRONG, knobs=splits(9), run=killed)
    raw(store, f"UPDATE patune_run SET started = '2026-01-01T00:00:00Z' WHERE id = {killed}")
    found = store.prune(keep=0)
    assert (found.trials, found.runs) == (1, 0)
    assert ids(store) == [kept]
    add_trial(store, WRONG, run=empty)


def test_misses_of_keys_with_a_winner_go(store: Store) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    store.promote(add_trial(store, measured(), workload=at(batch=1)), default_trial_id=None)
    store.retire(target=H200, problem=PROBLEM, workload=at(batch=1), reason="wrong")
    calls = [(t, PROBLEM, w, "safe", 1) for t in (H200, H100) for w in (WORKLOAD, at(batch=1))]
    store.add_capture("one", calls)
    assert store.prune().misses == 1
    assert (H200, WORKLOAD) not in [(m.target, m.workload) for m in store.misses()]
    assert len(store.misses()) == 3


def test_a_file_becomes_smaller(store: Store) -> None:
    if not isinstance(store.place, Path):
        pytest.skip("a server uses the room again by itself")
    for n in range(40):
        add_trial(store, TrialResult(status="compile_error", reason=f"{n} " + "x" * 20_000))
    found = store.prune()
    assert (found.trials, found.messages, found.runs) == (40, 40, 40)
    assert found.bytes > 800_000
    wal = store.place.with_name("patune.db-wal")
    assert store.place.stat().st_size < 300_000
    assert wal.stat().st_size == 0


@pytest.mark.parametrize(
    "how", [{"keep": -1}, {"keep": True}, {"before": "yesterday"}, {"before": "2026-01-01"}]
)
def test_what_makes_no_sense_is_refused(store: Store, how: dict[str, object]) -> None:
    add_trial(store, WRONG)
    with pytest.raises(InvalidValueError, match="is not allowed"):
        store.prune(**how)  # type: ignore[arg-type]
    assert len(ids(store)) == 1
