"""How keys, knobs, scores and times read."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fakes import counted, timed

from patune import wording
from patune.configs.dispatcher import lookup
from patune.kernels.knobs import CdnaKnobs, HopperKnobs, knobs_to_dict
from patune.problem import Problem, Workload

PROBLEM = Problem(block_size=1024, head_dim=128, qg=8).to_dict()
WORKLOAD = Workload(batch=128, kv_heads=8, context=4096).to_dict()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.9, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7385, "2 h 03 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration_text(seconds) == text


def test_emulated_work_never_reads_as_a_latency() -> None:
    winner = {"timing": None, "counted": counted(12345.0).to_dict(), "default_score": 24690.0}
    assert wording.full_score(winner) == "emulated-correct, counted 12345 slots"
    assert wording.short_score(winner) == "12345 slots"
    assert wording.gain_text(winner) == "50 %"
    texts = [wording.SCORE_LEGEND["emulated"], *wording.spread_rows(winner).values()]
    assert all(" us" not in f" {text} ".replace(" used", "") for text in texts)


def test_measured_times_name_their_share_of_the_ceiling() -> None:
    winner = {"timing": timed(123.44).to_dict(), "counted": None, "default_score": None}
    assert wording.full_score(winner) == "123.4 us (95 % of read ceiling)"
    assert wording.gain_text(winner) == "-"
    assert wording.gain_text({**winner, "default_score": 154.3}) == "1.25x"


def test_knobs_that_do_nothing_are_left_out() -> None:
    tile = {"partition_tokens": 128, "num_stages": 2, "num_warps": 4}
    one_shot = CdnaKnobs(num_splits=1, **tile)
    assert wording.knobs_text(knobs_to_dict(one_shot)) == "p128 s1 st2 w4"
    split = CdnaKnobs(num_splits=16, waves_per_eu=2, **tile)
    assert wording.knobs_text(knobs_to_dict(split)) == "p128 s16 st2 w4 eu2 r16x4"
    rare = replace(one_shot, mfma_rows=32, program_rows=32, lds_ring=True, cache_modifier=".cg")
    assert wording.knobs_text(knobs_to_dict(rare)) == "p128 s1 st2 w4 m32 rows32 ring cg"
    hopper = HopperKnobs(num_splits=4, maxnreg=128, probs_k_major=False, **tile)
    assert wording.knobs_text(knobs_to_dict(hopper)) == "p128 s4 st2 w4 reg128 pk0 r16x4"
    in_turn = HopperKnobs(num_splits=4, overlap_launch=False, **tile)
    assert wording.knobs_text(knobs_to_dict(in_turn)) == "p128 s4 st2 w4 pdl0 r16x4"


def test_a_key_says_only_what_differs_from_the_plain_variant() -> None:
    assert wording.key_text(PROBLEM, WORKLOAD) == (
        "block_size=1024 head_dim=128 qg=8 batch=128 kv_heads=8 context=4096"
    )
    variant = {**PROBLEM, "query_length": 2, "windowed": True}
    assert wording.variant_text(variant) == "query_length=2 windowed=True"
    capped = {**PROBLEM, "softcap": True, "fp8_math": True}
    assert wording.key_text(capped, WORKLOAD) == (
        "block_size=1024 head_dim=128 qg=8 softcap=True fp8_math=True batch=128 kv_heads=8 context=4096"
    )


def test_every_field_of_a_problem_is_the_core_or_can_be_said() -> None:
    core = {"block_size", "head_dim", "qg"}
    assert set(wording.PLAIN_VARIANT) == set(PROBLEM) - core


def test_the_plain_variant_is_what_problem_and_lookup_default_to() -> None:
    defaults = Problem(block_size=16, head_dim=64, qg=1).to_dict()
    assert {name: defaults[name] for name in wording.PLAIN_VARIANT} == wording.PLAIN_VARIANT
    parameters = inspect.signature(lookup).parameters
    assert parameters["kv_heads"].default == wording.LOOKUP_KV_HEADS
    assert all(parameters[n].default == value for n, value in wording.PLAIN_VARIANT.items())


def test_the_lookup_command_quotes_and_omits() -> None:
    line = wording.lookup_command(PROBLEM, WORKLOAD)
    assert line.startswith(wording.python_command())
    assert line.endswith(
        ' -c "import patune; print(patune.lookup(block_size=1024, head_dim=128, qg=8, batch=128, context=4096))"'
    )
    named = wording.lookup_command(
        {**PROBLEM, "sinks": True}, WORKLOAD, target="gfx950", db=Path("/a b/c.db")
    )
    assert named.startswith("PATUNE_DB='/a b/c.db' ")
    assert "qg=8, sinks=True, batch=128, context=4096, target='gfx950')" in named


def test_the_python_command_runs_this_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert wording.python_command() == "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert wording.python_command() == sys.executable
    monkeypatch.chdir(Path(sys.executable).parent.parent)
    assert wording.python_command() == f"bin/{Path(sys.executable).name}"


def test_failures_are_ordered_and_added_up() -> None:
    counts = wording.total([{"spills": 1, "wrong": 2}, {"spills": 4}])
    assert counts == {"spills": 5, "wrong": 2}
    assert wording.failures_text(counts) == "5 spills, 2 wrong"
    assert wording.failures_text({}) == ""


def test_long_reasons_become_one_short_line() -> None:
    assert wording.shorten("a\n  b", 10) == "a b"
    assert wording.shorten("x" * 20, 10) == "x" * 7 + "..."


def test_changes_of_an_environment_are_short() -> None:
    changes = {
        "device_name": ("NVIDIA H200", "NVIDIA H100 80GB HBM3"),
        "triton": ("3.6.0", "3.9.0"),
        "compiler": ("ptxas 12.8", "ptxas 12.9"),
        "fp_fusion": (True, False),
        "kernel_source_hash": ("ce69e675fddd", "50b1c2d3e4f5"),
    }
    assert wording.change_texts(changes) == [
        "device NVIDIA H200 -> NVIDIA H100 80GB HBM3",
        "triton 3.6.0 -> 3.9.0",
        "ptxas 12.8 -> ptxas 12.9",
        "fp fusion True -> False",
        "source ce69e675 -> 50b1c2d3",
    ]
    of_triton = {"compiler": ("llvm of triton 3.6.0", "llvm of triton 3.9.0")}
    assert wording.change_texts(of_triton) == []
    assert wording.change_texts({}) == []


def test_speedups_have_their_interval_and_ties_are_ties() -> None:
    winner = {
        "knobs": {"a": 1}, "default_knobs": {"a": 2}, "default_score": 300.0, "counted": None,
        "timing": {"median_us": 200.0},
    }  # fmt: skip
    speedup = {"ratio": 1.034, "low": 1.019, "high": 1.041}
    assert wording.speedup_text(winner, speedup) == "1.03x (1.02-1.04)"
    assert wording.speedup_text(winner, None) == "1.50x"
    assert wording.speedup_text({**winner, "knobs": {"a": 2}}, speedup) == "tie"
    assert wording.speedup_text({**winner, "default_knobs": None}, None) == "1.50x"
    counted = {**winner, "timing": None, "counted": {"busiest_simd_slots": 150}}
    assert wording.speedup_text(counted, speedup) == "50 %"


def test_the_device_s_share_is_said() -> None:
    busy = {"share": 0.834, "wall_s": 95.0, "share_after_first_minute": 0.912}
    assert wording.busy_text(busy) == "device busy: 83 % of 1 min 35 s, 91 % after the first minute"
    busy = {"share": 0.5, "wall_s": 40.0, "share_after_first_minute": None}
    assert wording.busy_text(busy) == "device busy: 50 % of 40 s"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0, 0, "no time"), (20.4, 49.1, "20 to 49 s"), (1.24, 2.6, "1.2 to 2.6 s"), (80, 130, "1.3 to 2.2 min"),
        (1234, 4321, "21 to 72 min"), (9000, 40000, "2.5 to 11 h"), (1e6, 2e6, "280 to 560 h"), (60, 61, "60 to 61 s"),
        (119, 121, "2 min"),
    ],
)  # fmt: skip
def test_estimates_are_not_too_precise(low: float, high: float, text: str) -> None:
    assert wording.range_text(low, high) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (49_500, "49.5 kB"), (3_400_000, "3.4 MB"), (5 * 10**12, "5000.0 GB")],
)  # fmt: skip
def test_bytes_have_units(count: int, text: str) -> None:
    assert wording.bytes_text(count) == text


def test_a_short_key_is_what_commands_take() -> None:
    from patune.cli_keys import parse_key

    problem = {"block_size": 1024, "head_dim": 128, "qg": 8}
    workload = {"batch": 16, "kv_heads": 4, "context": 512}
    assert wording.short_key(problem, workload) == "1024/128/8/16x4/512"
    assert parse_key([wording.short_key(problem, workload)]) == {**problem, **workload}


def test_what_holds_says_what_has_changed() -> None:
    changed = {"triton": {"stored": "3.5.0", "present": "3.9.0"}}
    assert wording.holds_text("reverify", changed) == "re-verify: triton 3.5.0 -> 3.9.0"
    assert wording.holds_text("fresh", {}) == "fresh: nothing has changed since"
