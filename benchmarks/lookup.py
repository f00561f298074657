"""Cost of a config lookup: warm, cold, and import. Prints one JSON document.

    python benchmarks/lookup.py [--entries 5000]

Warm lookups are timed as serving code calls them, all arguments by keyword, on a database with `--entries` winners; the figure is the
median of 15 repeats of 100,000 calls, minus nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import replace
from pathlib import Path

CALLS = 100_000
REPEATS = 15


def fill(path: Path, entries: int) -> None:
    """A database with that many winners of the default sweep's problems."""
    from patune.configs.store import Store
    from patune.environment import current_environment
    from patune.kernels.defaults import default_knobs
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.trial import CountedWork, TrialResult

    target = Target.named("gfx942")
    work = CountedWork(
        busiest_simd_slots=1.0,
        wave_instructions=1,
        mfma=1,
        global_bytes=1,
        lds_bytes=0,
        spill_bytes=0,
    )
    result = TrialResult(status="ok", gate_cases=1, error_rms=0.001, counted=work)
    problems = [
        Problem(block_size=page, head_dim=head_dim, qg=qg)
        for page, head_dim, qg in itertools.product((16, 64, 1024), (64, 128), (1, 4, 8, 16))
    ]
    workloads = (Workload(batch=b, kv_heads=8, context=4096) for b in itertools.count(1))
    with Store.open(path) as store:
        run = store.begin_run(
            target=target,
            environment=current_environment(target),
            sampler="none",
            seed=0,
            command="benchmark",
        )
        for problem, workload in itertools.islice(
            ((p, w) for w in workloads for p in problems), entries
        ):
            knobs = default_knobs(
                problem, replace(workload, batch=min(workload.batch, 128)), target
            )
            trial = store.record_trial(
                run,
                problem=problem,
                workload=workload,
                knobs=knobs,
                result=result,
                source="default",
            )
            store.promote(trial, default_trial_id=trial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=500)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patune.db"
        fill(path, entries)
        os.environ["PATUNE_DB"] = str(path)
        os.environ["PATUNE_TARGET"] = "gfx942"
        import patune

        def lookup() -> object:
            return patune.lookup(block_size=1024, head_dim=128, qg=8, batch=8, context=4096)

        started = time.perf_counter()
        answer = lookup()
        cold_ms = (time.perf_counter() - started) * 1e3
        warm = [seconds / CALLS for seconds in timeit.repeat(lookup, number=CALLS, repeat=REPEATS)]
        import_s = [
            float(
                subprocess.run(
                    [
                        sys.executable,
                        "-c",
                        "import time; t = time.perf_counter(); import patune; patune.lookup; print(time.perf_counter() - t)",
                    ],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(5)
        ]
    document = {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "entries": entries,
        "source": answer.source,
        "warm_ns": round(statistics.median(warm) * 1e9, 1),
        "warm_ns_worst_repeat": round(max(warm) * 1e9, 1),
        "cold_ms": round(cold_ms, 2),
        "import_ms": round(statistics.median(import_s) * 1e3, 1),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
