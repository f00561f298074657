"""Schema 1: the first one. Frozen: later schemas are later files."""

from __future__ import annotations

import uuid

from alembic import op
from sqlalchemy import text

from patune import __version__
from patune.configs.winner import utc_now

revision = "schema_1"
down_revision = None

STATEMENTS = (
    """
    CREATE TABLE patune_meta (
        schema INTEGER NOT NULL,
        uuid TEXT NOT NULL,
        created_by TEXT NOT NULL,
        created TEXT NOT NULL,
        CONSTRAINT pk_patune_meta PRIMARY KEY (schema)
    )
    """,
    """
    CREATE TABLE patune_target (
        id INTEGER NOT NULL,
        arch TEXT NOT NULL,
        device_name TEXT NOT NULL,
        compute_units INTEGER NOT NULL,
        CONSTRAINT pk_patune_target PRIMARY KEY (id),
        CONSTRAINT uq_patune_target_arch_device_name_compute_units UNIQUE (arch, device_name, compute_units),
        CONSTRAINT ck_patune_target_compute_units CHECK (typeof(compute_units) = 'integer' AND compute_units >= 1)
    )
    """,
    """
    CREATE TABLE patune_environment (
        id INTEGER NOT NULL,
        key TEXT NOT NULL,
        patune TEXT NOT NULL,
        triton TEXT NOT NULL,
        torch TEXT NOT NULL,
        python TEXT NOT NULL,
        compiler TEXT NOT NULL,
        driver TEXT NOT NULL,
        fp_fusion BOOLEAN NOT NULL,
        kernel_source_hash TEXT NOT NULL,
        CONSTRAINT pk_patune_environment PRIMARY KEY (id),
        CONSTRAINT uq_patune_environment_key UNIQUE (key),
        CONSTRAINT ck_patune_environment_fp_fusion CHECK (fp_fusion IN (0, 1))
    )
    """,
    """
    CREATE TABLE patune_problem (
        id INTEGER NOT NULL,
        block_size INTEGER NOT NULL,
        head_dim INTEGER NOT NULL,
        qg INTEGER NOT NULL,
        query_length INTEGER NOT NULL,
        query_dtype TEXT NOT NULL,
        kv_dtype TEXT NOT NULL,
        kv_quant TEXT NOT NULL,
        kv_layout TEXT NOT NULL,
        windowed BOOLEAN NOT NULL,
        sinks BOOLEAN NOT NULL,
        CONSTRAINT pk_patune_problem PRIMARY KEY (id),
        CONSTRAINT uq_patune_problem UNIQUE (block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, kv_layout, windowed, sinks),
        CONSTRAINT ck_patune_problem_block_size CHECK (typeof(block_size) = 'integer' AND block_size >= 1),
        CONSTRAINT ck_patune_problem_head_dim CHECK (typeof(head_dim) = 'integer' AND head_dim >= 1),
        CONSTRAINT ck_patune_problem_qg CHECK (typeof(qg) = 'integer' AND qg >= 1),
        CONSTRAINT ck_patune_problem_query_length CHECK (typeof(query_length) = 'integer' AND query_length >= 1),
        CONSTRAINT ck_patune_problem_windowed CHECK (windowed IN (0, 1)),
        CONSTRAINT ck_patune_problem_sinks CHECK (sinks IN (0, 1))
    )
    """,
    """
    CREATE TABLE patune_workload (
        id INTEGER NOT NULL,
        batch INTEGER NOT NULL,
        kv_heads INTEGER NOT NULL,
        context INTEGER NOT NULL,
        CONSTRAINT pk_patune_workload PRIMARY KEY (id),
        CONSTRAINT uq_patune_workload_batch_kv_heads_context UNIQUE (batch, kv_heads, context),
        CONSTRAINT ck_patune_workload_batch CHECK (typeof(batch) = 'integer' AND batch >= 1),
        CONSTRAINT ck_patune_workload_kv_heads CHECK (typeof(kv_heads) = 'integer' AND kv_heads >= 1),
        CONSTRAINT ck_patune_workload_context CHECK (typeof(context) = 'integer' AND context >= 1)
    )
    """,
    """
    CREATE TABLE patune_run (
        id INTEGER NOT NULL,
        target_id INTEGER NOT NULL,
        environment_id INTEGER NOT NULL,
        sampler TEXT NOT NULL,
        seed INTEGER NOT NULL,
        command TEXT NOT NULL,
        started TEXT NOT NULL,
        ended TEXT,
        CONSTRAINT pk_patune_run PRIMARY KEY (id),
        CONSTRAINT uq_patune_run_id_target_id_environment_id UNIQUE (id, target_id, environment_id),
        CONSTRAINT fk_patune_run_target_id FOREIGN KEY(target_id) REFERENCES patune_target (id),
        CONSTRAINT fk_patune_run_environment_id FOREIGN KEY(environment_id) REFERENCES patune_environment (id)
    )
    """,
    """
    CREATE TABLE patune_trial (
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
        reason TEXT NOT NULL,
        gate_cases INTEGER NOT NULL,
        error_rms REAL,
        evidence TEXT,
        median_us REAL,
        p20_us REAL,
        p80_us REAL,
        replays INTEGER,
        read_fraction REAL,
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
        CONSTRAINT uq_patune_trial_promotable UNIQUE (id, target_id, problem_id, workload_id, status, evidence),
        CONSTRAINT ck_patune_trial_status
        CHECK (status IN ('ok', 'infeasible', 'compile_error', 'out_of_resources', 'spills', 'duplicate', 'wrong', 'nonfinite', 'unstable', 'launch_error', 'crash', 'timeout', 'error')),
        CONSTRAINT ck_patune_trial_source CHECK (source <> ''),
        CONSTRAINT ck_patune_trial_gate_cases CHECK (typeof(gate_cases) = 'integer' AND gate_cases >= 0),
        CONSTRAINT ck_patune_trial_timing
        CHECK ((median_us IS NULL AND p20_us IS NULL AND p80_us IS NULL AND replays IS NULL AND read_fraction IS NULL)
        OR (typeof(median_us) IN ('integer', 'real') AND median_us >= 0
        AND typeof(p20_us) IN ('integer', 'real') AND p20_us >= 0
        AND typeof(p80_us) IN ('integer', 'real') AND p80_us >= 0
        AND typeof(replays) IN ('integer', 'real') AND replays >= 0
        AND typeof(read_fraction) IN ('integer', 'real') AND read_fraction >= 0)),
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
        CONSTRAINT ck_patune_trial_ok_has_evidence CHECK (status <> 'ok' OR evidence IS NOT NULL),
        CONSTRAINT ck_patune_trial_gated CHECK (evidence IS NULL OR (status = 'ok' AND gate_cases >= 1)),
        CONSTRAINT fk_patune_trial_problem_id FOREIGN KEY(problem_id) REFERENCES patune_problem (id),
        CONSTRAINT fk_patune_trial_workload_id FOREIGN KEY(workload_id) REFERENCES patune_workload (id)
    )
    """,
    """
    CREATE INDEX ix_patune_trial_resume ON patune_trial (target_id, problem_id, workload_id, environment_id, knobs_hash)
    """,
    """
    CREATE TABLE patune_winner (
        id INTEGER NOT NULL,
        target_id INTEGER NOT NULL,
        problem_id INTEGER NOT NULL,
        workload_id INTEGER NOT NULL,
        trial_id INTEGER NOT NULL,
        status TEXT NOT NULL,
        evidence TEXT NOT NULL,
        default_trial_id INTEGER,
        default_knobs TEXT,
        default_score REAL,
        trials INTEGER NOT NULL,
        state TEXT NOT NULL,
        created TEXT NOT NULL,
        imported_from TEXT,
        CONSTRAINT pk_patune_winner PRIMARY KEY (id),
        CONSTRAINT uq_patune_winner_target_id_problem_id_workload_id UNIQUE (target_id, problem_id, workload_id),
        CONSTRAINT fk_patune_winner_trial FOREIGN KEY(trial_id, target_id, problem_id, workload_id, status, evidence)
        REFERENCES patune_trial (id, target_id, problem_id, workload_id, status, evidence),
        CONSTRAINT fk_patune_winner_default_trial FOREIGN KEY(default_trial_id, target_id, problem_id, workload_id)
        REFERENCES patune_trial (id, target_id, problem_id, workload_id),
        CONSTRAINT ck_patune_winner_status CHECK (status = 'ok'),
        CONSTRAINT ck_patune_winner_state CHECK (state IN ('fresh', 'reverify', 'retired')),
        CONSTRAINT ck_patune_winner_trials CHECK (typeof(trials) = 'integer' AND trials >= 1),
        CONSTRAINT ck_patune_winner_default CHECK (default_score IS NULL OR default_knobs IS NOT NULL),
        CONSTRAINT fk_patune_winner_target_id FOREIGN KEY(target_id) REFERENCES patune_target (id),
        CONSTRAINT fk_patune_winner_problem_id FOREIGN KEY(problem_id) REFERENCES patune_problem (id),
        CONSTRAINT fk_patune_winner_workload_id FOREIGN KEY(workload_id) REFERENCES patune_workload (id)
    )
    """,
)


def upgrade() -> None:
    """Create the tables, and the row about the file itself."""
    for statement in STATEMENTS:
        op.execute(statement)
    op.execute(
        text(
            "INSERT INTO patune_meta (schema, uuid, created_by, created) VALUES (1, :uuid, :by, :now)"
        ).bindparams(uuid=str(uuid.uuid4()), by=f"patune {__version__}", now=utc_now())
    )
