"""Number formats of the matrix path as numpy conversions: bfloat16, half, and the four 8-bit floats of CDNA3 and CDNA4."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
U32Array = npt.NDArray[np.uint32]
F32Array = npt.NDArray[np.float32]


def f32_from_bf16(bits: Array) -> F32Array:
    """The float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_from_f32(values: F32Array) -> U32Array:
    """The bfloat16 bit patterns of float32 values, round to nearest even; NaN stays NaN and becomes quiet."""
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = ((upper & np.uint32(1)) + bits + np.uint32(0x7FFF)) >> np.uint32(16)
    nan = np.isnan(values)
    return np.where(nan, upper | np.uint32(0x40), rounded) if nan.any() else rounded


def f16_bits_from_f32(values: Array) -> U32Array:
    """The half bit patterns of float values, round to nearest even, overflow to infinity."""
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Format:
    """One 8-bit float.

    Attributes:
        name: torch's name of it without the ``float8_`` prefix.
        values: value of each of the 256 codes.
        magnitudes: finite values of the codes from 0 on, ascending: the rounding grid.
        half_step_above: what a magnitude may reach before it counts as overflow, ties included as the format rounds them.
        overflow_code: what an unsaturated conversion gives above that: NaN, or infinity where the format has one.
        nan_code: code that NaN converts to.
        has_negative_zero: the fnuz formats have none; their 0x80 is NaN.
    """

    name: str
    values: F32Array
    magnitudes: npt.NDArray[np.float64]
    half_step_above: float
    overflow_code: int
    nan_code: int
    has_negative_zero: bool

    @property
    def maximum(self) -> float:
        """The largest finite value."""
        return float(self.magnitudes[-1])

    def decode(self, codes: Array) -> F32Array:
        """The float32 values of codes 0..255."""
        return self.values[codes]

    def encode(self, values: F32Array, *, saturate: bool | npt.NDArray[np.bool_]) -> U32Array:
        """The codes of float32 values, round to nearest even.

        Args:
            values: what to convert.
            saturate: clamp to the largest finite value, as the hardware does when MODE.FP16_OVFL is set; may broadcast.
        """
        magnitude = np.abs(values.astype(np.float64))
        clamped = np.minimum(magnitude, self.maximum)
        upper = np.clip(np.searchsorted(self.magnitudes, clamped), 1, len(self.magnitudes) - 1)
        below = clamped - self.magnitudes[upper - 1]
        above = self.magnitudes[upper] - clamped
        # The code of a magnitude is its index, so an even index is an even mantissa.
        round_up = (below > above) | ((below == above) & (upper % 2 == 0))
        code = np.where(round_up, upper, upper - 1).astype(np.uint32)
        if not np.all(saturate):
            overflows = (magnitude > self.half_step_above) & np.logical_not(saturate)
            code = np.where(overflows, np.uint32(self.overflow_code), code)
        negative = np.signbit(values)
        if not self.has_negative_zero:
            negative &= (code != 0) & (code != self.nan_code)
        code |= negative.astype(np.uint32) << np.uint32(7)
        return np.where(np.isnan(values), np.uint32(self.nan_code), code)


def _build(name: str, *, mantissa_bits: int, bias: int) -> Fp8Format:
    """Tabulate one format from its mantissa width and exponent bias."""
    fnuz = name.endswith("fnuz")
    code = np.arange(256)
    exponent = (code & 0x7F) >> mantissa_bits
    fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    value = np.where(code & 0x80, -value, value)
    if fnuz:
        value[0x80] = np.nan
    elif name == "e4m3fn":
        value[[0x7F, 0xFF]] = np.nan
    else:  # e5m2 is IEEE-like: exponent 31 is infinity and NaN
        value[[0x7C, 0xFC]] = np.inf, -np.inf
        value[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    magnitudes = value[:128][np.isfinite(value[:128])]
    half_step = (magnitudes[-1] - magnitudes[-2]) / 2
    # An odd largest mantissa rounds a tie up, out of the format; an even one keeps it.
    last_is_odd = len(magnitudes) % 2 == 0
    limit = magnitudes[-1] + half_step
    return Fp8Format(
        name=name,
        values=value.astype(np.float32),
        magnitudes=magnitudes,
        half_step_above=float(np.nextafter(limit, 0.0) if last_is_odd else limit),
        overflow_code=0x80 if fnuz else 0x7C if name == "e5m2" else 0x7F,
        nan_code=0x80 if fnuz else 0x7F,
        has_negative_zero=not fnuz,
    )


@functools.cache
def fp8_formats(arch: str) -> tuple[Fp8Format, Fp8Format]:
    """(fp8, bf8) as the instructions of an architecture understand them: fnuz on gfx942, OCP on gfx950."""
    if arch == "gfx942":
        return (
            _build("e4m3fnuz", mantissa_bits=3, bias=8),
            _build("e5m2fnuz", mantissa_bits=2, bias=16),
        )
    return _build("e4m3fn", mantissa_bits=3, bias=7), _build("e5m2", mantissa_bits=2, bias=15)
