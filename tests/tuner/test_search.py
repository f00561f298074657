from __future__ import annotations

import dataclasses
import itertools

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape import BEST, CHOICES, DEFAULT, POOL, broken, feasible, make_space, passed, score
from optuna.trial import TrialState

from patune.kernels.knobs import CdnaKnobs
from patune.tuner.pool_sampler import PoolSampler
from patune.tuner.search import KeySearch, SearchSpace, Suggestion, canonical

SPACE = make_space()


def search(**changes) -> KeySearch:
    given = {"sampler": "pool", "seed": 0, "limit": 50, **changes}
    return KeySearch(given.pop("space", SPACE), **given)


def exhaust(key: KeySearch, judge=lambda knobs: passed(score(knobs))) -> list[Suggestion]:
    suggestions = []
    while (suggestion := key.ask()) is not None:
        suggestions.append(suggestion)
        key.tell(suggestion, judge(suggestion.knobs))
    return suggestions


def told(key: KeySearch) -> list[optuna.trial.FrozenTrial]:
    return key._study.get_trials()


def test_the_pool_of_these_tests_is_not_trivial():
    assert len(POOL) == 936
    assert BEST in POOL
    assert DEFAULT in POOL


@pytest.mark.parametrize("sampler", ["pool", "tpe", "random"])
def test_the_default_is_first_then_the_seeds_in_order(sampler):
    incumbent = dataclasses.replace(DEFAULT, waves_per_eu=1)
    neighbour = dataclasses.replace(DEFAULT, num_splits=1, reduce_chunk=32)
    key = search(
        sampler=sampler,
        seeds=[("incumbent", incumbent), ("neighbour", neighbour), ("neighbour", DEFAULT)],
    )
    first = [key.ask() for _ in range(4)]
    assert [(s.source, s.knobs) for s in first[:3]] == [
        ("default", DEFAULT),
        ("incumbent", incumbent),
        ("neighbour", canonical(neighbour)),
    ]
    assert first[3].source == "search"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 9),
    fates=st.lists(st.sampled_from(["ok", "wrong", "crash", "duplicate"]), min_size=1, max_size=7),
)
def test_the_pool_sampler_never_repeats_and_never_leaves_the_pool(seed, batch, fates):
    space = dataclasses.replace(SPACE, pool=POOL[::17])
    key = search(space=space, seed=seed, limit=1000)
    fate = itertools.cycle(fates)
    asked, waiting = [], []
    while True:
        suggestion = key.ask()
        if suggestion is not None:
            asked.append(suggestion.knobs)
            waiting.append(suggestion)
        if suggestion is None or len(waiting) >= batch:
            while waiting:
                it = waiting.pop()
                name = next(fate)
                key.tell(it, passed(score(it.knobs)) if name == "ok" else broken(name))
        if suggestion is None:
            break
    assert len(asked) == len(set(asked)) == len({*POOL[::17], DEFAULT})
    assert set(asked) == {*POOL[::17], DEFAULT}


def test_the_pool_sampler_finds_the_optimum_of_a_small_landscape():
    needed = []
    for seed in range(10):
        asked = [s.knobs for s in exhaust(search(seed=seed, limit=150))]
        assert BEST in asked
        needed.append(asked.index(BEST) + 1)
    assert sorted(needed)[5] <= 75  # the median, of 936


def test_nearest_values_are_tried_first():
    key = search(limit=12)
    first, second = key.ask(), key.ask()
    key.tell(second, passed(500.0))
    key.tell(first, passed(100.0))
    near = []
    for _ in range(8):
        suggestion = key.ask()
        near.append(suggestion.knobs)
        key.tell(suggestion, broken())
    for knobs in near:
        changed = [name for name in CHOICES if getattr(knobs, name) != getattr(DEFAULT, name)]
        assert len(changed) == 1
        values = CHOICES[changed[0]]
        assert (
            abs(
                values.index(getattr(knobs, changed[0]))
                - values.index(getattr(DEFAULT, changed[0]))
            )
            == 1
        )


def test_while_nothing_is_known_the_neighbours_of_what_runs_come_next():
    key = search()
    asked = [key.ask().knobs for _ in range(7)]
    assert asked[0] == DEFAULT
    for knobs in asked[2:]:
        assert sum(getattr(knobs, name) != getattr(DEFAULT, name) for name in CHOICES) == 1


def test_one_split_is_a_neighbour_of_many_splits_whatever_the_reduce_knobs():
    start = dataclasses.replace(DEFAULT, num_splits=2, reduce_chunk=32)
    space = dataclasses.replace(
        SPACE, pool=[start, canonical(dataclasses.replace(start, num_splits=1))], default=start
    )
    sampler = PoolSampler(
        [{n: getattr(k, n) for n in CHOICES} for k in space.pool],
        CHOICES,
        seed=0,
        canonical=lambda p: {n: getattr(canonical(CdnaKnobs(**p)), n) for n in CHOICES},
    )
    assert list(sampler._neighbours(0)) == [(1, 1)]


@pytest.mark.parametrize("sampler", ["pool", "tpe", "random"])
def test_the_same_seed_and_results_give_the_same_proposals(sampler):
    one = [s.knobs for s in exhaust(search(sampler=sampler, seed=7))]
    two = [s.knobs for s in exhaust(search(sampler=sampler, seed=7))]
    other = [s.knobs for s in exhaust(search(sampler=sampler, seed=8))]
    assert one == two
    assert one != other


def test_a_resumed_pool_search_goes_on_as_it_would_have():
    whole = exhaust(search(limit=30))
    results = [(s.knobs, passed(score(s.knobs))) for s in whole]
    resumed = search(limit=30, history=results[:13])
    assert resumed.asked == 13
    assert [s.knobs for s in exhaust(resumed)] == [s.knobs for s in whole[13:]]


@pytest.mark.parametrize("sampler", ["pool", "tpe", "random"])
def test_history_counts_towards_the_limit_and_is_not_repeated(sampler):
    history = [(DEFAULT, passed(50.0)), (BEST, broken("crash")), (DEFAULT, passed(60.0))]
    key = search(sampler=sampler, limit=6, history=history)
    suggestions = exhaust(key)
    assert len(suggestions) == 4
    assert {DEFAULT, BEST}.isdisjoint(s.knobs for s in suggestions)
    assert key.best == (50.0, DEFAULT)


def test_broken_trials_are_pruned_with_a_violated_constraint_and_never_failed():
    key = search(limit=4)
    fates = iter([passed(9.0), broken("compile_error"), broken("duplicate"), passed(8.0)])
    exhaust(key, lambda knobs: next(fates))
    states = [(t.state, t.value, t.constraints) for t in told(key)]
    assert states == [
        (TrialState.COMPLETE, 9.0, {}),
        (TrialState.PRUNED, None, {"broken": 1.0}),
        (TrialState.PRUNED, None, {}),
        (TrialState.COMPLETE, 8.0, {}),
    ]
    again = search(limit=9, history=[(s, broken("crash")) for s in POOL[:1]])
    assert [(t.state, t.constraints) for t in told(again)[:1]] == [
        (TrialState.PRUNED, {"broken": 1.0})
    ]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_other_samplers_name_what_is_infeasible_and_do_not_repeat(sampler):
    key = search(sampler=sampler, limit=40)
    suggestions = []
    while (suggestion := key.ask()) is not None:
        suggestions.append(suggestion)
        bad = suggestion.infeasible
        key.tell(suggestion, broken("infeasible") if bad else passed(score(suggestion.knobs)))
    assert len(suggestions) == len({s.knobs for s in suggestions}) == 40
    assert all((feasible(s.knobs) or "") == s.infeasible for s in suggestions)
    assert any(s.infeasible for s in suggestions)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_small_pool_is_emptied_by_any_sampler(sampler):
    pool = [canonical(dataclasses.replace(DEFAULT, num_splits=n)) for n in (1, 2, 4)]
    choices = {name: (getattr(DEFAULT, name),) for name in CHOICES} | {"num_splits": (1, 2, 4)}
    space = SearchSpace(pool=pool, choices=choices, default=DEFAULT, feasible=feasible)
    key = search(space=space, sampler=sampler, limit=100)
    assert {s.knobs for s in exhaust(key)} == set(pool)
    assert {t.state for t in told(key)} <= {TrialState.COMPLETE, TrialState.FAIL}


def test_seeds_outside_of_the_pool_are_tried_when_feasible_and_dropped_when_not():
    odd = dataclasses.replace(DEFAULT, num_splits=33)
    bad = dataclasses.replace(DEFAULT, partition_tokens=64, num_warps=8)
    key = search(seeds=[("incumbent", odd), ("neighbour", bad)])
    assert [key.ask().knobs for _ in range(2)] == [DEFAULT, odd]
    assert key.ask().source == "search"


def test_a_full_pool_raises_in_the_sampler_and_ends_the_search():
    sampler = PoolSampler([{"a": 1}], {"a": (1, 2)}, seed=0)
    study = optuna.create_study(sampler=sampler)
    assert study.ask(sampler._space).params == {"a": 1}
    with pytest.raises(RuntimeError, match="all 1 members of the pool were proposed"):
        study.ask(sampler._space)
    with pytest.raises(RuntimeError, match="'b' is not one of the pool's: a"):
        sampler.sample_independent(study, study.trials[0], "b", sampler._space["a"])
