"""Imports damaged packs by the ten thousand: nothing may crash, come in by half, or come in with a wrong type.

    python benchmarks/fuzz_packs.py [--mutants 100000] [--seed 0] [--processes 2] [--json FILE]

A mutant is refused with a DocumentError, and then the database was not written to; or it is accepted, and then everything in it is in
the database, its own bytes and those of an export of it satisfy the published JSON Schema, and the export says the same as the pack.
Prints one JSON document; exits 1 when a mutant did otherwise. `--only N` runs one mutant of the seed again and shows what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import multiprocessing
import platform
import random
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
from fuzz_packs_mutations import base_texts, mutant

import patune
from patune.cli_packs import SCHEMA_FILE
from patune.configs.packs import document_of, import_pack, load_pack, pack_text, stored_pack
from patune.configs.store import Store
from patune.errors import DocumentError
from patune.kernels.feasibility import is_feasible

if TYPE_CHECKING:
    from patune.configs.pack import Pack
    from patune.configs.pack_import import ImportReport
    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs

RESULT_SCHEMA = 1
MOST_STORED = 16  # winners and blocked knobs in a database before it is made anew
SHOWN_FINDINGS = 20
MEMORY = Path("/dev/shm")  # files there cost 20 us and not 800


class BrokenPromiseError(Exception):
    """A mutant was accepted or refused, and something is not as it must be then."""


class Bench:
    """A database that mutants are imported into, one after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.bases = base_texts()
        schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
        self.schema = jsonschema.Draft202012Validator(schema)
        self._template = folder / "template.db"
        Store.open(self._template).close()
        self._database = folder / "patune.db"
        self._pack = folder / "pack.json"
        self._stack = contextlib.ExitStack()
        self._renew()

    def _renew(self) -> None:
        """An empty database."""
        self._stack.close()
        for file in self._database.parent.glob("patune.db*"):
            file.unlink()
        shutil.copy(self._template, self._database)
        self._store = self._stack.enter_context(Store.open(self._database))
        look = sqlite3.connect(self._database)
        self._look = self._stack.enter_context(contextlib.closing(look))

    def close(self) -> None:
        self._stack.close()

    def _version(self) -> int:
        """Grows when another connection commits anything."""
        (version,) = self._look.execute("PRAGMA data_version").fetchone()
        return int(version)

    def _count(self, table: str) -> int:
        (count,) = self._look.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)

    def try_mutant(self, index: int) -> tuple[str, str]:
        """What was done to the pack, and how that ended.

        Raises:
            BrokenPromiseError: otherwise than promised; whatever else comes up is a crash.
        """
        change, data = self.data(index)
        self._pack.write_bytes(data)
        if self._count("patune_winner") + self._count("patune_blocklist") > MOST_STORED:
            self._renew()
        before, trials = self._version(), self._count("patune_trial")
        try:
            report = import_pack(self._store, self._pack)
        except DocumentError as error:
            if self._version() != before:
                raise BrokenPromiseError("refused, and the database was written to") from error
            if len(str(error)) > 2000 or not str(error).isprintable():
                raise BrokenPromiseError("the message would garble a terminal") from error
            return change, "refused"
        self._check_accepted(data, report, trials)
        return change, "accepted"

    def data(self, index: int) -> tuple[str, bytes]:
        """The mutant of a number: the same in every run of a seed."""
        return mutant(self.bases, random.Random(f"{self.seed}:{index}"))

    def _check_accepted(self, data: bytes, report: ImportReport, trials: int) -> None:
        pack = load_pack(self._pack)
        document, export = json.loads(data), document_of(pack)
        self._check_schema("pack", document)
        if pack_text(document) != pack_text(export):
            self._check_schema("export", export)
        self._pack.write_text(pack_text(export))
        if pack_text(document_of(load_pack(self._pack))) != pack_text(export):
            raise BrokenPromiseError("accepted, and its export says something else")
        self._check_stored(pack, report, trials)

    def _check_schema(self, what: str, document: Any) -> None:
        error = next(iter(self.schema.iter_errors(document)), None)
        if error is not None:
            raise BrokenPromiseError(
                f"accepted, and the JSON Schema refuses the {what}: {error.message[:200]}"
            )

    def _check_stored(self, pack: Pack, report: ImportReport, trials: int) -> None:
        """Everything that the report says came in is there, and nothing else."""
        stored = stored_pack(self._store)
        winners = {w.key: w for w in stored.winners}
        expected = sum(entry.fate == "added" for entry in report.blocklist)
        came = [e.winner for e in report.entries if e.fate in ("added", "replaced")]
        for winner in came:
            if winners.get(winner.key) != dataclasses.replace(winner, imported_from="pack.json"):
                raise BrokenPromiseError("accepted, and a winner is not in the database")
            beside = _usable(pack, winner)
            expected += 1 + len(beside)
            tried = {trial.knobs for trial in self._store.trials(**_key(winner))}
            if not tried.issuperset(beside):
                raise BrokenPromiseError("accepted, and the candidates are not in the database")
        for entry in report.robust:
            if entry.fate in ("added", "replaced") and entry.winner not in stored.robust:
                raise BrokenPromiseError("accepted, and a robust winner is not in the database")
        keys = {block.key for block in stored.blocklist}
        if any(block.key not in keys for block in pack.blocklist):
            raise BrokenPromiseError("accepted, and the blocklist is not in the database")
        grown = self._count("patune_trial") - trials
        if grown != expected:
            raise BrokenPromiseError(f"accepted, and {grown} trials came in, not {expected}")


def _key(winner: Winner) -> dict[str, Any]:
    return {"target": winner.target, "problem": winner.problem, "workload": winner.workload}


def _usable(pack: Pack, winner: Winner) -> set[Knobs]:
    """The knobs beside a winner that these kernels can run."""
    beside = (candidate.knobs for candidate in pack.candidates.get(winner.key, ()))
    return {k for k in beside if is_feasible(k, winner.problem, winner.target) is None}


def run_share(numbers: range, seed: int) -> dict[str, Any]:
    """Try every mutant of a range of numbers, in a folder of its own."""
    outcomes: Counter[str] = Counter()
    findings = []
    slowest = (0.0, -1)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        bench = Bench(Path(folder), seed)
        for index in numbers:
            began = time.perf_counter()
            try:
                change, outcome = bench.try_mutant(index)
            except BrokenPromiseError as error:
                change, outcome = "", "broken promise"
                findings.append({"mutant": index, "outcome": outcome, "what": str(error)})
            except Exception as error:
                change, outcome = "", "crash"
                last = traceback.format_exc().strip().splitlines()[-3:]
                what = f"{type(error).__name__}: {last}"[:500]
                findings.append({"mutant": index, "outcome": outcome, "what": what})
            outcomes[f"{change}: {outcome}" if change else outcome] += 1
            slowest = max(slowest, (time.perf_counter() - began, index))
        bench.close()
    return {"outcomes": outcomes, "findings": findings, "slowest": slowest}


def run(mutants: int, seed: int, processes: int) -> dict[str, Any]:
    """Try this many mutants; the document that is printed."""
    began = time.perf_counter()
    shares = [range(start, mutants, processes) for start in range(processes)]
    task = functools.partial(run_share, seed=seed)
    if processes == 1:
        done = [task(shares[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            done = pool.map(task, shares, chunksize=1)
    outcomes: Counter[str] = sum((share["outcomes"] for share in done), Counter())
    findings = [finding for share in done for finding in share["findings"]]
    totals: Counter[str] = Counter()
    for name, count in outcomes.items():
        totals[name.split(": ")[-1]] += count
    slowest_s, slowest = max(share["slowest"] for share in done)
    return {
        "schema": RESULT_SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {
            "patune": patune.__version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
        },
        "mutants": mutants,
        "seed": seed,
        "processes": processes,
        "seconds": round(time.perf_counter() - began, 1),
        "outcomes": dict(sorted(totals.items())),
        "by_change": dict(sorted((k, v) for k, v in outcomes.items() if ": " in k)),
        "slowest": {"mutant": slowest, "seconds": round(slowest_s, 3)},
        "findings": sorted(findings, key=lambda f: f["mutant"])[:SHOWN_FINDINGS],
        "findings_in_all": len(findings),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--only", type=int, help="one mutant's number: show it and what happens")
    options = parser.parse_args()
    if options.only is not None:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            bench = Bench(Path(folder), options.seed)
            sys.stdout.write(bench.data(options.only)[1].decode("utf-8", "replace") + "\n")
            print(bench.try_mutant(options.only))
        return 0
    document = run(options.mutants, options.seed, options.processes)
    text = json.dumps(document, indent=2) + "\n"
    if options.json is not None:
        options.json.write_text(text)
    sys.stdout.write(text)
    return 1 if document["findings_in_all"] else 0


if __name__ == "__main__":
    sys.exit(main())
