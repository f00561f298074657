"""Functional execution of compiled gfx942/gfx950 kernels, and static facts of a build."""

from patune.emulator.counting import busiest_simd_slots, issue_slots
from patune.emulator.facts import StaticFacts, static_facts
from patune.emulator.lds import Race
from patune.emulator.machine import Execution
from patune.emulator.memory import Traffic
from patune.emulator.program import Program

__all__ = [
    "Execution",
    "Program",
    "Race",
    "StaticFacts",
    "Traffic",
    "busiest_simd_slots",
    "issue_slots",
    "static_facts",
]
