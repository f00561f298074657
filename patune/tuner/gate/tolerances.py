"""How far a right kernel may be off: every tolerance of the gate, what it follows from, and what was seen.

A relative error is that of one output row (one query head of one query token) against the float64 oracle over the stored, de-quantised
values. One token of 1000 lost from random data is 3 % RMS; which tokens were seen is what markers and peaks are for, not these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from patune.problem import Problem

# (RMS, largest difference over the row's largest value)
# 16-bit cache, by query: probabilities and output are rounded to its type. Worst row of this gate's cases on an H200 (2026-11-22, 19
# problems): bf16 0.27-0.38 % RMS, fp16 0.036 %.
ROW = {"bf16": (0.01, 0.03), "fp16": (0.003, 0.01)}
# fp8 cache multiplied in 16 bits, by output: rounding that output is all that shows (bf16 0.17 % typical, 0.39 % at most; fp16 an eighth), as
# fp16 holds fp8 exactly and probabilities to 0.02 %. Worst row of a simulated kernel over these cases: bf16 0.34 %, fp16 0.04 %.
FP8_CACHE = {"bf16": (0.005, 0.015), "fp16": (0.003, 0.01)}
# fp8 products: probabilities keep 3 bits, 6 % at most, and where all are alike they round alike. Worst of 35,000 simulated rows 4.6 % and
# 0.067, most 2-3.5 %; H200 1.9-2.1 % (prototype).
FP8_MATH = (0.05, 0.15)
# Markers: a channel of the output is (its tokens) / (all tokens), exact but for the output's rounding. Beyond that rounding it may be off
# by this many tokens. At 3000 tokens a lower-half channel holds at most 94 (head_dim 64): bf16 moves it by 0.37, a lost token by 1.
# fp8 products keep it: the probabilities are all 1 (or all fp8's largest number), and 94 of them need 10 bits of the sum.
TOKENS = 0.1
# Integers: everything up to the last division is exact in float32. Division and scaling leave 2^-22, the output is rounded once. Where values
# cancel, the oracle is off by 1e-15.
EXACT, EXACT_ZERO = 2.0**-18, 1e-12
# Natural log, absolute and per unit of the LSE. Scores are exact products summed in float32, so only exp2 and the sum round, and what the
# offset of large scores costs: 2^-20 of 600. sm_90 sums fp8 products with 14 bits, which moves a score by 2e-3 of the largest product per
# 32 channels (arithmetic, not measured); CDNA sums them in float32.
LSE, LSE_RELATIVE, SM_90_FP8_MATH_LSE = 0.002, 1e-5, 0.02


def row_tolerances(problem: Problem) -> tuple[float, float]:
    """Relative RMS error of a row, and its largest difference over its largest value, that rounding explains."""
    if problem.fp8_math:
        return FP8_MATH
    by_dtype = FP8_CACHE if problem.kv_dtype.startswith("fp8") else ROW
    return by_dtype["fp16" if out_dtype(problem) is torch.float16 else "bf16"]


def lse_tolerance(problem: Problem, arch: str) -> float:
    """Absolute error of an LSE that rounding explains, besides LSE_RELATIVE of it."""
    return SM_90_FP8_MATH_LSE if problem.fp8_math and arch == "sm_90" else LSE


def out_dtype(problem: Problem) -> torch.dtype:
    """Element type of the output: the query's, or bf16 for an fp8 query."""
    return torch.float16 if problem.query_dtype == "fp16" else torch.bfloat16
