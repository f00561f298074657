"""Matrix instructions against a matrix product, with operands and result placed as the ISA document says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asm_snippets import LANE, run_lanes

FP8 = {
    ("gfx942", "fp8"): torch.float8_e4m3fnuz, ("gfx942", "bf8"): torch.float8_e5m2fnuz,
    ("gfx950", "fp8"): torch.float8_e4m3fn, ("gfx950", "bf8"): torch.float8_e5m2,
}  # fmt: skip
CASES = [
    ("gfx942", "v_mfma_f32_16x16x16_f16", 16, 16, "f16", "f16"),
    ("gfx942", "v_mfma_f32_16x16x16_bf16", 16, 16, "bf16", "bf16"),
    ("gfx942", "v_mfma_f32_32x32x8_f16", 32, 8, "f16", "f16"),
    ("gfx942", "v_mfma_f32_32x32x8_bf16", 32, 8, "bf16", "bf16"),
    ("gfx942", "v_mfma_f32_16x16x32_fp8_fp8", 16, 32, "fp8", "fp8"),
    ("gfx942", "v_mfma_f32_32x32x16_fp8_bf8", 32, 16, "fp8", "bf8"),
    ("gfx950", "v_mfma_f32_16x16x32_f16", 16, 32, "f16", "f16"),
    ("gfx950", "v_mfma_f32_16x16x32_bf16", 16, 32, "bf16", "bf16"),
    ("gfx950", "v_mfma_f32_32x32x16_f16", 32, 16, "f16", "f16"),
    ("gfx950", "v_mfma_f32_16x16x128_f8f6f4", 16, 128, "fp8", "fp8"),
]


def quantised(
    shape: tuple[int, int], kind: str, arch: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(values, bytes of the values in memory order) with few bits, so that every product and sum is exact."""
    values = torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, shape) / 4.0).float()
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind) or FP8[arch, kind]
    return values.numpy(), values.to(dtype).view(torch.uint8).numpy()


def operand_registers(matrix_bytes: np.ndarray, size: int, depth: int) -> np.ndarray:
    """uint32 [registers, 64]: lane g * size + i holds row i, elements [g * depth / groups, (g + 1) * depth / groups)."""
    groups = 64 // size
    per_lane = matrix_bytes.reshape(size, groups, -1).transpose(1, 0, 2).reshape(64, -1)
    return np.ascontiguousarray(per_lane).view(np.uint32).T


def span(first: int, count: int) -> str:
    return f"v[{first}:{first + count - 1}]"


def accumulator_rows(size: int) -> np.ndarray:
    """[registers, 64]: result row that each register of each lane holds (column is lane % size)."""
    register = np.arange(size * size // 64)[:, None]
    group = LANE[None, :] // size
    return 8 * (register // 4) + 4 * group + register % 4 if size == 32 else 4 * group + register


@pytest.mark.parametrize(("arch", "name", "size", "depth", "kind_a", "kind_b"), CASES)
@pytest.mark.parametrize("accumulate", [True, False])
def test_mfma(
    arch: str, name: str, size: int, depth: int, kind_a: str, kind_b: str, accumulate: bool
) -> None:
    a, a_bytes = quantised((size, depth), kind_a, arch, 0)
    b, b_bytes = quantised((size, depth), kind_b, arch, 1)
    rows = accumulator_rows(size)
    columns = np.broadcast_to(LANE % size, rows.shape)
    c = np.random.default_rng(2).integers(-8, 8, (size, size)).astype(np.float32)
    n_in, n_out = depth * size // 64 * (2 if "f16" in kind_a else 1) // 4, len(rows)
    sources = {2 + i: row for i, row in enumerate(operand_registers(a_bytes, size, depth))}
    sources |= {12 + i: row for i, row in enumerate(operand_registers(b_bytes, size, depth))}
    if accumulate:  # in place
        sources |= {30 + i: c[rows[i], columns[i]] for i in range(n_out)}
    result = span(30, n_out)
    body = f"{name} {result}, {span(2, n_in)}, {span(12, n_in)}, {result if accumulate else '0'}"
    got = run_lanes(body, sources, out=range(30, 30 + n_out), arch=arch)
    want = a @ b.T + (c if accumulate else 0)
    np.testing.assert_array_equal(np.stack(got).view(np.float32), want[rows, columns])


def test_mfma_ignores_exec_and_accumulates_in_place_in_agprs() -> None:
    a, a_bytes = quantised((16, 16), "f16", "gfx942", 0)
    sources = {2 + i: row for i, row in enumerate(operand_registers(a_bytes, 16, 16))}
    body = """
    v_mfma_f32_16x16x16_f16 a[0:3], v[2:3], v[2:3], 0
    v_mfma_f32_16x16x16_f16 a[0:3], v[2:3], v[2:3], a[0:3]
    s_mov_b64 exec, -1
    """ + "\n".join(f"v_accvgpr_read_b32 v{30 + i}, a{i}" for i in range(4))
    got = run_lanes(body, sources, out=range(30, 34), exec_mask=1)
    rows = accumulator_rows(16)
    want = (2 * a @ a.T)[rows, np.broadcast_to(LANE % 16, rows.shape)]
    np.testing.assert_array_equal(np.stack(got).view(np.float32), want)
