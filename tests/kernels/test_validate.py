"""What the layouts, scales and options of the operation may be, beyond the refusals of test_decode.py; every error names value and choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from patune.errors import InvalidValueError
from patune.kernels.caches import to_layout
from patune.kernels.inputs import DecodeInputs
from patune.kernels.samples import sample_inputs
from patune.kernels.validate import check_inputs
from patune.problem import DTYPES, HEAD_DIMS, KV_LAYOUTS, Problem, Workload

CPU = torch.device("cpu")
F8 = torch.float8_e4m3fn
PAGES, HEADS, BLOCK, DIM = 5, 2, 16, 64


def make_inputs(
    *, dtype: torch.dtype = torch.bfloat16, layout: str = "aiter", **changes: Any
) -> DecodeInputs:
    """2 sequences, 8 query heads, 2 KV heads, 5 pages of 16."""
    key, value = (torch.zeros(PAGES, BLOCK, HEADS, DIM).to(dtype) for _ in range(2))
    inputs = DecodeInputs(
        query=torch.zeros(2, 8, DIM, dtype=torch.bfloat16),
        key_cache=to_layout(key, layout, is_value=False),
        value_cache=to_layout(value, layout, is_value=True),
        block_tables=torch.zeros(2, 3, dtype=torch.int32),
        context_lengths=torch.ones(2, dtype=torch.int32),
        softmax_scale=0.125,
    )
    return replace(inputs, **changes)


def refusal(inputs: DecodeInputs) -> str:
    with pytest.raises(InvalidValueError) as caught:
        check_inputs(inputs)
    return str(caught.value)


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F8], ids=str)
def test_every_layout_is_accepted(layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype, layout=layout)
    query = inputs.query.to(torch.bfloat16 if dtype == F8 else dtype)
    check_inputs(replace(inputs, query=query))


@pytest.mark.parametrize("kv_quant", ["none", "per_tensor", "per_token"])
@pytest.mark.parametrize("query_dtype", ["bf16", "fp16", "fp8_e4m3fn"])
@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_sample_inputs_pose_their_problem(layout: str, query_dtype: str, kv_quant: str) -> None:
    assert query_dtype in DTYPES
    for head_dim in HEAD_DIMS:
        problem = Problem(
            block_size=32, head_dim=head_dim, qg=3, query_length=16, query_dtype=query_dtype,
            kv_dtype="fp8_e4m3fn", kv_quant=kv_quant, kv_layout=layout, softcap=True, fp8_math=True,
        )  # fmt: skip
        inputs = sample_inputs(problem, Workload(batch=2, kv_heads=2, context=70), CPU)
        check_inputs(inputs)
        assert inputs.problem == problem
        assert (inputs.query_scale is not None) == (query_dtype == "fp8_e4m3fn")


VALUES_5D: list[tuple[dict[str, Any], torch.Tensor, str]] = [
    ({"dtype": F8}, torch.zeros(PAGES, HEADS, 2, DIM, 8).to(F8),
     "value_cache has shape [5, 2, 2, 64, 8]; expected [pages, kv_heads, block_size/x, head_dim, x] = [5, 2, 1, 64, 16]"),
    ({}, torch.zeros(PAGES, HEADS, 1, DIM, 16, dtype=torch.bfloat16), "= [5, 2, 2, 64, 8]"),
    ({}, torch.zeros(PAGES, HEADS, 2, 32, 8, dtype=torch.bfloat16), "= [5, 2, 2, 64, 8]"),
    ({}, torch.zeros(PAGES, HEADS, DIM, 2, 8, dtype=torch.bfloat16).transpose(2, 3),
     "value_cache has strides [2048, 1024, 8, 16, 1]; expected [..., 512, 8, 1]: a (page, head) is one block"),
    ({}, torch.zeros(PAGES, HEADS, 2, DIM, 16, dtype=torch.bfloat16)[..., ::2], "expected [..., 512, 8, 1]"),
    ({"layout": "hnd"}, torch.zeros(PAGES, HEADS, 2, DIM, 8, dtype=torch.bfloat16),
     "value_cache has shape [5, 2, 2, 64, 8]; expected [pages, kv_heads, block_size, head_dim], as key_cache has 4 axes"),
    ({}, torch.zeros(PAGES, HEADS, DIM, dtype=torch.bfloat16),
     "expected [pages, kv_heads, head_dim, block_size] or [pages, kv_heads, block_size/x, head_dim, x]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "value", "message"), VALUES_5D, ids=[str(i) for i in range(len(VALUES_5D))]
)
def test_a_wrong_value_cache_is_refused(
    options: dict[str, Any], value: torch.Tensor, message: str
) -> None:
    assert message in refusal(make_inputs(**options, value_cache=value))


def test_key_and_value_may_lie_in_one_tensor() -> None:
    nhd = torch.zeros(PAGES, 2, BLOCK, HEADS, DIM, dtype=torch.bfloat16)
    inputs = make_inputs(key_cache=nhd[:, 0].transpose(1, 2), value_cache=nhd[:, 1].transpose(1, 2))
    check_inputs(inputs)
    assert inputs.kv_layout == "nhd"
    channels = torch.zeros(PAGES, HEADS, BLOCK, 2 * DIM, dtype=torch.bfloat16)
    check_inputs(make_inputs(key_cache=channels[..., :DIM], value_cache=channels[..., DIM:]))


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize(
    ("padded", "axis", "stride"),
    [
        ((PAGES, HEADS, BLOCK, DIM + 8), "page", HEADS * BLOCK * (DIM + 8)),
        ((PAGES, HEADS, BLOCK, DIM + 24), "page", HEADS * BLOCK * (DIM + 24)),
    ],
)
def test_a_token_stride_off_16_elements_is_refused(
    name: str, padded: tuple[int, ...], axis: str, stride: int
) -> None:
    assert stride % 16 == 0, f"the {axis} stride is fine"
    cache = torch.zeros(padded, dtype=torch.bfloat16)[..., :DIM]
    message = refusal(make_inputs(layout="hnd", **{name: cache}))
    assert f"{name} has strides {list(cache.stride())}: its token stride is {padded[-1]}" in message
    assert "allowed: multiples of 16 elements" in message


@pytest.mark.parametrize("layout", ["hnd", "aiter", "aiter_5d"])
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_page_and_head_strides_off_16_elements_are_refused(name: str, layout: str) -> None:
    dense = getattr(make_inputs(layout=layout), name)
    inner = dense.stride()[1:]
    memory = torch.zeros(2 * dense.numel(), dtype=dense.dtype)
    page = memory.as_strided(dense.shape, (dense.stride(0) + 8, *inner))
    assert f"its page stride is {dense.stride(0) + 8}; allowed: multiples of 16" in refusal(
        make_inputs(layout=layout, **{name: page})
    )
    head = memory.as_strided(dense.shape, (dense.stride(0) * 2, inner[0] + 8, *inner[1:]))
    assert f"its head stride is {inner[0] + 8}; allowed: multiples of 16" in refusal(
        make_inputs(layout=layout, **{name: head})
    )
    wide = memory.as_strided(dense.shape, (dense.stride(0) + 16, *inner))
    check_inputs(make_inputs(layout=layout, **{name: wide}))


def test_scales_may_have_page_and_head_strides_of_their_own() -> None:
    key = torch.ones(PAGES, HEADS, BLOCK, 1)
    value = torch.ones(HEADS + 1, PAGES, BLOCK, 3)[:HEADS, ..., 0].transpose(0, 1)[..., None]
    assert value.shape == key.shape
    message = refusal(make_inputs(dtype=F8, key_scale=key, value_scale=value))
    assert "value_scale has strides" in message
    assert "expected [..., 1, 1]: a page's tokens follow each other" in message
    value = torch.ones(HEADS + 1, PAGES, BLOCK)[:HEADS].transpose(0, 1)[..., None]
    assert value.stride()[:2] != key.stride()[:2]
    check_inputs(make_inputs(dtype=F8, key_scale=key, value_scale=value))


def test_scales_that_interleave_tokens_with_heads_are_refused() -> None:
    key = torch.ones(PAGES, BLOCK, HEADS, 1).transpose(1, 2)
    message = refusal(make_inputs(dtype=F8, key_scale=key, value_scale=key))
    assert "key_scale has strides [32, 1, 2, 1]; expected [..., 1, 1]" in message


def test_row_scales_of_a_query_are_a_plain_array() -> None:
    query = torch.zeros(2, 8, DIM).to(F8)
    for scale in (torch.ones(1), torch.ones(2, 8, 1)):
        check_inputs(make_inputs(dtype=F8, query=query, query_scale=scale))
    for scale in (torch.ones(2, 9, 1)[:, :8], torch.ones(8, 2, 1).transpose(0, 1)):
        message = refusal(make_inputs(dtype=F8, query=query, query_scale=scale))
        assert f"query_scale has strides {list(scale.stride())}; expected [..., 8, 1, 1]" in message
    assert "expected [1] or [batch * query_length, q_heads, 1] = [2, 8, 1]" in refusal(
        make_inputs(dtype=F8, query=query, query_scale=torch.ones(2, 8))
    )


@pytest.mark.parametrize(
    ("softcap", "message"),
    [
        (-1.0, "softcap=-1.0 is not allowed; allowed: a finite number >= 0.0"),
        (float("inf"), "softcap=inf is not allowed; allowed: a finite number"),
        (float("nan"), "softcap=nan is not allowed; allowed: a finite number"),
        (torch.tensor(30.0), "allowed: a Python float (a tensor would sync)"),
        (None, "softcap=None is not allowed; allowed: a Python float"),
        (True, "softcap=True is not allowed; allowed: a Python float"),
    ],
)
def test_a_wrong_softcap_is_refused(softcap: Any, message: str) -> None:
    assert message in refusal(make_inputs(softcap=softcap))


def test_a_softcap_and_fp8_math_are_accepted() -> None:
    check_inputs(make_inputs(softcap=30))
    check_inputs(make_inputs(dtype=F8, softcap=0.0, fp8_math=True))
    assert "fp8_math=1 is not allowed; allowed: true, false" in refusal(
        make_inputs(dtype=F8, fp8_math=1)
    )
    with pytest.raises(InvalidValueError, match="fp8_math=True needs an fp8 cache"):
        _ = make_inputs(fp8_math=True).problem
