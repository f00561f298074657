"""Schema 2: a problem also says whether its scores are capped and whether its products are fp8. Frozen.

SQLite cannot change a table's unique constraint, so the table is made anew; its rows keep their ids.
"""

from __future__ import annotations

from alembic import op

revision = "schema_2"
down_revision = "schema_1"

OLD_COLUMNS = """
    id, block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, kv_layout, windowed, sinks
"""
STATEMENTS = (
    """
    CREATE TABLE patune_problem_2 (
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
        softcap BOOLEAN NOT NULL,
        fp8_math BOOLEAN NOT NULL,
        CONSTRAINT pk_patune_problem PRIMARY KEY (id),
        CONSTRAINT uq_patune_problem UNIQUE (block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, kv_layout, windowed, sinks, softcap, fp8_math),
        CONSTRAINT ck_patune_problem_block_size CHECK (typeof(block_size) = 'integer' AND block_size >= 1),
        CONSTRAINT ck_patune_problem_head_dim CHECK (typeof(head_dim) = 'integer' AND head_dim >= 1),
        CONSTRAINT ck_patune_problem_qg CHECK (typeof(qg) = 'integer' AND qg >= 1),
        CONSTRAINT ck_patune_problem_query_length CHECK (typeof(query_length) = 'integer' AND query_length >= 1),
        CONSTRAINT ck_patune_problem_windowed CHECK (windowed IN (0, 1)),
        CONSTRAINT ck_patune_problem_sinks CHECK (sinks IN (0, 1)),
        CONSTRAINT ck_patune_problem_softcap CHECK (softcap IN (0, 1)),
        CONSTRAINT ck_patune_problem_fp8_math CHECK (fp8_math IN (0, 1))
    )
    """,
    f"INSERT INTO patune_problem_2 ({OLD_COLUMNS}, softcap, fp8_math) SELECT {OLD_COLUMNS}, 0, 0 FROM patune_problem",
    "DROP TABLE patune_problem",
    "ALTER TABLE patune_problem_2 RENAME TO patune_problem",
    "UPDATE patune_meta SET schema = 2",
)


def upgrade() -> None:
    """Add the two columns; existing problems have neither."""
    for statement in STATEMENTS:
        op.execute(statement)
