"""Capture what serving asked for in vain, tune it overnight, ship it to the fleet. Three machines, each with a folder and a database of its own:

    production   serves keys that nobody tuned: answers from the heuristic, and writes down what it was asked
    tuner        sweeps what was captured, and exports the winners as a pack
    fleet        imports the pack: the key that was tuned answers ``exact``, sizes near it ``nearest``

(``pack`` is the source of packs that come with patune itself; an imported one is in the database.)

    python examples/capture_and_tune.py [FOLDER]

Every step prints the command that does the same by hand in FOLDER, an empty one; without it everything is in a temporary folder, which is removed.
The target is gfx942, which is compiled and ranked in the ISA emulator: that runs anywhere, takes about half a minute on two cores, and gives no
latency. On an H200 leave PATUNE_TARGET and --trials out, and the sweep measures. Exits 1 when the fleet's answers are not the expected ones.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import patune

PROBLEM: dict[str, Any] = {"block_size": 16, "head_dim": 64, "qg": 5}
# Batch and context. Sizes are captured by their next power of two: one key here, and one sweep serves both.
SERVED = ((128, 2048), (100, 1500))
MACHINES = {
    machine: {
        "PATUNE_TARGET": "gfx942",
        "PATUNE_DB": f"{machine}/patune.db",
        "PATUNE_CAPTURE": captures,
    }
    for machine, captures in (("production", "captured"), ("tuner", "captured"), ("fleet", "0"))
}
WIDTH = 100  # of what is printed


def serve() -> None:
    """Stands for a serving process: looks its keys up, as every call of the kernel does, and says what it got."""
    print(f"{'batch':>5} {'context':>7}  source     evidence  knobs")
    for batch, context in SERVED:
        for _ in range(1000):
            answer = patune.lookup(**PROBLEM, batch=batch, kv_heads=8, context=context)
        k = answer.knobs
        knobs = f"partition_tokens={k.partition_tokens} num_splits={k.num_splits} num_warps={k.num_warps}"
        print(f"{batch:>5} {context:>7}  {answer.source:<9}  {answer.evidence:<8}  {knobs}")


def sources(table: str) -> list[str]:
    """The sources in what :func:`serve` printed."""
    return [line.split()[2] for line in table.splitlines()[1:]]


def run(folder: Path, machine: str, *command: str) -> str:
    """Run a command as on one of the machines, print it and its result; returns the result."""
    print(f"\n{machine}$ {shlex.join(command)}", flush=True)
    # the settings of whoever runs this are not those of the machines
    own = {name: value for name, value in os.environ.items() if not name.startswith("PATUNE_")}
    python = [sys.executable, "-m"] if command[0] == "patune" else [sys.executable]
    arguments = command if command[0] == "patune" else command[1:]
    done = subprocess.run(
        [*python, *arguments],
        cwd=folder, env={**own, **MACHINES[machine]},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        print(textwrap.fill(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else line)
    return done.stdout


def ship(folder: Path) -> int:
    """The whole way, from a miss in production to a tuned answer on the fleet; returns the exit code."""
    serving = ("python", str(Path(__file__).resolve()), "--serve")
    print(f"cd {folder}")
    for machine, variables in MACHINES.items():
        (folder / machine).mkdir(exist_ok=True)
        settings = (f"{name}={value}" for name, value in variables.items())
        print(f"{machine}$ export {' '.join(settings)}")
    run(folder, "production", *serving)  # what it missed is written when it ends
    run(folder, "tuner", "patune", "sweep", "--misses", "--trials", "3", "--quiet")
    run(folder, "tuner", "patune", "export", "winners.json")
    before = sources(run(folder, "fleet", *serving))
    run(folder, "fleet", "patune", "import", "winners.json")
    after = sources(run(folder, "fleet", *serving))
    print(f"\nfleet: {', '.join(before)} -> {', '.join(after)}")
    shipped = before == ["heuristic", "heuristic"] and after == ["exact", "nearest"]
    return 0 if shipped else 1


def main() -> int:
    """Play all machines; with ``--serve`` be a serving process."""
    if sys.argv[1:] == ["--serve"]:
        serve()
        return 0
    if sys.argv[1:]:
        return ship(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        return ship(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
