"""Representative kernel calls of every target: what a change of kernels or of Triton must still compile."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.feasibility import is_feasible, unsupported
from patune.kernels.knobs import CdnaKnobs, HopperKnobs, Knobs
from patune.kernels.plan import plan_decode, workspace_elements
from patune.kernels.samples import sample_inputs
from patune.problem import Problem, Workload
from patune.target import ARCHS, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.calls import KernelCall

TINY = Workload(batch=2, kv_heads=2, context=256)
FEW_WALKS = Workload(batch=1, kv_heads=2, context=4096)  # default knobs of a small batch are split
SHAPES = (
    (64, 1, 1),
    (128, 8, 1),
    (128, 16, 1),
    (64, 16, 4),
    (128, 16, 4),
)  # (head_dim, qg, query_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One configuration of the matrix."""

    problem: Problem
    knobs: Knobs
    target: Target

    @property
    def name(self) -> str:
        """One line that tells it from the others."""
        p, k = self.problem, self.knobs
        flags = "".join(f" {f}" for f in ("windowed", "sinks") if getattr(p, f))
        return (
            f"{self.target.arch} {p.kv_layout} page {p.block_size} head_dim {p.head_dim} qg {p.qg} query_length {p.query_length} "
            f"{p.kv_dtype}{flags}: tile {k.partition_tokens} splits {k.num_splits} stages {k.num_stages} warps {k.num_warps}"
        )

    def calls(self) -> list[KernelCall]:
        """The calls to compile; their tensors are tiny and on the CPU."""
        inputs = sample_inputs(self.problem, TINY, torch.device("cpu"))
        elements = workspace_elements(self.problem, inputs.workload(), self.knobs)
        return plan_decode(
            inputs,
            self.knobs,
            self.target,
            out=torch.empty(inputs.query.shape, dtype=inputs.out_dtype),
            workspace=torch.empty(elements),
            lse=torch.empty(inputs.query.shape[:2]),
        )


def _problems() -> Iterator[Problem]:
    """Every layout, page kind and shape; windows where defaults differ by page, and on page 64 every variant.

    Not nhd: it differs from hnd in run-time strides only.
    """
    for layout, page in itertools.product(("aiter", "hnd"), (16, 64, 1024)):
        for head_dim, qg, query_length in SHAPES:
            base = Problem(
                block_size=page,
                head_dim=head_dim,
                qg=qg,
                query_length=query_length,
                kv_layout=layout,
            )
            yield base
            if page != 16:
                yield replace(base, windowed=True, sinks=True)
            if page == 64:
                yield replace(base, query_dtype="fp16", kv_dtype="fp16")
    yield from _more_problems()


def _more_problems() -> Iterator[Problem]:
    """5-D values, head_dim 256, soft-capped scores, many query tokens, and fp8 caches of both flavours in both maths."""
    layouts, pages = ("aiter", "aiter_5d", "hnd"), (16, 64, 1024)
    for layout, page in itertools.product(layouts, pages):
        base = Problem(block_size=page, head_dim=128, qg=8, kv_layout=layout)
        yield replace(base, softcap=True)
        yield replace(base, head_dim=256)
    for layout, page, dtype in itertools.product(layouts, pages, ("fp8_e4m3fn", "fp8_e4m3fnuz")):
        base = Problem(block_size=page, head_dim=128, qg=8, kv_layout=layout)
        fp8 = replace(base, kv_dtype=dtype, kv_quant="per_tensor")
        yield from (fp8, replace(fp8, fp8_math=True))
        yield replace(fp8, kv_quant="per_token", windowed=True, sinks=True, query_length=4)
        yield replace(fp8, query_dtype=dtype, fp8_math=True, kv_quant="per_token")
        yield replace(fp8, head_dim=256 if page == 16 else 64)
    yield Problem(block_size=64, head_dim=128, qg=4, query_length=16, kv_layout="hnd")
    # 64 rows of 256 channels spill 40 B at least: they compute, but no default of theirs would pass the check
    yield Problem(block_size=64, head_dim=256, qg=16, query_length=2, kv_layout="nhd")


def _variants(problem: Problem, target: Target) -> Iterator[Knobs]:
    """Default knobs of a small and of a large batch, the safe ones, then one knob at a time away from the first."""
    split = default_knobs(problem, FEW_WALKS, target)
    yield split
    yield default_knobs(problem, replace(FEW_WALKS, batch=128), target)
    yield safe_knobs(problem, target)
    if isinstance(split, CdnaKnobs) and problem.rows > 32:
        yield replace(split, mfma_rows=32)
        yield replace(split, program_rows=16)
    if problem.head_dim != 128 or problem.qg != 8 or problem.softcap or problem.kv_itemsize == 1:
        return
    if problem.windowed and problem.block_size == 1024:
        return  # tile 256 spills 304 B there (Triton 3.9): a sweep refuses it, so defaults only
    yield replace(split, partition_tokens=256)
    yield replace(split, num_stages=2)
    yield replace(split, num_warps=8, partition_tokens=256, num_stages=1)
    if isinstance(split, HopperKnobs):
        yield replace(split, maxnreg=128)
    if isinstance(split, CdnaKnobs):
        yield replace(split, waves_per_eu=2)
        yield replace(split, num_stages=3, cache_modifier=".cg")
        yield replace(split, lds_ring=True, num_stages=3, num_warps=2, partition_tokens=64)


def _left_to_the_other(problem: Problem, arch: str) -> bool:
    """Whether a problem is compiled for the other CDNA architecture only: they share a kernel, so they take turns.

    Pages of 64 tokens are one of the other two kinds to that kernel, smaller than a tile or not: only what has no other page is compiled.
    """
    if arch == "sm_90":
        return False
    if problem.block_size == 64 and (problem.kv_dtype != "fp16" and problem.query_length < 16):
        return True
    on_gfx950 = problem.block_size == 1024 or problem.kv_layout == "aiter_5d"
    return arch == ("gfx942" if on_gfx950 else "gfx950")


def compile_matrix() -> list[CompileCase]:
    """Every case of every architecture that is feasible there."""
    cases = []
    for arch in ARCHS:
        target = Target.named(arch)
        for problem in _problems():
            if unsupported(problem, target) or _left_to_the_other(problem, arch):
                continue
            for knobs in dict.fromkeys(_variants(problem, target)):
                if is_feasible(knobs, problem, target) is None:
                    cases.append(CompileCase(problem=problem, knobs=knobs, target=target))
    return cases
