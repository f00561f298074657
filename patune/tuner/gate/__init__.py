"""The correctness gate: nothing is timed, stored or served before it passed.

A library of its own: sweep, check, verify and the tests run the same cases, on devices and in the ISA emulator alike. docs/gate.md says what it
proves and how its cases, tolerances and planted bugs were chosen.
"""

from patune.tuner.gate.runner import Plan, run_cases, run_gate
from patune.tuner.gate.verdict import GateReport

__all__ = ["GateReport", "Plan", "run_cases", "run_gate"]
