"""Real sweeps on the made-up device of the fault campaign, killed and continued: what a sweep was told is stored is there at the end.

As a script this is one such sweep: `python database_sweeps.py FOLDER ATTEMPT`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from database_check import read_log
from database_scenes import Scene
from database_stops import Ended

if TYPE_CHECKING:
    import random

SCRIPT = Path(__file__)
LOG = "acknowledged"
# Tasks that a sweep has started before its parent is killed, twice: it has 145 without a fault.
MOMENTS = ((1, 60), (65, 125))
LONGEST_WAIT_S = 0.03


class Sweeps(Scene):
    """Each run is one sweep, killed twice."""

    name = "sweep"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.index = 0
        self.acknowledged = 0

    def strike(self, source: random.Random) -> list[tuple[str, Ended]]:
        from faults_check import check
        from faults_plan import Fault
        from faults_plan import Scene as Plan
        from faults_run import run_scene

        folder = self.folder / f"s{self.index}"  # short: sockets of multiprocessing are in it
        self.index += 1
        faults = tuple(
            Fault(
                id=n,
                kind="kill_parent",
                stage="outside",
                after=source.randint(low, high),
                wait_s=source.uniform(0.0, LONGEST_WAIT_S),
            )
            for n, (low, high) in enumerate(MOMENTS)
        )
        plan = Plan(index=self.index, faults=faults)
        watched = run_scene(plan, folder, script=SCRIPT)
        for words in check(plan, folder, watched).problems:
            self.problem("wrong", words)
        lines = read_log(folder / LOG)
        self.acknowledged += len(lines)
        for line in lines:
            if (found := stored(folder / "patune.db", line["id"])) != line:
                self.problem("lost", f"{line}; there is {found}")
        self.outcomes["continued to its end"] += watched.codes[-1] == 0
        shutil.rmtree(folder)
        return [
            ("time", Ended(code, f"after {fault.after // 25 * 25} or more tasks", ""))
            for fault, code in zip(faults, watched.codes, strict=False)
            if code is not None  # wedged: a problem already
        ]


def stored(path: Path, trial: int) -> dict[str, Any] | None:
    """What the database has of a trial."""
    from patune.configs import rows
    from patune.configs.models import TrialRow
    from patune.configs.store import Store

    with Store.open(path) as store, store.transaction(writes=False) as session:
        row = session.get(TrialRow, trial)
        return line_of(trial, rows.stored_trial(row)) if row is not None else None


def line_of(trial: int, holder: Any) -> dict[str, Any]:
    """A line about a trial, from what was stored or from what there is now."""
    from patune.configs.rows import knobs_text

    result = holder.result
    return {
        "id": trial,
        "knobs": knobs_text(holder.knobs),
        "status": result.status,
        "score": result.score,
    }


def main() -> None:
    """One sweep that notes what it is told."""
    from types import SimpleNamespace

    import faults_sweep
    from database_writers import Log

    from patune.configs.store import Store

    log = Log(Path(sys.argv[1]) / LOG)
    record = Store.record_trial

    def noted(self: Store, *args: Any, **how: Any) -> int:
        trial = record(self, *args, **how)
        log.write(**line_of(trial, SimpleNamespace(knobs=how["knobs"], result=how["result"])))
        return trial

    Store.record_trial = noted  # type: ignore[method-assign]
    faults_sweep.main()


if __name__ == "__main__":
    main()
