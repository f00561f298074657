"""Compiles every kernel for sm_90, gfx942 and gfx950 with the Triton that is installed, without a GPU.

    python scripts/compile_check.py [--refuse-spills] [--arch ARCH ...]

Prints each case with the registers, spills and shared memory of its builds. Exits 1 when a build fails; with --refuse-spills also when one
spills without a register cap among its knobs (a sweep refuses builds that spill, so default knobs must not).
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import importlib.metadata
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from patune.target import ARCHS

if TYPE_CHECKING:
    from patune.kernels.compile_matrix import CompileCase

CAPS = ("maxnreg", "waves_per_eu")
SHOWN_FACTS = ("registers", "vgpr", "agpr", "sgpr", "spills", "shared_b", "waves_per_simd")


def compile_case(case: CompileCase) -> tuple[dict[str, dict[str, Any]], str]:
    """Compile one case: facts by kernel, and the first line of the error or an empty text."""
    from patune.kernels.compile import compile_call

    facts: dict[str, dict[str, Any]] = {}
    try:
        for call in case.calls():
            facts[call.kernel.fn.__name__] = compile_call(call, case.target).facts()
    except Exception as error:  # whatever the compiler raises is the verdict of this case
        return facts, f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return facts, ""


def leave_quietly() -> None:
    """Let a worker end without its interpreter's clean-up, where Triton's bindings print pages about leaked functions."""
    atexit.register(os._exit, 0)


def spills_by_itself(case: CompileCase, facts: dict[str, dict[str, Any]]) -> bool:
    """Whether a build spills though no knob caps its registers."""
    capped = any(getattr(case.knobs, cap, 0) for cap in CAPS)
    return not capped and any(fact["spills"] for fact in facts.values())


def main() -> int:
    """Compile the matrix on all cores."""
    from patune.kernels.compile_matrix import compile_matrix

    arguments = argparse.ArgumentParser()
    arguments.add_argument("--arch", action="append", choices=list(ARCHS))
    arguments.add_argument("--refuse-spills", action="store_true")
    options = arguments.parse_args()
    started = time.perf_counter()
    cases = [c for c in compile_matrix() if c.target.arch in (options.arch or ARCHS)]
    workers = min(len(os.sched_getaffinity(0)), len(cases))
    failed = spilled = 0
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=leave_quietly
    ) as pool:
        for case, (facts, error) in zip(cases, pool.map(compile_case, cases), strict=True):
            spills = spills_by_itself(case, facts)
            failed += bool(error)
            spilled += spills
            print(f"{'FAILED' if error else 'spills' if spills else 'ok    '} {case.name}")
            for kernel, fact in facts.items():
                shown = " ".join(f"{name}={fact[name]}" for name in SHOWN_FACTS if name in fact)
                print(f"       {kernel}: {shown}")
            if error:
                print(f"       {error}")
    seconds = time.perf_counter() - started
    triton = importlib.metadata.version("triton")
    print(
        f"triton {triton}: {len(cases)} cases, {failed} failed, {spilled} spill without a register cap, "
        f"{seconds:.0f} s on {workers} cores"
    )
    return 1 if failed or (spilled and options.refuse_spills) else 0


if __name__ == "__main__":
    sys.exit(main())
