"""Faults in compiled code do not pass: every barrier, shared-memory offset and wait for a copy that matters, and every short buffer."""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from assembly_faults import Fault, FaultyExecutor, builds_of, removed_barriers, weakened_waits
from fault_settings import SETTINGS, Setting

from patune.target import Target
from patune.tuner.executors import EmulatedExecutor
from patune.tuner.gate import run_gate

if TYPE_CHECKING:
    from patune.kernels.compile import Build

pytestmark = pytest.mark.slow
KINDS = ("removed barrier", "shifted LDS offset", "weakened wait", "short buffer")


@functools.cache
def correct(setting: Setting) -> tuple[EmulatedExecutor, Build]:
    """An executor that holds the builds of a setting, which pass, and the build that faults are planted into."""
    executor = EmulatedExecutor(Target.named(setting.arch))
    report = run_gate(setting.problem, setting.knobs, executor.target, executor)
    assert (report.status, report.reason) == ("ok", "")
    return executor, builds_of(executor, setting.kernel)[0]


def faults_of(setting: Setting, kind: str) -> list[Fault]:
    _, build = correct(setting)
    assert build.asm is not None
    return [fault for fault in setting.faults(build.asm) if fault.kind == kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_every_fault_is_rejected(setting: Setting, kind: str) -> None:
    executor, build = correct(setting)
    verdicts = {}
    for fault in faults_of(setting, kind):
        faulty = FaultyExecutor(executor, build, fault)
        report = run_gate(setting.problem, setting.knobs, executor.target, faulty)
        verdicts[fault.place] = report.status
        if kind == "removed barrier":
            assert "race" in report.reason
        if kind == "short buffer":
            assert f"argument {fault.argument}" in report.reason
    assert [place for place, status in verdicts.items() if status == "ok"] == []


def test_there_are_faults_of_every_kind() -> None:
    counts = Counter(
        fault.kind for setting in SETTINGS for kind in KINDS for fault in faults_of(setting, kind)
    )
    assert set(counts) == set(KINDS)
    assert counts["weakened wait"] == 2  # of keys and of values
    assert all(counts[kind] > 20 for kind in KINDS if kind != "weakened wait")


def test_what_a_fault_changes() -> None:
    asm = "x:\n\ts_barrier\n\ts_waitcnt lgkmcnt(0)\n\ts_barrier\n\tds_read_b32 v1, v2\n\ts_barrier\n\ts_waitcnt vmcnt(8)\n"
    first, second = removed_barriers(asm)
    assert first.asm == asm.replace("\ts_barrier\n\ts_waitcnt lgkmcnt(0)\n\ts_barrier", "\ts_nop 0\n\ts_waitcnt lgkmcnt(0)\n\ts_nop 0")  # fmt: skip
    assert second.asm.count("s_barrier") == 2
    assert second.place == "line 6: s_barrier"
    (wait,) = weakened_waits(asm)
    assert wait.asm == asm.replace("vmcnt(8)", "vmcnt(63)")
