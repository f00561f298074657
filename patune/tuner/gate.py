"""The correctness gate: runs poisoned cases and compares every output row with the oracle. Nothing is timed before it passed.

It stops at the first case that fails, and says which row was wrong, by how much, and where it can tell, which tokens were lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from patune.errors import EmulatorError
from patune.kernels.reference import keys_and_values, reference_decode
from patune.record import check_choice
from patune.trial import STATUSES
from patune.tuner.cases import Case, build_inputs, first_seen, gate_cases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.calls import KernelCall
    from patune.kernels.inputs import DecodeInputs
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.target import Target
    from patune.tuner.executors import Executor

# Relative errors of one output row against the float64 oracle: (RMS, largest difference over the row's largest value).
# Probabilities and output are rounded to the query's dtype. Worst row of this gate's cases on an H200 (2026-11-22, 19 problems): bf16
# 0.27-0.38 % RMS, fp16 0.036 %; native fp8 products 1.9-2.1 % (prototype). One token of 1000 lost from random data is 3 % RMS.
ROW_TOLERANCES = {
    "bf16": (0.01, 0.03),
    "fp16": (0.003, 0.01),
    "fp8_e4m3fn": (0.05, 0.15),
    "fp8_e4m3fnuz": (0.05, 0.15),
}
# Markers: a channel of the output is (its tokens) / (all tokens), exact but for the output's rounding. Beyond that rounding it may be off
# by this many tokens. At 3000 tokens a lower-half channel holds at most 94 (head_dim 64): bf16 moves it by 0.37, a lost token by 1.
TOKEN_TOLERANCE = 0.1
LSE_TOLERANCE = 0.002  # natural log; scores are exact products summed in float32, so only exp2 and the sum round
# NaNs by width that no arithmetic produces: an element that still has this value was not written.
POISON = {16: 0x7FE5, 32: 0x7FE5A5A5}
GUARD = 4096  # elements before and after every output buffer, which nobody may write
LOG2E = 1.4426950408889634
SHOWN_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """Verdict of the gate.

    Attributes:
        status: ``ok``, ``wrong``, ``nonfinite``, ``unstable`` or ``launch_error``.
        reason: what the first failing case saw; empty when ok.
        cases: cases passed.
        error_rms: worst relative RMS error of a row over the passed cases, or of the failing row.
        failed_case: name of the case that failed.
    """

    status: str
    reason: str = ""
    cases: int = 0
    error_rms: float | None = None
    failed_case: str | None = None

    def __post_init__(self) -> None:
        check_choice("status", self.status, STATUSES)

    @property
    def ok(self) -> bool:
        """Every case passed."""
        return self.status == "ok"


class Plan(Protocol):
    """How inputs and knobs become calls; :func:`patune.kernels.plan.plan_decode` is the one that counts."""

    def __call__(
        self,
        inputs: DecodeInputs,
        knobs: Knobs,
        target: Target,
        *,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> Sequence[KernelCall]:
        """Calls that compute the decode step."""
        ...


class _Rejected(Exception):
    """A verdict that ends a case."""

    def __init__(self, status: str, reason: str, error_rms: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.error_rms = status, reason, error_rms


def run_gate(
    problem: Problem,
    knobs: Knobs,
    target: Target,
    executor: Executor,
    *,
    plan: Plan | None = None,
) -> GateReport:
    """Decide whether the knobs compute the problem. Deterministic: the same cases for the same problem and knobs.

    CPU executors (the emulator) get the small list of cases, devices the wide one.

    Raises:
        Exception: what compiling or launching raised, with the case as a note: only the worker knows whether its device survived.
    """
    cases = gate_cases(problem, knobs, emulated=executor.device.type == "cpu")
    return run_cases(cases, problem, knobs, target, executor, plan=plan)


def run_cases(
    cases: Sequence[Case],
    problem: Problem,
    knobs: Knobs,
    target: Target,
    executor: Executor,
    *,
    plan: Plan | None = None,
) -> GateReport:
    """Run the cases in order up to the first that fails."""
    worst = 0.0
    for passed, case in enumerate(cases):
        try:
            worst = max(worst, _run_case(case, problem, knobs, target, executor, plan))
        except _Rejected as verdict:
            return GateReport(
                status=verdict.status,
                reason=f"case {case.name} (window {case.window}, tile {knobs.partition_tokens}, page {problem.block_size}, "
                f"splits {knobs.num_splits}): {verdict.reason}",
                cases=passed,
                error_rms=verdict.error_rms,
                failed_case=case.name,
            )
        except Exception as error:
            error.add_note(f"in gate case {case.name}")
            raise
    return GateReport(status="ok", cases=len(cases), error_rms=worst)


def _run_case(
    case: Case,
    problem: Problem,
    knobs: Knobs,
    target: Target,
    executor: Executor,
    plan: Plan | None,
) -> float:
    """Run one case with all its repeats; the worst relative RMS error of a row."""
    from patune.kernels.plan import plan_decode, workspace_elements

    inputs = build_inputs(case, problem, executor.device)
    elements = workspace_elements(problem, inputs.workload(), knobs)
    out = _Guarded("out", inputs.query.shape, _out_dtype(problem), executor.device, gap=1)
    workspace = _Guarded("workspace", (elements,), torch.float32, executor.device)
    lse = _Guarded("lse", inputs.query.shape[:2], torch.float32, executor.device)
    buffers = (out, workspace, lse)
    calls = (plan or plan_decode)(
        inputs,
        knobs,
        target,
        out=out.inner,
        workspace=workspace.inner if elements else None,
        lse=lse.inner if case.checks_lse else None,
    )
    exact, exact_lse = reference_decode(inputs, dtype=torch.float64)
    _run(executor, calls, buffers)
    first = out.inner.clone()
    error_rms = _check_out(case, problem, inputs, first, exact, exact_lse)
    if case.checks_lse:
        _check_lse(inputs, lse.inner.double(), exact_lse)
    for repeat in range(case.repeats):
        _run(executor, calls, buffers)
        if not torch.equal(out.inner, first):
            row = int((out.inner != first).flatten(1).any(1).nonzero()[0])
            where = _place(inputs, row, 0).rsplit(",", 1)[0]
            raise _Rejected("unstable", f"run {repeat + 2} differs from run 1 in {where}: a race")
    return error_rms


class _Guarded:
    """An output buffer that is poison until a kernel writes it, between guards and with a gap after each row, which must stay poison."""

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        gap: int = 0,
    ) -> None:
        padded = torch.Size((shape[0], shape[1] + gap, *shape[2:]) if gap else shape)
        buffer = torch.empty(padded.numel() + 2 * GUARD, dtype=dtype, device=device)
        self.bits = buffer.view(torch.int16 if buffer.itemsize == 2 else torch.int32)
        self.poison = POISON[8 * buffer.itemsize]
        whole = slice(GUARD, GUARD + padded.numel())
        self.inner = buffer[whole].view(padded)
        self.guards = {f"before {name}": self.bits[:GUARD], f"after {name}": self.bits[-GUARD:]}
        if gap:
            self.guards[f"between rows of {name}"] = self.bits[whole].view(padded)[:, shape[1] :]
            self.inner = self.inner[:, : shape[1]]

    def check_guards(self) -> None:
        for where, guard in self.guards.items():
            if written := int((guard != self.poison).sum()):
                raise _Rejected("wrong", f"{written} elements {where} were written")


def _run(executor: Executor, calls: Sequence[KernelCall], buffers: Sequence[_Guarded]) -> None:
    for buffer in buffers:
        buffer.bits.fill_(buffer.poison)
    try:
        executor.run(calls)
    except EmulatorError as error:
        status = "unstable" if str(error).startswith("race") else "launch_error"
        raise _Rejected(status, " ".join(str(error).split())) from error
    for buffer in buffers:
        buffer.check_guards()


def _out_dtype(problem: Problem) -> torch.dtype:
    return torch.float16 if problem.query_dtype == "fp16" else torch.bfloat16


def _place(inputs: DecodeInputs, row: int, head: int) -> str:
    """Where an output row is, in the words of its problem."""
    sequence, query_token = divmod(row, inputs.query_length)
    context = int(inputs.context_lengths[sequence])
    kv_head = head // (inputs.query.shape[1] // inputs.kv_heads)
    return f"sequence {sequence} (context {context}), query token {query_token}, head {head} (KV head {kv_head})"


def _worst(errors: torch.Tensor) -> tuple[int, int, float]:
    """Row, head and value of the largest of [rows, heads]."""
    row, head = divmod(int(errors.argmax()), errors.shape[1])
    return row, head, float(errors[row, head])


def _check_out(
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
        raise _Rejected(
            "nonfinite",
            f"{int((~seen[row, head].isfinite()).sum())} channels are NaN or Inf in {_place(inputs, row, head)}, "
            f"one of {int(bad.sum())} such rows of {bad.numel()}: {why}",
        )
    ghosts = (exact_lse == -torch.inf) & (seen != 0).any(-1)
    if ghosts.any():
        row, head, _ = _worst(ghosts.double())
        largest = float(seen[row, head].abs().max())
        raise _Rejected(
            "wrong", f"{_place(inputs, row, head)} sees no token: expected zeros, saw {largest:.3g}"
        )
    if case.kind == "markers":
        _check_tokens(case, problem, inputs, seen, exact, exact_lse)
    return _check_values(problem, inputs, seen, exact)


def _check_values(
    problem: Problem, inputs: DecodeInputs, seen: torch.Tensor, exact: torch.Tensor
) -> float:
    # below the output type's smallest normal number there is nothing relative left to compare
    floor = torch.finfo(_out_dtype(problem)).tiny
    difference = seen - exact
    rms = difference.square().mean(-1).sqrt() / exact.square().mean(-1).sqrt().clamp(min=floor)
    peak = difference.abs().amax(-1) / exact.abs().amax(-1).clamp(min=floor)
    rms_limit, peak_limit = ROW_TOLERANCES[problem.query_dtype]
    for name, errors, limit in (
        ("relative RMS error", rms, rms_limit),
        ("largest difference over the largest value", peak, peak_limit),
    ):
        row, head, error = _worst(errors)
        if error > limit:
            wrong = int((errors > limit).sum())
            raise _Rejected(
                "wrong",
                f"{name} {error:.3g} in {_place(inputs, row, head)}, allowed {limit}; {wrong} of {errors.numel()} rows are off",
                float(rms[row, head]),
            )
    return float(rms.max())


def _check_lse(inputs: DecodeInputs, seen: torch.Tensor, exact: torch.Tensor) -> None:
    difference = torch.where(seen == exact, 0.0, (seen - exact).abs()).nan_to_num(nan=torch.inf)
    row, head, error = _worst(difference)
    if error > LSE_TOLERANCE:
        got, expected = float(seen[row, head]), float(exact[row, head])
        base = abs(got - expected * LOG2E) <= LSE_TOLERANCE * LOG2E
        raise _Rejected(
            "wrong",
            f"lse {got:.5g}, expected {expected:.5g} in {_place(inputs, row, head)}, allowed difference {LSE_TOLERANCE}"
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
    rounding = counts * (torch.finfo(_out_dtype(problem)).eps / 2)
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
    raise _Rejected(
        "wrong",
        f"a channel is off by {float(difference[row, head].max()):.3g} of {visible} tokens "
        f"in {_place(inputs, row, head)}{guess}",
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
