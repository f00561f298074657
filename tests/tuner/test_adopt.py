"""Second looks by the sweep machinery: what becomes of a standing winner in another environment, and under a stricter gate."""

from __future__ import annotations

import dataclasses

import pytest
from fake_kernels import TARGET, environment, workbench
from landscape import DEFAULT, LARGE, PROBLEM, SMALL, make_pool, make_space, passed, score
from sweep_fixtures import OPTIONS, keys_of, stored, sweep

from patune.second_look import Present
from patune.tuner.adopt import adopt
from patune.tuner.progress import TrialEnded
from patune.tuner.sweep import run_sweep

ONE = dataclasses.replace(OPTIONS, keys=keys_of(SMALL), trials=10)
NEWER = environment("b")


@pytest.fixture
def device(monkeypatch):
    """The made-up kernels of this architecture are timed."""
    monkeypatch.setattr("patune.second_look.evidence_of", lambda target: "measured")


def winner_of(store, workload=SMALL):
    return store.winner(target=TARGET, problem=PROBLEM, workload=workload)


def values(knobs):
    """What the fakes' rules ask for."""
    return {n: v for n, v in knobs.to_dict().items() if n != "family"}


def adopt_all(store, *, every=False, present=NEWER, events=None, **changes):
    bench = workbench(environment=present, **changes)
    winners = store.winners()
    here = Present({TARGET.arch: present})
    looks = [here.look(w) for w in winners] if every else here.stale(winners)
    return adopt(
        looks,
        database="here",
        device=None,
        command="patune verify --adopt",
        sweep=lambda options: sweep(store, options, bench, events),
        answer=lambda winner: None,
    )


@pytest.fixture
def tuned(store):
    """A store with two winners of an older Triton, that is, of another source of the kernels."""
    old = dataclasses.replace(environment(), kernel_source_hash="old")
    sweep(store, dataclasses.replace(OPTIONS, trials=10), workbench(environment=old))
    return store


@pytest.mark.parametrize("measured", [False, True])
def test_a_winner_that_holds_becomes_current(store, measured, device):
    old = dataclasses.replace(environment(), kernel_source_hash="old")
    sweep(store, ONE, workbench(environment=old, measured=measured))
    before = winner_of(store)
    report = adopt_all(store, measured=measured)
    (adoption,) = report.adoptions
    assert (adoption.fate, report.exit_code) == ("adopted", 0)
    after = winner_of(store)
    assert after == adoption.after
    assert (after.knobs, after.environment) == (before.knobs, NEWER)
    assert [str(c) for c in adoption.look.changes] == [
        "kernel_source_hash old -> 0", "compiler a -> b",
    ]  # fmt: skip
    assert Present({TARGET.arch: NEWER}).stale(store.winners()) == []
    assert adopt_all(store, measured=measured).adoptions == ()


def test_a_tie_leaves_the_winner_and_makes_it_current(store, device, monkeypatch):
    old = dataclasses.replace(environment(), kernel_source_hash="old")
    sweep(store, ONE, workbench(environment=old, measured=True))
    before = winner_of(store)
    assert before.knobs != DEFAULT
    monkeypatch.setenv("FAKE_GAIN", "0")  # in turns all of them are as fast
    (adoption,) = adopt_all(store, measured=True).adoptions
    assert adoption.fate == "adopted"
    assert (winner_of(store).knobs, winner_of(store).environment) == (before.knobs, NEWER)


def test_stored_knobs_that_are_better_now_take_the_place(tuned, fates):
    before = winner_of(tuned)
    second = tuned.top(target=TARGET, problem=PROBLEM, workload=SMALL, k=2)[1].knobs
    fates([values(before.knobs), "evaluate", "slow"])
    report = adopt_all(tuned)
    fate = {a.look.winner.workload: a for a in report.adoptions}[SMALL]
    assert (fate.fate, fate.again.status, fate.after.knobs) == ("replaced", "slow", second)
    assert report.exit_code == 0
    assert winner_of(tuned).knobs == second


def test_knobs_that_no_longer_pass_are_retired_and_the_next_answers(tuned, fates, monkeypatch):
    said = []
    retire = type(tuned).retire
    monkeypatch.setattr(
        type(tuned), "retire", lambda store, **key: said.append(key) or retire(store, **key)
    )
    before = winner_of(tuned)
    fates([{**values(before.knobs), "batch": SMALL.batch}, "evaluate", "wrong"])
    report = adopt_all(tuned)
    fate = {a.look.winner.workload: a for a in report.adoptions}[SMALL]
    assert (fate.fate, report.exit_code) == ("failed", 1)
    assert fate.reason.startswith("wrong")
    assert fate.after == winner_of(tuned)
    assert fate.after.knobs != before.knobs
    assert [(key["workload"], key["reason"]) for key in said] == [(SMALL, fate.reason)]
    assert "patune sweep --block-size 16" in fate.next_command


def test_without_any_that_pass_nothing_is_stored_any_more(tuned, fates):
    fates([{"batch": SMALL.batch}, "evaluate", "wrong"])
    report = adopt_all(tuned)
    fate = {a.look.winner.workload: a for a in report.adoptions}[SMALL]
    assert (fate.fate, fate.after) == ("failed", None)
    assert winner_of(tuned) is None
    assert winner_of(tuned, LARGE) is not None


def test_nothing_but_a_proof_retires(tuned, fates):
    fates([{"batch": SMALL.batch}, "evaluate", "raise"])
    report = adopt_all(tuned)
    fate = {a.look.winner.workload: a for a in report.adoptions}[SMALL]
    assert (fate.fate, fate.again.status, report.exit_code) == ("undecided", "error", 4)
    assert winner_of(tuned) == fate.look.winner


def test_under_a_stricter_gate_the_newest_trial_speaks(store, fates):
    sweep(store, ONE)
    before = winner_of(store)
    tried = len(stored(store))
    assert adopt_all(store, present=environment()).adoptions == ()
    fates([values(before.knobs), "evaluate", "wrong"])
    (adoption,) = adopt_all(store, present=environment(), every=True).adoptions
    assert adoption.fate == "failed"
    of_it = [t.result.status for t in stored(store) if t.knobs == before.knobs]
    assert of_it == ["ok", "wrong"]
    again = len(stored(store))
    assert again > tried
    fates()
    report = sweep(store, dataclasses.replace(ONE, trials=10))
    assert (report.trials, len(stored(store))) == (0, again)  # the same limit: all of them count
    assert report.keys[0].winner.knobs == adoption.after.knobs != before.knobs


def test_a_build_that_is_rejected_now_outweighs_an_earlier_pass(store, fates):
    sweep(store, ONE)
    before = winner_of(store)
    fates([values(before.knobs), "build", "spills"])
    (adoption,) = adopt_all(store, present=environment(), every=True).adoptions
    assert (adoption.fate, adoption.again.status) == ("failed", "spills")
    fates()
    assert sweep(store, ONE).keys[0].winner.knobs != before.knobs


def test_the_standing_winner_is_tried_first_and_whatever_the_limit(tuned):
    incumbent = winner_of(tuned).knobs
    events = []
    report = sweep(
        tuned,
        dataclasses.replace(ONE, trials=1),
        workbench(environment=NEWER, builders=1),
        events,
    )
    tried = [e.knobs for e in events if isinstance(e, TrialEnded)]
    assert tried == [DEFAULT, incumbent]
    assert report.keys[0].winner.environment == NEWER
    assert report.keys[0].winner.knobs == incumbent


def test_a_stale_winner_beside_a_full_set_of_trials_is_tried(tuned):
    sweep(tuned, ONE, workbench(environment=NEWER, builders=1))
    worse = next(k for k in make_pool() if k not in {t.knobs for t in stored(tuned)})
    run = tuned.begin_run(
        target=TARGET, environment=environment("c"), sampler="import", seed=0, command="import"
    )
    trial = tuned.record_trial(
        run, problem=PROBLEM, workload=SMALL, knobs=worse, result=passed(1.0), source="pack"
    )
    tuned.promote(trial, default_trial_id=None)
    report = sweep(tuned, ONE, workbench(environment=NEWER, builders=1))
    assert report.trials == 1
    assert report.keys[0].incumbent.score == score(worse) != 1.0
    assert report.keys[0].winner.environment == NEWER


def test_a_search_that_ends_before_it_was_tried_leaves_the_winner(tuned):
    before = winner_of(tuned)

    def notify(event):
        if isinstance(event, TrialEnded):
            raise KeyboardInterrupt

    report = run_sweep(ONE, tuned, notify, workbench(environment=NEWER, builders=1))
    assert report.interrupted
    assert [t.knobs for t in stored(tuned, environment=NEWER)] == [DEFAULT]
    assert winner_of(tuned) == report.keys[0].winner == before
    assert report.keys[0].decision.startswith("the standing winner stays")


def test_a_build_rejected_for_another_key_counts_for_the_winner(store, fates, device):
    old = dataclasses.replace(environment(), kernel_source_hash="old")
    sweep(store, dataclasses.replace(OPTIONS, trials=10), workbench(environment=old, measured=True))
    knobs = [winner_of(store, w).knobs for w in (SMALL, LARGE)]
    pool = [DEFAULT, *dict.fromkeys(knobs)]
    for one in knobs:
        fates([{**values(one)}, "build", "spills"])
    report = adopt_all(store, measured=True, space=lambda p, w: make_space(pool))
    fates_of = {a.look.winner.knobs: a.fate for a in report.adoptions}
    assert fates_of[knobs[1]] == "failed"
