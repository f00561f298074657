"""The 8-bit and 16-bit floats against torch, code by code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patune.emulator.formats import (
    Fp8Format,
    bf16_from_f32,
    f16_bits_from_f32,
    f32_from_bf16,
    fp8_formats,
)

FORMATS = {f.name: f for arch in ("gfx942", "gfx950") for f in fp8_formats(arch)}
TORCH = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}


def interesting_floats() -> np.ndarray:
    """Every sign, exponent and rounding situation: random bit patterns, small integers, NaN and infinities."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    near = np.random.default_rng(1).standard_normal(20_000).astype(np.float32) * 100
    special = np.array(
        [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 448, 464, 465, 240, 248, 57344, 61440], np.float32
    )
    return np.concatenate([random, near, special])


@pytest.mark.parametrize("name", list(TORCH))
def test_fp8_tables_equal_torch(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(TORCH[name]).float().numpy()
    np.testing.assert_array_equal(FORMATS[name].decode(codes.numpy()), want)


@pytest.mark.parametrize("name", list(TORCH))
def test_every_fp8_value_encodes_to_itself(name: str) -> None:
    f = FORMATS[name]
    finite = np.isfinite(f.values)
    np.testing.assert_array_equal(f.encode(f.values, saturate=True)[finite], np.arange(256)[finite])
    assert (f.encode(np.array([np.nan], np.float32), saturate=True) == f.nan_code).all()


@pytest.mark.parametrize("name", list(TORCH))
def test_fp8_rounding_equals_torch_inside_the_range(name: str) -> None:
    f = FORMATS[name]
    values = interesting_floats()
    values = values[np.abs(values) <= f.maximum]
    want = torch.from_numpy(values).to(TORCH[name]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(f.encode(values, saturate=True), want)
    np.testing.assert_array_equal(f.encode(values, saturate=False), want)


@pytest.mark.parametrize("name", list(TORCH))
def test_fp8_ties_round_to_even(name: str) -> None:
    f = FORMATS[name]
    ties = ((f.magnitudes[1:] + f.magnitudes[:-1]) / 2).astype(np.float32)
    ties = np.concatenate([ties, -ties])
    want = torch.from_numpy(ties).to(TORCH[name]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(f.encode(ties, saturate=True), want)


def _finite_neighbours(f: Fp8Format) -> tuple[float, float]:
    return f.maximum, float(f.magnitudes[-2])


@pytest.mark.parametrize("name", list(TORCH))
def test_fp8_overflow(name: str) -> None:
    f = FORMATS[name]
    top, below = _finite_neighbours(f)
    step = top - below
    values = np.array([top + 0.49 * step, top + 0.51 * step, 1e30, -1e30], np.float32)
    np.testing.assert_array_equal(f.decode(f.encode(values, saturate=True)), [top, top, top, -top])
    unsaturated = f.decode(f.encode(values, saturate=False))
    assert unsaturated[0] == top
    if name == "e5m2":
        np.testing.assert_array_equal(unsaturated[1:], [np.inf, np.inf, -np.inf])
    else:
        assert np.isnan(unsaturated[1:]).all()


def test_bf16_equals_torch() -> None:
    values = interesting_floats()
    got = bf16_from_f32(values)
    want = torch.from_numpy(values).bfloat16()
    nan = np.isnan(values)
    bits = want.view(torch.int16).numpy().astype(np.uint16)
    np.testing.assert_array_equal(got[~nan], bits[~nan])
    back = f32_from_bf16(got.astype(np.uint16))
    assert np.isnan(back[nan]).all()
    np.testing.assert_array_equal(back[~nan], want.float().numpy()[~nan])


def test_half_equals_torch() -> None:
    values = interesting_floats()
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        got = f16_bits_from_f32(values)
    want = torch.from_numpy(values).half().view(torch.int16).numpy().astype(np.uint16)
    np.testing.assert_array_equal(got, want)
