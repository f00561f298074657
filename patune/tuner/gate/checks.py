"""What a kernel's output must be: finite, zero where nothing is seen, the right tokens, the right values, the right LSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patune.kernels.reference import keys_and_values
from patune.tuner.gate import tolerances
from patune.tuner.gate.case import Case, first_seen
from patune.tuner.gate.diagnosis import guess_tokens
from patune.tuner.gate.guards import POISON
from patune.tuner.gate.verdict import Place, Rejected

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs
    from patune.problem import Problem

LOG2E = 1.4426950408889634


def check_out(
    case: Case,
    problem: Problem,
    inputs: DecodeInputs,
    out: torch.Tensor,
    exact: torch.Tensor,
    exact_lse: torch.Tensor,
) -> float:
    """Every row: finite, zero where it sees nothing, the right tokens, the right values. Returns the worst relative RMS error.

    ``out`` and the float64 oracle ``exact`` are [rows, heads, head_dim], ``exact_lse`` is [rows, heads].

    Raises:
        Rejected: the first of these that does not hold.
    """
    seen = out.double()
    _check_finite(inputs, out, seen)
    ghosts = (exact_lse == -torch.inf) & (seen != 0).any(-1)
    if ghosts.any():
        row, head, _ = _worst(ghosts.double())
        where = Place.of_row(inputs, row, head)
        largest = float(seen[row, head].abs().max())
        raise Rejected(
            "wrong", f"{where} sees no token: expected zeros, saw {largest:.3g}", place=where
        )
    if case.kind == "markers":
        _check_tokens(case, problem, inputs, seen, exact, exact_lse)
    if case.kind == "integers":
        _check_exact(inputs, out, exact)
    return _check_values(problem, inputs, seen, exact)


def check_lse(inputs: DecodeInputs, seen: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    """The LSE of every row, [rows, heads], within ``limit``; -inf where nothing is seen.

    Raises:
        Rejected: a row's LSE is off.
    """
    difference = torch.where(seen == exact, 0.0, (seen - exact).abs()).nan_to_num(nan=torch.inf)
    relative = tolerances.LSE_RELATIVE * torch.where(exact.isfinite(), exact.abs(), 0.0)
    row, head, error = _worst(difference - relative)
    if error > limit:
        got, expected = float(seen[row, head]), float(exact[row, head])
        base = abs(got - expected * LOG2E) <= limit * LOG2E
        where = Place.of_row(inputs, row, head)
        raise Rejected(
            "wrong",
            f"lse {got:.5g}, expected {expected:.5g} in {where}, allowed difference {limit}"
            + (": it is in base 2, not natural" if base else ""),
            place=where,
        )


def check_same_bits(
    inputs: DecodeInputs, seen: torch.Tensor, first: torch.Tensor, status: str, why: str
) -> None:
    """Two outputs [rows, heads, head_dim] of the same rows are the same bits.

    Raises:
        Rejected: with ``status`` and the first row that differs.
    """
    if torch.equal(seen, first):
        return
    differs = (seen != first).any(-1)
    row, head = differs.nonzero()[0].tolist()
    where = Place.of_row(inputs, row, head)
    raise Rejected(status, f"{why} in {int(differs.sum())} of {differs.numel()} rows, first in {where}", place=where)  # fmt: skip


def _worst(errors: torch.Tensor) -> tuple[int, int, float]:
    """Row, head and value of the largest of [rows, heads]."""
    row, head = divmod(int(errors.argmax()), errors.shape[1])
    return row, head, float(errors[row, head])


def _check_finite(inputs: DecodeInputs, out: torch.Tensor, seen: torch.Tensor) -> None:
    bad = ~seen.isfinite().all(-1)
    if not bad.any():
        return
    row, head, _ = _worst(bad.double())
    where = Place.of_row(inputs, row, head)
    unwritten = out[row, head].view(torch.int16) == POISON[16]
    why = (
        "they were not written"
        if unwritten.any()
        else "something unused was read (a cache slot, a page, a partial result), or 0 / 0"
    )
    raise Rejected(
        "nonfinite",
        f"{int((~seen[row, head].isfinite()).sum())} channels are NaN or Inf in {where}, "
        f"one of {int(bad.sum())} such rows of {bad.numel()}: {why}",
        place=where,
    )


def _check_values(
    problem: Problem, inputs: DecodeInputs, seen: torch.Tensor, exact: torch.Tensor
) -> float:
    # below the output type's smallest normal number there is nothing relative left to compare
    floor = torch.finfo(tolerances.out_dtype(problem)).tiny
    difference = seen - exact
    rms = difference.square().mean(-1).sqrt() / exact.square().mean(-1).sqrt().clamp(min=floor)
    peak = difference.abs().amax(-1) / exact.abs().amax(-1).clamp(min=floor)
    rms_limit, peak_limit = tolerances.row_tolerances(problem)
    for name, errors, limit in (
        ("relative RMS error", rms, rms_limit),
        ("largest difference over the largest value", peak, peak_limit),
    ):
        row, head, error = _worst(errors)
        if error > limit:
            wrong = int((errors > limit).sum())
            where = Place.of_row(inputs, row, head)
            raise Rejected(
                "wrong",
                f"{name} {error:.3g} in {where}, allowed {limit}; {wrong} of {errors.numel()} rows are off",
                error_rms=float(rms[row, head]),
                place=where,
            )
    return float(rms.max())


def _check_exact(inputs: DecodeInputs, out: torch.Tensor, exact: torch.Tensor) -> None:
    """Integers: every element is the exact result rounded once; where that lies all but between two numbers, either of them."""
    slack = tolerances.EXACT * exact.abs() + tolerances.EXACT_ZERO
    low, high = ((exact + step).to(out.dtype) for step in (-slack, slack))
    off = (out < low) | (out > high)
    if off.any():
        row, head, count = _worst(off.double().sum(-1))
        where = Place.of_row(inputs, row, head)
        channel = int(off[row, head].nonzero()[0])
        raise Rejected(
            "wrong",
            f"sums of small integers are exact, but {int(count)} channels are not the exact result rounded to {out.dtype} in {where}: "
            f"channel {channel} is {float(out[row, head, channel]):.6g}, exactly {float(exact[row, head, channel]):.6g}; "
            f"{int(off.any(-1).sum())} of {off[..., 0].numel()} rows are off",
            place=where,
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
    total = exact_lse.exp()
    if inputs.sinks is not None:
        total = total + inputs.sinks.double().exp()
    counts = exact * total[..., None]
    rounding = counts * (torch.finfo(tolerances.out_dtype(problem)).eps / 2)
    difference = (seen * total[..., None] - counts).abs()
    off = (difference - rounding).amax(-1) > tolerances.TOKENS
    if not off.any():
        return
    # of the wrong rows the one with the fewest tokens: what is wrong with it is the easiest to tell, and to reproduce
    row, head, _ = _worst(torch.where(off, -total, -torch.inf))
    where = Place.of_row(inputs, row, head)
    first = first_seen(where.context, problem, case.window)
    _, values = keys_and_values(inputs, where.sequence, first, where.context, torch.float64)
    tokens = guess_tokens(
        values[:, where.kv_head], seen[row, head] * total[row, head], counts[row, head], first
    )
    visible = round(float(exact_lse[row, head].exp()))
    raise Rejected(
        "wrong",
        f"a channel is off by {float(difference[row, head].max()):.3g} of {visible} tokens in {where}"
        + (f"; probably {tokens}" if tokens else ""),
        error_rms=float((seen - exact)[row, head].norm() / exact[row, head].norm()),
        place=where,
        tokens=tokens,
    )
