"""The promises of quantised cases: scales that matter, poison around them, queries that a plain cast breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patune.kernels.caches import from_layout
from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs
from patune.kernels.knobs import CdnaKnobs
from patune.kernels.reference import reference_decode
from patune.kernels.validate import check_inputs
from patune.problem import KV_LAYOUTS, Problem
from patune.tuner.gate.case import Case
from patune.tuner.gate.cases import LARGE_ROWS, SMALL_ROWS, gate_cases
from patune.tuner.gate.tensors import UNUSED_ENTRY, build_inputs

CPU = torch.device("cpu")
KNOBS = CdnaKnobs(partition_tokens=128, num_splits=4, num_stages=1, num_warps=2)
FP8_DTYPES = ("fp8_e4m3fn", "fp8_e4m3fnuz")


def make_problem(**fields: Any) -> Problem:
    base = {"block_size": 16, "head_dim": 64, "qg": 2, "kv_dtype": "fp8_e4m3fn"}
    return Problem(**(base | fields))


def inputs_of(problem: Problem, **fields: Any) -> DecodeInputs:
    base = {"name": "q", "kind": "random", "contexts": (40, 17), "kv_heads": 2}
    inputs = build_inputs(Case(**(base | fields)), problem, CPU)
    check_inputs(inputs)
    assert inputs.problem == problem
    return inputs


def used_slots(inputs: DecodeInputs) -> torch.Tensor:
    """[pages, block_size]; no window."""
    used = torch.zeros(inputs.key_cache.shape[0], inputs.block_size, dtype=torch.bool)
    for row, context in zip(inputs.block_tables, inputs.context_lengths.tolist(), strict=True):
        for token in range(context):
            used[int(row[token // inputs.block_size]), token % inputs.block_size] = True
    return used


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("kv_quant", ["none", "per_tensor", "per_token"])
@pytest.mark.parametrize("query_dtype", ["bf16", "fp16", "fp8_e4m3fn"])
@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_every_case_is_valid_and_poses_its_problem(
    layout: str, query_dtype: str, kv_quant: str, emulated: bool
) -> None:
    problem = make_problem(
        query_dtype=query_dtype, kv_quant=kv_quant, kv_layout=layout, fp8_math=emulated,
        softcap=kv_quant == "none", sinks=True, query_length=2,
    )  # fmt: skip
    names = set()
    for case in gate_cases(problem, KNOBS, emulated=emulated):
        names.add(case.name)
        if not case.far:
            inputs = build_inputs(case, problem, CPU)
            check_inputs(inputs)
            assert inputs.problem == problem
    assert ("random/extreme_scales" in names) == (kv_quant != "none")
    assert ("random/large_rows" in names) == (query_dtype != "fp8_e4m3fn")
    assert ("random/small_rows" in names) == (query_dtype != "fp8_e4m3fn")
    assert ("random/rounded_query" in names) == (emulated and query_dtype != "fp8_e4m3fn")


def test_a_16_bit_cache_has_the_cases_that_it_had() -> None:
    fields: dict[str, Any] = {"block_size": 16, "head_dim": 64, "qg": 2}
    for emulated, count in ((True, 8), (False, 10)):
        cases = gate_cases(Problem(**fields), KNOBS, emulated=emulated)
        capped = gate_cases(Problem(**fields, softcap=True), KNOBS, emulated=emulated)
        assert len(cases) == len(capped) == count
        assert {c.softcap for c in cases} == {0.0}
        assert {c.softcap for c in capped} == {5.0, 20.0, 30.0}
        assert all(c.checks_lse for c in capped if c.kind != "markers")
        assert not any(c.offset for c in capped), "a cap would make all scores of an offset alike"


@pytest.mark.parametrize("quant", ["per_tensor", "per_token"])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("kind", ["random", "markers"])
@pytest.mark.parametrize("row_scales", [False, True])
def test_scales_differ_and_lie_in_poison(
    quant: str, dtype: str, kind: str, row_scales: bool
) -> None:
    problem = make_problem(query_dtype=dtype, kv_dtype=dtype, kv_quant=quant)
    inputs = inputs_of(problem, kind=kind, row_scales=row_scales)
    key, value, query = inputs.key_scale, inputs.value_scale, inputs.query_scale
    assert key is not None
    assert value is not None
    assert query is not None
    assert query.shape == ((2, 4, 1) if row_scales else (1,))
    behind = query.as_strided((query.numel() + 1,), (1,))
    assert behind[:-1].isfinite().all()
    assert behind[-1].isnan()
    if quant == "per_tensor":
        assert float(key) != float(value)
        assert float(key) != 1
        assert (float(value) == 1) == (kind == "markers")
        assert key.as_strided((2,), (1,))[1].isnan()
        return
    used = used_slots(inputs)[:, None, :, None].expand_as(key)
    for scale in (key, value):
        assert scale[used].isfinite().all()
        assert not scale[~used].isfinite().any()
        assert scale[~used].isnan().any()
        assert scale[~used].isinf().any()
    assert key.stride()[:2] != value.stride()[:2]
    assert float(key[used].max() / key[used].min()) > 1000
    if kind == "markers":
        assert (value[used] == 1).all()
    else:
        assert float(value[used].max() / value[used].min()) > 1000
        assert not torch.equal(key[used], value[used])


@pytest.mark.parametrize("quant", ["per_tensor", "per_token"])
def test_every_token_keeps_a_say_whatever_its_scale(quant: str) -> None:
    """De-quantised keys are as random as those of a 16-bit cache; no score is out of the others' range."""
    inputs = inputs_of(make_problem(kv_quant=quant), contexts=(300,))
    keys = from_layout(inputs.key_cache, "aiter", is_value=False).float()
    scale = inputs.key_scale
    assert scale is not None
    scale = scale if quant == "per_tensor" else scale.permute(0, 2, 1, 3)
    true_keys = (keys * scale)[used_slots(inputs)]
    assert float(true_keys.std()) == pytest.approx(1.0, abs=0.05)
    assert float(true_keys.abs().max()) < 7
    _, lse = reference_decode(inputs)
    assert float((lse - torch.tensor(300.0).log()).abs().max()) < 1.5


def test_extreme_scales_are_extreme() -> None:
    problem = make_problem(kv_quant="per_token")
    case = next(c for c in gate_cases(problem, KNOBS, emulated=False) if c.extreme_scales)
    inputs = build_inputs(case, problem, CPU)
    key, value = inputs.key_scale, inputs.value_scale
    assert key is not None
    assert value is not None
    for scale in (key, value):
        kept = scale[scale.isfinite()]
        for extreme in (0.0, 1e-6, 1e3):
            assert (kept == extreme).any()
    out, lse = reference_decode(inputs, dtype=torch.float64)
    assert lse.isfinite().all()
    sizes = out.abs().amax(-1).amax(-1)
    assert float(sizes[0]) < 1e-5  # no fp16 probability times such a scale is a normal number
    assert float(sizes[1]) > 1e4
    assert not out[3].any(), "every value scale of the fourth sequence is 0"
    halves = build_inputs(case, make_problem(kv_quant="per_token", query_dtype="fp16"), CPU)
    small, _ = reference_decode(halves)
    assert float(small.abs().max()) < torch.finfo(torch.float16).max / 2


@pytest.mark.parametrize("query_dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_holds_the_rows_of_an_fp8_products_query(query_dtype: str, dtype: str) -> None:
    problem = make_problem(query_dtype=query_dtype, kv_dtype=dtype, fp8_math=True)
    fp8 = TORCH_DTYPES[dtype]
    for rows in (LARGE_ROWS, SMALL_ROWS):
        query = inputs_of(problem, query_log2=rows[query_dtype]).query.float()
        largest = query.abs().amax(-1, keepdim=True)
        for unit in (
            torch.finfo(fp8).max / largest,
            torch.exp2((torch.finfo(fp8).max / largest).log2().floor()),
        ):
            assert torch.equal((query * unit).to(fp8).float() / unit, query)
        plain = query.to(fp8).float().nan_to_num(nan=0.0)
        lost = (plain - query).norm(dim=-1) / query.norm(dim=-1)
        assert float((lost > 0.5).float().mean()) >= 0.5, "a plain cast loses half of the rows"
    rounded = inputs_of(problem, rounded_query=True).query.float()
    unit = torch.finfo(fp8).max / rounded.abs().amax(-1, keepdim=True)
    error = ((rounded * unit).to(fp8).float() / unit - rounded).norm() / rounded.norm()
    assert 0.015 < float(error) < 0.04


def test_large_and_small_rows_keep_sane_scores_and_break_a_cast_to_fp16() -> None:
    problem = make_problem()
    for rows, broken in ((LARGE_ROWS, torch.isinf), (SMALL_ROWS, lambda half: half == 0)):
        inputs = inputs_of(problem, contexts=(300,) * 8, query_log2=rows["bf16"], scale_factor=2.0)
        assert broken(inputs.query.half()).any()
        _, lse = reference_decode(inputs)
        assert float(lse.min()) > 5
        assert float(lse.max()) < 15
        assert float(lse.max() - lse.min()) > 0.5, "some rows' scores matter"


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_interleaved_halves_lie_in_one_poisoned_tensor(layout: str, dtype: str) -> None:
    problem = make_problem(kv_dtype=dtype, kv_layout=layout)
    apart, together = (inputs_of(problem, interleaved=flag) for flag in (False, True))
    key, value = together.key_cache, together.value_cache
    assert key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert key.stride() == value.stride()
    page, begin = key[0].numel(), key.storage_offset()
    memory = key.as_strided((len(key), key.stride(0)), (key.stride(0), 1), begin).float()
    offset = value.storage_offset() - begin
    assert memory[:, page:offset].isnan().all()
    assert memory[:, offset + page :].isnan().all()
    before = key.as_strided((begin,), (1,), 0).float()
    assert len(before) == key.stride(0)
    assert before.isnan().all()
    for near, far in ((apart.key_cache, key), (apart.value_cache, value)):
        assert torch.equal(near.float().nan_to_num(9.0), far.float().nan_to_num(9.0))


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_wide_values_have_strides_of_their_own(layout: str) -> None:
    problem = make_problem(kv_layout=layout)
    plain, wide = (inputs_of(problem, wide_values=flag) for flag in (False, True))
    assert wide.value_cache.stride(0) != wide.key_cache.stride(0) == plain.key_cache.stride(0)
    assert torch.equal(
        wide.value_cache.float().nan_to_num(9.0), plain.value_cache.float().nan_to_num(9.0)
    )


def test_poison_of_fp8_is_nan() -> None:
    for dtype, bits in (("fp8_e4m3fn", {0x7F}), ("fp8_e4m3fnuz", {0x80})):
        inputs = inputs_of(make_problem(kv_dtype=dtype))
        unused = inputs.key_cache[0].contiguous().view(torch.uint8)
        assert set(unused.unique().tolist()) == bits
        assert int(inputs.block_tables.max()) == UNUSED_ENTRY
