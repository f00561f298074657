"""The promises that the database keeps by itself, tried with raw SQL."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from config_samples import (
    H100,
    LATER_ENVIRONMENT,
    WORKLOAD,
    WRONG,
    add_trial,
    emulated,
    measured,
    on_server,
    robust_winner,
    run_on_server,
)

from patune.configs import postgres
from patune.configs.constraints import Base
from patune.configs.models import EVENTS, FAULTS, STATES
from patune.configs.store import Store
from patune.configs.winner import ROBUST_OBJECTIVES
from patune.problem import Problem, Workload
from patune.trial import STATUSES, WITH_EVIDENCE, TrialResult

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from patune.settings import ServerUrl

# Trials: 1 measured and promoted, 2 wrong, 3 emulated, 4, 5 and 6 of another target, problem, workload, 7 hung and blocked.
NEW_WINNER = """
    INSERT INTO patune_winner (target_id, problem_id, workload_id, trial_id, environment_id, status, evidence,
        default_trial_id, default_score, trials, top, state, created)
    VALUES ({target}, {problem}, {workload}, {trial}, 1, '{status}', '{evidence}', {default}, NULL, 1, '[]', 'fresh', 'now')
"""
NEW_TRIAL = """
    INSERT INTO patune_trial (run_id, target_id, environment_id, problem_id, workload_id, knobs, knobs_hash,
        source, status, gate_cases, seconds, created)
    VALUES (1, {target}, {environment}, 1, 1, '{{}}', 'h', 'search', 'wrong', 0, 0, 'now')
"""


def new_winner(**changes: object) -> str:
    key = {"target": 1, "problem": 1, "workload": 2, "trial": 6, "status": "ok"}
    return NEW_WINNER.format(**(key | {"evidence": "measured", "default": "NULL"} | changes))


class Rows:
    """Raw SQL on a filled database; what it changes is undone at the end of a test."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.on_server = not isinstance(connection, sqlite3.Connection)
        connection.execute("BEGIN")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        self._connection.execute("SAVEPOINT before")
        try:
            cursor = self._connection.execute(statement)
        except Exception:
            self._connection.execute("ROLLBACK TO SAVEPOINT before")
            raise
        return cursor.fetchall() if cursor.description else []

    def dump(self) -> list[str]:
        return [
            f"{name}: {line}"
            for name in sorted(Base.metadata.tables)
            for line in sorted(map(str, self.execute(f"SELECT * FROM {name}")))
        ]


@pytest.fixture(scope="module")
def filled(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filled") / "patune.db"
    shutil.copy(empty_database, path)
    with Store.open(path) as store:
        fill(store)
    return path


@pytest.fixture(scope="module")
def filled_on_server(postgres_server: str) -> ServerUrl:
    run_on_server(postgres_server, "CREATE DATABASE patune_filled TEMPLATE template0")
    place = on_server(postgres_server, "patune_filled")
    with Store.open(place) as store:
        fill(store)
    return place


def fill(store: Store) -> None:
    first = add_trial(store, measured())
    add_trial(store, WRONG)
    add_trial(store, emulated())
    add_trial(store, measured(), target=H100, environment=LATER_ENVIRONMENT)
    add_trial(store, measured(), problem=Problem(block_size=16, head_dim=64, qg=1))
    add_trial(store, measured(), workload=Workload(batch=1, kv_heads=8, context=4096))
    store.promote(first, default_trial_id=None)
    store.block(add_trial(store, TrialResult(status="hang", reason="gate: killed")))
    store.put_robust(robust_winner())
    store.add_capture(
        "c", [(H100, Problem(block_size=16, head_dim=64, qg=1), WORKLOAD, "heuristic", 3)]
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def rows(request: pytest.FixtureRequest) -> Iterator[Rows]:
    if request.param == "postgresql":
        with closing(postgres.connect(request.getfixturevalue("filled_on_server"))) as server:
            server.autocommit = True
            yield Rows(server)
            server.execute("ROLLBACK")
        return
    path = request.getfixturevalue("filled")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        yield Rows(connection)
        connection.execute("ROLLBACK")


TRIAL = "UPDATE patune_trial SET {} WHERE id = {}"
ANOTHER_BLOCK = """
    INSERT INTO patune_blocklist (arch, kernel_source_hash, problem_id, knobs, knobs_hash, status, trial_id, created)
    SELECT {} FROM patune_blocklist
"""
ANOTHER_ROBUST = """
    INSERT INTO patune_robust (target_id, problem_id, environment_id, objective, workloads, knobs, regrets, score, created)
    SELECT target_id, problem_id, 2, objective, '[]', '{}', '[]', 1, 'now' FROM patune_robust
"""
WINNER = "UPDATE patune_winner SET default_knobs = '{{}}', {}"
BROKEN = {
    "a winner of another environment than its trial": (
        "UPDATE patune_winner SET environment_id = 2", "FOREIGN KEY"),
    "a winner of no environment": (
        "UPDATE patune_winner SET environment_id = NULL", "NOT NULL"),
    "a winner that does not say what it beat": (
        "UPDATE patune_winner SET top = NULL", "NOT NULL"),
    "a winning trial that gets another environment": (
        TRIAL.format("environment_id = 2", 1), "FOREIGN KEY"),
    "a timing that is no number": (
        TRIAL.format("median_us = 'NaN'", 5), "ck_patune_trial_timing"),
    "an event that nobody knows": (
        "UPDATE patune_history SET event = 'won'", "ck_patune_history_event"),
    "an event of no target": (
        "UPDATE patune_history SET target_id = 99", "FOREIGN KEY"),
    "an event of no environment": (
        "UPDATE patune_history SET environment_id = 99", "FOREIGN KEY"),
    "a capture that is taken in twice": (
        "INSERT INTO patune_miss (capture, target_id, problem_id, workload_id, source, calls, created) "
        "SELECT capture, target_id, problem_id, workload_id, source, 9, 'now' FROM patune_miss", "UNIQUE"),
    "a miss that nobody asked for": (
        "UPDATE patune_miss SET calls = 0", "ck_patune_miss_calls"),
    "a miss of no problem": (
        "UPDATE patune_miss SET problem_id = 99", "FOREIGN KEY"),
    "a slow trial without evidence": (
        TRIAL.format("status = 'slow', gate_cases = 3", 2), "ck_patune_trial_has_evidence"),
    "a slow trial that skipped the gate": (
        TRIAL.format("status = 'slow', gate_cases = 0", 5), "ck_patune_trial_gated"),
    "a winning trial that turns out slow": (
        TRIAL.format("status = 'slow'", 1), "FOREIGN KEY"),
    "an interval of no timing": (
        TRIAL.format("low_us = 1", 3), "ck_patune_trial_low_us"),
    "an interval that ends in words": (
        TRIAL.format("high_us = 'late'", 5), "ck_patune_trial_high_us"),
    "an interval below zero": (
        TRIAL.format("low_us = -1", 5), "ck_patune_trial_low_us"),
    "a timing of no protocol": (
        TRIAL.format("protocol = NULL", 5), "ck_patune_trial_protocol"),
    "a timing of a protocol without a name": (
        TRIAL.format("protocol = ''", 5), "ck_patune_trial_protocol"),
    "a protocol of no timing": (
        TRIAL.format("protocol = 'p'", 3), "ck_patune_trial_protocol"),
    "an old name of a status": (
        TRIAL.format("status = 'unstable'", 2), "ck_patune_trial_status"),
    "a message that is not there": (
        TRIAL.format("message_id = 99", 2), "FOREIGN KEY"),
    "a message that trials refer to is deleted": (
        "DELETE FROM patune_message WHERE text = 'token 3 differs'", "FOREIGN KEY"),
    "the same message twice": (
        "INSERT INTO patune_message (sha256, text) SELECT sha256, 'another' FROM patune_message WHERE id = 1", "UNIQUE"),
    "an empty message": (
        "INSERT INTO patune_message (sha256, text) VALUES ('s', '')", "ck_patune_message_text"),
    "half a speedup": (
        WINNER.format("speedup = 1.2"), "ck_patune_winner_speedup"),
    "a speedup without its interval's end": (
        WINNER.format("speedup = 1.2, speedup_low = 1.1"), "ck_patune_winner_speedup"),
    "a speedup below its interval": (
        WINNER.format("speedup = 1.0, speedup_low = 1.1, speedup_high = 1.3"), "ck_patune_winner_speedup"),
    "a speedup above its interval": (
        WINNER.format("speedup = 1.4, speedup_low = 1.1, speedup_high = 1.3"), "ck_patune_winner_speedup"),
    "a speedup in words": (
        WINNER.format("speedup = 'much', speedup_low = 1, speedup_high = 'more'"), "ck_patune_winner_speedup"),
    "a speedup over nothing": (
        "UPDATE patune_winner SET speedup = 1.2, speedup_low = 1.1, speedup_high = 1.3", "ck_patune_winner_speedup"),
    "the same block twice": (
        ANOTHER_BLOCK.format("arch, kernel_source_hash, problem_id, '{}', knobs_hash, 'crash', trial_id, 'now'"), "UNIQUE"),
    "a block for what is no fault": (
        "UPDATE patune_blocklist SET status = 'wrong'", "ck_patune_blocklist_status"),
    "a block of no trial": (
        "UPDATE patune_blocklist SET trial_id = 99", "FOREIGN KEY"),
    "a block of no problem": (
        "UPDATE patune_blocklist SET problem_id = 99", "FOREIGN KEY"),
    "a blocked trial that is deleted": (
        "DELETE FROM patune_trial WHERE id = 7", "FOREIGN KEY"),
    "two robust winners of one objective": (ANOTHER_ROBUST, "UNIQUE"),
    "a robust winner of an unknown objective": (
        "UPDATE patune_robust SET objective = 'best'", "ck_patune_robust_objective"),
    "a robust score in words": (
        "UPDATE patune_robust SET score = 'good'", "ck_patune_robust_score"),
    "a robust winner of no target": (
        "UPDATE patune_robust SET target_id = 99", "FOREIGN KEY"),
    "a robust winner of no environment": (
        "UPDATE patune_robust SET environment_id = 99", "FOREIGN KEY"),
    "a timed trial that failed": (
        TRIAL.format("status = 'wrong'", 5), "ck_patune_trial_gated"),
    "a counted trial that failed": (
        TRIAL.format("status = 'crash'", 3), "ck_patune_trial_gated"),
    "a timed trial that skipped the gate": (
        TRIAL.format("gate_cases = 0", 5), "ck_patune_trial_gated"),
    "a counted trial that skipped the gate": (
        TRIAL.format("gate_cases = 0", 3), "ck_patune_trial_gated"),
    "a timing on a failed trial": (
        TRIAL.format("median_us = 1, p20_us = 1, p80_us = 1, replays = 1, read_fraction = 1, protocol = 'p', "
                     "evidence = 'measured'", 2),
        "ck_patune_trial_gated"),
    "counted work on a failed trial": (
        TRIAL.format("busiest_simd_slots = 1, wave_instructions = 1, mfma = 1, global_bytes = 1, lds_bytes = 1, "
                     "spill_bytes = 0, evidence = 'emulated'", 2), "ck_patune_trial_gated"),
    "ok without evidence": (
        TRIAL.format("status = 'ok', gate_cases = 3", 2), "ck_patune_trial_has_evidence"),
    "a timing that is not called measured": (
        TRIAL.format("evidence = 'emulated'", 5), "ck_patune_trial_evidence"),
    "counted work that is called measured": (
        TRIAL.format("evidence = 'measured'", 3), "ck_patune_trial_evidence"),
    "evidence out of nothing": (
        TRIAL.format("evidence = 'measured'", 2), "ck_patune_trial_evidence"),
    "evidence that is hidden": (
        TRIAL.format("evidence = NULL", 5), "ck_patune_trial_evidence"),
    "half a timing": (
        TRIAL.format("replays = NULL", 5), "ck_patune_trial_timing"),
    "a negative timing": (
        TRIAL.format("median_us = -1", 5), "ck_patune_trial_timing"),
    "a timing in words": (
        TRIAL.format("p80_us = 'fast'", 5), "ck_patune_trial_timing"),
    "half of the counted work": (
        TRIAL.format("mfma = NULL", 3), "ck_patune_trial_counted"),
    "counted work in words": (
        TRIAL.format("lds_bytes = 'many'", 3), "ck_patune_trial_counted"),
    "an unknown status": (
        TRIAL.format("status = 'fine'", 2), "ck_patune_trial_status"),
    "a negative number of gate cases": (
        TRIAL.format("gate_cases = -1", 2), "ck_patune_trial_gate_cases"),
    "a trial from nowhere": (
        TRIAL.format("source = ''", 2), "ck_patune_trial_source"),
    "a trial of another environment than its run": (
        NEW_TRIAL.format(target=1, environment=2), "FOREIGN KEY"),
    "a trial of another target than its run": (
        NEW_TRIAL.format(target=2, environment=1), "FOREIGN KEY"),
    "a trial without a run": (
        TRIAL.format("run_id = 99", 2), "FOREIGN KEY"),
    "a winner that failed": (
        new_winner(trial=2, status="wrong"), "ck_patune_winner_status"),
    "a winner that failed and says ok": (
        new_winner(trial=2, workload=1, target=1), "FOREIGN KEY|UNIQUE"),
    "a failed trial in a winner's place": (
        "UPDATE patune_winner SET trial_id = 2", "FOREIGN KEY"),
    "a winner of another target": (
        "UPDATE patune_winner SET trial_id = 4", "FOREIGN KEY"),
    "a winner of another problem": (
        "UPDATE patune_winner SET trial_id = 5", "FOREIGN KEY"),
    "a winner of another workload": (
        "UPDATE patune_winner SET trial_id = 6", "FOREIGN KEY"),
    "a winner with better evidence than its trial": (
        "UPDATE patune_winner SET trial_id = 3", "FOREIGN KEY"),
    "a winner without a trial": (
        new_winner(trial=99), "FOREIGN KEY"),
    "two winners of a key": (
        new_winner(trial=1, workload=1), "UNIQUE"),
    "a default trial of another key": (
        "UPDATE patune_winner SET default_trial_id = 4", "FOREIGN KEY"),
    "a default's score without its knobs": (
        "UPDATE patune_winner SET default_score = 1.0", "ck_patune_winner_default"),
    "a winner out of no trials": (
        "UPDATE patune_winner SET trials = 0", "ck_patune_winner_trials"),
    "an unknown state": (
        "UPDATE patune_winner SET state = 'new'", "ck_patune_winner_state"),
    "a winning trial that is deleted": (
        "DELETE FROM patune_trial WHERE id = 1", "FOREIGN KEY"),
    "a winning trial that loses its verdict": (
        TRIAL.format("status = 'wrong', evidence = NULL, median_us = NULL, p20_us = NULL, p80_us = NULL, "
                     "replays = NULL, read_fraction = NULL, protocol = NULL", 1), "FOREIGN KEY"),
    "a run that loses its target": (
        "DELETE FROM patune_target WHERE id = 1", "FOREIGN KEY"),
    "the same target twice": (
        "INSERT INTO patune_target (arch, device_name, compute_units) VALUES ('sm_90', 'NVIDIA H200', 132)", "UNIQUE"),
    "a target without compute units": (
        "UPDATE patune_target SET compute_units = 0", "ck_patune_target_compute_units"),
    "the same environment twice": (
        "UPDATE patune_environment SET key = (SELECT key FROM patune_environment WHERE id = 1)", "UNIQUE"),
    "fusion that is neither on nor off": (
        "UPDATE patune_environment SET fp_fusion = 2", "ck_patune_environment_fp_fusion"),
    "the same problem twice": (
        "INSERT INTO patune_problem SELECT 99, block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, "
        "kv_layout, windowed, sinks, softcap, fp8_math FROM patune_problem WHERE id = 1", "UNIQUE"),
    "a page size in words": (
        "UPDATE patune_problem SET block_size = 'large'", "ck_patune_problem_block_size"),
    "half a window": (
        "UPDATE patune_problem SET windowed = 0.5", "ck_patune_problem_windowed"),
    "half a cap": (
        "UPDATE patune_problem SET softcap = 0.5", "ck_patune_problem_softcap"),
    "fp8 twice": (
        "UPDATE patune_problem SET fp8_math = 2", "ck_patune_problem_fp8_math"),
    "the same workload twice": (
        "INSERT INTO patune_workload (batch, kv_heads, context) VALUES (128, 8, 4096)", "UNIQUE"),
    "an empty batch": (
        "UPDATE patune_workload SET batch = 0", "ck_patune_workload_batch"),
    "a context in words": (
        "UPDATE patune_workload SET context = 'long' WHERE id = 1", "ck_patune_workload_context"),
}  # fmt: skip


# What a server's typed columns refuse before any constraint is asked.
TYPED = (
    *("an interval that ends in words", "a speedup in words", "a robust score in words", "a timing in words"),
    *("counted work in words", "fusion that is neither on nor off", "a page size in words", "half a window"),
    *("half a cap", "fp8 twice", "a context in words"),
)  # fmt: skip
WORDS = {
    "FOREIGN KEY": "foreign key constraint",
    "UNIQUE": "unique constraint",
    "NOT NULL": "not-null constraint",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_database_refuses(rows: Rows, name: str) -> None:
    statement, constraint = BROKEN[name]
    refusal: type[Exception] = sqlite3.IntegrityError
    if rows.on_server:
        constraint = "|".join(WORDS.get(word, word) for word in constraint.split("|"))
        refusal = psycopg.IntegrityError
        if name in TYPED:
            constraint = "invalid input syntax for type|is of type boolean but expression is"
            refusal = psycopg.Error
    before = rows.dump()
    with pytest.raises(refusal, match=constraint):
        rows.execute(statement)
    assert rows.dump() == before


def test_the_database_accepts_what_is_right(rows: Rows) -> None:
    rows.execute(new_winner())
    rows.execute(NEW_TRIAL.format(target=1, environment=1))
    rows.execute(TRIAL.format("median_us = 2", 5))
    rows.execute("UPDATE patune_winner SET default_trial_id = 2 WHERE trial_id = 1")
    rows.execute("UPDATE patune_winner SET default_knobs = '{}', default_score = 1.5")
    for state in STATES:
        rows.execute(f"UPDATE patune_winner SET state = '{state}'")
    for status in STATUSES:
        if status not in WITH_EVIDENCE:
            rows.execute(TRIAL.format(f"status = '{status}'", 2))
    rows.execute(TRIAL.format("status = 'slow'", 5))
    rows.execute(TRIAL.format("low_us = 49, high_us = 51, protocol = 'graph-cold-2'", 5))
    rows.execute(TRIAL.format("message_id = NULL", 2))
    rows.execute("UPDATE patune_winner SET speedup = 1.2, speedup_low = 1.1, speedup_high = 1.3")
    for fault in FAULTS:
        rows.execute(f"UPDATE patune_blocklist SET status = '{fault}'")
    for objective in ROBUST_OBJECTIVES:
        rows.execute(f"UPDATE patune_robust SET objective = '{objective}'")
    for event in EVENTS:
        rows.execute(f"UPDATE patune_history SET event = '{event}', workload_id = NULL")
    rows.execute("UPDATE patune_miss SET calls = 4611686018427387904")  # 64 bits
    rows.execute("UPDATE patune_trial SET median_us = 50.123456789012345 WHERE id = 5")
    assert rows.execute("SELECT median_us FROM patune_trial WHERE id = 5") == [
        (50.123456789012345,)
    ]
    assert rows.execute("SELECT count(*) FROM patune_winner") == [(2,)]


def test_resuming_uses_an_index(rows: Rows) -> None:
    query = (
        "SELECT * FROM patune_trial WHERE target_id = 1 AND problem_id = 1 AND workload_id = 1 "
        "AND environment_id = 1 AND knobs_hash = 'h'"
    )
    if rows.on_server:
        rows.execute("SET LOCAL enable_seqscan = off")  # of a table this small it would be right
        plan = "".join(line for (line,) in rows.execute(f"EXPLAIN {query}"))
        assert "ix_patune_trial_resume" in plan
        return
    (plan,) = rows.execute(f"EXPLAIN QUERY PLAN {query}")
    assert "ix_patune_trial_resume (target_id=? AND problem_id=? AND workload_id=?" in plan[3]
