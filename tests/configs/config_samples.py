"""Values that the tests of patune.configs are made from."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

from patune.configs import dispatcher, postgres
from patune.configs.block import Block
from patune.configs.candidate import Candidate
from patune.configs.store import Store
from patune.configs.winner import RobustWinner, Winner
from patune.environment import Environment
from patune.kernels.defaults import default_knobs
from patune.kernels.knobs import CdnaKnobs, HopperKnobs, Knobs
from patune.problem import Problem, Workload
from patune.settings import ServerUrl
from patune.target import Target
from patune.trial import CountedWork, Timing, TrialResult

if TYPE_CHECKING:
    from pathlib import Path

    from patune.settings import DatabasePlace

H200 = Target.named("sm_90")
H100 = Target(arch="sm_90", device_name="NVIDIA H100 80GB HBM3", compute_units=132)
MI300X = Target.named("gfx942")
PROBLEM = Problem(block_size=1024, head_dim=128, qg=8)
WORKLOAD = Workload(batch=128, kv_heads=8, context=4096)
KNOBS = HopperKnobs(partition_tokens=64, num_splits=4, num_stages=3, num_warps=4)
OTHER_KNOBS = HopperKnobs(partition_tokens=128, num_splits=8, num_stages=2, num_warps=4)
CDNA_KNOBS = CdnaKnobs(partition_tokens=128, num_splits=2, num_stages=1, num_warps=4)
ENVIRONMENT = Environment(
    patune="0.1.0",
    triton="3.9.0",
    torch="2.11.0",
    python="3.11.7",
    compiler="ptxas 12.9",
    driver="580.1",
    fp_fusion=True,
    kernel_source_hash="5" * 64,
)
LATER_ENVIRONMENT = Environment(**{**ENVIRONMENT.to_dict(), "triton": "3.10.0", "fp_fusion": False})


def timing(median_us: float = 50.0) -> Timing:
    return Timing(
        median_us=median_us,
        p20_us=median_us * 0.98,
        p80_us=median_us * 1.02,
        replays=30,
        read_fraction=0.8,
    )


def counted(slots: float = 1000.0) -> CountedWork:
    return CountedWork(
        busiest_simd_slots=slots,
        wave_instructions=5000,
        mfma=512,
        global_bytes=2**40,
        lds_bytes=65536,
        spill_bytes=0,
    )


def measured(median_us: float = 50.0) -> TrialResult:
    return TrialResult(
        status="ok", gate_cases=12, error_rms=1e-3, timing=timing(median_us), seconds=1.5
    )


def emulated(slots: float = 1000.0) -> TrialResult:
    return TrialResult(
        status="ok",
        gate_cases=12,
        error_rms=2e-3,
        counted=counted(slots),
        facts={"vgprs": 200, "names": ["decode", "reduce"], "occupancy": None},
    )


CORE: dict[str, Any] = {"block_size": 1024, "head_dim": 128, "qg": 8}  # of PROBLEM, for lookup()
KEY: dict[str, Any] = {"target": H200, "problem": PROBLEM, "workload": WORKLOAD}
WRONG = TrialResult(
    status="wrong", reason="token 3 differs", gate_cases=4, error_rms=0.5, seconds=0.25
)


def winner(**changes: Any) -> Winner:
    """A measured winner of H200; with ``slots`` an emulated one, with ``median_us`` another time."""
    score: dict[str, Any] = {"timing": timing(changes.pop("median_us", 50.0)), "counted": None}
    evidence = "measured"
    if "slots" in changes:
        score = {"timing": None, "counted": counted(changes.pop("slots"))}
        evidence = "emulated"
    fields: dict[str, Any] = {
        "target": H200,
        "environment": ENVIRONMENT,
        "problem": PROBLEM,
        "workload": WORKLOAD,
        "knobs": KNOBS,
        "evidence": evidence,
        "default_score": 60.0,
        "default_knobs": OTHER_KNOBS,
        "trials": 32,
        "gate_cases": 12,
        "error_rms": 1e-3,
        "created": "2026-11-22T10:42:00Z",
    }
    if changes.get("target") == MI300X:
        fields |= {"knobs": CDNA_KNOBS, "default_knobs": None, "default_score": None}
    return Winner(**(fields | score | changes))


def robust_winner(**changes: Any) -> RobustWinner:
    """The robust winner of two batch sizes of H200."""
    fields: dict[str, Any] = {
        "target": H200,
        "environment": ENVIRONMENT,
        "problem": PROBLEM,
        "objective": "worst",
        "workloads": (WORKLOAD, Workload(batch=1, kv_heads=8, context=4096)),
        "knobs": KNOBS,
        "regrets": (1.0, 1.25),
        "score": 1.25,
        "created": "2026-11-22T10:42:00Z",
    }
    return RobustWinner(**(fields | changes))


def block(**changes: Any) -> Block:
    """Knobs that hang, on every sm_90."""
    fields: dict[str, Any] = {
        "arch": "sm_90",
        "kernel_source_hash": ENVIRONMENT.kernel_source_hash,
        "problem": PROBLEM,
        "knobs": KNOBS,
        "status": "hang",
        "reason": "killed after 30 s",
        "created": "2026-11-22T10:42:00Z",
    }
    return Block(**(fields | changes))


def candidate(median_us: float = 51.0, *, knobs: Knobs = OTHER_KNOBS, **changes: Any) -> Candidate:
    """Measured knobs to stand beside a measured winner."""
    fields: dict[str, Any] = {"timing": timing(median_us), "counted": None, "gate_cases": 12}
    return Candidate(knobs=knobs, **(fields | changes))


def add_trial(
    store: Store,
    result: TrialResult,
    *,
    target: Target = H200,
    environment: Environment = ENVIRONMENT,
    problem: Problem = PROBLEM,
    workload: Workload = WORKLOAD,
    knobs: Knobs | None = None,
    source: str = "search",
    run: int | None = None,
) -> int:
    """One trial in a run of its own, or in the one that is named; returns its id."""
    own = run is None
    run = run or store.begin_run(
        target=target, environment=environment, sampler="auto", seed=7, command="patune sweep"
    )
    if knobs is None:
        knobs = KNOBS if target.limits.family == "hopper_wgmma" else CDNA_KNOBS
    trial = store.record_trial(
        run, problem=problem, workload=workload, knobs=knobs, result=result, source=source
    )
    if own:
        store.end_run(run)
    return trial


def at(batch: int = 128, kv_heads: int = 8, context: int = 4096) -> Workload:
    """A workload that differs from WORKLOAD in what is given."""
    return Workload(batch=batch, kv_heads=kv_heads, context=context)


def serve(database: Path, *found: Winner) -> None:
    """Make lookups answer from these winners."""
    with Store.open(database) as store:
        store.merge(found, imported_from="test")
    dispatcher.reload()


def dump(place: DatabasePlace) -> list[str]:
    """Everything that a database holds, as SQL, or as lines of its tables."""
    if isinstance(place, ServerUrl):
        with closing(postgres.connect(place)) as connection:
            names = sorted(name for (name,) in connection.execute(postgres.TABLES))
            rows = [(n, connection.execute(f"SELECT * FROM {n}").fetchall()) for n in names]
        return [f"{name}: {line}" for name, lines in rows for line in sorted(map(str, lines))]
    with closing(sqlite3.connect(place)) as connection:
        return list(connection.iterdump())


LOCKED, PASSWORD = "locked", "s3cr3t"  # who may connect to the tests' server and create nothing


def on_server(url: str, database: str) -> ServerUrl:
    """Another database of the same server."""
    return ServerUrl(url.replace("/postgres?", f"/{database}?"))


def run_on_server(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Statements outside of any transaction; the rows of the last one."""
    with closing(postgres.connect(ServerUrl(url))) as connection:
        connection.autocommit = True
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def raw(store: Store, statement: str) -> list[tuple[Any, ...]]:
    """A statement behind the store's back; its rows."""
    with store.transaction(writes=True) as session:
        found = session.connection().exec_driver_sql(statement)
        return [tuple(row) for row in found] if found.returns_rows else []


DEFAULT = default_knobs(PROBLEM, WORKLOAD, H200)
SWEEP = "patune sweep --block-size 1024 --head-dim 128 --qg 8"
