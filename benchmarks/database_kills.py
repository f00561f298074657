"""Kill processes at random moments of their work on the config database, and look at what is left.

    python benchmarks/database_kills.py [--kills 300] [--seed 0] [--scene NAME] [--json FILE]

The works: trials as sweeps write them, `patune import`, bringing earlier schemas forward, `patune export`, and real sweeps on a made-up
device. Prints a JSON document that also says where in the work the kills fell; the exit code is 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import database_plants
from database_check import Problems
from database_scenes import OLD_SCHEMAS, Export, Import, Migration, Scene, Trials
from database_stress import versions
from database_sweeps import Sweeps

if TYPE_CHECKING:
    from collections.abc import Callable

SHARES = {"trials": 40, "import": 20, "migration": 24, "export": 12, "sweep": 4}  # of 100 kills
MOST_TRIES = 4  # runs per kill that was asked for: some moments come after the end


def kill(scene: Scene, kills: int, source: random.Random) -> dict[str, Any]:
    """Run a scene until so many processes were killed in it."""
    began = time.monotonic()
    counts: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    sorts: Counter[str] = Counter()
    while counts["killed"] < kills and counts.total() < MOST_TRIES * kills:
        for sort, ended in scene.strike(source):
            if ended.killed:
                counts["killed"] += 1
                stages[ended.stage] += 1
                sorts[sort] += 1
            else:
                counts["came to the end"] += 1
    if counts["killed"] < kills:
        scene.problem("too few kills", f"{counts['killed']} of {kills}")
    return {
        "scene": scene.name,
        **counts,
        "acknowledged": getattr(scene, "acknowledged", None),
        "moments": dict(sorts.most_common()),
        "stages": dict(stages.most_common()),
        "found": dict(scene.outcomes.most_common()),
        "seconds": round(time.monotonic() - began, 1),
    }


def scenes(folder: Path, problems: Problems, plant: str | None, only: str | None) -> list[Scene]:
    """All of them, or those of one name."""

    def planted() -> None:
        database_plants.plant(plant, "writer")

    given = (folder, problems, planted)
    makers: dict[str, list[Callable[[], Scene]]] = {
        "trials": [lambda: Trials(*given)],
        "import": [lambda: Import(*given)],
        "migration": [partial(Migration, schema, *given) for schema in OLD_SCHEMAS],
        "export": [lambda: Export(*given)],
        "sweep": [lambda: Sweeps(*given)],
    }
    return [make() for name in SHARES if only in (None, name) for make in makers[name]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill processes at their work on a config database."
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scene", choices=tuple(SHARES), help="only this one, with all of the kills"
    )
    parser.add_argument("--plant", choices=database_plants.KILLS, help="a bug that has to be seen")
    parser.add_argument("--json", type=Path, help="write the document to this file too")
    arguments = parser.parse_args()
    problems, rows = Problems(), []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        chosen = scenes(Path(name), problems, arguments.plant, arguments.scene)
        kinds = Counter(scene.name.split()[0] for scene in chosen)
        for scene in chosen:
            kind = scene.name.split()[0]
            share = 1.0 if arguments.scene else SHARES[kind] / 100
            kills = math.ceil(arguments.kills * share / kinds[kind])
            sys.stderr.write(f"{scene.name}: {kills} kills\n")
            rows.append(kill(scene, kills, random.Random(f"{scene.name} {arguments.seed}")))
    document = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began, 1),
        "killed": sum(row["killed"] for row in rows),
        "scenes": rows,
        "wrong": dict(problems.counts),
        "problems": problems.told,
    }
    output = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if arguments.json:
        arguments.json.write_text(output)
    print(output, end="")
    return 1 if problems.counts else 0


if __name__ == "__main__":
    sys.exit(main())
