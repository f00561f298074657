"""Registers, spills, LDS and occupancy of the decode kernels on gfx942 and gfx950 by waves_per_eu: from the machine code, nothing is run.

    python benchmarks/amd_static.py [--json FILE] [--arch ARCH ...] [--waves 0,1,2,3,4] [--jobs N]

Other knobs are the defaults of batch 1 and batch 128 with 8 KV heads and 4096 tokens. The decode kernel of each build is shown; `spills` are
its vector registers that live in scratch memory. Problems that no kernel computes and knobs that cannot work are listed with the reason.
These are static facts: none of them is a latency, and no AMD device was used.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patune.environment import current_environment
from patune.problem import Problem, Workload
from patune.record import Record
from patune.target import ARCHS, Target
from patune.tuner.check_cases import CheckCase, CheckOptions, select_cases
from patune.tuner.check_run import run_checks
from patune.wording import problem_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.tuner.check_rows import CheckRow

SCHEMA = 1
AMD = tuple(arch for arch in ARCHS if Target.named(arch).vendor == "amd")
PAGES = (16, 1024)
HEAD_DIMS = (64, 128, 256)
SHAPES = ((8, 1), (16, 4))  # (qg, query_length): 8 and 64 query rows
CACHES: tuple[dict[str, Any], ...] = (
    {},
    {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_tensor"},
    {"kv_dtype": "fp8_e4m3fnuz", "kv_quant": "per_tensor"},
)
WORKLOADS = (
    Workload(batch=1, kv_heads=8, context=4096),
)  # splits: one-shot builds differ in their epilogue only
FACTS = ("vgpr", "agpr", "total_vgpr", "sgpr", "spills", "scratch_b", "shared_b", "waves_per_simd", "limiter", "code_b")  # fmt: skip
HEADINGS = (
    "target", "page", "D", "rows", "cache", "splits", "eu", "status",
    "vgpr", "agpr", "spills", "scratch B", "LDS B", "waves/SIMD", "limiter", "MFMA",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StaticRow(Record):
    """Static facts of one decode kernel, or why there are none."""

    arch: str
    problem: dict[str, Any]
    knobs: dict[str, Any] | None
    status: str
    reason: str
    facts: dict[str, Any] | None


def problems() -> tuple[Problem, ...]:
    return tuple(
        Problem(block_size=page, head_dim=head_dim, qg=qg, query_length=length, **cache)
        for cache, page, head_dim, (qg, length) in itertools.product(
            CACHES, PAGES, HEAD_DIMS, SHAPES
        )
    )


def cases_of(archs: Sequence[str], waves: Sequence[int]) -> list[CheckCase]:
    """The default and the safe knobs of every problem with every number of waves; the gate of a check is left out."""
    options = CheckOptions(
        targets=tuple(Target.named(arch) for arch in archs),
        problems=problems(),
        workloads=WORKLOADS,
    )
    cases = []
    for case in select_cases(options):
        if case.knobs is None or case.infeasible:
            cases.append(case)
            continue
        for count in waves:
            knobs = dataclasses.replace(case.knobs, waves_per_eu=count)
            cases.append(dataclasses.replace(case, knobs=knobs))
    return cases


def static_row(row: CheckRow) -> StaticRow:
    facts = None
    if row.facts:
        decode = next(iter(row.facts.values()))
        facts = {name: decode[name] for name in FACTS} | {"mfma": decode["mix"].get("mfma", 0)}
    status = "ok" if row.status in ("static_ok", "identical") else row.status
    reason = "" if status == "ok" else row.reason
    return StaticRow(
        arch=row.target,
        problem=row.problem,
        knobs=row.knobs,
        status=status,
        reason=reason,
        facts=facts,
    )


def document_of(rows: Sequence[StaticRow], archs: Sequence[str]) -> dict[str, Any]:
    environment = current_environment(Target.named(archs[0]))
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d"),
        "what": "static facts of ahead-of-time builds; no latency, no AMD device",
        "triton": environment.triton,
        "kernel_source_hash": environment.kernel_source_hash,
        "environment": environment.to_dict(),
        "rows": [row.to_dict() for row in rows],
    }


def cells_of(row: StaticRow) -> list[str]:
    p, knobs = row.problem, row.knobs or {}
    cells = [row.arch, p["block_size"], p["head_dim"], p["qg"] * p["query_length"], p["kv_dtype"]]
    cells += [knobs["num_splits"], knobs["waves_per_eu"], row.status]
    if row.facts:
        names = ("vgpr", "agpr", "spills", "scratch_b", "shared_b", "waves_per_simd", "limiter", "mfma")  # fmt: skip
        cells += [row.facts[name] for name in names]
    return [f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells]


def table_text(document: dict[str, Any]) -> str:
    """The rows that were built as a table, then what was left out and why."""
    rows = [StaticRow.from_dict(row) for row in document["rows"]]
    lines = [list(HEADINGS), *(cells_of(row) for row in rows if row.facts)]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(HEADINGS))]
    head = f"static facts, no latency: {document['date']}, triton {document['triton']}, kernel source {document['kernel_source_hash'][:12]}"
    table = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=False)) for line in lines]
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if not row.facts:
            left_out.setdefault(f"{row.status}: {row.reason}", []).append(problem_text(row.problem))
    skipped = [f"{why}: {len(which)} cases, such as {which[0]}" for why, which in left_out.items()]
    return "\n".join([head, "", *table, "", *(skipped or ["nothing was left out"])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the document here")
    parser.add_argument("--arch", action="append", choices=AMD)
    parser.add_argument("--waves", default="0,1,2,3,4", help="values of waves_per_eu")
    parser.add_argument("--jobs", type=int, help="worker processes; one per CPU without it")
    options = parser.parse_args(arguments)
    archs = tuple(options.arch or AMD)
    cases = cases_of(archs, [int(word) for word in options.waves.split(",")])
    rows = []
    for row in run_checks(cases, jobs=options.jobs, gate=False):
        rows.append(static_row(row))
        if sys.stderr.isatty():
            print(f"\r{len(rows)}/{len(cases)}", end="", file=sys.stderr)
    document = document_of(rows, archs)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"written: {options.json}", file=sys.stderr)
    print(table_text(document))
    broken = [row for row in rows if row.status not in ("ok", "spills", "infeasible")]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
