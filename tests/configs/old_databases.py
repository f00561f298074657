"""Database files as earlier versions left them: made by their migration, with rows in every table."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy
from alembic import command
from alembic.config import Config
from config_samples import KNOBS, OTHER_KNOBS

from patune.configs.migrating import MIGRATIONS
from patune.configs.readonly import SCHEMA
from patune.kernels.knobs import knobs_to_dict
from patune.record import canonical_json

if TYPE_CHECKING:
    from pathlib import Path

    from patune.kernels.knobs import Knobs

TABLES = ("meta", "target", "environment", "problem", "workload", "run", "trial", "winner")
TABLES_SINCE_3 = ("message", "blocklist", "robust")


def make_empty(path: Path, revision: str) -> None:
    """A file as a version whose newest migration was ``revision`` made it."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def insert(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        for table, found in rows.items():
            for row in found:
                marks = ", ".join("?" * len(row))
                statement = f"INSERT INTO patune_{table} ({', '.join(row)}) VALUES ({marks})"
                connection.execute(statement, tuple(row.values()))


def rows_of(path: Path, table: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM patune_{table}")]


def _knobs(knobs: Knobs) -> str:
    """As schema 1 spelled them: it had no overlap_launch."""
    fields = {n: v for n, v in knobs_to_dict(knobs).items() if n != "overlap_launch"}
    return canonical_json(fields)


def _problem(id: int, **changes: object) -> dict[str, Any]:
    plain = {
        "block_size": 1024,
        "head_dim": 128,
        "qg": 8,
        "query_length": 1,
        "query_dtype": "bf16",
        "kv_dtype": "bf16",
        "kv_quant": "none",
        "kv_layout": "aiter",
        "windowed": 0,
        "sinks": 0,
    }
    return {"id": id} | plain | changes


def _trial(id: int, run: int, problem: int, knobs: str, **score: object) -> dict[str, Any]:
    return {
        "id": id,
        "run_id": run,
        "target_id": run,
        "environment_id": 4,
        "problem_id": problem,
        "workload_id": 6,
        "knobs": knobs,
        "knobs_hash": f"hash {id}",
        "source": "search",
        "status": "ok" if score else "wrong",
        "reason": "" if score else "token 3 differs",
        "gate_cases": 12,
        "error_rms": 0.001,
        "facts": '{"registers":168}',
        "seconds": 1.5,
        "created": "2026-11-22T10:42:00Z",
        **score,
    }


def _measured(median_us: float) -> dict[str, Any]:
    share = {"replays": 30, "read_fraction": 0.8}
    times = {"median_us": median_us, "p20_us": 0.98 * median_us, "p80_us": 1.02 * median_us}
    return {"evidence": "measured", **times, **share}


EMULATED = {
    "evidence": "emulated",
    "busiest_simd_slots": 1000.0,
    "wave_instructions": 5000,
    "mfma": 512,
    "global_bytes": 2**40,
    "lds_bytes": 65536,
    "spill_bytes": 0,
}


def _winner(id: int, target: int, problem: int, trial: int, **changes: object) -> dict[str, Any]:
    plain = {
        "workload_id": 6,
        "status": "ok",
        "evidence": "measured",
        "trials": 32,
        "state": "fresh",
        "created": "2026-11-22T10:43:00Z",
    }
    key = {"id": id, "target_id": target, "problem_id": problem, "trial_id": trial}
    return key | plain | changes


ILLEGAL = "gate: RuntimeError: CUDA error: an illegal memory access was encountered"
# Trials of another key with the statuses that schemas before 3 had: (id, status, reason), and what they are called now.
ENDED = (
    (1, "unstable", "race: run 2 differs", "flaky"),
    (2, "timeout", "build: killed after 60 s", "compile_timeout"),
    (3, "timeout", "gate: killed after 30 s", "hang"),
    (4, "crash", ILLEGAL, "illegal_access"),
    (5, "crash", "gate: the worker died (SIGABRT): CUDA_ERROR_ILLEGAL_ADDRESS", "illegal_access"),
    (6, "crash", "gate: the worker died (SIGSEGV)", "crash"),
    (7, "crash", ILLEGAL, "illegal_access"),
    (8, "timeout", "after the build: killed after 30 s", "hang"),
    (9, "error", "build: what was not foreseen", "error"),
)
SINCE_2 = {"softcap": 0, "fp8_math": 0}  # of a problem
OLD_SCHEMAS = (1, 2, 3)
NO_TIMES = dict.fromkeys(
    ("evidence", "median_us", "p20_us", "p80_us", "replays", "read_fraction", "low_us", "high_us")
)
WRONG = {"status": "wrong", "protocol": None, **NO_TIMES}


def make_old(path: Path, schema: int, knobs: Knobs, default: Knobs, cdna: Knobs) -> None:
    """Two targets, three problems, trials and three winners of an earlier schema; ids have gaps, so that a new numbering would show."""
    make_empty(path, f"schema_{schema}")
    since = SINCE_2 if schema >= 2 else {}
    texts = {
        "patune": "0.1.0", "triton": "3.9.0", "torch": "2.11.0", "python": "3.11.7",
        "compiler": "ptxas 12.9", "driver": "580.1", "kernel_source_hash": "5" * 64,
    }  # fmt: skip
    run = {"environment_id": 4, "sampler": "pool", "seed": 7, "command": "patune sweep"}
    times = {"started": "2026-11-22T10:40:00Z", "ended": None}
    rows: dict[str, list[dict[str, Any]]] = (
        {
            "target": [
                {"id": 2, "arch": "sm_90", "device_name": "NVIDIA H200", "compute_units": 132},
                {"id": 3, "arch": "gfx942", "device_name": "AMD Instinct MI300X", "compute_units": 304},
            ],
            "environment": [{"id": 4, "key": "e" * 64, "fp_fusion": 1, **texts}],
            "problem": [
                _problem(5, **since),
                _problem(9, windowed=1, sinks=1, query_length=2, **since),
                _problem(7, kv_dtype="fp8_e4m3fn", kv_quant="per_token", kv_layout="hnd", **since),
            ],
            "workload": [{"id": 6, "batch": 128, "kv_heads": 8, "context": 4096}],
            "run": [
                {"id": 2, "target_id": 2, **run, **times},
                {"id": 3, "target_id": 3, **run, **times},
            ],
            "trial": [
                _trial(11, 2, 5, _knobs(default), **_measured(60.0)),
                _trial(13, 2, 5, _knobs(knobs), **_measured(50.0)),
                _trial(14, 2, 7, _knobs(knobs)),
                _trial(15, 2, 9, _knobs(knobs), **_measured(70.0)),
                _trial(17, 3, 5, _knobs(cdna), **EMULATED),
                *(
                    _trial(id, 2, 7, _knobs(knobs)) | {"status": status, "reason": reason}
                    for id, status, reason, _ in ENDED
                ),
            ],
            "winner": [
                _winner(
                    21, 2, 5, 13, default_trial_id=11, default_knobs=_knobs(default), default_score=60.0
                ),
                _winner(22, 2, 9, 15, state="retired"),
                _winner(25, 3, 5, 17, evidence="emulated", imported_from="mi300x.json"),
            ],
        }
    )  # fmt: skip
    insert(path, _since_3(rows, _knobs(cdna)) if schema >= 3 else rows)


def _since_3(rows: dict[str, list[dict[str, Any]]], cdna: str) -> dict[str, list[dict[str, Any]]]:
    """The same as schema 3 has them, with a runner-up, a speedup, an entry of the blocklist and a robust winner."""
    named = {id: now for id, _, _, now in ENDED}
    reasons = list(
        dict.fromkeys(
            t["reason"] for t in sorted(rows["trial"], key=itemgetter("id")) if t["reason"]
        )
    )
    messages = [
        {"id": n, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}
        for n, text in enumerate(reasons, start=1)
    ]
    ids = {row["text"]: row["id"] for row in messages}
    for row in rows["trial"]:
        row["message_id"] = ids.get(row.pop("reason"))
        row["status"] = named.get(row["id"], row["status"])
        if "median_us" in row:
            row |= {"protocol": "graph-cold-2", "low_us": row["median_us"], "high_us": 1e6}
    slower = rows["trial"][1]
    stages = slower["knobs"].replace('"num_stages":3', '"num_stages":2')
    rows["trial"] += [
        slower | {"id": 12, "knobs": stages, "median_us": 55.0, "p20_us": 54.0, "p80_us": 56.0, "low_us": 55.0},
        slower | {"id": 16, "knobs": slower["knobs"].replace('"num_splits":4', '"num_splits":6')} | WRONG,
    ]  # fmt: skip
    rows["winner"][0] |= {"speedup": 1.2, "speedup_low": 1.1, "speedup_high": 1.3}
    block = {
        "id": 31,
        "arch": "sm_90",
        "kernel_source_hash": "5" * 64,
        "problem_id": 7,
        "knobs": cdna,
    }
    fault = {"knobs_hash": "h", "status": "hang", "message_id": ids[ENDED[2][2]], "trial_id": 3}
    robust = {"id": 41, "target_id": 2, "problem_id": 5, "environment_id": 4, "objective": "worst"}
    texts = {"workloads": "[]", "knobs": cdna, "regrets": "[]", "score": 1.5, "created": "then"}
    return {
        **{table: rows[table] for table in ("target", "environment", "problem", "workload", "run")},
        "message": messages,
        "trial": rows["trial"],
        "winner": rows["winner"],
        "blocklist": [block | fault | {"created": "then"}],
        "robust": [robust | texts],
    }


def said(path: Path) -> dict[int, str]:
    """What each trial of a database says, whatever its schema."""
    trials = rows_of(path, "trial")
    if "reason" in trials[0]:
        return {row["id"]: row["reason"] for row in trials}
    texts = {row["id"]: row["text"] for row in rows_of(path, "message")}
    return {row["id"]: texts.get(row["message_id"], "") for row in trials}


def _top(*found: tuple[float, Knobs]) -> str:
    """As schema 1 spelled knobs: it had no overlap_launch."""
    old = [
        [score, {n: v for n, v in knobs_to_dict(knobs).items() if n != "overlap_launch"}]
        for score, knobs in found
    ]
    return canonical_json(old)


TOPS_BEFORE = {21: _top((60.0, OTHER_KNOBS)), 22: "[]", 25: "[]"}
TOPS = TOPS_BEFORE | {21: _top((55.0, replace(KNOBS, num_stages=2)), (60.0, OTHER_KNOBS))}


def expected_now(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of an old database as this schema has them, messages aside."""
    expected = {table: rows_of(path, table) for table in TABLES}
    schema = expected["meta"][0]["schema"]
    expected["meta"][0]["schema"] = SCHEMA
    if schema < 2:
        expected["problem"] = [row | SINCE_2 for row in expected["problem"]]
    named = {id: now for id, _, _, now in ENDED}
    for row in expected["trial"]:
        row.pop("reason", None)
        row.pop("message_id", None)
        if schema < 3:
            row["status"] = named.get(row["id"], row["status"])
            row |= {"low_us": None, "high_us": None}
            row["protocol"] = "graph-cold-1" if row["median_us"] is not None else None
    for row in expected["winner"]:
        if schema < 3:
            row |= {"speedup": None, "speedup_low": None, "speedup_high": None}
        row |= {
            "environment_id": 4,
            "top": TOPS[row["id"]] if schema >= 3 else TOPS_BEFORE[row["id"]],
        }
    return expected
