"""The store keeps every trial as it was, counts failures, and finds them again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from config_samples import (
    CDNA_KNOBS,
    ENVIRONMENT,
    H100,
    H200,
    KEY,
    KNOBS,
    LATER_ENVIRONMENT,
    MI300X,
    OTHER_KNOBS,
    PROBLEM,
    WORKLOAD,
    WRONG,
    add_trial,
    dump,
    emulated,
    measured,
    raw,
)

from patune.configs.queries import SETTLED
from patune.configs.store import Store
from patune.errors import DatabaseError, InvalidValueError
from patune.inspection import inspect_key
from patune.problem import Problem, Workload
from patune.trial import STATUSES, WITH_EVIDENCE, Timing, TrialResult

if TYPE_CHECKING:
    from patune.target import Target


@pytest.fixture
def store(any_store: Store) -> Store:
    """Every test here runs on SQLite and on PostgreSQL."""
    return any_store


def test_trials_come_back_as_they_were_recorded(store: Store) -> None:
    both = TrialResult(
        status="ok",
        gate_cases=1,
        timing=Timing(median_us=0.1 + 0.2, p20_us=0.0, p80_us=1e300, replays=1, read_fraction=1.01),
        counted=emulated(3.0).counted,
        facts={"text": "é\n", "deep": [{"n": 1.5}]},
    )
    results = [measured(), WRONG, both, emulated()]
    ids = [add_trial(store, result, source=f"s{i}") for i, result in enumerate(results)]
    stored = store.trials(**KEY)
    assert [trial.result for trial in stored] == results
    assert [trial.id for trial in stored] == ids
    assert [trial.source for trial in stored] == ["s0", "s1", "s2", "s3"]
    assert {trial.knobs for trial in stored} == {KNOBS}
    assert {trial.environment_key for trial in stored} == {ENVIRONMENT.key}
    assert all(trial.created.endswith("Z") for trial in stored)


def test_trials_are_of_one_key(store: Store) -> None:
    add_trial(store, measured())
    add_trial(store, measured(), target=H100)
    add_trial(store, measured(), problem=Problem(block_size=16, head_dim=64, qg=1))
    add_trial(store, measured(), workload=Workload(batch=8, kv_heads=128, context=4096))
    assert len(store.trials(**KEY)) == 1
    unknown = Problem(block_size=32, head_dim=64, qg=1)
    assert store.trials(target=H200, problem=unknown, workload=WORKLOAD) == []
    assert store.failures(target=H200, problem=unknown, workload=WORKLOAD) == {}
    assert store.winner(target=MI300X, problem=PROBLEM, workload=WORKLOAD) is None


def test_a_sweep_resumes_within_its_environment(store: Store) -> None:
    add_trial(store, measured(), knobs=KNOBS)
    add_trial(store, measured(), knobs=OTHER_KNOBS, environment=LATER_ENVIRONMENT)
    assert [t.knobs for t in store.trials(**KEY, environment=ENVIRONMENT)] == [KNOBS]
    assert [t.knobs for t in store.trials(**KEY, environment=LATER_ENVIRONMENT)] == [OTHER_KNOBS]
    assert [t.knobs for t in store.trials(**KEY)] == [KNOBS, OTHER_KNOBS]


def test_other_keys_learn_from_evidence_and_settled_failures(store: Store) -> None:
    small = Problem(block_size=16, head_dim=64, qg=1)
    for status in STATUSES:
        if status not in WITH_EVIDENCE:
            add_trial(store, TrialResult(status=status, reason=status), problem=small)
    slow = TrialResult(status="slow", gate_cases=1, timing=measured(99.0).timing)
    add_trial(store, slow, target=H100, workload=Workload(batch=1, kv_heads=8, context=4096))
    add_trial(store, measured())
    add_trial(store, measured(), environment=LATER_ENVIRONMENT)
    add_trial(store, emulated(), target=MI300X)
    found = store.arch_trials(arch="sm_90", environment=ENVIRONMENT)
    assert {problem for problem, _, _ in found[:-2]} == {small}
    assert [trial.result.status for _, _, trial in found] == [
        *[s for s in STATUSES if s in SETTLED],
        "slow",
        "ok",
    ]
    assert [trial.result.reason for _, _, trial in found][:-2] == [
        s for s in STATUSES if s in SETTLED
    ]
    assert found[-1] == (PROBLEM, WORKLOAD, store.trials(**KEY)[0])
    assert found[-2][1].batch == 1
    assert len(store.arch_trials(arch="gfx942", environment=ENVIRONMENT)) == 1
    assert store.arch_trials(arch="gfx950", environment=ENVIRONMENT) == []


def test_a_slow_trial_is_no_failure_and_cannot_win(store: Store) -> None:
    slow = TrialResult(status="slow", gate_cases=12, reason="3x the best", timing=measured().timing)
    trial = add_trial(store, slow)
    add_trial(store, WRONG)
    assert store.trials(**KEY)[0].result == slow
    assert store.failures(**KEY) == {"wrong": 1}
    with pytest.raises(InvalidValueError, match=f"trial_id={trial} ended as 'slow' and cannot win"):
        store.promote(trial, default_trial_id=None)


def test_a_message_is_stored_once(store: Store) -> None:
    for reason in ("ptxas died", "ptxas died", "", "ptxas died again"):
        add_trial(store, TrialResult(status="compile_error", reason=reason))
    texts = raw(store, "SELECT text FROM patune_message ORDER BY id")
    assert texts == [("ptxas died",), ("ptxas died again",)]
    reasons = [t.result.reason for t in store.trials(**KEY)]
    assert reasons == ["ptxas died", "ptxas died", "", "ptxas died again"]


def test_an_infinite_error_of_an_older_file_is_none(store: Store) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    infinity = "9e999" if isinstance(store.place, Path) else "'Infinity'"
    raw(store, f"UPDATE patune_trial SET error_rms = {infinity}")
    assert store.trials(**KEY)[0].result.error_rms is None
    assert store.winner(**KEY) is not None
    shown = inspect_key(store, **KEY)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["trials"][0]["error_rms"] is None


@pytest.mark.parametrize("status", [s for s in STATUSES if s not in WITH_EVIDENCE])
def test_failures_are_kept_with_their_reason(store: Store, status: str) -> None:
    add_trial(store, TrialResult(status=status, reason=f"because {status}"))
    add_trial(store, TrialResult(status=status, reason="again"))
    add_trial(store, measured())
    assert store.failures(**KEY) == {status: 2}
    assert store.trials(**KEY)[0].result.reason == f"because {status}"


def test_what_compilers_print_can_be_stored(store: Store) -> None:
    add_trial(
        store, TrialResult(status="compile_error", reason="bad \udcff byte", error_rms=math.nan)
    )
    add_trial(store, TrialResult(status="nonfinite", reason="", error_rms=math.inf))
    first, second = (trial.result for trial in store.trials(**KEY))
    assert first.reason == "bad ? byte"
    assert first.error_rms is None
    assert second.error_rms is None  # JSON has no infinity


def test_a_run_is_recorded(store: Store) -> None:
    run = store.begin_run(
        target=H200, environment=ENVIRONMENT, sampler="tpe", seed=3, command="patune sweep --qg 8"
    )
    query = f"SELECT sampler, seed, command, ended FROM patune_run WHERE id = {run}"
    assert raw(store, query) == [("tpe", 3, "patune sweep --qg 8", None)]
    store.end_run(run)
    ((ended,),) = raw(store, "SELECT ended FROM patune_run")
    assert ended.endswith("Z")


def test_unknown_ids_and_foreign_knobs_are_refused(store: Store) -> None:
    with pytest.raises(InvalidValueError, match="run_id=99 is not in"):
        store.end_run(99)
    with pytest.raises(InvalidValueError, match="trial_id=99 is not in"):
        store.promote(99, default_trial_id=None)
    with pytest.raises(InvalidValueError, match=r"knobs.family='cdna_mfma'.*allowed: hopper_wgmma"):
        add_trial(store, measured(), knobs=CDNA_KNOBS)
    with pytest.raises(InvalidValueError, match="source=''"):
        add_trial(store, measured(), source="")
    not_json = TrialResult(status="spills", facts={"bytes": math.inf})
    with pytest.raises(InvalidValueError, match="is not JSON"):
        add_trial(store, not_json)
    assert store.trials(**KEY) == []


def test_winners_are_filtered_and_ordered(store: Store) -> None:
    small = Problem(block_size=16, head_dim=64, qg=1)
    keys = [(H200, PROBLEM), (H200, small), (H100, PROBLEM), (MI300X, PROBLEM)]
    for target, problem in keys:
        trial = add_trial(store, emulated(), target=target, problem=problem)
        store.promote(trial, default_trial_id=None)

    def found(**wanted: object) -> list[tuple[Target, Problem]]:
        return [(w.target, w.problem) for w in store.winners(**wanted)]  # type: ignore[arg-type]

    assert found() == [(MI300X, PROBLEM), (H100, PROBLEM), (H200, small), (H200, PROBLEM)]
    assert found(arch="sm_90") == [(H100, PROBLEM), (H200, small), (H200, PROBLEM)]
    assert found(block_size=16) == found(head_dim=64) == found(qg=1) == [(H200, small)]
    assert found(arch="gfx950") == []
    assert found(arch="gfx942", qg=8) == [(MI300X, PROBLEM)]


def test_rows_of_another_version_are_skipped_with_a_log_line(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    raw(
        store,
        """UPDATE patune_trial SET knobs = replace(knobs, '"num_stages":3', '"num_stages":33')""",
    )
    assert store.trials(**KEY) == []
    assert store.winner(**KEY) is None
    assert "Skipped row 1 of patune_winner: num_stages=33 is not allowed" in caplog.text


def test_a_store_does_not_survive_a_fork(store: Store) -> None:
    store._pid -= 1  # what a forked child sees
    with pytest.raises(DatabaseError, match="Open a Store in each process"):
        store.winners()


def test_the_path_comes_from_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATUNE_DB", str(tmp_path / "deep" / "here?.db"))
    with Store.open() as opened:
        assert opened.place == tmp_path / "deep" / "here?.db"
    assert opened.place.exists()
    assert not opened.place.with_name("here?.db-wal").exists()


def test_a_store_that_reads_cannot_write(store: Store) -> None:
    trial = add_trial(store, measured())
    store.promote(trial, default_trial_id=None)
    before = dump(store.place)
    with Store.read(store.place) as reader:
        assert reader.winners() == store.winners()
        with pytest.raises(DatabaseError, match="readonly"):
            add_trial(reader, measured())
    assert dump(store.place) == before
