from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from fake_kernels import TARGET, environment, workbench
from landscape import DEFAULT, LARGE, PROBLEM, SMALL, make_space, score

from patune.configs.store import Store
from patune.errors import InvalidValueError, NoUsableGpuError
from patune.tuner import tasks
from patune.tuner.progress import Key, KeyEnded, Note, SweepStarted, TrialEnded
from patune.tuner.sweep import SweepOptions, run_sweep

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = SweepOptions(target=TARGET, problems=(PROBLEM,), workloads=(SMALL, LARGE), trials=6)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "patune.db") as store:
        yield store


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path


@pytest.fixture
def fates(monkeypatch):
    return lambda *fates: monkeypatch.setenv("FAKE_FATES", json.dumps(fates))


def logged(log: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [knobs for where, knobs in lines if where == stage]


def sweep(store, options=OPTIONS, bench=None, events=None):
    return run_sweep(
        options, store, (lambda e: None) if events is None else events.append, bench or workbench()
    )


def stored(store, workload=SMALL, **changes):
    key = {"target": TARGET, "problem": PROBLEM, "workload": workload, **changes}
    return store.trials(**key)


def test_a_sweep_stores_every_trial_and_promotes_the_best(store):
    events = []
    report = sweep(store, events=events)
    for workload, factor in ((SMALL, 1.0), (LARGE, 7.0)):
        trials = stored(store, workload)
        assert len(trials) == 6
        assert Counter(t.source for t in trials) == {"default": 1, "search": 5}
        assert [t.knobs for t in trials if t.source == "default"] == [DEFAULT]
        assert {t.result.score for t in trials} == {score(t.knobs) * factor for t in trials}
        assert trials[0].result.facts == {"kernel": {"vgprs": 7}}
        best = min(trials, key=lambda t: t.result.score)
        winner = store.winner(target=TARGET, problem=PROBLEM, workload=workload)
        assert winner.knobs == best.knobs
        assert winner.default_score == score(DEFAULT) * factor
    assert isinstance(events[0], SweepStarted)
    assert events[0].keys == (
        Key(problem=PROBLEM, workload=SMALL),
        Key(problem=PROBLEM, workload=LARGE),
    )
    ended = [e for e in events if isinstance(e, TrialEnded)]
    assert [e.done for e in ended] == list(range(1, 13))
    assert {e.total for e in ended} == {12}
    assert ended[-1].best == min(e.result.score for e in ended if e.key == ended[-1].key)
    assert [e.report for e in events if isinstance(e, KeyEnded)] == list(report.keys)
    assert report.exit_code == 0
    assert report.trials == 12


def test_the_report_is_json_of_the_agreed_shape(store):
    report = json.loads(json.dumps(sweep(store).to_dict()))
    assert list(report) == [
        "schema", "target", "evidence", "environment", "read_ceiling_gb_s", "interrupted", "seconds",
        "trials", "keys",
    ]  # fmt: skip
    assert (report["schema"], report["evidence"], report["read_ceiling_gb_s"]) == (
        1,
        "emulated",
        None,
    )
    key = report["keys"][0]
    assert key["key"] == {**PROBLEM.to_dict(), "workload": SMALL.to_dict()}
    assert key["default"]["score"] == score(DEFAULT)
    assert key["default"]["knobs"] == {"family": "cdna_mfma", **DEFAULT.to_dict()}
    assert (key["trials"], key["failures"]) == (6, {})
    assert key["winner"]["evidence"] == "emulated"


def test_every_key_has_its_default_before_any_has_a_third_trial(store):
    sizes = tuple(dataclasses.replace(SMALL, batch=b) for b in (1, 2, 4, 8))
    events = []
    sweep(store, dataclasses.replace(OPTIONS, workloads=sizes, trials=4), events=events)
    keys = [e.key.workload.batch for e in events if isinstance(e, TrialEnded)]
    third = min(i for i, b in enumerate(keys) if keys[: i + 1].count(b) == 3)
    assert set(keys[:third]) == {1, 2, 4, 8}


def test_every_kind_of_end_is_recorded_with_its_reason(store, fates, monkeypatch):
    monkeypatch.setattr(tasks, "EMULATE_LIMIT_S", 1.0)
    table = [  # splits, waves_per_eu, stage, fate, status
        (1, 0, "build", "spills", "spills"),
        (1, 1, "build", "out_of_resources", "out_of_resources"),
        (2, 0, "build", "abort", "crash"),
        (2, 1, "evaluate", "abort", "crash"),
        (4, 1, "build", "same", "duplicate"),
        (8, 0, "evaluate", "hang", "timeout"),
        (8, 1, "evaluate", "raise", "error"),
        (16, 0, "evaluate", "wrong", "wrong"),
        (16, 1, "evaluate", "unstable", "unstable"),
    ]
    fates(*([{"num_splits": s, "waves_per_eu": w}, stage, fate] for s, w, stage, fate, _ in table))
    expected = {
        dataclasses.replace(DEFAULT, num_splits=s, waves_per_eu=w): status
        for s, w, _, _, status in table
    }
    bench = workbench(space=lambda p, w: make_space([DEFAULT, *expected]))
    report = sweep(store, dataclasses.replace(OPTIONS, workloads=(SMALL,), trials=50), bench)
    found = {t.knobs: t.result for t in stored(store)}
    assert {k: r.status for k, r in found.items()} == {DEFAULT: "ok", **expected}
    reasons = {r.status: r.reason for r in found.values()}
    assert reasons["duplicate"] == "same machine code and grid as waves_per_eu=0"
    assert reasons["timeout"].startswith("evaluate: killed after 1 s")
    assert reasons["error"] == "evaluate: KeyError: 'a bug'"
    assert {r.reason.split(":")[0] for r in found.values() if r.status == "crash"} == {
        "build",
        "evaluate",
    }
    assert report.keys[0].failures == dict(sorted(Counter(expected.values()).items()))
    assert report.exit_code == 0


def test_a_key_without_a_winner_gives_exit_code_3(store, fates):
    fates([{}, "evaluate", "wrong"])
    report = sweep(store)
    assert [key.winner for key in report.keys] == [None, None]
    assert report.keys[0].default.status == "wrong"
    assert report.exit_code == 3


def test_verdicts_of_the_gate_hold_for_every_workload_of_the_problem(store, fates, log):
    pool = [DEFAULT, dataclasses.replace(DEFAULT, waves_per_eu=1)]
    fates([{"waves_per_eu": 1}, "evaluate", "wrong"])
    bench = workbench(builders=1, space=lambda p, w: make_space(pool))
    sweep(store, bench=bench)
    for workload in (SMALL, LARGE):
        results = {t.knobs: t.result for t in stored(store, workload)}
        assert [results[k].status for k in pool] == ["ok", "wrong"]
    runs = Counter((k["waves_per_eu"], str(k["passed"])) for k in logged(log, "evaluate"))
    # one worker: the second workload's default knows that the first one's passed, its twin is not run at all
    assert runs == {(0, "None"): 1, (0, "[3, 0.001]"): 1, (1, "None"): 1}


def test_a_second_sweep_goes_on_where_the_first_ended(store, log):
    sweep(store)
    asked = len(logged(log, "evaluate"))
    again = sweep(store)
    assert (again.trials, len(logged(log, "evaluate"))) == (0, asked)
    assert again.keys[0].trials == 6
    assert again.exit_code == 0
    more = sweep(store, dataclasses.replace(OPTIONS, trials=9))
    assert more.trials == 6
    knobs = [t.knobs for t in stored(store)]
    assert len(knobs) == len(set(knobs)) == 9


def test_another_environment_starts_again_from_the_incumbent(store):
    sweep(store, dataclasses.replace(OPTIONS, trials=10))
    incumbent = store.winner(target=TARGET, problem=PROBLEM, workload=SMALL).knobs
    other = environment("b")
    events = []
    sweep(store, bench=workbench(environment=other), events=events)
    mine = {t.source: t.knobs for t in stored(store, environment=other)}
    assert mine["default"] == DEFAULT
    assert mine["incumbent"] == incumbent
    assert len(stored(store, environment=other)) == 6
    assert store.winner(target=TARGET, problem=PROBLEM, workload=SMALL).environment == other


def test_winners_of_near_keys_are_seeds(store):
    sweep(store, dataclasses.replace(OPTIONS, workloads=(SMALL,), trials=10))
    near = dataclasses.replace(SMALL, batch=2)
    sweep(store, dataclasses.replace(OPTIONS, workloads=(near,), trials=3))
    knobs = store.winner(target=TARGET, problem=PROBLEM, workload=SMALL).knobs
    assert ("neighbour", knobs) in [(t.source, t.knobs) for t in stored(store, near)]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_other_samplers_record_what_is_infeasible(store, sampler):
    report = sweep(
        store, dataclasses.replace(OPTIONS, sampler=sampler, trials=12, workloads=(SMALL,))
    )
    statuses = Counter(t.result.status for t in stored(store))
    assert statuses["ok"] + statuses["infeasible"] == 12
    assert statuses["infeasible"] == report.keys[0].failures["infeasible"] > 0


def test_no_budget_no_trials(store):
    report = sweep(store, dataclasses.replace(OPTIONS, budget_s=0.0))
    assert (report.trials, report.interrupted, report.exit_code) == (0, False, 3)
    assert report.keys[0].default is None


def test_a_spent_budget_keeps_the_best_so_far(store, monkeypatch):
    monkeypatch.setenv("FAKE_DELAY_S", "0.2")
    events = []
    report = sweep(store, dataclasses.replace(OPTIONS, budget_s=1.5, trials=900), events=events)
    assert report.trials == sum(isinstance(e, TrialEnded) for e in events) < 900
    assert not report.interrupted
    assert [e.text for e in events if isinstance(e, Note)] == ["The budget of 1.5 s is used up."]
    ok = [t for t in stored(store) if t.result.ok]
    best = min((t.result.score for t in ok), default=None)
    assert (report.keys[0].winner and report.keys[0].winner.score) == best


def test_an_interrupt_from_the_callers_own_code_ends_the_sweep_in_order(store):
    events = []

    def notify(event):
        events.append(event)
        if isinstance(event, TrialEnded) and event.done == 3:
            raise KeyboardInterrupt

    report = run_sweep(dataclasses.replace(OPTIONS, trials=900), store, notify, workbench())
    assert (report.interrupted, report.exit_code) == (True, 130)
    assert [key.winner is not None for key in report.keys] == [True, True]
    assert len(stored(store)) + len(stored(store, LARGE)) == 3


def test_a_sweep_runs_outside_of_the_main_thread(tmp_path):
    reports = []

    def run():
        with Store.open(tmp_path / "thread.db") as store:
            reports.append(sweep(store, dataclasses.replace(OPTIONS, trials=2)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reports[0].trials == 4


# On a device


def test_a_device_sweep_measures_the_finalists_again(store, log):
    report = sweep(
        store, dataclasses.replace(OPTIONS, trials=10, workloads=(SMALL,)), workbench(measured=True)
    )
    assert report.evidence == "measured"
    assert report.read_ceiling_gb_s == 4600.0
    trials = stored(store)
    finals = [t for t in trials if t.source == "final"]
    assert len(trials) - len(finals) == 10
    ranked = sorted((t for t in trials if t.source != "final"), key=lambda t: t.result.score)
    best = [t.knobs for t in ranked[:3]]
    assert [t.knobs for t in finals] == [*best, *([] if DEFAULT in best else [DEFAULT])]
    winner = store.winner(target=TARGET, problem=PROBLEM, workload=SMALL)
    assert winner.knobs == best[0]
    assert winner.timing.median_us == score(best[0]) + 0.5
    assert winner.default_score == score(DEFAULT) + 0.5
    assert len(logged(log, "read_ceiling")) == 1
    again = sweep(
        store, dataclasses.replace(OPTIONS, trials=10, workloads=(SMALL,)), workbench(measured=True)
    )
    assert again.keys[0].trials == 10  # finals are not trials


def test_inside_the_noise_the_default_wins_then_the_incumbent(store, monkeypatch):
    monkeypatch.setenv("FAKE_SPREAD", "0.9")
    options = dataclasses.replace(OPTIONS, trials=10, workloads=(SMALL,))
    assert sweep(store, options, workbench(measured=True)).keys[0].winner.knobs == DEFAULT
    monkeypatch.setenv("FAKE_SPREAD", "0.001")
    tuned = sweep(store, options, workbench(measured=True)).keys[0].winner.knobs
    assert tuned != DEFAULT
    monkeypatch.setenv("FAKE_SPREAD", "0.9")
    more = dataclasses.replace(options, trials=20)
    assert sweep(store, more, workbench(measured=True)).keys[0].winner.knobs == tuned


def test_recorded_times_decide_when_the_final_measurement_fails(store, fates):
    fates([{}, "retime", "abort"])
    events = []
    report = sweep(
        store, dataclasses.replace(OPTIONS, workloads=(SMALL,)), workbench(measured=True), events
    )
    best = min(stored(store), key=lambda t: t.result.score)
    assert report.keys[0].winner.knobs == best.knobs
    assert any("could not be timed again" in e.text for e in events if isinstance(e, Note))


def test_a_crash_costs_one_trial_and_a_canary(store, fates, log):
    fates([{"waves_per_eu": 1}, "evaluate", "illegal"])
    pool = [DEFAULT, *(dataclasses.replace(DEFAULT, waves_per_eu=w) for w in (1, 2, 3))]
    bench = workbench(measured=True, builders=1, space=lambda p, w: make_space(pool))
    report = sweep(store, dataclasses.replace(OPTIONS, workloads=(SMALL,)), bench)
    results = {t.knobs.waves_per_eu: t.result for t in stored(store)}
    assert [results[w].status for w in range(4)] == ["ok", "crash", "ok", "ok"]
    assert "illegal memory access" in results[1].reason
    defaults = [k for k in logged(log, "evaluate") if k["waves_per_eu"] == 0]
    assert [k["passed"] for k in defaults] == [None, None]  # the canary goes through the gate again
    assert report.exit_code == 0


def test_before_any_default_passed_the_read_only_kernel_is_the_canary(store, fates, log):
    fates([{"waves_per_eu": 0}, "evaluate", "abort"])
    pool = [DEFAULT, dataclasses.replace(DEFAULT, waves_per_eu=1)]
    bench = workbench(measured=True, builders=1, space=lambda p, w: make_space(pool))
    report = sweep(store, dataclasses.replace(OPTIONS, workloads=(SMALL,)), bench)
    assert [t.result.status for t in stored(store) if t.source != "final"] == ["crash", "ok"]
    assert len(logged(log, "read_ceiling")) == 2
    assert report.keys[0].default.status == "crash"
    assert report.exit_code == 0


def test_a_lost_device_ends_the_sweep_with_an_error_and_keeps_what_was_found(store, monkeypatch):
    def notify(event):
        if isinstance(event, TrialEnded) and event.done == 5:
            monkeypatch.setenv("FAKE_FATES", json.dumps([[{}, "evaluate", "illegal"]]))
            # the workers that run have the old environment; the replaced ones are lost

    fates = [[{"waves_per_eu": w}, "evaluate", "illegal"] for w in (1, 2, 3)]
    monkeypatch.setenv("FAKE_FATES", json.dumps(fates))
    with pytest.raises(NoUsableGpuError, match="stopped working during the sweep: default knobs"):
        run_sweep(dataclasses.replace(OPTIONS, trials=900), store, notify, workbench(measured=True))
    assert store.winner(target=TARGET, problem=PROBLEM, workload=SMALL) is not None
    assert len(stored(store)) >= 1


def test_a_device_that_cannot_even_read_is_an_error_before_any_trial(store, fates, log):
    fates([{}, "read_ceiling", "abort"])
    with pytest.raises(NoUsableGpuError, match="the read-only kernel failed"):
        sweep(store, bench=workbench(measured=True))
    assert len(logged(log, "read_ceiling")) == 2
    assert logged(log, "evaluate") == []


def test_options_are_checked():
    for changes in (
        {"trials": 0},
        {"sampler": "best"},
        {"budget_s": -1.0},
        {"seed": -1},
        {"problems": ()},
        {"command": ""},
    ):
        with pytest.raises(InvalidValueError):
            dataclasses.replace(OPTIONS, **changes)
