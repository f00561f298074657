"""Schema 4: a winner's environment and runners-up, the history of what is served, misses of serving processes. Frozen.

SQLite cannot change a table's constraints, so the tables of trials and winners are made anew; their rows keep their ids.
Databases on a server begin with this schema: they are made from the models.
"""

from __future__ import annotations

import json

from alembic import op
from sqlalchemy import text

revision = "schema_4"
down_revision = "schema_3"

MOST = 5  # other configurations beside a winner
TRIAL = """
    id, run_id, target_id, environment_id, problem_id, workload_id, knobs, knobs_hash, source, status, message_id,
    gate_cases, error_rms, evidence, median_us, p20_us, p80_us, replays, read_fraction, low_us, high_us, protocol,
    busiest_simd_slots, wave_instructions, mfma, global_bytes, lds_bytes, spill_bytes, facts, seconds, created
"""
WINNER = """
    id, target_id, problem_id, workload_id, trial_id, status, evidence, default_trial_id, default_knobs, default_score,
    speedup, speedup_low, speedup_high, trials, state, created, imported_from
"""
STATEMENTS = (
    """
    CREATE TABLE patune_trial_4 (
        id INTEGER NOT NULL,
        run_id INTEGER NOT NULL,
        target_id INTEGER NOT NULL,
        environment_id INTEGER NOT NULL,
        problem_id INTEGER NOT NULL,
        workload_id INTEGER NOT NULL,
        knobs TEXT NOT NULL,
        knobs_hash TEXT NOT NULL,
        source TEXT NOT NULL,
        status TEXT NOT NULL,
        message_id INTEGER,
        gate_cases INTEGER NOT NULL,
        error_rms REAL,
        evidence TEXT,
        median_us REAL,
        p20_us REAL,
        p80_us REAL,
        replays INTEGER,
        read_fraction REAL,
        low_us REAL,
        high_us REAL,
        protocol TEXT,
        busiest_simd_slots REAL,
        wave_instructions INTEGER,
        mfma INTEGER,
        global_bytes INTEGER,
        lds_bytes INTEGER,
        spill_bytes INTEGER,
        facts TEXT,
        seconds REAL NOT NULL,
        created TEXT NOT NULL,
        CONSTRAINT pk_patune_trial PRIMARY KEY (id),
        CONSTRAINT fk_patune_trial_run_id_target_id_environment_id FOREIGN KEY(run_id, target_id, environment_id)
        REFERENCES patune_run (id, target_id, environment_id),
        CONSTRAINT uq_patune_trial_key UNIQUE (id, target_id, problem_id, workload_id),
        CONSTRAINT uq_patune_trial_winnable UNIQUE (id, target_id, problem_id, workload_id, environment_id, status, evidence),
        CONSTRAINT ck_patune_trial_status
        CHECK (status IN ('ok', 'infeasible', 'compile_error', 'compile_timeout', 'out_of_resources', 'spills', 'duplicate', 'wrong', 'nonfinite', 'flaky', 'launch_error', 'illegal_access', 'crash', 'hang', 'slow', 'error')),
        CONSTRAINT ck_patune_trial_source CHECK (source <> ''),
        CONSTRAINT ck_patune_trial_gate_cases CHECK (typeof(gate_cases) = 'integer' AND gate_cases >= 0),
        CONSTRAINT ck_patune_trial_timing
        CHECK ((median_us IS NULL AND p20_us IS NULL AND p80_us IS NULL AND replays IS NULL AND read_fraction IS NULL)
        OR (typeof(median_us) IN ('integer', 'real') AND median_us >= 0
        AND typeof(p20_us) IN ('integer', 'real') AND p20_us >= 0
        AND typeof(p80_us) IN ('integer', 'real') AND p80_us >= 0
        AND typeof(replays) IN ('integer', 'real') AND replays >= 0
        AND typeof(read_fraction) IN ('integer', 'real') AND read_fraction >= 0)),
        CONSTRAINT ck_patune_trial_low_us CHECK (low_us IS NULL OR (median_us IS NOT NULL AND typeof(low_us) IN ('integer', 'real') AND low_us >= 0)),
        CONSTRAINT ck_patune_trial_high_us CHECK (high_us IS NULL OR (median_us IS NOT NULL AND typeof(high_us) IN ('integer', 'real') AND high_us >= 0)),
        CONSTRAINT ck_patune_trial_protocol
        CHECK ((median_us IS NULL AND protocol IS NULL) OR (median_us IS NOT NULL AND protocol IS NOT NULL AND protocol <> '')),
        CONSTRAINT ck_patune_trial_counted
        CHECK ((busiest_simd_slots IS NULL AND wave_instructions IS NULL AND mfma IS NULL AND global_bytes IS NULL AND lds_bytes IS NULL AND spill_bytes IS NULL)
        OR (typeof(busiest_simd_slots) IN ('integer', 'real') AND busiest_simd_slots >= 0
        AND typeof(wave_instructions) IN ('integer', 'real') AND wave_instructions >= 0
        AND typeof(mfma) IN ('integer', 'real') AND mfma >= 0
        AND typeof(global_bytes) IN ('integer', 'real') AND global_bytes >= 0
        AND typeof(lds_bytes) IN ('integer', 'real') AND lds_bytes >= 0
        AND typeof(spill_bytes) IN ('integer', 'real') AND spill_bytes >= 0)),
        CONSTRAINT ck_patune_trial_evidence
        CHECK (evidence IS CASE WHEN median_us IS NOT NULL THEN 'measured' WHEN busiest_simd_slots IS NOT NULL THEN 'emulated' END),
        CONSTRAINT ck_patune_trial_has_evidence CHECK (NOT (status IN ('ok', 'slow')) OR evidence IS NOT NULL),
        CONSTRAINT ck_patune_trial_gated CHECK (evidence IS NULL OR (status IN ('ok', 'slow') AND gate_cases >= 1)),
        CONSTRAINT fk_patune_trial_problem_id FOREIGN KEY(problem_id) REFERENCES patune_problem (id),
        CONSTRAINT fk_patune_trial_workload_id FOREIGN KEY(workload_id) REFERENCES patune_workload (id),
        CONSTRAINT fk_patune_trial_message_id FOREIGN KEY(message_id) REFERENCES patune_message (id)
    )
    """,
    f"INSERT INTO patune_trial_4 ({TRIAL}) SELECT {TRIAL} FROM patune_trial",
    "DROP TABLE patune_trial",
    "ALTER TABLE patune_trial_4 RENAME TO patune_trial",
    """
    CREATE INDEX ix_patune_trial_resume ON patune_trial (target_id, problem_id, workload_id, environment_id, knobs_hash)
    """,
    "CREATE INDEX ix_patune_trial_run_id ON patune_trial (run_id)",
    "CREATE INDEX ix_patune_trial_message_id ON patune_trial (message_id)",
    """
    CREATE TABLE patune_winner_4 (
        id INTEGER NOT NULL,
        target_id INTEGER NOT NULL,
        problem_id INTEGER NOT NULL,
        workload_id INTEGER NOT NULL,
        trial_id INTEGER NOT NULL,
        environment_id INTEGER NOT NULL,
        status TEXT NOT NULL,
        evidence TEXT NOT NULL,
        default_trial_id INTEGER,
        default_knobs TEXT,
        default_score REAL,
        speedup REAL,
        speedup_low REAL,
        speedup_high REAL,
        trials INTEGER NOT NULL,
        top TEXT NOT NULL,
        state TEXT NOT NULL,
        created TEXT NOT NULL,
        imported_from TEXT,
        CONSTRAINT pk_patune_winner PRIMARY KEY (id),
        CONSTRAINT uq_patune_winner_target_id_problem_id_workload_id UNIQUE (target_id, problem_id, workload_id),
        CONSTRAINT fk_patune_winner_trial FOREIGN KEY(trial_id, target_id, problem_id, workload_id, environment_id, status, evidence)
        REFERENCES patune_trial (id, target_id, problem_id, workload_id, environment_id, status, evidence),
        CONSTRAINT fk_patune_winner_default_trial FOREIGN KEY(default_trial_id, target_id, problem_id, workload_id)
        REFERENCES patune_trial (id, target_id, problem_id, workload_id),
        CONSTRAINT ck_patune_winner_status CHECK (status = 'ok'),
        CONSTRAINT ck_patune_winner_state CHECK (state IN ('fresh', 'reverify', 'retired')),
        CONSTRAINT ck_patune_winner_trials CHECK (typeof(trials) = 'integer' AND trials >= 1),
        CONSTRAINT ck_patune_winner_default CHECK (default_score IS NULL OR default_knobs IS NOT NULL),
        CONSTRAINT ck_patune_winner_speedup
        CHECK ((speedup IS NULL AND speedup_low IS NULL AND speedup_high IS NULL)
        OR (typeof(speedup) IN ('integer', 'real') AND speedup >= 0
        AND typeof(speedup_low) IN ('integer', 'real') AND speedup_low >= 0
        AND typeof(speedup_high) IN ('integer', 'real') AND speedup_high >= 0
        AND speedup_low <= speedup AND speedup <= speedup_high AND evidence = 'measured' AND default_knobs IS NOT NULL)),
        CONSTRAINT fk_patune_winner_target_id FOREIGN KEY(target_id) REFERENCES patune_target (id),
        CONSTRAINT fk_patune_winner_problem_id FOREIGN KEY(problem_id) REFERENCES patune_problem (id),
        CONSTRAINT fk_patune_winner_workload_id FOREIGN KEY(workload_id) REFERENCES patune_workload (id),
        CONSTRAINT fk_patune_winner_environment_id FOREIGN KEY(environment_id) REFERENCES patune_environment (id)
    )
    """,
    f"""
    INSERT INTO patune_winner_4 ({WINNER}, environment_id, top)
    SELECT {WINNER}, (SELECT t.environment_id FROM patune_trial t WHERE t.id = trial_id), '[]' FROM patune_winner
    """,
    "DROP TABLE patune_winner",
    "ALTER TABLE patune_winner_4 RENAME TO patune_winner",
    "CREATE INDEX ix_patune_winner_trial_id ON patune_winner (trial_id)",
    "CREATE INDEX ix_patune_winner_default_trial_id ON patune_winner (default_trial_id)",
    "CREATE INDEX ix_patune_winner_environment ON patune_winner (environment_id, target_id, state)",
    "CREATE INDEX ix_patune_blocklist_message_id ON patune_blocklist (message_id)",
    "CREATE INDEX ix_patune_blocklist_trial_id ON patune_blocklist (trial_id)",
    """
    CREATE TABLE patune_history (
        id INTEGER NOT NULL,
        created TEXT NOT NULL,
        event TEXT NOT NULL,
        target_id INTEGER NOT NULL,
        problem_id INTEGER NOT NULL,
        workload_id INTEGER,
        trial_id INTEGER,
        knobs TEXT,
        evidence TEXT,
        score REAL,
        environment_id INTEGER,
        previous_knobs TEXT,
        previous_evidence TEXT,
        previous_score REAL,
        reason TEXT NOT NULL,
        CONSTRAINT pk_patune_history PRIMARY KEY (id),
        CONSTRAINT ck_patune_history_event
        CHECK (event IN ('promoted', 'kept', 'imported', 'retired', 'blocked', 'robust', 'pruned')),
        CONSTRAINT fk_patune_history_target_id FOREIGN KEY(target_id) REFERENCES patune_target (id),
        CONSTRAINT fk_patune_history_problem_id FOREIGN KEY(problem_id) REFERENCES patune_problem (id),
        CONSTRAINT fk_patune_history_workload_id FOREIGN KEY(workload_id) REFERENCES patune_workload (id),
        CONSTRAINT fk_patune_history_environment_id FOREIGN KEY(environment_id) REFERENCES patune_environment (id)
    )
    """,
    "CREATE INDEX ix_patune_history_key ON patune_history (target_id, problem_id, workload_id)",
    """
    CREATE TABLE patune_miss (
        id INTEGER NOT NULL,
        capture TEXT NOT NULL,
        target_id INTEGER NOT NULL,
        problem_id INTEGER NOT NULL,
        workload_id INTEGER NOT NULL,
        source TEXT NOT NULL,
        calls INTEGER NOT NULL,
        created TEXT NOT NULL,
        CONSTRAINT pk_patune_miss PRIMARY KEY (id),
        CONSTRAINT uq_patune_miss_capture_target_id_problem_id_workload_id_source
        UNIQUE (capture, target_id, problem_id, workload_id, source),
        CONSTRAINT ck_patune_miss_calls CHECK (typeof(calls) = 'integer' AND calls >= 1),
        CONSTRAINT fk_patune_miss_target_id FOREIGN KEY(target_id) REFERENCES patune_target (id),
        CONSTRAINT fk_patune_miss_problem_id FOREIGN KEY(problem_id) REFERENCES patune_problem (id),
        CONSTRAINT fk_patune_miss_workload_id FOREIGN KEY(workload_id) REFERENCES patune_workload (id)
    )
    """,
    # What is known of the time before: since when each winner is one.
    """
    INSERT INTO patune_history (created, event, target_id, problem_id, workload_id, trial_id, knobs, evidence, score,
        environment_id, reason)
    SELECT n.created, CASE WHEN n.imported_from IS NULL THEN 'promoted' ELSE 'imported' END,
        n.target_id, n.problem_id, n.workload_id, n.trial_id, t.knobs, n.evidence,
        coalesce(t.median_us, t.busiest_simd_slots), n.environment_id,
        coalesce('from ' || n.imported_from || '; ', '') || 'before there was a history'
    FROM patune_winner n JOIN patune_trial t ON t.id = n.trial_id
    WHERE n.state <> 'retired'
    ORDER BY n.created, n.id
    """,
    "UPDATE patune_meta SET schema = 4",
)
# The newest trial of an environment speaks for its knobs; a duplicate says that another one does.
RUNNERS_UP = """
    SELECT coalesce(median_us, busiest_simd_slots), knobs FROM patune_trial
    WHERE status = 'ok' AND protocol IS :protocol AND id IN (
        SELECT max(id) FROM patune_trial
        WHERE target_id = :target_id AND problem_id = :problem_id AND workload_id = :workload_id
            AND environment_id = :environment_id AND status <> 'duplicate'
        GROUP BY knobs
    )
"""
WINNERS = """
    SELECT n.id, n.target_id, n.problem_id, n.workload_id, n.environment_id, t.knobs, t.protocol
    FROM patune_winner n JOIN patune_trial t ON t.id = n.trial_id
"""


def _fill_top() -> None:
    """Beside every winner the best other configurations that were scored as it was."""
    connection = op.get_bind()
    for winner in connection.execute(text(WINNERS)).mappings().all():
        found = connection.execute(text(RUNNERS_UP), dict(winner)).all()
        best = [
            f"[{json.dumps(score)},{knobs}]"
            for score, knobs in sorted(map(tuple, found))
            if knobs != winner["knobs"] and _is_object(knobs)
        ]
        fill = text("UPDATE patune_winner SET top = :top WHERE id = :id")
        connection.execute(fill, {"top": f"[{','.join(best[:MOST])}]", "id": winner["id"]})


def _is_object(knobs: str) -> bool:
    try:
        return isinstance(json.loads(knobs), dict)
    except json.JSONDecodeError:
        return False


def upgrade() -> None:
    """Make the tables of trials and winners anew, add the new tables, and write what they can say of the time before."""
    for statement in STATEMENTS:
        op.execute(statement)
    _fill_top()
