"""What the CDNA kernel refuses and why, its defaults, and the knobs that a sweep tries."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from patune.kernels.defaults import default_knobs
from patune.kernels.feasibility import is_feasible, padded_rows, programs_per_walk, unsupported
from patune.kernels.knobs import CdnaKnobs
from patune.kernels.plan import plan_decode
from patune.kernels.samples import sample_inputs
from patune.kernels.space import feasible_pool, knob_choices
from patune.problem import BLOCK_SIZES, HEAD_DIMS, KV_LAYOUTS, Problem, Workload
from patune.target import Target

MI300X, MI355X = Target.named("gfx942"), Target.named("gfx950")
FP8 = {"gfx942": "fp8_e4m3fnuz", "gfx950": "fp8_e4m3fn"}
PLAIN = Problem(block_size=1024, head_dim=128, qg=8)
KNOBS = CdnaKnobs(partition_tokens=64, num_splits=4, num_stages=2, num_warps=2)
RING = replace(KNOBS, lds_ring=True, num_stages=3)
ALONE = Workload(batch=1, kv_heads=8, context=4096)
MANY = replace(ALONE, batch=128)


@pytest.mark.parametrize(
    ("target", "fields", "reason"),
    [
        (MI300X, {"kv_dtype": "fp8_e4m3fn"}, "gfx942 has fp8_e4m3fnuz only"),
        (MI355X, {"kv_dtype": "fp8_e4m3fnuz"}, "gfx950 has fp8_e4m3fn only"),
        (MI300X, {"kv_dtype": "fp16"}, "a fp16 cache takes a query of its own type; seen query_dtype=bf16, kv_dtype=fp16"),
    ],
)  # fmt: skip
def test_unsupported_problems(target: Target, fields: dict[str, Any], reason: str) -> None:
    assert reason in (unsupported(replace(PLAIN, **fields), target) or "")
    assert unsupported(PLAIN, target) is None


@pytest.mark.parametrize(
    ("knobs", "problem", "target", "reason"),
    [
        (replace(KNOBS, num_warps=4), {}, MI300X, "leaves a warp fewer than 32 tokens"),
        (replace(KNOBS, num_stages=4), {}, MI300X, "num_stages=4: without lds_ring"),
        (replace(KNOBS, mfma_rows=32), {}, MI300X, "mfma_rows=32: a program's 8 query rows"),
        (replace(KNOBS, program_rows=16), {}, MI300X, "program_rows=16: the problem has 8 query rows"),
        (replace(KNOBS, program_rows=16, mfma_rows=32), {"query_length": 4}, MI300X, "mfma_rows=32: a program's 16 query rows"),
        (replace(KNOBS, num_warps=8, partition_tokens=256, waves_per_eu=1), {}, MI300X, "waves_per_eu=1: a workgroup of num_warps=8 puts 2 waves on each SIMD"),
        (replace(KNOBS, num_warps=8, partition_tokens=256, waves_per_eu=3), {}, MI300X, "or a multiple of 2"),
        (RING, {}, MI300X, "lds_ring=True: gfx942 copies 4 bytes per lane"),
        (replace(RING, num_stages=1), {}, MI355X, "lds_ring=True: num_stages=1 leaves no slot"),
        (RING, {"block_size": 16}, MI355X, "lds_ring=True: partition_tokens=64 on pages of block_size=16"),
        (RING, {"kv_layout": "hnd", "head_dim": 64}, MI355X, "a lane has 4 neighbouring elements of a value tile, its 16-byte copies need 8"),
        (RING, {"kv_dtype": "fp8_e4m3fn"}, MI355X, "a lane has 8 neighbouring elements of a value tile, its 16-byte copies need 16"),
        (replace(RING, partition_tokens=128, num_warps=4), {}, MI355X, "num_stages=3 needs 196608 B LDS for the ring, gfx950 has 163840 B"),
        (replace(RING, num_stages=2, waves_per_eu=2), {}, MI355X, "waves_per_eu=2 is 4 workgroups per compute unit, whose rings of 65536 B do not fit"),
        (replace(KNOBS, reduce_chunk=4), {}, MI300X, "reduce_chunk=4"),
    ],
)  # fmt: skip
def test_infeasible_knobs_are_named(
    knobs: CdnaKnobs, problem: dict[str, Any], target: Target, reason: str
) -> None:
    assert reason in (is_feasible(knobs, replace(PLAIN, **problem), target) or "")


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        (KNOBS, {}),
        (replace(KNOBS, num_stages=3, waves_per_eu=1), {}),
        (replace(KNOBS, num_warps=8, partition_tokens=256, waves_per_eu=2), {}),
        (replace(KNOBS, mfma_rows=32, program_rows=32), {"qg": 16, "query_length": 4}),
        (RING, {}),
        (RING, {"kv_layout": "hnd"}),
        (replace(RING, partition_tokens=128), {"kv_dtype": "fp8_e4m3fn"}),
        (replace(RING, num_stages=2, waves_per_eu=1), {}),
    ],
)
def test_what_is_feasible(knobs: CdnaKnobs, problem: dict[str, Any]) -> None:
    assert is_feasible(knobs, replace(PLAIN, **problem), MI355X) is None


@pytest.mark.parametrize(
    ("qg", "length", "program_rows", "rows", "programs"),
    [(8, 1, 0, 16, 1), (12, 2, 0, 32, 1), (12, 2, 16, 16, 2), (16, 4, 16, 16, 4), (16, 4, 32, 32, 2), (12, 3, 16, 16, 3)],
)  # fmt: skip
def test_rows_of_a_program(
    qg: int, length: int, program_rows: int, rows: int, programs: int
) -> None:
    problem = replace(PLAIN, qg=qg, query_length=length)
    knobs = replace(KNOBS, num_splits=1, program_rows=program_rows)
    assert (padded_rows(problem, knobs), programs_per_walk(problem, knobs)) == (rows, programs)
    import torch

    inputs = sample_inputs(problem, Workload(batch=3, kv_heads=2, context=64), torch.device("cpu"))
    (call,) = plan_decode(inputs, knobs, MI300X, out=torch.empty_like(inputs.query))
    assert call.grid == (2 * programs, 1, 3)
    assert (call.constants["ROWS"], call.constants["N"]) == (qg * length, rows)


@pytest.mark.parametrize(
    ("fields", "tile", "warps", "program_rows"),
    [
        ({}, 128, 4, 0),
        ({"qg": 16}, 128, 4, 0),
        ({"query_length": 4}, 64, 2, 0),
        ({"qg": 16, "query_length": 4}, 64, 2, 32),
        ({"head_dim": 64, "qg": 16, "query_length": 4}, 64, 2, 0),
        ({"head_dim": 256}, 64, 2, 0),
        ({"head_dim": 256, "qg": 5, "query_length": 4}, 64, 2, 16),
    ],
)
def test_default_knobs(fields: dict[str, Any], tile: int, warps: int, program_rows: int) -> None:
    knobs = default_knobs(replace(PLAIN, **fields), ALONE, MI300X)
    assert isinstance(knobs, CdnaKnobs)
    seen = (knobs.partition_tokens, knobs.num_warps, knobs.program_rows)
    assert seen == (tile, warps, program_rows)
    assert not knobs.lds_ring


def test_defaults_are_feasible_for_every_supported_problem() -> None:
    shapes = product(BLOCK_SIZES, HEAD_DIMS, KV_LAYOUTS, (1, 5, 16), (1, 4), (False, True))
    for (page, dim, layout, qg, length, windowed), target in product(shapes, (MI300X, MI355X)):
        problem = Problem(
            block_size=page, head_dim=dim, qg=qg, query_length=length, kv_layout=layout, windowed=windowed
        )  # fmt: skip
        fp8 = replace(problem, kv_dtype=FP8[target.arch], kv_quant="per_token")
        for posed, workload in product((problem, fp8, replace(fp8, fp8_math=True)), (ALONE, MANY)):
            assert unsupported(posed, target) is None
            knobs = default_knobs(posed, workload, target)
            assert is_feasible(knobs, posed, target) is None


def test_a_pool_holds_every_new_knob_where_it_can_work() -> None:
    many_rows = replace(PLAIN, qg=16, query_length=4)
    pool = feasible_pool(many_rows, ALONE, MI355X)
    assert len(pool) == len(set(pool))
    assert all(is_feasible(knobs, many_rows, MI355X) is None for knobs in pool)
    assert {k.mfma_rows for k in pool if isinstance(k, CdnaKnobs)} == {16, 32}
    assert {k.program_rows for k in pool if isinstance(k, CdnaKnobs)} == {0, 16, 32}
    assert {(k.lds_ring, k.num_stages) for k in pool if isinstance(k, CdnaKnobs)} == {
        (False, 1), (False, 2), (False, 3), (True, 2), (True, 3), (True, 4),
    }  # fmt: skip
    assert knob_choices(PLAIN, ALONE, MI300X)["lds_ring"] == (False,)
    assert knob_choices(PLAIN, ALONE, MI300X)["program_rows"] == (0,)
    assert knob_choices(PLAIN, ALONE, MI300X)["cache_modifier"] == ("", ".cg")


def test_knobs_of_before_read_as_without_the_new_ones() -> None:
    from patune.kernels.knobs import knobs_from_dict, knobs_to_dict

    new = ("mfma_rows", "program_rows", "lds_ring", "cache_modifier")
    old = {name: value for name, value in knobs_to_dict(KNOBS).items() if name not in new}
    assert knobs_from_dict(old) == KNOBS
