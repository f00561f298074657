"""What a lookup loses at sizes that nobody tuned. Needs the GPU of a measured target.

    python benchmarks/transfer.py [--effort standard] [--seed 0] [--json FILE]

Per problem: a sweep tunes a few anchors and the robust configuration over them; another one, with a database of its own, tunes probes
between them. Then the configurations that a lookup at a probe could give are timed in turns: what the neighbours' tables choose
(`nearest`, what patune does), the winner of the nearest anchor alone (`row`), the robust one, the heuristic, and the probe's own winner.
A regret is a time over that of the probe's fastest. The shipped packs do not answer here.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import patune
from patune.configs import dispatcher
from patune.configs.store import Store
from patune.kernels.defaults import default_knobs
from patune.kernels.knobs import Knobs, knobs_to_dict
from patune.problem import Problem, Workload
from patune.target import Target, detect_target, require_device
from patune.tuner import tasks
from patune.tuner.progress import Key, SweepReport
from patune.tuner.sweep import SweepOptions, run_sweep

PROBLEMS = (
    Problem(block_size=1024, head_dim=128, qg=8),
    Problem(block_size=1024, head_dim=64, qg=4),
    Problem(block_size=16, head_dim=128, qg=4, kv_layout="hnd"),
)
# Large batches, where a workgroup walks whole contexts, and small ones, which splits share.
ANCHORS = (
    (64, 4096),
    (128, 4096),
    (64, 8192),
    (128, 8192),
    (2, 8192),
    (4, 8192),
    (2, 16384),
    (4, 16384),
)
PROBES = (
    (96, 4096),
    (96, 6000),
    (128, 6144),
    (80, 5000),
    (3, 8192),
    (3, 12000),
    (4, 10000),
    (2, 14000),
)
ANSWERS = ("nearest", "row", "robust", "heuristic", "own")


def _workloads(sizes: tuple[tuple[int, int], ...]) -> tuple[Workload, ...]:
    return tuple(Workload(batch=batch, kv_heads=8, context=context) for batch, context in sizes)


def _sweep(
    path: Path, target: Target, workloads: tuple[Workload, ...], options: dict[str, Any]
) -> SweepReport:
    keys = tuple(Key(problem=p, workload=w) for p in PROBLEMS for w in workloads)
    with Store.open(path) as store:
        return run_sweep(
            SweepOptions(target=target, keys=keys, command="benchmark", **options),
            store,
            lambda event: None,
        )


def _distance(workload: Workload, anchor: Workload) -> float:
    return math.hypot(
        math.log2(workload.walks / anchor.walks), math.log2(workload.context / anchor.context)
    )


def _answers(
    problem: Problem, probe: Workload, target: Target, tuned: SweepReport, own: Knobs
) -> dict[str, Knobs]:
    anchors = {
        r.key.workload: r.winner.knobs
        for r in tuned.keys
        if r.winner is not None and r.key.problem == problem
    }
    robust = next(r.winner for r in tuned.robust if r.winner and r.winner.problem == problem)
    answer = dispatcher.lookup_problem(problem, probe, target)
    if answer.source != "nearest":
        raise SystemExit(
            f"{problem} {probe}: the lookup answers from {answer.source}, not from neighbours"
        )
    return {
        "nearest": answer.knobs,
        "row": anchors[min(anchors, key=lambda anchor: _distance(probe, anchor))],
        "robust": robust.knobs,
        "heuristic": default_knobs(problem, probe, target),
        "own": own,
    }


def _timed(
    key: Key, target: Target, answers: dict[str, Knobs], ceiling_gb_s: float | None
) -> dict[str, float]:
    """Microseconds of each answer, all timed in turns."""
    different = list(dict.fromkeys(answers.values()))
    timed = tasks.retime_finalists(
        {
            "target": target.to_dict(),
            "problem": key.problem.to_dict(),
            "workload": key.workload.to_dict(),
            "knobs": [knobs_to_dict(knobs) for knobs in different],
            "ceiling_gb_s": ceiling_gb_s,
        }
    )
    medians = [timing["median_us"] for timing in timed["timings"]]
    return {name: medians[different.index(knobs)] for name, knobs in answers.items()}


def measure(target: Target, options: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per problem and probe."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dispatcher.PACKS = Path(folder) / "no packs"
        tuned = _sweep(
            Path(folder) / "anchors.db", target, _workloads(ANCHORS), options | {"robust": "worst"}
        )
        own = _sweep(Path(folder) / "probes.db", target, _workloads(PROBES), options)
        dispatcher.reload(Path(folder) / "anchors.db")
        for report in own.keys:
            if report.winner is None:
                raise SystemExit(f"{report.key} has no winner")
            problem, probe = report.key.problem, report.key.workload
            answers = _answers(problem, probe, target, tuned, report.winner.knobs)
            times = _timed(report.key, target, answers, own.read_ceiling_gb_s)
            best = min(times.values())
            rows.append(
                {
                    "problem": problem.to_dict(),
                    "workload": probe.to_dict(),
                    "us": {name: round(us, 3) for name, us in times.items()},
                    "regret": {name: round(us / best, 4) for name, us in times.items()},
                    "knobs": {name: knobs_to_dict(knobs) for name, knobs in answers.items()},
                }
            )
            regrets = "  ".join(f"{name} {us / best:.3f}" for name, us in times.items())
            sys.stderr.write(
                f"{problem.block_size}/{problem.head_dim}/{problem.qg} {probe.batch} x {probe.context}: {regrets}\n"
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and worst regret of each kind of answer."""
    every = {name: [row["regret"][name] for row in rows] for name in ANSWERS}
    return {
        name: {"median": round(statistics.median(found), 4), "worst": max(found)}
        for name, found in every.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what lookups lose between tuned sizes.")
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, dest="file")
    arguments = parser.parse_args()
    target = detect_target()
    if target is None:
        raise SystemExit("No supported GPU here: latencies are measured, never guessed.")
    require_device(target)
    began = time.monotonic()
    rows = measure(target, {"effort": arguments.effort, "seed": arguments.seed})
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "target": target.to_dict(),
        "versions": {name: version(name) for name in ("torch", "triton")}
        | {"patune": patune.__version__, "python": platform.python_version()},
        "seconds": round(time.monotonic() - began, 1),
        "anchors": ANCHORS,
        "summary": summary(rows),
        "rows": rows,
    }
    text = json.dumps(document, indent=1)
    if arguments.file:
        arguments.file.write_text(text + "\n")
    sys.stdout.write(json.dumps(document["summary"], indent=1) + "\n")


if __name__ == "__main__":
    main()
