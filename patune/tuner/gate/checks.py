"""What a kernel's output must be: finite, zero where nothing is seen, the right tokens, the right values, the right LSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patune.kernels.reference import keys_and_values
from patune.tuner.gate.cases import Case, first_seen

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs
    from patune.problem import Problem

# Relative errors of one output row against the float64 oracle: (RMS, largest difference over the row's largest value).
# 16-bit cache, by query: probabilities and output are rounded to its type. Worst row of this gate's cases on an H200 (2026-11-22, 19
# problems): bf16 0.27-0.38 % RMS, fp16 0.036 %. One token of 1000 lost from random data is 3 % RMS.
ROW_TOLERANCES = {"bf16": (0.01, 0.03), "fp16": (0.003, 0.01)}
# fp8 cache multiplied in fp16, by output: rounding that output is all that shows (bf16 0.17 % typical, 0.39 % at most; fp16 an eighth), as
# fp16 holds fp8 exactly and probabilities to 0.02 %. Worst row of a simulated kernel over these cases: bf16 0.34 %, fp16 0.04 %.
FP8_CACHE_TOLERANCES = {"bf16": (0.005, 0.015), "fp16": (0.003, 0.01)}
# fp8 products: probabilities keep 3 bits, 6 % at most, and where all are alike they round alike. Worst of 35,000 simulated rows 4.6 % and
# 0.067, most 2-3.5 %; H200 1.9-2.1 % (prototype).
FP8_MATH_TOLERANCES = (0.05, 0.15)
# ... of a query rounded to fp8 too: its scores move by 2.6 % of their spread. Worst simulated row 5.4 % and 0.093.
ROUNDED_QUERY_TOLERANCES = (0.08, 0.2)
# Markers: a channel of the output is (its tokens) / (all tokens), exact but for the output's rounding. Beyond that rounding it may be off
# by this many tokens. At 3000 tokens a lower-half channel holds at most 94 (head_dim 64): bf16 moves it by 0.37, a lost token by 1.
# fp8 products keep it: the probabilities are all 1 (or all fp8's largest number), and 94 of them need 10 bits of the sum.
TOKEN_TOLERANCE = 0.1
# Natural log. Scores are exact products summed in float32, so only exp2 and the sum round; fp8 products are summed with 14 bits on sm_90,
# which moves a score by 2e-3 of the largest product per 32 channels (arithmetic, not measured).
LSE_TOLERANCE, FP8_MATH_LSE_TOLERANCE = 0.002, 0.02
# NaNs by width that no arithmetic produces: an element that still has this value was not written.
POISON = {16: 0x7FE5, 32: 0x7FE5A5A5}
LOG2E = 1.4426950408889634
SHOWN_TOKENS = 4


class Rejected(Exception):
    """A verdict that ends a case."""

    def __init__(self, status: str, reason: str, error_rms: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.error_rms = status, reason, error_rms


def row_tolerances(case: Case, problem: Problem) -> tuple[float, float]:
    """Relative RMS error of a row, and its largest difference over its largest value, that rounding explains."""
    if problem.fp8_math:
        return ROUNDED_QUERY_TOLERANCES if case.rounded_query else FP8_MATH_TOLERANCES
    quantised = problem.kv_dtype.startswith("fp8")
    by_dtype = FP8_CACHE_TOLERANCES if quantised else ROW_TOLERANCES
    return by_dtype["fp16" if out_dtype(problem) is torch.float16 else "bf16"]


def out_dtype(problem: Problem) -> torch.dtype:
    """Element type of the output: the query's, or bf16 for an fp8 query."""
    return torch.float16 if problem.query_dtype == "fp16" else torch.bfloat16


def place(inputs: DecodeInputs, row: int, head: int) -> str:
    """Where an output row is, in the words of its problem."""
    sequence, query_token = divmod(row, inputs.query_length)
    context = int(inputs.context_lengths[sequence])
    kv_head = head // (inputs.query.shape[1] // inputs.kv_heads)
    return f"sequence {sequence} (context {context}), query token {query_token}, head {head} (KV head {kv_head})"


def _worst(errors: torch.Tensor) -> tuple[int, int, float]:
    """Row, head and value of the largest of [rows, heads]."""
    row, head = divmod(int(errors.argmax()), errors.shape[1])
    return row, head, float(errors[row, head])


def check_out(
    case: Case,
    problem: Problem,
    inputs: DecodeInputs,
    out: torch.Tensor,
    exact: torch.Tensor,
    exact_lse: torch.Tensor,
) -> float:
    """Every row: finite, zero where it sees nothing, the right tokens, the right values. Returns the worst relative RMS error."""
    seen = out.double()
    bad = ~seen.isfinite().all(-1)
    if bad.any():
        row, head, _ = _worst(bad.double())
        unwritten = out[row, head].view(torch.int16) == POISON[16]
        why = (
            "they were not written"
            if unwritten.any()
            else "something unused was read (a cache slot, a page, a partial result), or 0 / 0"
        )
        raise Rejected(
            "nonfinite",
            f"{int((~seen[row, head].isfinite()).sum())} channels are NaN or Inf in {place(inputs, row, head)}, "
            f"one of {int(bad.sum())} such rows of {bad.numel()}: {why}",
        )
    ghosts = (exact_lse == -torch.inf) & (seen != 0).any(-1)
    if ghosts.any():
        row, head, _ = _worst(ghosts.double())
        largest = float(seen[row, head].abs().max())
        raise Rejected(
            "wrong", f"{place(inputs, row, head)} sees no token: expected zeros, saw {largest:.3g}"
        )
    if case.kind == "markers":
        _check_tokens(case, problem, inputs, seen, exact, exact_lse)
    return _check_values(case, problem, inputs, seen, exact)


def _check_values(
    case: Case,
    problem: Problem,
    inputs: DecodeInputs,
    seen: torch.Tensor,
    exact: torch.Tensor,
) -> float:
    # below the output type's smallest normal number there is nothing relative left to compare
    floor = torch.finfo(out_dtype(problem)).tiny
    difference = seen - exact
    rms = difference.square().mean(-1).sqrt() / exact.square().mean(-1).sqrt().clamp(min=floor)
    peak = difference.abs().amax(-1) / exact.abs().amax(-1).clamp(min=floor)
    rms_limit, peak_limit = row_tolerances(case, problem)
    for name, errors, limit in (
        ("relative RMS error", rms, rms_limit),
        ("largest difference over the largest value", peak, peak_limit),
    ):
        row, head, error = _worst(errors)
        if error > limit:
            wrong = int((errors > limit).sum())
            raise Rejected(
                "wrong",
                f"{name} {error:.3g} in {place(inputs, row, head)}, allowed {limit}; {wrong} of {errors.numel()} rows are off",
                float(rms[row, head]),
            )
    return float(rms.max())


def check_lse(
    problem: Problem, inputs: DecodeInputs, seen: torch.Tensor, exact: torch.Tensor
) -> None:
    """The LSE of every row; -inf where nothing is seen."""
    limit = FP8_MATH_LSE_TOLERANCE if problem.fp8_math else LSE_TOLERANCE
    difference = torch.where(seen == exact, 0.0, (seen - exact).abs()).nan_to_num(nan=torch.inf)
    row, head, error = _worst(difference)
    if error > limit:
        got, expected = float(seen[row, head]), float(exact[row, head])
        base = abs(got - expected * LOG2E) <= limit * LOG2E
        raise Rejected(
            "wrong",
            f"lse {got:.5g}, expected {expected:.5g} in {place(inputs, row, head)}, allowed difference {limit}"
            + (": it is in base 2, not natural" if base else ""),
        )


def _check_tokens(
    case: Case,
    problem: Problem,
    inputs: DecodeInputs,
    seen: torch.Tensor,
    exact: torch.Tensor,
    exact_lse: torch.Tensor,
) -> None:
    """Markers: all weights are equal, so a channel times the number of tokens (and sinks) counts the tokens that it marks."""
    tokens = exact_lse.exp()
    if inputs.sinks is not None:
        tokens = tokens + inputs.sinks.double().exp()
    counts = exact * tokens[..., None]
    rounding = counts * (torch.finfo(out_dtype(problem)).eps / 2)
    difference = (seen * tokens[..., None] - counts).abs()
    row, head, excess = _worst((difference - rounding).amax(-1))
    if excess <= TOKEN_TOLERANCE:
        return
    sequence = row // inputs.query_length
    context = int(inputs.context_lengths[sequence])
    first = first_seen(context, problem, case.window)
    _, values = keys_and_values(inputs, sequence, first, context, torch.float64)
    count, visible = tokens[row, head], round(float(exact_lse[row, head].exp()))
    guess = _guess_tokens(
        values[:, head // problem.qg], seen[row, head] * count, counts[row, head], first
    )
    raise Rejected(
        "wrong",
        f"a channel is off by {float(difference[row, head].max()):.3g} of {visible} tokens "
        f"in {place(inputs, row, head)}{guess}",
        float((seen - exact)[row, head].norm() / exact[row, head].norm()),
    )


def _guess_tokens(marks: torch.Tensor, seen: torch.Tensor, exact: torch.Tensor, first: int) -> str:
    """Which tokens have too little or too much weight: those whose channels are all short, or all over.

    A lost token also scales up everything that is left. One token leaves most channels alone, a tile most of the upper half (which
    marks runs of tokens): their median is the scale. A token read from the wrong tile may show in the upper half only.
    """
    every, upper = slice(None), slice(len(seen) // 2, None)
    for scaled_by, matched in ((every, every), (upper, every), (upper, upper)):
        present = exact[scaled_by] > 0.5
        scale = (seen[scaled_by] / exact[scaled_by])[present].median().clamp(min=1e-3)
        counts = seen / scale - exact
        lost, extra = (
            (marks[:, matched] @ held[matched].double()) == 0
            for held in (counts > -0.5, counts < 0.5)
        )
        if lost.any() or extra.any():
            words = (("too little", lost), ("too much", extra))
            found = [
                f"{word} weight on {_ranges(mask, first)}" for word, mask in words if mask.any()
            ]
            return "; probably " + ", ".join(found)
    return ""


def _ranges(mask: torch.Tensor, first: int) -> str:
    """Set positions of a mask as token ranges, the first few of them."""
    tokens = (mask.nonzero()[:, 0] + first).tolist()
    starts = [t for i, t in enumerate(tokens) if i == 0 or tokens[i - 1] != t - 1]
    ends = [t for i, t in enumerate(tokens) if i + 1 == len(tokens) or tokens[i + 1] != t + 1]
    pairs = list(zip(starts, ends, strict=True))
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in pairs[:SHOWN_TOKENS])
    return f"token {shown}" + (", ..." if len(pairs) > SHOWN_TOKENS else "")
