"""Real compiled kernels, end to end: correct ones compute what numpy computes, broken ones are noticed."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gluon_kernels import (
    LOG2E,
    compile_async_sum,
    compile_decode,
    compile_dot,
    compile_softmax,
    compile_vadd,
)

from patune.emulator import Execution, Program, static_facts
from patune.errors import EmulatorError

ARCHS = ["gfx942", "gfx950"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# P is rounded to the operand type before P V; the output averages many of them.
TOLERANCE = {"fp16": 5e-4, "bf16": 4e-3}


def program_of(build: Any) -> Program:
    return Program(build.asm["amdgcn"], build.metadata.shared)


@pytest.mark.parametrize("arch", ARCHS)
def test_vadd(arch: str) -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 3000), dtype=np.float32)
    out = np.full(3000, np.nan, np.float32)
    execution = program_of(compile_vadd(arch)).launch(
        (3, 1, 1), 4, [x, y, out, 3000], names=["x", "y", "out", "n"]
    )
    np.testing.assert_array_equal(out, x + y)
    assert execution.races == ()
    assert {n: t.load_b + t.store_b for n, t in execution.traffic.items()} == {
        "x": 12000,
        "y": 12000,
        "out": 12000,
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_softmax(arch: str) -> None:
    x = np.random.default_rng(0).standard_normal((4, 1000), dtype=np.float32)
    out = np.full_like(x, np.nan)
    execution = program_of(compile_softmax(arch)).launch((4, 1, 1), 4, [x, out, 1000, 1000])
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=2e-6)
    assert execution.races == ()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 32])
def test_dot(arch: str, dtype: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small integers: every product and sum is exact in any order.
    a = torch.randint(-4, 5, (rows, 64), generator=generator)
    b = torch.randint(-4, 5, (64, 128), generator=generator)
    out = np.full((rows, 128), np.nan, np.float32)
    operands = [t.to(DTYPES[dtype]).view(torch.int16).numpy() for t in (a, b)]
    execution = program_of(compile_dot(arch, dtype, rows)).launch((1, 1, 1), 4, [*operands, out])
    np.testing.assert_array_equal(out, (a @ b).numpy())
    assert execution.races == ()
    assert execution.mfma > 0


@pytest.mark.parametrize("waits", [True, False])
def test_direct_to_lds_loads_need_their_waits(waits: bool) -> None:
    x = np.random.default_rng(0).integers(-8, 8, (5, 1024)).astype(np.float32)
    out = np.full(1024, np.nan, np.float32)
    build = compile_async_sum()
    asm = build.asm["amdgcn"]
    assert re.search(r"\n\tbuffer_load_dwordx4 .* lds", asm)
    if not waits:
        asm = re.sub(r"\n\ts_waitcnt [^\n]*vmcnt[^\n]*", "\n\ts_nop 0", asm)
    program = Program(asm, build.metadata.shared)
    program.launch((1, 1, 1), 4, [x, out, 5], detect_races=False)
    assert np.array_equal(out, x.sum(0)) == waits
    if not waits:
        with pytest.raises(EmulatorError, match="which nobody has written"):
            program.launch((1, 1, 1), 4, [x, out, 5])


# ---- decode ---------------------------------------------------------------------------------------------------------

PAGES, PAGE, G = 4, 128, 16


@dataclass
class Decode:
    """One small decode problem: query [G, head_dim], caches [page, token, head_dim], NaN wherever the context ends."""

    dtype: str
    context: int
    head_dim: int = 64

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        cast = DTYPES[self.dtype]
        self.q = torch.randn(G, self.head_dim, generator=generator).to(cast)
        self.k, self.v = (
            torch.randn(PAGES, PAGE, self.head_dim, generator=generator).to(cast) for _ in "kv"
        )
        self.table = torch.tensor([2, 0, 3], dtype=torch.int32)
        for cache in (self.k, self.v):
            tokens = cache[self.table.long()].reshape(-1, self.head_dim)
            tokens[self.context :] = math.nan
            cache[self.table.long()] = tokens.reshape(3, PAGE, self.head_dim)
            cache[1] = math.nan

    def expected(self) -> np.ndarray:
        k, v = (
            c[self.table.long()].reshape(-1, self.head_dim)[: self.context].double()
            for c in (self.k, self.v)
        )
        return (torch.softmax(self.q.double() @ k.T / math.sqrt(self.head_dim), 1) @ v).numpy()

    def run(self, asm: str, shared_b: int, pages: int = PAGES) -> tuple[float, Execution]:
        """(largest error, execution) with the key cache cut to some pages."""
        out = np.full((G, self.head_dim), np.nan, np.float32)
        q, k, v = (t.view(torch.int16).numpy() for t in (self.q, self.k, self.v))
        execution = Program(asm, shared_b).launch(
            (1, 1, 1), 4,
            [q, k[:pages], v, self.table.numpy(), out, LOG2E / math.sqrt(self.head_dim), self.context],
            names=["query", "key_cache", "value_cache", "block_table", "out", "scale", "context"],
        )  # fmt: skip
        error = np.abs(out - self.expected()).max()
        return math.inf if math.isnan(error) else float(error), execution


@functools.cache
def decode_build(
    arch: str, dtype: str, head_dim: int = 64, tile: int = 64, waves_per_eu: int = 0
) -> tuple[str, int]:
    build = compile_decode(arch, dtype, head_dim, tile, waves_per_eu=waves_per_eu)
    return build.asm["amdgcn"], build.metadata.shared


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 64, 300])
def test_decode(arch: str, dtype: str, context: int) -> None:
    error, execution = Decode(dtype, context).run(*decode_build(arch, dtype))
    assert error < TOLERANCE[dtype]
    assert execution.races == ()
    tiles = -(-context // 64)
    assert (
        execution.traffic["key_cache"].load_b
        == execution.traffic["value_cache"].load_b
        == 2 * 64 * context
    )
    assert execution.histogram["s_barrier"] >= 4 * tiles


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_with_spills(arch: str) -> None:
    asm, shared_b = decode_build(arch, "fp16", head_dim=128, tile=128, waves_per_eu=8)
    facts = static_facts(asm, shared_b, 4)
    assert facts.vgpr_spills > 0
    error, execution = Decode("fp16", 200, head_dim=128).run(asm, shared_b)
    assert error < TOLERANCE["fp16"]
    assert execution.spill_bytes > 0


# ---- mutations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_removed_barrier_is_reported_as_a_race(arch: str) -> None:
    asm, shared_b = decode_build(arch, "bf16")
    problem = Decode("bf16", 200)
    barriers = [match.span() for match in re.finditer(r"\n\ts_barrier", asm)]
    assert len(barriers) >= 4
    for start, end in barriers:
        _, execution = problem.run(asm[:start] + "\n\ts_nop 0" + asm[end:], shared_b)
        assert execution.races, asm[start - 200 : end + 200]


def is_noticed(problem: Decode, asm: str, shared_b: int) -> bool:
    """A wrong value, a race or a refusal."""
    try:
        error, execution = problem.run(asm, shared_b)
    except EmulatorError:
        return True
    return error > TOLERANCE[problem.dtype] or bool(execution.races)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_flipped_shared_memory_offset_is_noticed(arch: str) -> None:
    asm, shared_b = decode_build(arch, "bf16")
    problem = Decode("bf16", 200)
    offsets = list(re.finditer(r"\n\tds_(?:read|write)\w* [^\n]*? offset:(\d+)", asm))
    assert len(offsets) >= 4
    for match in offsets[:: max(1, len(offsets) // 6)]:
        flipped = asm[: match.start(1)] + str(int(match[1]) ^ 64) + asm[match.end(1) :]
        assert is_noticed(problem, flipped, shared_b), match[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_shorter_than_the_block_table_says_is_named(arch: str) -> None:
    with pytest.raises(EmulatorError, match=r"out-of-bounds .* argument key_cache\["):
        Decode("bf16", 300).run(*decode_build(arch, "bf16"), pages=3)


@pytest.mark.parametrize("arch", ARCHS)
def test_less_shared_memory_than_the_kernel_uses_is_an_error(arch: str) -> None:
    asm, shared_b = decode_build(arch, "bf16")
    with pytest.raises(EmulatorError, match="out-of-bounds shared memory"):
        Decode("bf16", 64).run(asm, shared_b // 2)
