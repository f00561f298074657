"""The store keeps every trial as it was, counts failures, and lets only the better evidence win."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

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
    winner,
)

from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.errors import DatabaseError, InvalidValueError
from patune.problem import Problem, Workload
from patune.trial import STATUSES, Timing, TrialResult

if TYPE_CHECKING:
    from pathlib import Path

    from patune.target import Target


def raw(store: Store, statement: str) -> None:
    with closing(sqlite3.connect(store.path)) as connection, connection:
        connection.execute(statement)


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


@pytest.mark.parametrize("status", [s for s in STATUSES if s != "ok"])
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
    assert second.error_rms == math.inf


def test_a_run_is_recorded(store: Store) -> None:
    run = store.begin_run(
        target=H200, environment=ENVIRONMENT, sampler="tpe", seed=3, command="patune sweep --qg 8"
    )
    with closing(sqlite3.connect(store.path)) as connection:
        query = "SELECT sampler, seed, command, ended FROM patune_run WHERE id = ?"
        assert connection.execute(query, (run,)).fetchone() == (
            "tpe",
            3,
            "patune sweep --qg 8",
            None,
        )
        store.end_run(run)
        (ended,) = connection.execute("SELECT ended FROM patune_run").fetchone()
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


def test_promotion_describes_the_winner(store: Store) -> None:
    default = add_trial(store, measured(60.0), knobs=OTHER_KNOBS, source="default")
    add_trial(store, WRONG)
    best = add_trial(store, measured(40.0))
    add_trial(store, measured(1.0), environment=LATER_ENVIRONMENT)
    promoted = store.promote(best, default_trial_id=default)
    assert promoted == Winner(
        target=H200,
        environment=ENVIRONMENT,
        problem=PROBLEM,
        workload=WORKLOAD,
        knobs=KNOBS,
        evidence="measured",
        timing=measured(40.0).timing,
        counted=None,
        default_score=60.0,
        default_knobs=OTHER_KNOBS,
        trials=2,  # configurations: the wrong run and the best one are of the same knobs
        gate_cases=12,
        error_rms=1e-3,
        created=promoted.created,
    )
    assert promoted.speedup_over_default == 1.5
    assert store.winner(**KEY) == promoted
    assert store.winners() == [promoted]


def test_a_failed_default_is_named_without_a_score(store: Store) -> None:
    default = add_trial(store, WRONG, knobs=OTHER_KNOBS, source="default")
    promoted = store.promote(add_trial(store, measured()), default_trial_id=default)
    assert promoted.default_knobs == OTHER_KNOBS
    assert promoted.default_score is None
    assert promoted.speedup_over_default is None


def test_a_score_of_the_other_kind_is_not_compared(store: Store) -> None:
    default = add_trial(store, emulated(1000.0))
    assert (
        store.promote(add_trial(store, measured()), default_trial_id=default).default_score is None
    )


def test_a_default_of_another_key_is_refused(store: Store) -> None:
    best = add_trial(store, measured())
    elsewhere: dict[str, dict[str, Any]] = {
        "target": {"target": H100},
        "environment": {"environment": LATER_ENVIRONMENT},
        "problem": {"problem": Problem(block_size=16, head_dim=64, qg=1)},
        "workload": {"workload": Workload(batch=1, kv_heads=1, context=1)},
    }
    for name, change in elsewhere.items():
        other = add_trial(store, measured(), **change)
        with pytest.raises(InvalidValueError, match=f"is of another {name} than trial {best}"):
            store.promote(best, default_trial_id=other)
    with pytest.raises(InvalidValueError, match="default_trial_id=99 is not in"):
        store.promote(best, default_trial_id=99)
    assert store.winners() == []


def test_a_failed_trial_cannot_win(store: Store) -> None:
    failed = add_trial(store, WRONG)
    with pytest.raises(InvalidValueError, match=f"trial_id={failed} ended as 'wrong'"):
        store.promote(failed, default_trial_id=None)
    assert store.winner(**KEY) is None


def test_weaker_evidence_never_replaces_stronger(store: Store) -> None:
    strong = store.promote(add_trial(store, measured(40.0)), default_trial_id=None)
    weak = add_trial(store, emulated(1.0), environment=LATER_ENVIRONMENT, knobs=OTHER_KNOBS)
    assert store.promote(weak, default_trial_id=None) == strong
    assert store.winner(**KEY) == strong


def test_stronger_evidence_replaces_weaker(store: Store) -> None:
    store.promote(add_trial(store, emulated(1.0)), default_trial_id=None)
    strong = store.promote(
        add_trial(store, measured(40.0), knobs=OTHER_KNOBS), default_trial_id=None
    )
    assert strong.evidence == "measured"
    assert store.winners() == [strong]


@pytest.mark.parametrize("result", [measured(80.0), emulated(80.0)])
def test_a_promotion_replaces_an_older_environment(store: Store, result: TrialResult) -> None:
    faster = measured(40.0) if result.timing else emulated(40.0)
    store.promote(add_trial(store, faster), default_trial_id=None)
    newer = add_trial(store, result, environment=LATER_ENVIRONMENT)
    promoted = store.promote(newer, default_trial_id=None)
    assert promoted.environment == LATER_ENVIRONMENT
    assert promoted.score == 80.0
    assert store.winners() == [promoted]


def test_a_retired_winner_is_not_served_and_yields_to_anything(store: Store) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    raw(store, "UPDATE patune_winner SET state = 'retired'")
    assert store.winner(**KEY) is None
    assert store.winners() == []
    promoted = store.promote(add_trial(store, emulated()), default_trial_id=None)
    assert promoted.evidence == "emulated"
    assert store.winner(**KEY) == promoted


def test_a_promotion_after_an_import_is_ours(store: Store) -> None:
    store.merge([winner()], imported_from="h200.json")
    imported = store.winner(**KEY)
    assert imported == winner(imported_from="h200.json")
    promoted = store.promote(add_trial(store, measured()), default_trial_id=None)
    assert promoted.imported_from is None
    assert promoted.default_knobs is None
    assert store.winner(**KEY) == promoted


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
        assert opened.path == tmp_path / "deep" / "here?.db"
    assert opened.path.exists()
    assert not opened.path.with_name("here?.db-wal").exists()


def test_a_store_that_reads_cannot_write(store: Store) -> None:
    trial = add_trial(store, measured())
    store.promote(trial, default_trial_id=None)
    before = dump(store.path)
    with Store.read(store.path) as reader:
        assert reader.winners() == store.winners()
        with pytest.raises(DatabaseError, match="readonly"):
            add_trial(reader, measured())
    assert dump(store.path) == before
