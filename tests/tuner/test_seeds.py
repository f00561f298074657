from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from landscape import BEST, DEFAULT, PROBLEM, SMALL, TARGET, winner_of

from patune.problem import Workload
from patune.target import Target
from patune.tuner.progress import Key
from patune.tuner.seeds import NEIGHBOUR_SEEDS, PACKED_SEEDS, distance, seeds_for

KEY = Key(problem=PROBLEM, workload=SMALL)
KNOBS = [dataclasses.replace(DEFAULT, num_splits=n) for n in range(1, 13)]


def near(knobs, context=8192, problem=PROBLEM, target=TARGET):
    workload = Workload(batch=1, kv_heads=8, context=context)
    return winner_of(knobs, problem, workload, target)


def test_the_incumbent_then_packs_then_neighbours_each_up_to_its_number():
    winners = [near(KNOBS[0], 16384), winner_of(KNOBS[1], PROBLEM, SMALL), near(KNOBS[2])]
    seeds = seeds_for(KEY, target=TARGET, winners=winners, candidates=KNOBS[4:10])
    assert (PACKED_SEEDS, NEIGHBOUR_SEEDS) == (3, 1)
    assert seeds == [
        ("incumbent", KNOBS[1]),
        ("candidate", KNOBS[4]),
        ("candidate", KNOBS[5]),
        ("candidate", KNOBS[6]),
        ("neighbour", KNOBS[2]),  # twice the context, not four times
    ]
    more = seeds_for(
        KEY, target=TARGET, winners=winners, candidates=KNOBS[4:10], packed=1, neighbours=9
    )
    assert [source for source, _ in more] == ["incumbent", "candidate", "neighbour", "neighbour"]
    none = seeds_for(KEY, target=TARGET, winners=winners, candidates=KNOBS, packed=0, neighbours=0)
    assert none == [("incumbent", KNOBS[1])]
    assert seeds_for(KEY, target=TARGET) == []


def test_what_was_taken_does_not_use_up_a_place():
    winners = [winner_of(BEST, PROBLEM, SMALL), near(KNOBS[0]), near(KNOBS[1], 16384)]
    candidates = [BEST, KNOBS[0], KNOBS[0], KNOBS[2], BEST, KNOBS[3], KNOBS[4]]
    assert seeds_for(KEY, target=TARGET, winners=winners, candidates=candidates) == [
        ("incumbent", BEST),
        ("candidate", KNOBS[0]),
        ("candidate", KNOBS[2]),
        ("candidate", KNOBS[3]),
        ("neighbour", KNOBS[1]),  # the nearest one is a pack already
    ]


def test_another_devices_winner_of_the_key_is_no_incumbent():
    other = Target(arch="gfx942", device_name="another", compute_units=228)
    elsewhere = winner_of(BEST, PROBLEM, SMALL, other)
    assert seeds_for(KEY, target=TARGET, winners=[elsewhere]) == []
    assert seeds_for(KEY, target=other, winners=[elsewhere]) == [("incumbent", BEST)]


@pytest.mark.parametrize(
    ("changes", "batch", "context", "steps"),
    [
        ({}, 1, 4096, None),
        ({}, 1, 8192, 1.0),
        ({}, 4, 2048, 3.0),
        ({"qg": 16}, 1, 4096, 2.0),
        ({"qg": 16}, 2, 4096, 3.0),
        ({"qg": 16, "block_size": 64}, 1, 4096, None),
    ],
)
def test_distance_counts_doublings_and_one_other_field_as_two(changes, batch, context, steps):
    problem = dataclasses.replace(PROBLEM, **changes)
    workload = Workload(batch=batch, kv_heads=8, context=context)
    assert distance(KEY, winner_of(BEST, problem, workload)) == steps


@given(
    candidates=st.lists(st.sampled_from(KNOBS), max_size=12),
    others=st.lists(st.tuples(st.sampled_from(KNOBS), st.integers(10, 16)), max_size=6),
    packed=st.integers(0, 5),
    neighbours=st.integers(0, 3),
)
def test_every_seed_once_and_never_more_than_allowed(candidates, others, packed, neighbours):
    winners = [near(knobs, 1 << power) for knobs, power in others]
    seeds = seeds_for(
        KEY,
        target=TARGET,
        winners=winners,
        candidates=candidates,
        packed=packed,
        neighbours=neighbours,
    )
    taken = [knobs for _, knobs in seeds]
    assert len(taken) == len(set(taken))
    sources = [source for source, _ in seeds]
    assert sources == sorted(sources, key=("incumbent", "candidate", "neighbour").index)
    fresh = set(candidates) - {knobs for source, knobs in seeds if source == "incumbent"}
    assert sources.count("candidate") == min(packed, len(fresh))
    assert sources.count("neighbour") <= neighbours
