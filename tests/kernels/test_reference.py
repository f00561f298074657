"""The oracle against two others: scalar loops over the spec's formula, and torch's dense attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patune.errors import InvalidValueError
from patune.kernels.caches import from_layout, to_layout
from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs
from patune.kernels.reference import reference_decode, visible_tokens

HEAD_DIM, BLOCK = 64, 16
UNUSED = 1 << 30


def make_inputs(
    contexts: tuple[int, ...],
    *,
    length: int = 1,
    window: int = 0,
    kv_heads: int = 2,
    qg: int = 3,
    layout: str = "aiter",
    kv_dtype: str = "bf16",
    query_dtype: str = "bf16",
    quant: str = "none",
    sinks: bool = False,
    scale: float = 0.125,
    softcap: float = 0.0,
    row_scales: bool = True,
) -> DecodeInputs:
    """Unused slots are NaN, unused table entries are 2^30, pages are permuted."""
    generator = torch.Generator().manual_seed(len(contexts) * 7 + length)
    pages_of = [-(-c // BLOCK) for c in contexts]
    total = sum(pages_of) + 1
    ids = torch.randperm(total, generator=generator)[: sum(pages_of)].tolist()
    table = torch.full((len(contexts), max(pages_of) + 1), UNUSED, dtype=torch.int32)
    used = torch.zeros(total, BLOCK, dtype=torch.bool)
    for b, context in enumerate(contexts):
        for j in range(pages_of[b]):
            table[b, j] = page = ids.pop()
            used[page, : min(BLOCK, context - j * BLOCK)] = True

    def cache(*, is_value: bool) -> torch.Tensor:
        logical = torch.randn(total, BLOCK, kv_heads, HEAD_DIM, generator=generator)
        logical = torch.where(used[..., None, None], logical, torch.nan)
        return to_layout(logical.to(TORCH_DTYPES[kv_dtype]), layout, is_value=is_value)

    def scales() -> torch.Tensor | None:
        if quant == "none":
            return None
        if quant == "per_tensor":
            return 0.5 + torch.rand(1, generator=generator)
        return 0.5 + torch.rand(total, kv_heads, BLOCK, 1, generator=generator)

    rows, heads = len(contexts) * length, kv_heads * qg
    query = torch.randn(rows, heads, HEAD_DIM, generator=generator).to(TORCH_DTYPES[query_dtype])
    per_row = 0.5 + torch.rand(rows, heads, 1, generator=generator)
    return DecodeInputs(
        query=query,
        key_cache=cache(is_value=False),
        value_cache=cache(is_value=True),
        block_tables=table,
        context_lengths=torch.tensor(contexts, dtype=torch.int32),
        softmax_scale=scale,
        query_length=length,
        sliding_window=window,
        sinks=torch.randn(heads, generator=generator).to(torch.bfloat16) if sinks else None,
        query_scale=(per_row if row_scales else per_row[0, 0])
        if query_dtype.startswith("fp8")
        else None,
        softcap=softcap,
        key_scale=scales(),
        value_scale=scales(),
    )


def scalar_row(inputs: DecodeInputs, b: int, i: int, head: int) -> tuple[list[float], float]:
    """Output and LSE of one row by the spec's formula, one token after the other, in Python floats."""
    kv_head = head // (inputs.query.shape[1] // inputs.kv_heads)
    context, length = int(inputs.context_lengths[b]), inputs.query_length
    row = b * length + i
    position = context - length + i
    key = from_layout(inputs.key_cache, inputs.kv_layout, is_value=False)
    value = from_layout(inputs.value_cache, inputs.kv_layout, is_value=True)

    def scale_of(scale: torch.Tensor | None, page: int, slot: int) -> float:
        if scale is None:
            return 1.0
        return float(scale[0] if scale.numel() == 1 else scale[page, kv_head, slot, 0])

    query = inputs.query[row, head].double()
    if inputs.query_scale is not None:
        per_row = inputs.query_scale.numel() > 1
        query = query * float(inputs.query_scale[row, head, 0] if per_row else inputs.query_scale)
    scores, values = [], []
    for k in range(context):
        if k > position or (inputs.sliding_window and k <= position - inputs.sliding_window):
            continue
        page, slot = int(inputs.block_tables[b, k // BLOCK]), k % BLOCK
        product = float(query @ key[page, slot, kv_head].double())
        score = inputs.softmax_scale * scale_of(inputs.key_scale, page, slot) * product
        if inputs.softcap:
            score = inputs.softcap * math.tanh(score / inputs.softcap)
        scores.append(score)
        values.append(
            value[page, slot, kv_head].double() * scale_of(inputs.value_scale, page, slot)
        )
    if not scores:
        return [0.0] * HEAD_DIM, -math.inf
    denominator = sum(math.exp(s) for s in scores)
    lse = math.log(denominator)
    if inputs.sinks is not None:
        denominator += math.exp(float(inputs.sinks[head]))
    out = sum(
        (math.exp(s) / denominator * v for s, v in zip(scores, values, strict=True)),
        torch.zeros(HEAD_DIM),
    )
    return out.tolist(), lse


def assert_matches_scalar_formula(inputs: DecodeInputs) -> None:
    out, lse = reference_decode(inputs, dtype=torch.float64)
    assert out.dtype == lse.dtype == torch.float64
    assert out.shape == inputs.query.shape
    assert lse.shape == inputs.query.shape[:2]
    for b in range(inputs.batch):
        for i in range(inputs.query_length):
            for head in range(inputs.query.shape[1]):
                expected, expected_lse = scalar_row(inputs, b, i, head)
                row = b * inputs.query_length + i
                assert out[row, head].tolist() == pytest.approx(expected, abs=1e-6, rel=1e-6)
                assert float(lse[row, head]) == pytest.approx(expected_lse, abs=1e-9, rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "nhd"},
        {"layout": "hnd", "sinks": True},
        {"length": 4, "window": 5, "sinks": True},
        {"length": 3, "window": 17, "layout": "nhd"},
        {"kv_dtype": "fp8_e4m3fn", "quant": "per_tensor"},
        {"kv_dtype": "fp8_e4m3fnuz", "quant": "per_token", "length": 2, "sinks": True},
        {"kv_dtype": "fp8_e4m3fn", "quant": "per_token", "layout": "hnd", "window": 9},
        {"kv_dtype": "fp8_e4m3fn", "query_dtype": "fp8_e4m3fn", "quant": "per_token"},
        {"kv_dtype": "fp8_e4m3fnuz", "query_dtype": "fp16"},
        {"kv_dtype": "fp16", "query_dtype": "fp16", "qg": 1, "kv_heads": 3, "scale": 1.0},
        {
            "kv_dtype": "fp8_e4m3fn",
            "query_dtype": "fp8_e4m3fn",
            "row_scales": False,
            "quant": "per_tensor",
        },
        {"layout": "aiter_5d", "length": 16, "qg": 1},
        {"layout": "aiter_5d", "kv_dtype": "fp8_e4m3fn", "quant": "per_token", "window": 9},
        {"softcap": 2.0, "sinks": True, "scale": 0.5},
        {
            "softcap": 1.0,
            "kv_dtype": "fp8_e4m3fn",
            "quant": "per_token",
            "window": 9,
            "sinks": True,
        },
    ],
    ids=str,
)
def test_it_is_the_formula(options: dict[str, Any]) -> None:
    assert_matches_scalar_formula(make_inputs((0, 1, 2, 15, 16, 17, 40), **options))


@settings(max_examples=15, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    length=st.integers(1, 4),
    window=st.integers(0, 55),
    layout=st.sampled_from(["aiter", "aiter_5d", "nhd", "hnd"]),
    sinks=st.booleans(),
    softcap=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_it_is_the_formula_everywhere(
    contexts: list[int], length: int, window: int, layout: str, sinks: bool, softcap: float
) -> None:
    inputs = make_inputs(
        tuple(contexts), length=length, window=window, layout=layout, sinks=sinks, kv_heads=2, qg=1,
        softcap=softcap,
    )  # fmt: skip
    assert_matches_scalar_formula(inputs)


@pytest.mark.parametrize("length", [1, 4])
def test_it_is_torch_attention(length: int) -> None:
    contexts = (4, 33, 64)
    inputs = make_inputs(contexts, length=length)
    out, _ = reference_decode(inputs, dtype=torch.float64)
    for b, context in enumerate(contexts):
        pages = inputs.block_tables[b, : -(-context // BLOCK)].long()
        keys, values = (
            from_layout(cache[pages], "aiter", is_value=is_value).flatten(0, 1)[:context].double()
            for is_value, cache in enumerate((inputs.key_cache, inputs.value_cache))
        )
        rows = slice(b * length, (b + 1) * length)
        mask = torch.ones(length, context, dtype=torch.bool).tril(context - length)
        expected = torch.nn.functional.scaled_dot_product_attention(
            inputs.query[rows].double().transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=mask,
            scale=inputs.softmax_scale,
            enable_gqa=True,
        )
        torch.testing.assert_close(out[rows], expected.transpose(0, 1))


def test_visible_tokens_are_those_of_the_spec() -> None:
    # W = 128, L = 4, C = 1000: every query token sees 128 tokens, its own (C - L + i) the last of them
    assert [visible_tokens(1000, i, 4, 128) for i in range(4)] == [
        (869, 997), (870, 998), (871, 999), (872, 1000),
    ]  # fmt: skip
    assert visible_tokens(1000, 0, 1, 0) == (0, 1000)
    assert visible_tokens(1000, 0, 1, 1) == (999, 1000)
    assert visible_tokens(100, 0, 1, 128) == (0, 100)
    assert visible_tokens(2, 0, 4, 0) == (0, 0)
    assert visible_tokens(0, 0, 1, 128) == (0, 0)


def test_an_empty_row_is_zeros_even_with_sinks() -> None:
    inputs = make_inputs((0, 2), length=4, sinks=True)
    out, lse = reference_decode(inputs)
    assert out.dtype == torch.float32
    empty = [0, 1, 2, 3, 4, 5]  # context 0, and the query tokens before a context of 2
    assert not out[empty].any()
    assert (lse[empty] == -torch.inf).all()
    assert lse[6:].isfinite().all()


def test_sinks_take_weight_but_not_the_lse() -> None:
    inputs = make_inputs((40,), sinks=True)
    out, lse = reference_decode(inputs, dtype=torch.float64)
    plain, plain_lse = reference_decode(replace(inputs, sinks=None), dtype=torch.float64)
    assert inputs.sinks is not None
    kept = torch.sigmoid(plain_lse - inputs.sinks.double())  # e^lse / (e^lse + e^sink)
    torch.testing.assert_close(out, plain * kept[..., None])
    torch.testing.assert_close(lse, plain_lse)


def test_a_huge_sink_does_not_overflow() -> None:
    inputs = make_inputs((40,), sinks=True)
    huge = replace(inputs, sinks=torch.full((6,), 1000.0))
    out, lse = reference_decode(huge)
    assert not out.any()
    assert lse.isfinite().all()


def two_tokens(**changes: Any) -> DecodeInputs:
    """One row over two tokens with keys (2, 0, ...) and (0, 4, ...) and values 1 and 3 in every channel, all in fp8; query (1, 1, 0, ...)."""
    query = torch.zeros(1, 1, HEAD_DIM)
    query[..., :2] = 1.0
    key, value = torch.zeros(2, BLOCK, 1, HEAD_DIM), torch.zeros(2, BLOCK, 1, HEAD_DIM)
    key[1, 0, 0, 0], key[1, 1, 0, 1] = 2.0, 4.0
    value[1, 0], value[1, 1] = 1.0, 3.0
    inputs = DecodeInputs(
        query=query.to(torch.float8_e4m3fn),
        key_cache=to_layout(key.to(torch.float8_e4m3fn), "aiter_5d", is_value=False),
        value_cache=to_layout(value.to(torch.float8_e4m3fn), "aiter_5d", is_value=True),
        block_tables=torch.tensor([[1]], dtype=torch.int32),
        context_lengths=torch.tensor([2], dtype=torch.int32),
        softmax_scale=0.5,
    )
    return replace(inputs, **changes)


def per_token(first: float, second: float) -> torch.Tensor:
    scale = torch.full((2, 1, BLOCK, 1), torch.nan)
    scale[1, 0, :2, 0] = torch.tensor([first, second])
    return scale


# scores, then weights of values 1 and 3, computed by hand: score_k = 0.5 * query_scale * key_scale_k * (2 or 4)
HAND_COMPUTED: list[tuple[dict[str, Any], tuple[float, float], tuple[float, float]]] = [
    ({}, (1.0, 2.0), (1.0, 3.0)),
    ({"key_scale": torch.tensor([3.0]), "value_scale": torch.tensor([10.0])}, (3.0, 6.0), (10.0, 30.0)),
    ({"key_scale": per_token(4.0, 0.5), "value_scale": per_token(7.0, 0.1)}, (4.0, 1.0), (7.0, 0.3)),
    ({"query_scale": torch.tensor([0.25])}, (0.25, 0.5), (1.0, 3.0)),
    ({"query_scale": torch.tensor([[[0.25]]]), "key_scale": per_token(4.0, 0.5), "value_scale": per_token(7.0, 0.1)},
     (1.0, 0.25), (7.0, 0.3)),
    ({"softcap": 1.5}, (1.5 * math.tanh(1 / 1.5), 1.5 * math.tanh(2 / 1.5)), (1.0, 3.0)),
    ({"softcap": 1.5, "key_scale": torch.tensor([3.0]), "value_scale": torch.tensor([10.0])},
     (1.5 * math.tanh(3 / 1.5), 1.5 * math.tanh(6 / 1.5)), (10.0, 30.0)),
    ({"fp8_math": True}, (1.0, 2.0), (1.0, 3.0)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "scores", "values"), HAND_COMPUTED)
@pytest.mark.parametrize("sink", [None, 4.0])
def test_two_tokens_by_hand(
    changes: dict[str, Any],
    scores: tuple[float, float],
    values: tuple[float, float],
    sink: float | None,
) -> None:
    inputs = two_tokens(**changes, sinks=None if sink is None else torch.tensor([sink]))
    out, lse = reference_decode(inputs, dtype=torch.float64)
    weights = [math.exp(score) for score in scores]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink))  # the sink is never capped
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    assert out.flatten().tolist() == pytest.approx([expected] * HEAD_DIM, rel=1e-6)
    assert float(lse) == pytest.approx(math.log(sum(weights)), rel=1e-6)


def test_a_large_cap_changes_nothing_and_a_small_one_levels_the_scores() -> None:
    inputs = make_inputs((40, 3), sinks=True)
    out, lse = reference_decode(inputs, dtype=torch.float64)
    same, same_lse = reference_decode(replace(inputs, softcap=1e6), dtype=torch.float64)
    torch.testing.assert_close(same, out)
    torch.testing.assert_close(same_lse, lse)
    _, level = reference_decode(replace(inputs, softcap=1e-9), dtype=torch.float64)
    torch.testing.assert_close(level, torch.tensor([[40.0], [3.0]]).log().double().expand(2, 6))


def test_float32_is_close_to_float64() -> None:
    inputs = make_inputs((1, 40, 200), length=2, window=37, sinks=True)
    exact, exact_lse = reference_decode(inputs, dtype=torch.float64)
    out, lse = reference_decode(inputs)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-6)


def test_only_visible_slots_and_entries_are_read() -> None:
    inputs = make_inputs((70,), length=2, window=20)
    out, _ = reference_decode(inputs)
    first = 70 - 1 - 20  # the earlier query token's window
    table = inputs.block_tables.clone()
    table[0, : first // BLOCK] = UNUSED  # pages that no query token sees
    key = inputs.key_cache.clone()
    page = int(table[0, first // BLOCK])
    key[page, :, :, : first % BLOCK] = torch.nan
    again, _ = reference_decode(replace(inputs, block_tables=table, key_cache=key))
    assert torch.equal(out, again)


def test_a_context_beyond_the_table_is_refused() -> None:
    inputs = make_inputs((40,))
    long = replace(inputs, context_lengths=torch.tensor([65], dtype=torch.int32))
    with pytest.raises(
        InvalidValueError,
        match=r"context_lengths\[0\]=65 needs 5 pages of 16 tokens, block_tables has 4 columns",
    ):
        reference_decode(long)


@pytest.mark.parametrize("entry", [-1, 4, UNUSED])
def test_a_needed_entry_must_name_a_page(entry: int) -> None:
    inputs = make_inputs((40,))
    table = inputs.block_tables.clone()
    table[0, 2] = entry
    with pytest.raises(
        InvalidValueError,
        match=rf"block_tables\[0, 2\]={entry} is not allowed; allowed: pages 0 to 3",
    ):
        reference_decode(replace(inputs, block_tables=table))
