"""The tables of the config database, as typed SQLAlchemy models.

The constraints make the promises that the code relies on: a trial has evidence only when it passed the gate,
and a winner points to an ok trial of its own target, problem and workload. ``migrations/`` creates them.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from patune.configs.block import FAULTS as FAULTS  # what confirmed knobs are never tried again for
from patune.configs.constraints import (
    Base,
    flags,
    integers,
    interval_ends,
    number,
    numbers_or_null,
    one_of,
    same,
)
from patune.configs.winner import ROBUST_OBJECTIVES
from patune.trial import STATUSES, WITH_EVIDENCE

STATES = ("fresh", "reverify", "retired")
EVENTS = ("promoted", "kept", "imported", "retired", "blocked", "robust", "pruned")
SPEEDUP_COLUMNS = ("speedup", "speedup_low", "speedup_high")
TIMING_COLUMNS = ("median_us", "p20_us", "p80_us", "replays", "read_fraction")
COUNTED_COLUMNS = (
    *("busiest_simd_slots", "wave_instructions", "mfma"),
    *("global_bytes", "lds_bytes", "spill_bytes"),
)
# What a winner repeats of its trial, for the promise that they match.
WINNABLE = (
    *("id", "target_id", "problem_id", "workload_id"),
    *("environment_id", "status", "evidence"),
)


class MetaRow(Base):
    """One row about the file itself."""

    __tablename__ = "patune_meta"
    schema: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    uuid: Mapped[str]
    created_by: Mapped[str]
    created: Mapped[str]


class TargetRow(Base):
    """A :class:`patune.target.Target`."""

    __tablename__ = "patune_target"
    __table_args__ = (
        UniqueConstraint("arch", "device_name", "compute_units"),
        *integers(1, "compute_units"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    arch: Mapped[str]
    device_name: Mapped[str]
    compute_units: Mapped[int]


class EnvironmentRow(Base):
    """A :class:`patune.environment.Environment` with its key."""

    __tablename__ = "patune_environment"
    __table_args__ = (
        UniqueConstraint("key"),
        *flags("fp_fusion"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    patune: Mapped[str]
    triton: Mapped[str]
    torch: Mapped[str]
    python: Mapped[str]
    compiler: Mapped[str]
    driver: Mapped[str]
    fp_fusion: Mapped[bool]
    kernel_source_hash: Mapped[str]


class ProblemRow(Base):
    """A :class:`patune.problem.Problem`."""

    __tablename__ = "patune_problem"
    __table_args__ = (
        UniqueConstraint(
            *("block_size", "head_dim", "qg", "query_length", "query_dtype", "kv_dtype"),
            *("kv_quant", "kv_layout", "windowed", "sinks", "softcap", "fp8_math"),
            name="uq_patune_problem",
        ),
        *integers(1, "block_size", "head_dim", "qg", "query_length"),
        *flags("windowed", "sinks", "softcap", "fp8_math"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    block_size: Mapped[int]
    head_dim: Mapped[int]
    qg: Mapped[int]
    query_length: Mapped[int]
    query_dtype: Mapped[str]
    kv_dtype: Mapped[str]
    kv_quant: Mapped[str]
    kv_layout: Mapped[str]
    windowed: Mapped[bool]
    sinks: Mapped[bool]
    softcap: Mapped[bool]
    fp8_math: Mapped[bool]


class WorkloadRow(Base):
    """A :class:`patune.problem.Workload`."""

    __tablename__ = "patune_workload"
    __table_args__ = (
        UniqueConstraint("batch", "kv_heads", "context"),
        *integers(1, "batch", "kv_heads", "context"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    batch: Mapped[int]
    kv_heads: Mapped[int]
    context: Mapped[int]


class RunRow(Base):
    """One sweep, or one import of a pack."""

    __tablename__ = "patune_run"
    __table_args__ = (UniqueConstraint("id", "target_id", "environment_id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    target_id: Mapped[int] = mapped_column(ForeignKey(TargetRow.id))
    environment_id: Mapped[int] = mapped_column(ForeignKey(EnvironmentRow.id))
    sampler: Mapped[str]
    seed: Mapped[int]
    command: Mapped[str]
    started: Mapped[str]
    ended: Mapped[str | None]


class MessageRow(Base):
    """A text that trials refer to: thousands of them end with the same compiler message."""

    __tablename__ = "patune_message"
    __table_args__ = (
        UniqueConstraint("sha256"),
        CheckConstraint("text <> ''", name="text"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    text: Mapped[str]


class TrialRow(Base):
    """One tried configuration: a :class:`patune.trial.TrialResult`, losers and failures included."""

    __tablename__ = "patune_trial"
    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "target_id", "environment_id"],
            ["patune_run.id", "patune_run.target_id", "patune_run.environment_id"],
        ),
        # What winners point to, for the promise that they match.
        UniqueConstraint(
            "id", "target_id", "problem_id", "workload_id", name="uq_patune_trial_key"
        ),
        UniqueConstraint(*WINNABLE, name="uq_patune_trial_winnable"),
        Index(
            "ix_patune_trial_resume",
            *("target_id", "problem_id", "workload_id", "environment_id", "knobs_hash"),
        ),
        Index("ix_patune_trial_run_id", "run_id"),
        Index("ix_patune_trial_message_id", "message_id"),
        CheckConstraint(one_of("status", STATUSES), name="status"),
        CheckConstraint("source <> ''", name="source"),
        *integers(0, "gate_cases"),
        *numbers_or_null("timing", TIMING_COLUMNS),
        *interval_ends("low_us", "high_us"),
        CheckConstraint(
            "(median_us IS NULL AND protocol IS NULL) OR (median_us IS NOT NULL AND protocol IS NOT NULL AND protocol <> '')",
            name="protocol",
        ),
        *numbers_or_null("counted", COUNTED_COLUMNS),
        *same(
            "evidence",
            "evidence",
            "CASE WHEN median_us IS NOT NULL THEN 'measured' WHEN busiest_simd_slots IS NOT NULL THEN 'emulated' END",
        ),
        CheckConstraint(
            f"NOT ({one_of('status', WITH_EVIDENCE)}) OR evidence IS NOT NULL", name="has_evidence"
        ),
        CheckConstraint(
            f"evidence IS NULL OR ({one_of('status', WITH_EVIDENCE)} AND gate_cases >= 1)",
            name="gated",
        ),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int]
    target_id: Mapped[int]
    environment_id: Mapped[int]
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    workload_id: Mapped[int] = mapped_column(ForeignKey(WorkloadRow.id))
    knobs: Mapped[str]
    knobs_hash: Mapped[str]
    source: Mapped[str]
    status: Mapped[str]
    message_id: Mapped[int | None] = mapped_column(ForeignKey(MessageRow.id))
    gate_cases: Mapped[int]
    error_rms: Mapped[float | None]
    evidence: Mapped[str | None]
    median_us: Mapped[float | None]
    p20_us: Mapped[float | None]
    p80_us: Mapped[float | None]
    replays: Mapped[int | None]
    read_fraction: Mapped[float | None]
    low_us: Mapped[float | None]
    high_us: Mapped[float | None]
    protocol: Mapped[str | None]
    busiest_simd_slots: Mapped[float | None]
    wave_instructions: Mapped[int | None]
    mfma: Mapped[int | None]
    global_bytes: Mapped[int | None]
    lds_bytes: Mapped[int | None]
    spill_bytes: Mapped[int | None]
    facts: Mapped[str | None]
    seconds: Mapped[float]
    created: Mapped[str]
    environment: Mapped[EnvironmentRow] = relationship(
        primaryjoin="foreign(TrialRow.environment_id) == EnvironmentRow.id",
        viewonly=True,
        lazy="joined",
        innerjoin=True,
    )
    message: Mapped[MessageRow | None] = relationship(lazy="joined")


class WinnerRow(Base):
    """The trial that serving uses for a (target, problem, workload).

    ``state``: ``fresh`` is served; ``retired`` is kept and not served; ``reverify`` is not written: whether an environment
    has changed depends on who reads. ``default_score`` and ``default_knobs`` are what the winner was compared with when promoted;
    ``speedup`` with its 95 % interval is set when both were measured interleaved. ``top`` is JSON: ``[[score, knobs], ...]``,
    the best other configurations of the key, scored as the winner was. ``environment_id`` is the trial's.
    """

    __tablename__ = "patune_winner"
    __table_args__ = (
        UniqueConstraint("target_id", "problem_id", "workload_id"),
        ForeignKeyConstraint(
            ["trial_id", *WINNABLE[1:]],
            [f"patune_trial.{c}" for c in WINNABLE],
            name="fk_patune_winner_trial",
        ),
        ForeignKeyConstraint(
            ["default_trial_id", "target_id", "problem_id", "workload_id"],
            [f"patune_trial.{c}" for c in ("id", "target_id", "problem_id", "workload_id")],
            name="fk_patune_winner_default_trial",
        ),
        CheckConstraint("status = 'ok'", name="status"),
        CheckConstraint(one_of("state", STATES), name="state"),
        *integers(1, "trials"),
        CheckConstraint("default_score IS NULL OR default_knobs IS NOT NULL", name="default"),
        *numbers_or_null(
            "speedup",
            SPEEDUP_COLUMNS,
            " AND speedup_low <= speedup AND speedup <= speedup_high"
            " AND evidence = 'measured' AND default_knobs IS NOT NULL",
        ),
        Index("ix_patune_winner_trial_id", "trial_id"),
        Index("ix_patune_winner_default_trial_id", "default_trial_id"),
        # Counts winners by environment without their wide rows: 8 ms of a table load of 10,000 (2026-11).
        Index("ix_patune_winner_environment", "environment_id", "target_id", "state"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    target_id: Mapped[int] = mapped_column(ForeignKey(TargetRow.id))
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    workload_id: Mapped[int] = mapped_column(ForeignKey(WorkloadRow.id))
    trial_id: Mapped[int]
    environment_id: Mapped[int] = mapped_column(ForeignKey(EnvironmentRow.id))
    status: Mapped[str]
    evidence: Mapped[str]
    default_trial_id: Mapped[int | None]
    default_knobs: Mapped[str | None]
    default_score: Mapped[float | None]
    speedup: Mapped[float | None]
    speedup_low: Mapped[float | None]
    speedup_high: Mapped[float | None]
    trials: Mapped[int]
    top: Mapped[str]
    state: Mapped[str]
    created: Mapped[str]
    imported_from: Mapped[str | None]
    target: Mapped[TargetRow] = relationship(lazy="joined", innerjoin=True)
    problem: Mapped[ProblemRow] = relationship(lazy="joined", innerjoin=True)
    workload: Mapped[WorkloadRow] = relationship(lazy="joined", innerjoin=True)
    trial: Mapped[TrialRow] = relationship(
        primaryjoin="foreign(WinnerRow.trial_id) == TrialRow.id",
        viewonly=True,
        lazy="joined",
        innerjoin=True,
    )


class BlockRow(Base):
    """Knobs whose fault was confirmed: not to be tried again for a problem with this kernel source on this architecture."""

    __tablename__ = "patune_blocklist"
    __table_args__ = (
        UniqueConstraint("arch", "kernel_source_hash", "problem_id", "knobs_hash"),
        CheckConstraint(one_of("status", FAULTS), name="status"),
        Index("ix_patune_blocklist_message_id", "message_id"),
        Index("ix_patune_blocklist_trial_id", "trial_id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    arch: Mapped[str]
    kernel_source_hash: Mapped[str]
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    knobs: Mapped[str]
    knobs_hash: Mapped[str]
    status: Mapped[str]
    message_id: Mapped[int | None] = mapped_column(ForeignKey(MessageRow.id))
    trial_id: Mapped[int] = mapped_column(ForeignKey(TrialRow.id))
    created: Mapped[str]
    message: Mapped[MessageRow | None] = relationship(lazy="joined")
    problem: Mapped[ProblemRow] = relationship(lazy="joined", innerjoin=True)


class RobustRow(Base):
    """A :class:`patune.configs.winner.RobustWinner`; its lists are JSON of equal length."""

    __tablename__ = "patune_robust"
    __table_args__ = (
        UniqueConstraint("target_id", "problem_id", "objective"),
        CheckConstraint(one_of("objective", ROBUST_OBJECTIVES), name="objective"),
        *number("score"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    target_id: Mapped[int] = mapped_column(ForeignKey(TargetRow.id))
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    environment_id: Mapped[int] = mapped_column(ForeignKey(EnvironmentRow.id))
    objective: Mapped[str]
    workloads: Mapped[str]
    knobs: Mapped[str]
    regrets: Mapped[str]
    score: Mapped[float]
    created: Mapped[str]
    target: Mapped[TargetRow] = relationship(lazy="joined", innerjoin=True)
    problem: Mapped[ProblemRow] = relationship(lazy="joined", innerjoin=True)
    environment: Mapped[EnvironmentRow] = relationship(lazy="joined", innerjoin=True)


class HistoryRow(Base):
    """A :class:`patune.configs.history.HistoryEvent`; never changed. ``trial_id`` is of a trial that may be gone."""

    __tablename__ = "patune_history"
    __table_args__ = (
        CheckConstraint(one_of("event", EVENTS), name="event"),
        Index("ix_patune_history_key", "target_id", "problem_id", "workload_id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    created: Mapped[str]
    event: Mapped[str]
    target_id: Mapped[int] = mapped_column(ForeignKey(TargetRow.id))
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    workload_id: Mapped[int | None] = mapped_column(ForeignKey(WorkloadRow.id))
    trial_id: Mapped[int | None]
    knobs: Mapped[str | None]
    evidence: Mapped[str | None]
    score: Mapped[float | None]
    environment_id: Mapped[int | None] = mapped_column(ForeignKey(EnvironmentRow.id))
    previous_knobs: Mapped[str | None]
    previous_evidence: Mapped[str | None]
    previous_score: Mapped[float | None]
    reason: Mapped[str]
    target: Mapped[TargetRow] = relationship(lazy="joined", innerjoin=True)
    problem: Mapped[ProblemRow] = relationship(lazy="joined", innerjoin=True)
    workload: Mapped[WorkloadRow | None] = relationship(lazy="joined")
    environment: Mapped[EnvironmentRow | None] = relationship(lazy="joined")


class MissRow(Base):
    """How often a serving process asked for a key that nothing was tuned for, and which layer answered."""

    __tablename__ = "patune_miss"
    __table_args__ = (
        UniqueConstraint("capture", "target_id", "problem_id", "workload_id", "source"),
        *integers(1, "calls"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    capture: Mapped[str]
    target_id: Mapped[int] = mapped_column(ForeignKey(TargetRow.id))
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    workload_id: Mapped[int] = mapped_column(ForeignKey(WorkloadRow.id))
    source: Mapped[str]
    calls: Mapped[int]
    created: Mapped[str]
    target: Mapped[TargetRow] = relationship(lazy="joined", innerjoin=True)
    problem: Mapped[ProblemRow] = relationship(lazy="joined", innerjoin=True)
    workload: Mapped[WorkloadRow] = relationship(lazy="joined", innerjoin=True)
