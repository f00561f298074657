"""fp8 caches, fp8 products, 5-D values and capped scores: the gate passes what is right and rejects every planted bug."""

from __future__ import annotations

from typing import Any

import pytest
from test_gate_simulation import TARGET, CpuExecutor, Simulation, make_knobs, make_problem

from patune.tuner.gate import GateReport, run_cases
from patune.tuner.gate.cases import gate_cases

FP8 = {"kv_dtype": "fp8_e4m3fn", "block_size": 16}
TENSOR = FP8 | {"kv_quant": "per_tensor"}
TOKEN = FP8 | {"kv_quant": "per_token"}
MATH = TOKEN | {"fp8_math": True}
QUERY = TOKEN | {"query_dtype": "fp8_e4m3fn"}
FIVE = {"kv_layout": "aiter_5d", "block_size": 16}
CAP = {"softcap": True}
HND = {"kv_layout": "hnd", "block_size": 16}
FNUZ = {"kv_dtype": "fp8_e4m3fnuz", "query_dtype": "fp8_e4m3fnuz"}

RIGHT: list[dict[str, Any]] = [
    FP8,
    TENSOR | {"windowed": True, "softcap": True, "kv_layout": "hnd"},
    TOKEN | {"sinks": True, "query_length": 2, "kv_layout": "aiter_5d"},
    TOKEN | {"query_dtype": "fp16", "kv_layout": "nhd", "windowed": True},
    QUERY | {"kv_layout": "aiter_5d", "head_dim": 128, "softcap": True},
    TENSOR | {"fp8_math": True, "query_length": 16},
    MATH | {"softcap": True, "sinks": True, "windowed": True},
    MATH | {"query_dtype": "fp16", "kv_layout": "hnd"},
    MATH | FNUZ | {"query_length": 3},
    FIVE | CAP | {"sinks": True, "query_length": 8},
    {"head_dim": 256, "softcap": True, "windowed": True, "query_dtype": "fp16", "kv_dtype": "fp16"},
    TENSOR | {"head_dim": 256, "block_size": 1024, "kv_layout": "aiter_5d"},
]


def gate(bug: str, fields: dict[str, Any], *, emulated: bool) -> GateReport:
    """The gate without its far pages, which take a buffer of gigabytes and have a test of their own."""
    problem, knobs = make_problem(**fields), make_knobs(tile=64)
    cases = [c for c in gate_cases(problem, knobs, emulated=emulated) if not c.far]
    return run_cases(cases, problem, knobs, TARGET, CpuExecutor(), plan=Simulation(bug).plan)


@pytest.mark.parametrize("emulated", [True, False], ids=["emulated", "device"])
@pytest.mark.parametrize("fields", RIGHT, ids=str)
def test_a_correct_kernel_passes(fields: dict[str, Any], emulated: bool) -> None:
    report = gate("", fields, emulated=emulated)
    assert (report.status, report.reason) == ("ok", "")
    assert report.error_rms is not None
    if not fields.get("fp8_math"):
        # rounding the output is at most 0.39 % of bf16 and 0.05 % of fp16
        assert report.error_rms < (0.0006 if fields.get("query_dtype") == "fp16" else 0.004)


BUGS: list[tuple[str, dict[str, Any]]] = [
    # bug, problem
    ("key scale twice", TENSOR),
    ("value scale twice", TENSOR),
    ("key scale twice", TOKEN),
    ("value scale twice", TOKEN),
    ("key scale dropped", TENSOR),
    ("value scale dropped", TENSOR),
    ("key scale dropped", TOKEN),
    ("value scale dropped", TOKEN),
    ("scales swapped", TENSOR),
    ("scales swapped", TOKEN),
    ("per tensor as per token", TENSOR),
    ("per token as per tensor", TOKEN),
    ("one scale per tile", TOKEN),
    ("scales of head 0", TOKEN),
    ("scale of wrong page", TOKEN),
    ("scale of wrong page", TOKEN | {"windowed": True}),
    ("value scale by key strides", TOKEN),
    ("value scale tail unmasked", TOKEN),
    ("value scale tail unmasked", TOKEN | {"windowed": True}),
    ("value scale tail unmasked", MATH),
    ("value tail unmasked", FP8),
    ("fold not normalised", TOKEN),
    ("fold not normalised", MATH),
    ("fp8 probabilities", TENSOR),
    ("query cast", FP8),
    ("query cast", TENSOR | {"fp8_math": True}),
    ("query cast", MATH | {"query_dtype": "fp16"}),
    ("query saturates", FP8),
    ("query saturates", MATH),
    ("small query lost", FP8),
    ("small query lost", MATH),
    ("zero row", FP8),
    ("zero row", MATH),
    ("query scale dropped", QUERY),
    ("query scale of row 0", QUERY),
    ("x of 8", FP8),
    ("x of 8", FP8 | {"kv_layout": "aiter_5d"}),
    ("x of 8", {"kv_dtype": "fp8_e4m3fn", "block_size": 1024}),
    ("5-D value as a key", FIVE),
    ("5-D value as a key", TOKEN | {"kv_layout": "aiter_5d"}),
    ("5-D value as 4-D", FIVE),
    ("softcap ignored", CAP),
    ("softcap ignored", TOKEN | CAP),
    ("softcap ignored", MATH | CAP),
    ("softcap in base 2", CAP),
    ("softcap in base 2", MATH | CAP),
    ("softcap clamps", CAP),
    ("softcap before scale", CAP),
    ("softcap on the sink", CAP | {"sinks": True}),
    ("cache written", {}),
]
# what the short list has no room for
DEVICE_BUGS: list[tuple[str, dict[str, Any]]] = [
    ("value by key strides", {"block_size": 16}),
    ("value by key strides", FIVE),
    ("value by key strides", HND),
    ("dense pages", HND),
    ("dense pages", TOKEN | {"kv_layout": "nhd"}),
]


@pytest.mark.parametrize(("bug", "fields"), BUGS, ids=[f"{b[0]} {[*b[1].values()]}" for b in BUGS])
@pytest.mark.parametrize("emulated", [True, False], ids=["emulated", "device"])
def test_a_planted_bug_is_rejected(bug: str, fields: dict[str, Any], emulated: bool) -> None:
    report = gate(bug, fields, emulated=emulated)
    assert report.status in ("wrong", "nonfinite"), report


@pytest.mark.parametrize(
    ("bug", "fields"),
    DEVICE_BUGS,
    ids=[f"{b[0]} {[*b[1].values()]}" for b in DEVICE_BUGS],
)
def test_a_planted_bug_is_rejected_on_the_device(bug: str, fields: dict[str, Any]) -> None:
    report = gate(bug, fields, emulated=False)
    assert report.status in ("wrong", "nonfinite"), report


def test_the_reasons_name_what_is_wrong() -> None:
    assert "cache was written" in gate("cache written", {}, emulated=True).reason
    capped = gate("softcap ignored", CAP, emulated=True)
    assert capped.failed_case == "random/edges"
    assert "relative RMS error" in capped.reason
