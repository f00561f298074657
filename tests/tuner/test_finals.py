from __future__ import annotations

import dataclasses

import pytest
from landscape import BEST, DEFAULT, passed, timed

from patune.tuner.finals import choose_finalists, choose_winner, ties

OTHER = dataclasses.replace(DEFAULT, num_splits=16)
FOURTH = dataclasses.replace(DEFAULT, num_splits=8)
INCUMBENT = dataclasses.replace(DEFAULT, num_splits=2)


def test_finalists_are_the_best_three_the_default_and_the_incumbent():
    results = {
        DEFAULT: timed(50.0),
        BEST: timed(10.0),
        OTHER: timed(20.0),
        FOURTH: timed(30.0),
        INCUMBENT: timed(40.0),
    }
    assert choose_finalists(results, DEFAULT, INCUMBENT) == [
        BEST,
        OTHER,
        FOURTH,
        DEFAULT,
        INCUMBENT,
    ]
    assert choose_finalists(results, BEST, None) == [BEST, OTHER, FOURTH]
    assert choose_finalists({BEST: timed(1.0)}, DEFAULT, INCUMBENT) == [BEST]


@pytest.mark.parametrize(
    ("best", "rival", "spread", "tie"),
    [
        (100.0, 100.9, 0.0, True),  # under 1 % of the rival
        (100.0, 101.1, 0.0, False),
        (100.0, 104.0, 0.02, True),  # 102 >= 101.92: the ranges overlap
        (100.0, 104.2, 0.02, False),
        (100.0, 100.0, 0.0, True),
    ],
)
def test_timings_tie_inside_one_percent_or_when_their_ranges_overlap(best, rival, spread, tie):
    assert ties(timed(rival, spread), timed(best, spread)) is tie


def test_counted_work_ties_only_when_equal():
    assert ties(passed(7.0), passed(7.0))
    assert not ties(passed(7.0 + 1e-9), passed(7.0))


@pytest.mark.parametrize(
    ("results", "winner"),
    [
        ({DEFAULT: timed(100.5), INCUMBENT: timed(100.4), BEST: timed(100.0)}, INCUMBENT),
        ({DEFAULT: timed(100.5), INCUMBENT: timed(120.0), BEST: timed(100.0)}, DEFAULT),
        ({DEFAULT: timed(120.0), INCUMBENT: timed(120.0), BEST: timed(100.0)}, BEST),
        ({DEFAULT: timed(100.0), BEST: timed(200.0)}, DEFAULT),
        ({BEST: timed(200.0)}, BEST),
        ({DEFAULT: passed(5.0), INCUMBENT: passed(5.0), BEST: passed(5.0)}, DEFAULT),
        ({DEFAULT: passed(6.0), INCUMBENT: passed(5.0), BEST: passed(5.0)}, INCUMBENT),
        ({DEFAULT: passed(5.0), INCUMBENT: passed(5.0), BEST: passed(4.99)}, BEST),
        ({}, None),
    ],
)
def test_ties_go_to_the_incumbent_then_to_the_default(results, winner):
    assert choose_winner(results, DEFAULT, INCUMBENT) == winner
