"""Every kind of problem and knob of the CDNA kernel passes the emulated gate: layouts, head sizes, fp8 in both maths, row parts, LDS rings."""

from __future__ import annotations

from typing import Any

import pytest

from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import CdnaKnobs
from patune.problem import Problem
from patune.target import Target
from patune.tuner.executors import EmulatedExecutor
from patune.tuner.gate import run_gate

pytestmark = pytest.mark.slow
FP8 = {"gfx942": "fp8_e4m3fnuz", "gfx950": "fp8_e4m3fn"}
NARROW = {"partition_tokens": 64, "num_warps": 2}
RING = {**NARROW, "lds_ring": True, "num_stages": 3}
BOTH = ("gfx942", "gfx950")
# (architectures, problem, knobs); "fp8" stands for the architecture's own
VARIANTS: tuple[tuple[tuple[str, ...], dict[str, Any], dict[str, Any]], ...] = (
    (BOTH, {}, {"num_stages": 3}),
    (BOTH, {"kv_layout": "hnd"}, {}),
    (("gfx942",), {"kv_layout": "nhd", "block_size": 16}, {}),
    (("gfx950",), {"kv_layout": "nhd", "block_size": 64, "head_dim": 64}, NARROW),
    (("gfx942",), {"kv_layout": "aiter_5d"}, {"cache_modifier": ".cg"}),
    (("gfx950",), {"kv_layout": "aiter_5d", "block_size": 16}, {}),
    (("gfx942",), {"head_dim": 256}, NARROW),
    (("gfx950",), {"head_dim": 256, "kv_layout": "hnd", "block_size": 64}, NARROW),
    (BOTH, {"softcap": True, "query_length": 4}, NARROW),
    (("gfx942",), {"query_length": 4, "kv_layout": "hnd"}, {**NARROW, "mfma_rows": 32}),
    (("gfx950",), {"query_length": 16, "qg": 4}, {**NARROW, "mfma_rows": 32, "program_rows": 32}),
    (("gfx942",), {"query_length": 3, "qg": 12, "windowed": True, "sinks": True}, {**NARROW, "program_rows": 16}),
    (("gfx950",), {"qg": 64}, {**NARROW, "program_rows": 16}),
    (("gfx942",), {"kv_dtype": "fp8"}, NARROW),
    (("gfx950",), {"kv_dtype": "fp8", "kv_layout": "hnd"}, {}),
    (BOTH, {"kv_dtype": "fp8", "kv_quant": "per_token", "block_size": 16}, {}),
    (("gfx950",), {"kv_dtype": "fp8", "kv_quant": "per_tensor", "query_dtype": "fp16"}, {}),
    (("gfx942",), {"kv_dtype": "fp8", "query_dtype": "fp8", "kv_quant": "per_tensor", "head_dim": 64}, {}),
    (BOTH, {"kv_dtype": "fp8", "fp8_math": True, "kv_layout": "hnd"}, {}),
    (("gfx942",), {"kv_dtype": "fp8", "fp8_math": True, "query_dtype": "fp8", "kv_quant": "per_token"}, {}),
    (("gfx950",), {}, {**RING, "partition_tokens": 128, "num_warps": 4, "num_stages": 2}),
    (("gfx950",), {"windowed": True, "sinks": True, "query_length": 2}, {**RING, "num_stages": 4}),
    (("gfx950",), {"kv_layout": "aiter_5d", "block_size": 64}, RING),
    (("gfx950",), {"kv_layout": "nhd", "head_dim": 256, "block_size": 64}, {**RING, "num_stages": 2}),
    (("gfx950",), {"query_length": 4, "head_dim": 64}, {**RING, "mfma_rows": 32, "num_stages": 2}),
    (("gfx950",), {"kv_dtype": "fp8", "kv_quant": "per_token", "fp8_math": True}, {**RING, "partition_tokens": 128}),
)  # fmt: skip


def posed(arch: str, fields: dict[str, Any], changes: dict[str, Any]) -> tuple[Problem, CdnaKnobs]:
    own = {name: FP8[arch] if value == "fp8" else value for name, value in fields.items()}
    knobs = {"partition_tokens": 128, "num_splits": 2, "num_stages": 1, "num_warps": 4, **changes}
    return Problem(**{"block_size": 1024, "head_dim": 128, "qg": 8, **own}), CdnaKnobs(**knobs)


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}_{v}" for k, v in value.items()) or "default"  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "fields", "changes"),
    [(arch, fields, changes) for archs, fields, changes in VARIANTS for arch in archs],
    ids=name_of,
)
def test_the_gate_passes(arch: str, fields: dict[str, Any], changes: dict[str, Any]) -> None:
    target = Target.named(arch)
    problem, knobs = posed(arch, fields, changes)
    assert is_feasible(knobs, problem, target) is None
    report = run_gate(problem, knobs, target, EmulatedExecutor(target))
    assert (report.status, report.reason) == ("ok", "")
    assert report.cases >= 5
