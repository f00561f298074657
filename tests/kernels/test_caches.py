"""Layouts: every element where the operation's spec says, and back again."""

from __future__ import annotations

import pytest
import torch

from patune.errors import InvalidValueError
from patune.kernels.caches import from_layout, to_layout

PAGES, BLOCK, HEADS, DIM = 3, 16, 2, 64
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def logical_cache(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(PAGES, BLOCK, HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["aiter", "aiter_5d", "nhd", "hnd"])
@pytest.mark.parametrize("is_value", [False, True])
def test_round_trip(dtype: torch.dtype, layout: str, is_value: bool) -> None:
    logical = logical_cache(dtype)
    cache = to_layout(logical, layout, is_value=is_value)
    back = from_layout(cache, layout, is_value=is_value)
    assert back.shape == logical.shape
    assert torch.equal(bits(back), bits(logical))


@pytest.mark.parametrize(("dtype", "x"), [(torch.bfloat16, 8), (torch.float8_e4m3fn, 16)])
def test_aiter_elements_are_where_the_spec_says(dtype: torch.dtype, x: int) -> None:
    logical = logical_cache(dtype)
    key = to_layout(logical, "aiter", is_value=False)
    value = to_layout(logical, "aiter", is_value=True)
    assert key.shape == (PAGES, HEADS, DIM // x, BLOCK, x)
    assert value.shape == (PAGES, HEADS, DIM, BLOCK)
    assert key.is_contiguous()
    assert value.is_contiguous()
    for page, head, channel, slot in ((0, 0, 0, 0), (2, 1, 63, 15), (1, 0, 17, 3), (2, 1, 40, 9)):
        expected = float(logical[page, slot, head, channel])
        assert float(key[page, head, channel // x, slot, channel % x]) == expected
        assert float(value[page, head, channel, slot]) == expected


@pytest.mark.parametrize(("dtype", "x"), [(torch.bfloat16, 8), (torch.float8_e4m3fn, 16)])
def test_5d_values_are_runs_of_tokens(dtype: torch.dtype, x: int) -> None:
    block = 32  # more than one run at either width
    logical = torch.randn(PAGES, block, HEADS, DIM, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )
    value = to_layout(logical, "aiter_5d", is_value=True)
    assert value.shape == (PAGES, HEADS, block // x, DIM, x)
    assert value.is_contiguous()
    for page, head, slot, channel in ((0, 0, 0, 0), (2, 1, 31, 63), (1, 0, 9, 17), (2, 1, 16, 40)):
        expected = float(logical[page, slot, head, channel])
        assert float(value[page, head, slot // x, channel, slot % x]) == expected
    back = from_layout(value, "aiter_5d", is_value=True)
    assert torch.equal(bits(back), bits(logical))
    keys = [to_layout(logical, name, is_value=False) for name in ("aiter", "aiter_5d")]
    assert torch.equal(bits(keys[0]), bits(keys[1]))


def test_strided_layouts_differ_in_memory_only() -> None:
    logical = logical_cache(torch.bfloat16)
    nhd, hnd = (to_layout(logical, name, is_value=False) for name in ("nhd", "hnd"))
    assert nhd.shape == hnd.shape == (PAGES, HEADS, BLOCK, DIM)
    assert torch.equal(nhd, hnd)
    assert nhd.data_ptr() == logical.data_ptr()
    assert nhd.stride() == (BLOCK * HEADS * DIM, DIM, HEADS * DIM, 1)
    assert hnd.stride() == (HEADS * BLOCK * DIM, BLOCK * DIM, DIM, 1)
    assert float(nhd[1, 1, 5, 7]) == float(logical[1, 5, 1, 7])


def test_scales_have_one_channel() -> None:
    scale = torch.rand(PAGES, BLOCK, HEADS, 1)
    stored = to_layout(scale, "hnd", is_value=False)
    assert stored.shape == (PAGES, HEADS, BLOCK, 1)
    assert torch.equal(from_layout(stored, "hnd", is_value=True), scale)


def test_an_unknown_layout_is_refused() -> None:
    logical = logical_cache(torch.bfloat16)
    with pytest.raises(
        InvalidValueError,
        match="kv_layout='bshd' is not allowed; allowed: aiter, aiter_5d, nhd, hnd",
    ):
        to_layout(logical, "bshd", is_value=False)
    with pytest.raises(InvalidValueError, match="kv_layout"):
        from_layout(logical, "bshd", is_value=True)
