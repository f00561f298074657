"""Robust winners are stored one per target, problem and objective, and come back as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from config_samples import (
    CDNA_KNOBS,
    H100,
    H200,
    LATER_ENVIRONMENT,
    MI300X,
    OTHER_KNOBS,
    PROBLEM,
    dump,
    robust_winner,
)
from config_strategies import robust_winners
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs.store import Store
from patune.errors import DatabaseError

if TYPE_CHECKING:
    from patune.configs.winner import RobustWinner

WINDOWED = replace(PROBLEM, windowed=True)


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def test_they_come_back_filtered_and_ordered(store: Store) -> None:
    mean = robust_winner(objective="mean", regrets=(1.1, 1.05), score=1.075)
    worst = robust_winner()
    windowed = robust_winner(problem=WINDOWED)
    h100 = robust_winner(target=H100)
    amd = robust_winner(target=MI300X, knobs=CDNA_KNOBS)
    for found in (windowed, worst, h100, mean, amd):
        store.put_robust(found)
    assert store.robust() == [amd, h100, mean, worst, windowed]
    assert store.robust(target=H200) == [mean, worst, windowed]
    assert store.robust(problem=WINDOWED) == [windowed]
    assert store.robust(target=H200, problem=PROBLEM) == [mean, worst]
    assert store.robust(target=H100, problem=WINDOWED) == []


def test_a_later_one_takes_the_place_of_the_earlier(store: Store) -> None:
    store.put_robust(robust_winner())
    later = robust_winner(
        environment=LATER_ENVIRONMENT, knobs=OTHER_KNOBS, regrets=(1.0, 1.5), score=1.5
    )
    store.put_robust(later)
    assert store.robust() == [later]


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(robust_winners(), max_size=6))
def test_the_last_of_every_place_is_stored(
    tmp_path_factory: pytest.TempPathFactory, found: list[RobustWinner]
) -> None:
    last = {(w.target, w.problem, w.objective): w for w in found}
    with Store.open(tmp_path_factory.mktemp("robust") / "patune.db") as store:
        for one in found:
            store.put_robust(one)
        stored = store.robust()
        assert len(stored) == len(last)
        assert {(w.target, w.problem, w.objective): w for w in stored} == last


def test_a_reader_cannot_store_one(store: Store) -> None:
    before = dump(store.place)
    with Store.read(store.place) as reader, pytest.raises(DatabaseError, match="readonly"):
        reader.put_robust(robust_winner())
    assert dump(store.place) == before
