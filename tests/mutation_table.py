"""Plants every CDNA kernel bug and every fault in compiled code, and prints what caught them: ``python tests/mutation_table.py [--json FILE]``.

AMD only, no GPU: the gate runs in the ISA emulator. Exits 1 when anything passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assembly_faults import FaultyExecutor, builds_of
from fault_settings import SETTINGS
from mutants import CDNA_KNOBS, CDNA_PROBLEM, mutants_of, plant

from patune.environment import current_environment
from patune.target import Target
from patune.tuner.executors import EmulatedExecutor
from patune.tuner.gate import run_gate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.tuner.gate import GateReport


def row(kind: str, name: str, arch: str, report: GateReport) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "arch": arch,
        "verdict": report.status,
        "case": report.failed_case,
        "reason": report.reason,
    }


def kernel_bugs(folder: Path) -> Iterator[dict[str, Any]]:
    for mutant in mutants_of("cdna_mfma"):
        executor = EmulatedExecutor(Target.named(mutant.cdna_arch))
        problem = replace(CDNA_PROBLEM, **mutant.problem)
        knobs = replace(CDNA_KNOBS, **mutant.knobs)
        report = run_gate(problem, knobs, executor.target, executor, plan=plant(mutant, folder))
        yield row("kernel source", f"{mutant.module}: {mutant.name}", mutant.cdna_arch, report)


def compiled_faults() -> Iterator[dict[str, Any]]:
    for setting in SETTINGS:
        executor = EmulatedExecutor(Target.named(setting.arch))
        assert run_gate(setting.problem, setting.knobs, executor.target, executor).ok
        build = builds_of(executor, setting.kernel)[0]
        assert build.asm is not None
        for fault in setting.faults(build.asm):
            faulty = FaultyExecutor(executor, build, fault)
            report = run_gate(setting.problem, setting.knobs, executor.target, faulty)
            yield row(fault.kind, f"{setting.name}: {fault.place}", setting.arch, report)


def table(rows: list[dict[str, Any]]) -> str:
    """Planted and caught by kind, and by what."""
    lines = ["| fault | planted | caught | wrong values | NaN or unwritten | race | refused access |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind in dict.fromkeys(r["kind"] for r in rows):
        verdicts = Counter(r["verdict"] for r in rows if r["kind"] == kind)
        caught = verdicts.total() - verdicts["ok"]
        seen = [verdicts[v] for v in ("wrong", "nonfinite", "unstable", "launch_error")]
        lines.append(f"| {kind} | {verdicts.total()} | {caught} | {' | '.join(map(str, seen))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        rows = [*kernel_bugs(Path(folder)), *compiled_faults()]
    environment = current_environment(Target.named("gfx942"))
    head = f"{time.strftime('%Y-%m-%d')}, Triton {environment.triton}, Python {platform.python_version()}, kernel source {environment.kernel_source_hash[:12]}"
    print(f"{head}\n\n{table(rows)}")
    passed = [r["name"] for r in rows if r["verdict"] == "ok"]
    print(f"\npassed the gate: {', '.join(passed) or 'none'}")
    if path:
        document = {"date": time.strftime("%Y-%m-%d"), "environment": environment.to_dict(), "faults": rows}  # fmt: skip
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
