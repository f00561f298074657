"""Captures of serving processes are taken in once each, and their calls are added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from config_samples import H100, H200, MI300X, PROBLEM, WORKLOAD, at

from patune.configs.captures import StoredMiss
from patune.errors import InvalidValueError
from patune.problem import Problem

if TYPE_CHECKING:
    from patune.configs.store import Store

SMALL = Problem(block_size=16, head_dim=64, qg=1)


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def test_calls_are_added_up_over_captures(store: Store) -> None:
    first = [
        (H200, PROBLEM, WORKLOAD, "heuristic", 2**40),
        (H200, PROBLEM, WORKLOAD, "heuristic", 5),
        (H200, PROBLEM, WORKLOAD, "safe", 1),
        (MI300X, SMALL, WORKLOAD, "other_device", 7),
    ]
    assert store.add_capture("one", first) == 3
    assert store.add_capture("two", [(H200, PROBLEM, WORKLOAD, "heuristic", 2**40)]) == 1
    assert store.misses() == [
        StoredMiss(MI300X, SMALL, WORKLOAD, "other_device", 7),
        StoredMiss(H200, PROBLEM, WORKLOAD, "heuristic", 2**41 + 5),
        StoredMiss(H200, PROBLEM, WORKLOAD, "safe", 1),
    ]
    assert [m.target for m in store.misses(arch="gfx942")] == [MI300X]
    assert store.misses(arch="gfx950") == []


def test_a_capture_counts_once(store: Store) -> None:
    misses = [(H200, PROBLEM, at(batch=n), "heuristic", n) for n in (1, 2, 3)]
    assert store.add_capture("one", misses) == 3
    assert store.add_capture("one", misses) == 0
    assert store.add_capture("none", []) == 0
    assert sum(miss.calls for miss in store.misses()) == 6


def test_misses_of_tuned_keys_are_dropped(store: Store) -> None:
    keys = [(H200, PROBLEM, at(batch=n)) for n in (1, 2, 3)]
    for name in ("one", "two"):
        store.add_capture(name, [(*key, "heuristic", 10) for key in keys])
    unknown = (H100, SMALL, at(batch=64))
    assert store.drop_misses([keys[0], keys[2], unknown]) == 4
    assert store.misses() == [StoredMiss(*keys[1], "heuristic", 20)]
    assert store.drop_misses(keys) == 2
    assert store.misses() == []


@pytest.mark.parametrize(
    ("capture", "source", "calls"),
    [("", "safe", 1), ("one", "", 1), ("one", "safe", 0), ("one", "safe", True)],
)
def test_a_bad_capture_is_refused_whole(
    store: Store, capture: str, source: str, calls: int
) -> None:
    good = (H200, PROBLEM, WORKLOAD, "heuristic", 1)
    with pytest.raises(InvalidValueError, match="is not allowed"):
        store.add_capture(capture, [good, (H200, PROBLEM, WORKLOAD, source, calls)])
    assert store.misses() == []
