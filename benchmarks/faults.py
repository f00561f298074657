"""Inject faults into sweeps and see what becomes of them: nothing may be lost, blamed wrongly, wedged or left behind.

    python benchmarks/faults.py [--faults 500] [--seed 0] [--jobs 2] [--on fake|gpu] [--json FILE]

`fake`: real coordinators, crews, worker processes and databases on a made-up device whose compilers, gates and clocks do what was planned.
`gpu`: real kernels on the device here, with planted faults of the device itself; one sweep, which is killed once and continued.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults_check import Verdict, check
from faults_plan import Scene, plan_scene
from faults_run import SCRIPT, run_scene

import patune

COLUMNS = ("injected", "right", "lost", "wedged", "wrong status", "wrongly blamed")
Row = dict[str, int]


class Tally:
    """Counts over the sweeps of a campaign."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.problems: list[str] = []
        self.sweeps = self.starts = 0

    @property
    def injected(self) -> int:
        return sum(row["injected"] for row in self.rows.values())

    def add(self, scene: Scene, verdict: Verdict, starts: int) -> None:
        self.sweeps += 1
        self.starts += starts
        wedged = any(problem.startswith("wedged") for problem in verdict.problems)
        for fault in scene.faults:
            row = self.rows.setdefault((fault.kind, fault.stage), dict.fromkeys(COLUMNS, 0))
            here = fault.id in verdict.injected
            row["injected"] += here
            row["right"] += fault.id in verdict.right
            row["lost"] += fault.id in verdict.lost
            row["wedged"] += here and wedged
            row["wrong status"] += fault.id in verdict.wrong
            row["wrongly blamed"] += verdict.blamed.count(fault.id)
        self.problems += [f"sweep {scene.index}: {problem}" for problem in verdict.problems]

    def totals(self) -> dict[str, int]:
        sums = {name: sum(row[name] for row in self.rows.values()) for name in COLUMNS}
        by_sort = Counter(problem.split(": ")[1] for problem in self.problems)
        sorts = ("missing", "left behind", "wrong winner", "wrong time", "not blocked", "run again")
        return sums | {sort: by_sort[sort] for sort in sorts} | {"problems": len(self.problems)}

    def table(self) -> str:
        lines = [f"{'kind':<18}{'stage':<14}" + "".join(f"{c:>16}" for c in COLUMNS)]
        for (kind, stage), row in sorted(self.rows.items(), key=lambda r: (r[0][1], r[0][0])):
            lines.append(f"{kind:<18}{stage:<14}" + "".join(f"{row[c]:>16}" for c in COLUMNS))
        totals = ", ".join(f"{name} {count}" for name, count in self.totals().items())
        lines.append(f"{self.sweeps} sweeps, started {self.starts} times: {totals}")
        return "\n".join(lines + self.problems)


def play(
    seed: int, index: int, script: Path = SCRIPT, **environment: str
) -> tuple[Scene, Verdict, int]:
    """One sweep of the campaign, checked; its folder is kept where something is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="patune-faults-")) / "sweep"
    scene = plan_scene(seed, index)
    watched = run_scene(scene, folder, script=script, **environment)
    verdict = check(scene, folder, watched)
    if verdict.problems:
        verdict.problems.append(f"kept: {folder}")
    else:
        shutil.rmtree(folder.parent)
    return scene, verdict, len(watched.codes)


def campaign(faults: int, seed: int, jobs: int, first: int) -> Tally:
    """Sweeps until that many faults were injected."""
    tally, index = Tally(), first
    with ThreadPoolExecutor(jobs) as threads:
        while tally.injected < faults:
            batch = range(index, index + jobs)
            index += jobs
            for scene, verdict, starts in threads.map(lambda i: play(seed, i), batch):
                tally.add(scene, verdict, starts)
                sys.stderr.write(
                    f"sweep {scene.index}: {len(verdict.injected)} faults, {tally.injected} in all, {len(verdict.problems)} problems\n"
                )
    return tally


def document(tally: Tally, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    packages = ("torch", "triton", "optuna", "sqlalchemy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "seed": arguments.seed,
        "on": arguments.on,
        "versions": {name: version(name) for name in packages}
        | {
            "patune": patune.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "sweeps": tally.sweeps,
        "starts": tally.starts,
        "seconds": round(seconds, 1),
        "totals": tally.totals(),
        "table": [{"kind": k, "stage": s, **row} for (k, s), row in sorted(tally.rows.items())],
        "problems": tally.problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults into sweeps.")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first sweep")
    parser.add_argument("--jobs", type=int, default=1, help="sweeps at a time")
    parser.add_argument("--on", choices=("fake", "gpu"), default="fake")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.on == "gpu":
        from faults_gpu import gpu_campaign

        tally = Tally()
        tally.add(*gpu_campaign(arguments.seed))
    else:
        tally = campaign(arguments.faults, arguments.seed, arguments.jobs, arguments.first)
    print(tally.table())
    if arguments.json:
        text = json.dumps(document(tally, arguments, time.monotonic() - began))
        arguments.json.write_text(text.replace('{"kind"', '\n{"kind"') + "\n")
        print(arguments.json)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
