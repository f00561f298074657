"""What the numbers of a case are for: markers name tokens, integers are exact, peaks dominate, offsets break who does not subtract the maximum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from patune.kernels.caches import from_layout
from patune.kernels.reference import keys_and_values, reference_decode
from patune.problem import Problem
from patune.tuner.gate.case import Case
from patune.tuner.gate.tensors import LN2, build_inputs

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs

CPU = torch.device("cpu")
EXACT_PROBLEMS: list[dict[str, Any]] = [
    {},
    {"query_dtype": "fp16", "kv_dtype": "fp16", "sinks": True},
    {"kv_dtype": "fp8_e4m3fn"},
    {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_tensor", "query_dtype": "fp8_e4m3fn"},
    {"kv_dtype": "fp8_e4m3fnuz", "kv_quant": "per_token", "query_dtype": "fp8_e4m3fnuz"},
    {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_token", "softcap": True, "sinks": True},
]


def inputs_of(fields: dict[str, Any], **case: Any) -> DecodeInputs:
    problem = Problem(**({"block_size": 16, "head_dim": 64, "qg": 2} | fields))
    base: dict[str, Any] = {"name": "n", "contexts": (300, 40), "kv_heads": 2}
    if problem.softcap:
        base["softcap"] = 30.0
    return build_inputs(Case(**(base | case)), problem, CPU)


@pytest.mark.parametrize("fields", EXACT_PROBLEMS, ids=str)
def test_integers_are_exact_in_every_step(fields: dict[str, Any]) -> None:
    """Scores, weights and all sums in any order, in float32: what a kernel does until it divides."""
    inputs = inputs_of(fields, kind="integers")
    assert inputs.softmax_scale == LN2
    keys, values = keys_and_values(inputs, 0, 0, 300, torch.float64)
    query = inputs.query.double()
    if inputs.query_scale is not None:
        query = query * inputs.query_scale
    scores = torch.einsum("gd,kd->gk", query[0, :2], keys[:, 0])  # KV head 0, in log2 units
    assert torch.equal(scores, scores.round())
    assert float(scores.abs().max()) <= 4
    assert (scores[:, 299] == (0 if fields.get("softcap") else 4)).all(), "the last token's"
    assert fields.get("softcap") or float(scores[:, :299].max()) < 4
    if fields.get("softcap"):
        assert not scores.any(), "tanh is not exact"
    else:
        assert float(scores.max() - scores.min()) >= 4
    weights = torch.exp2(scores - scores.amax(1, keepdim=True))
    products = weights[:, :, None] * values[None, :, 0]
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(weights.to(dtype).double(), weights)
        assert torch.equal(values.to(dtype).double(), values)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for summed in (weights, products):
        exact = summed.sum(1)
        single = summed.float()
        assert torch.equal(single.double(), summed)
        assert torch.equal(single[:, order].cumsum(1)[:, -1].double(), exact)
        assert torch.equal(single.sum(1).double(), exact)
    if inputs.sinks is not None:
        assert not inputs.sinks.any(), "exp(0) is exact"


def test_scales_of_integers_are_powers_of_two() -> None:
    inputs = inputs_of(EXACT_PROBLEMS[4], kind="integers", row_scales=True)
    assert inputs.query_scale is not None
    assert inputs.key_scale is not None
    assert inputs.value_scale is not None
    for scale in (inputs.key_scale, inputs.value_scale):
        kept = scale[scale.isfinite()]
        assert torch.equal(kept.log2(), kept.log2().round())
        assert len(kept.unique()) > 1
    assert set(inputs.value_scale[inputs.value_scale.isfinite()].tolist()) == {1.0, 2.0}


def test_markers_stay_what_they_are_under_scales() -> None:
    inputs = inputs_of({"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_token"}, kind="markers")
    _, values = keys_and_values(inputs, 0, 0, 300, torch.float64)
    assert set(values.unique().tolist()) == {0.0, 1.0}
    assert (values.sum(-1) == 2).all()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head_dim": 256},
        {"query_dtype": "fp16", "kv_dtype": "fp16"},
        {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_tensor"},
        {"kv_dtype": "fp8_e4m3fn", "kv_quant": "per_token"},
        {"kv_dtype": "fp8_e4m3fnuz", "kv_quant": "per_token", "query_dtype": "fp8_e4m3fnuz"},
    ],
    ids=str,
)
def test_offset_scores_are_beyond_exp_and_the_peak_still_takes_the_weight(
    fields: dict[str, Any],
) -> None:
    contexts, peaks = (50, 50, 70), (0, 33, 69)
    inputs = inputs_of(fields, kind="peaked", contexts=contexts, peaks=peaks, offset=400.0)
    out, lse = reference_decode(inputs, dtype=torch.float64)
    assert float(lse[[0, 2]].min()) > math.log(torch.finfo(torch.float32).max)
    assert float(lse[1].max()) < math.log(torch.finfo(torch.float32).tiny)
    for sequence, (context, token) in enumerate(zip(contexts, peaks, strict=True)):
        _, values = keys_and_values(inputs, sequence, 0, context, torch.float64)
        torch.testing.assert_close(out[sequence, 0], values[token, 0], rtol=1e-3, atol=1e-3)


def test_the_peak_takes_the_weight() -> None:
    inputs = inputs_of({"head_dim": 128}, kind="peaked", contexts=(50, 50), peaks=(0, 33))
    out, _ = reference_decode(inputs)
    values = from_layout(inputs.value_cache, "aiter", is_value=True)
    for sequence, token in enumerate((0, 33)):
        page = int(inputs.block_tables[sequence, token // 16])
        torch.testing.assert_close(out[sequence, 0], values[page, token % 16, 0].float())


def test_a_tail_is_below_every_fp8_probability_of_at_most_1() -> None:
    inputs = inputs_of({}, kind="peaked", contexts=(2900,), peaks=(333,), tail=True, kv_heads=1)
    keys, values = keys_and_values(inputs, 0, 0, 2900, torch.float64)
    scores = inputs.softmax_scale * torch.einsum("gd,kd->gk", inputs.query[0].double(), keys[:, 0])
    probs = torch.exp(scores - scores.amax(1, keepdim=True))
    assert probs.argmax(1).tolist() == [333, 333]
    tail = probs[:, torch.arange(2900) != 333]
    assert float(tail.sum(1).min()) > 1.5, "it weighs more than the peak"
    assert float((tail < 2**-10).double().mean()) > 0.95
    kept = probs.to(torch.float8_e4m3fn).double()
    out, _ = reference_decode(inputs, dtype=torch.float64)
    lost = torch.einsum("gk,kd->gd", kept, values[:, 0]) / probs.sum(1, keepdim=True) - out[0]
    assert float((lost.norm(dim=-1) / out[0].norm(dim=-1)).min()) > 0.4
