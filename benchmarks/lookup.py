"""Cost of a config lookup: warm, one call at a time, cold, loading, importing. Prints one JSON document.

    python benchmarks/lookup.py [--fast] [--winners 10000]

Medians of warm lookups come from pyperf, in processes of their own: `lookup` with ints by keyword, over databases of 10 and of 100,000 winners that have
all been asked for before, in random order and again and again for one key; what the loop around the call takes alone is subtracted. The 99th percentile is of single calls, timed with
perf_counter_ns, less the median cost of asking the clock twice. A clock that varies shows in `empty_loop_ns`, the time of one turn of an empty loop:
it is measured beside every figure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES = 64
CONTEXT_STEP = 256
CALLS = 10_000
SINGLE_CALLS = 200_000
SIZES = (10, 100_000)
PROBLEMS = tuple(itertools.product((1024, 16, 64), (128, 64), (8, 1, 4, 16)))  # page, head_dim, qg

Asked = tuple[int, int, int, int, int]  # page, head_dim, qg, batch, context


def key(i: int) -> Asked:
    """The key of the i-th winner."""
    j = i // len(PROBLEMS)
    return (*PROBLEMS[i % len(PROBLEMS)], j % BATCHES + 1, CONTEXT_STEP * (j // BATCHES + 1))


def fill(path: Path, winners: int) -> None:
    """A database with that many winners of 24 problems on one device, five other configurations beside each."""
    from patune.configs.store import Store
    from patune.environment import Environment
    from patune.kernels.defaults import default_knobs
    from patune.kernels.knobs import knobs_to_dict
    from patune.problem import Problem, Workload
    from patune.record import canonical_json
    from patune.target import Target

    target = Target.named("gfx942")
    problems = [
        Problem(block_size=page, head_dim=head_dim, qg=qg) for page, head_dim, qg in PROBLEMS
    ]
    workload = Workload(batch=8, kv_heads=8, context=4096)
    environment = Environment(
        patune="0.1.0", triton="3.9.0", torch="2.13.0", python="3.11.7", compiler="llvm of triton 3.9.0", driver="none",
        fp_fusion=True, kernel_source_hash="5" * 64,
    )  # fmt: skip
    with Store.open(path) as store:
        store.begin_run(
            target=target, environment=environment, sampler="none", seed=0, command="benchmark"
        )
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        _add(
            connection,
            "patune_problem",
            [{"id": i, **p.to_dict()} for i, p in enumerate(problems, 1)],
        )
        rows = range(winners)
        _add(
            connection,
            "patune_workload",
            [
                {"id": j + 1, "batch": batch, "kv_heads": 8, "context": context}
                for j in range(winners // len(PROBLEMS) + 1)
                for *_, batch, context in [key(j * len(PROBLEMS))]
            ],
        )
        knobs = canonical_json(knobs_to_dict(default_knobs(problems[0], workload, target)))
        top = "[" + ",".join(f"[{1.0625 + i / 16},{knobs}]" for i in range(5)) + "]"
        trial = {
            "run_id": 1, "target_id": 1, "environment_id": 1, "knobs": knobs, "knobs_hash": "x", "source": "grid", "status": "ok",
            "gate_cases": 1, "evidence": "emulated", "busiest_simd_slots": 1.0, "wave_instructions": 1, "mfma": 1, "global_bytes": 1,
            "lds_bytes": 0, "spill_bytes": 0, "seconds": 1.0, "created": "2026-11-22T10:42:00Z",
        }  # fmt: skip
        winner = {
            "target_id": 1, "environment_id": 1, "status": "ok", "evidence": "emulated", "trials": 1, "state": "fresh", "top": top,
            "created": "2026-11-22T10:42:00Z",
        }  # fmt: skip
        places = [
            {"problem_id": i % len(PROBLEMS) + 1, "workload_id": i // len(PROBLEMS) + 1}
            for i in rows
        ]
        _add(
            connection,
            "patune_trial",
            [{"id": i + 1, **trial, **place} for i, place in zip(rows, places, strict=True)],
        )
        _add(
            connection,
            "patune_winner",
            [
                {"id": i + 1, "trial_id": i + 1, **winner, **place}
                for i, place in zip(rows, places, strict=True)
            ],
        )


def _add(connection: sqlite3.Connection, table: str, rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    marks = ", ".join("?" * len(names))
    statement = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})"
    connection.executemany(statement, [tuple(row.values()) for row in rows])


def empty_loop_ns(turns: int = 1_000_000) -> float:
    """What the processor's clock does just now."""
    started = time.perf_counter_ns()
    for _ in itertools.repeat(None, turns):
        pass
    return (time.perf_counter_ns() - started) / turns


def warmed(keys: int) -> list[Asked]:
    """That many keys, all of them stored and asked for before."""
    import patune

    patune.reload(Path(os.environ["LOOKUP_FOLDER"]) / f"{keys}.db")
    every = [key(i) for i in range(keys)]
    for page, head_dim, qg, batch, context in every:
        answer = patune.lookup(
            block_size=page, head_dim=head_dim, qg=qg, batch=batch, context=context
        )
        assert answer.source == "exact"
    return every


def time_calls(loops: int, asked: list[Asked]) -> float:
    """Seconds of `loops` x all calls, less those of the loop."""
    from patune.configs.dispatcher import lookup

    turns = range(loops)
    started = time.perf_counter()
    for _ in turns:
        for page, head_dim, qg, batch, context in asked:
            lookup(block_size=page, head_dim=head_dim, qg=qg, batch=batch, context=context)
    called = time.perf_counter()
    for _ in turns:
        for _page, _head_dim, _qg, _batch, _context in asked:
            pass
    return (called - started) - (time.perf_counter() - called)


def run_pyperf() -> None:
    """The pyperf part; it starts its own workers, which come here again."""
    import pyperf

    runner = pyperf.Runner(program_args=(__file__, "--pyperf"))
    for keys, order in itertools.product(SIZES, ("random", "repeated")):
        sizes: list[Asked] = []
        asked: list[Asked] = []

        def timed(
            loops: int, keys: int = keys, order: str = order, sizes: Any = sizes, asked: Any = asked
        ) -> float:
            if not asked:
                sizes += warmed(keys)
                chance = random.Random(0)
                asked += [
                    chance.choice(sizes) if order == "random" else sizes[0] for _ in range(CALLS)
                ]
            return time_calls(loops, asked)

        runner.bench_time_func(f"{keys} {order}", timed, inner_loops=CALLS)


def medians(fast: bool, environment: dict[str, str]) -> dict[str, Any]:
    """Medians and spreads of warm lookups, by number of keys and order."""
    import pyperf

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = [sys.executable, __file__, "--pyperf", "-o", str(out), "--quiet"]
        words += ["--inherit-environ", ",".join(environment)] + (
            ["-p", "2", "-n", "5"] if fast else ["-p", "6"]
        )
        subprocess.run(words, check=True, env={**os.environ, **environment}, stdout=sys.stderr)
        suite = pyperf.BenchmarkSuite.load(str(out))
    found = {}
    for bench in suite.get_benchmarks():
        values = sorted(bench.get_values())
        found[bench.get_name()] = {
            "median_ns": round(bench.median() * 1e9, 1),
            "low_ns": round(values[0] * 1e9, 1),
            "high_ns": round(values[-1] * 1e9, 1),
        }
    return found


def single_calls(keys: int) -> dict[str, float]:
    """Percentiles of calls that are timed one by one, of keys in random order."""
    from patune.configs.dispatcher import lookup

    sizes = warmed(keys)
    chance = random.Random(1)
    asked = [chance.choice(sizes) for _ in range(SINGLE_CALLS)]
    clock = time.perf_counter_ns
    own, taken = [], []
    for _ in range(SINGLE_CALLS):
        a = clock()
        b = clock()
        own.append(b - a)
    for page, head_dim, qg, batch, context in asked:
        a = clock()
        lookup(block_size=page, head_dim=head_dim, qg=qg, batch=batch, context=context)
        b = clock()
        taken.append(b - a)
    cost = statistics.median(own)
    taken.sort()
    return {
        "p50_ns": taken[SINGLE_CALLS // 2] - cost,
        "p99_ns": taken[SINGLE_CALLS * 99 // 100] - cost,
        "p999_ns": taken[SINGLE_CALLS * 999 // 1000] - cost,
        "clock_ns": cost,
        "empty_loop_ns": round(empty_loop_ns(), 1),
    }


def loads(path: Path) -> dict[str, Any]:
    """Table loads, the median of 15, and the first lookup after one."""
    import patune
    from patune.configs import dispatcher
    from patune.configs.reading import read_database, read_packs

    tables, lookups = [], []
    for _ in range(15):
        started = time.perf_counter()
        table = read_database(path, "gfx942")
        tables.append(time.perf_counter() - started)
        dispatcher.reload(path)
        dispatcher._tables(dispatcher._state, "gfx942")
        started = time.perf_counter()
        answer = patune.lookup(
            block_size=1024, head_dim=128, qg=8, batch=8, context=256, target="gfx942"
        )
        lookups.append(time.perf_counter() - started)
    started = time.perf_counter()
    read_packs(dispatcher.PACKS, "sm_90")
    packs = time.perf_counter() - started
    return {
        "winners": table.count,
        "load_ms": round(statistics.median(tables) * 1e3, 2),
        "load_low_ms": round(min(tables) * 1e3, 2),
        "first_lookup_of_a_problem_ms": round(statistics.median(lookups) * 1e3, 2),
        "shipped_packs_ms": round(packs * 1e3, 2),
        "source": answer.source,
        "empty_loop_ns": round(empty_loop_ns(), 1),
    }


def imports() -> dict[str, float]:
    """Milliseconds of `import patune`, alone and after torch: medians of 9 processes."""
    found = {}
    for name, before in (("import_ms", ""), ("import_over_torch_ms", "import torch; ")):
        code = f"import time; {before}t = time.perf_counter(); import patune; print(time.perf_counter() - t)"
        words = [sys.executable, "-c", code]
        seconds = [
            float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            for _ in range(9)
        ]
        found[name] = round(statistics.median(seconds) * 1e3, 1)
    return found


def main() -> None:
    if "--pyperf" in sys.argv:
        sys.argv.remove("--pyperf")
        run_pyperf()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--winners", type=int, default=10_000)
    parser.add_argument("--fast", action="store_true", help="pyperf with fewer processes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patune.db"
        fill(path, given.winners)
        for keys in SIZES:
            fill(Path(folder) / f"{keys}.db", keys)
        environment = {
            "LOOKUP_FOLDER": folder,
            "PATUNE_DB": str(path),
            "PATUNE_TARGET": "gfx942",
            "PATUNE_WATCH": "0",
            "PATUNE_CAPTURE": "0",
        }
        os.environ |= environment
        document = {
            "schema": 2,
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "pyperf": importlib.metadata.version("pyperf"),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "empty_loop_ns": round(empty_loop_ns(), 1),
            "load": loads(path),
            "warm": medians(given.fast, environment),
            "single_calls": {str(keys): single_calls(keys) for keys in SIZES},
            "imports": imports(),
        }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
