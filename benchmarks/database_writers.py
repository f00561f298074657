"""A process that writes to the config database as sweeps and imports do, and says in a log what was acknowledged to it.

The log is the proof of an acknowledgement: its lines are written by one system call each, which a killed process cannot take back.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import database_values as values
from database_values import ENVIRONMENTS, KEYS, STRIDE

from patune.configs.store import Store
from patune.configs.winner import Speedup, utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from patune.configs.winner import Winner
    from patune.settings import DatabasePlace

# How often a writer does what, of 100.
HABITS = {"record": 74, "robust": 10, "merge": 8, "rollback": 3, "run": 3, "reopen": 2}
PROMOTED = 0.4  # of the ok trials
MOST_MERGED = 6
MERGE_CODES = 2 * len(
    KEYS
)  # a candidate's code is that of its winner, and the number of keys: so it has the same key
NEVER = "never"  # in the name of an import that is rolled back


class BrokenOffError(Exception):
    """Ends a merge from inside its transaction."""


class _BrokenOff(list["Winner"]):
    """Winners of which the last one never comes."""

    def __iter__(self) -> Iterator[Winner]:
        yield from list.__iter__(self)
        raise BrokenOffError


class Log:
    """Lines of JSON that outlive the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **line: Any) -> None:
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def problem(self, what: str, error: BaseException) -> None:
        self.write(problem=f"{what}: {type(error).__name__}: {error}")


class Writer:
    """Draws what to do next from its seed.

    Args:
        number: of the writer; its codes follow from it.
    """

    def __init__(self, place: DatabasePlace, log: Log, *, number: int, seed: int) -> None:
        self.place = place
        self.log = log
        self.number = number
        self.random = random.Random(f"writer {number} {seed}")
        self.environment = number % len(ENVIRONMENTS)
        self.n = 0
        self.store = Store.open(place)
        self.runs: dict[str, int] = {}
        self.ids: dict[int, int] = {}
        self.best: dict[int, int] = {}  # key -> code of the trial that stands for its default

    def run(self, *, until: float = float("inf"), steps: int | None = None) -> None:
        """Work until a moment of the monotonic clock, or for so many steps."""
        names, weights = list(HABITS), list(HABITS.values())
        done = 0
        while time.monotonic() < until and (steps is None or done < steps):
            name = self.random.choices(names, weights)[0]
            try:
                getattr(self, f"_{name}")()
            except Exception as error:
                self.log.problem(name, error)
            done += 1
        for arch in list(self.runs):
            self._end(arch)
        self.store.close()

    def _code(self, advance: int = 1) -> int:
        code = self.number * STRIDE + self.n
        self.n += advance
        return code

    def _do(self, op: str, codes: list[int], call: Any, **fields: Any) -> Any:
        self.log.write(begin=op, codes=codes, at=time.monotonic())
        began = time.monotonic()
        result = call()
        ended = time.monotonic()
        told = fields.pop("tell", lambda result: {})(result)
        self.log.write(op=op, codes=codes, began=began, ended=ended, **fields, **told)
        return result

    def _begun(self, arch: str) -> int:
        if arch not in self.runs:
            target = next(t for t in values.TARGETS if t.arch == arch)
            self.runs[arch] = self._do(
                "begin_run",
                [],
                lambda: self.store.begin_run(
                    target=target,
                    environment=ENVIRONMENTS[self.environment],
                    sampler="auto",
                    seed=self.number,
                    command=f"writer {self.number}",
                ),
                tell=lambda run: {"run": run},
            )
        return self.runs[arch]

    def _end(self, arch: str) -> None:
        run = self.runs.pop(arch)
        self._do("end_run", [], lambda: self.store.end_run(run), run=run)

    def _run(self) -> None:
        if self.runs:
            self._end(self.random.choice(list(self.runs)))

    def _reopen(self) -> None:
        self.store.close()
        self._do("open", [], self._open)

    def _open(self) -> None:
        self.store = Store.open(self.place)

    def _record(self) -> None:
        code = self._code()
        index = values.key_index(code)
        target, problem, workload = KEYS[index]
        run = self._begun(target.arch)
        result = values.result_of(code)
        self.ids[code] = self._do(
            "record",
            [code],
            lambda: self.store.record_trial(
                run,
                problem=problem,
                workload=workload,
                knobs=values.knobs_of(code, target.arch),
                result=result,
                source="search",
            ),
            tell=lambda trial: {"id": trial},
        )
        if result.status in values.FAULTS and self.random.random() < 0.5:
            self._do("block", [code], lambda: self.store.block(self.ids[code]))
        if result.ok and self.random.random() < PROMOTED:
            self._promote(code, index)
        if result.ok:
            self.best[index] = code

    def _promote(self, code: int, index: int) -> None:
        default = self.best.get(index)
        speedup = None
        kinds = {values.result_of(c).evidence for c in (code, default) if c is not None}
        if default is not None and kinds == {"measured"}:
            speedup = Speedup(ratio=1.0, low=0.5, high=code + 2.0)
        self._do(
            "promote",
            [code],
            lambda: self.store.promote(
                self.ids[code],
                default_trial_id=None if default is None else self.ids[default],
                speedup=speedup,
            ),
            default=default,
            tell=lambda winner: {
                "standing": values.check_winner(winner).code,
                "trials": winner.trials,
            },
        )

    def _robust(self) -> None:
        code = self._code()
        self._do("robust", [code], lambda: self.store.put_robust(values.robust_of(code)))

    def _merge(self) -> None:
        self._take_in(self.random.randint(1, MOST_MERGED), f"w{self.number} n{self.n}")

    def _rollback(self) -> None:
        try:
            self._take_in(self.random.randint(1, MOST_MERGED), f"{NEVER} w{self.number} n{self.n}")
        except BrokenOffError:
            return
        raise ValueError("a merge did not raise what its winners raised")

    def _take_in(self, count: int, name: str) -> None:
        first = self._code(MERGE_CODES)
        codes = [first + i for i in range(count)]
        created = utc_now()
        winners = [values.pack_winner(code, created) for code in codes]
        candidates = {
            w.key: (values.pack_candidate(c + len(KEYS)),)
            for w, c in zip(winners, codes, strict=True)
        }
        incoming = _BrokenOff(winners) if name.startswith(NEVER) else winners
        self._do(
            "rollback" if name.startswith(NEVER) else "merge",
            codes,
            lambda: self.store.merge(incoming, candidates, imported_from=name),
            name=name,
            tell=lambda merged: {"verdicts": [verdict for verdict, _ in merged.winners]},
        )


def write(
    place: DatabasePlace, log: Log, *, number: int, seed: int, start: float, until: float
) -> None:
    """What a writing process does, from the moment that all begin at."""
    time.sleep(max(0.0, start - time.monotonic()))
    Writer(place, log, number=number, seed=seed).run(until=until)
