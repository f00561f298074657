"""A split decode kernel in torch, for the gate to judge: right, or wrong in one of many ways."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from simulated_operands import Operands

from patune.errors import EmulatorError
from patune.kernels.calls import KernelCall
from patune.kernels.knobs import CdnaKnobs
from patune.kernels.plan import workspace_elements
from patune.kernels.reference import reference_decode
from patune.problem import Problem
from patune.target import Target
from patune.tuner.gate.case import Case
from patune.tuner.gate.tensors import build_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.inputs import DecodeInputs

TARGET = Target.named("gfx942")
torch.set_num_threads(
    1
)  # small tensors: on a busy machine threads that wait for each other take 4 times as long
FLAT = -torch.inf


class CpuExecutor:
    """Runs fake calls on CPU tensors, so the gate takes the emulated list of cases."""

    device = torch.device("cpu")

    def run(self, calls: Sequence[KernelCall]) -> None:
        for call in calls:
            call.launch()

    def replay(self, calls: Sequence[KernelCall], resident: Sequence[torch.Tensor]) -> None:
        """Run again."""
        self.run(calls)


@dataclass
class Simulation(Operands):
    """A split decode kernel in torch: whole tiles are dealt to splits in turn, partial results are merged. ``bug`` breaks it on purpose."""

    runs: int = field(default=0)
    caches: tuple[torch.Tensor, ...] = ()

    def plan(
        self,
        inputs: DecodeInputs,
        knobs: Any,
        target: Target,
        *,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> list[KernelCall]:
        assert target is TARGET
        assert (workspace is None) == (knobs.num_splits == 1)
        if workspace is not None:
            needed = workspace_elements(inputs.problem, inputs.workload(), knobs)
            assert workspace.shape == (needed,)

        self.runs = 0
        self.caches = (self.read_key(inputs), self.read_value(inputs))

        def kernel() -> None:
            self.runs += 1
            self.decode(inputs, knobs.partition_tokens, knobs.num_splits, out, lse)
            if self.bug == "cache written":
                inputs.value_cache[-1] = 0
            if self.bug == "lengths written":
                inputs.context_lengths.as_strided((1,), (1,), 0).zero_()

        return [KernelCall(kernel={(1, 1, 1): kernel}, grid=(1, 1, 1), arguments={}, constants={})]

    def decode(
        self,
        inputs: DecodeInputs,
        tile: int,
        splits: int,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        length, q_heads = inputs.query_length, inputs.query.shape[1]
        for sequence, context in enumerate(inputs.context_lengths.tolist()):
            if context == 0 and self.bug == "context 0 unwritten":
                continue
            if sequence and sequence == inputs.batch - 1 and self.bug == "stale rows":
                continue
            total = torch.zeros(length, q_heads)
            acc = torch.zeros(length, q_heads, inputs.query.shape[2])
            top = torch.full((length, q_heads), FLAT)
            for split in range(splits):
                if split and self.bug == "first split only":
                    break
                m, s, o = self.walk(inputs, sequence, context, tile, splits, split)
                if self.bug == "coarse partial results":
                    o = o.bfloat16().float()
                new_top = torch.maximum(top, m)
                safe = torch.where(new_top == FLAT, 0.0, new_top)
                old, new = torch.exp(top - safe), torch.exp(m - safe)
                total, top = total * old + s * new, new_top
                acc = acc * old[..., None] + o * new[..., None]
            if self.bug == "depends on the batch" and inputs.batch == 1:
                acc = acc * (1 + 2**-8)
            self.write(inputs, sequence, acc, total, top, splits, out, lse)
        if self.bug == "noise" and self.runs > 1:
            out[-1, -1] *= 1.01
        if self.bug == "zeros":
            out.zero_()
        if self.bug == "overrun":
            torch.as_strided(
                out, (1,), (1,), out.storage_offset() + out.shape[1] * out.shape[2]
            ).zero_()

    def tiles(
        self, inputs: DecodeInputs, context: int, tile: int, splits: int, split: int
    ) -> range:
        """Split s of n takes tiles first + s, first + s + n, ..."""
        begin, end = self.first(inputs, context) // tile + split, -(-context // tile)
        if self.bug == "tile twice" and split and begin < end:
            begin -= 1
        if self.bug == "last tile lost" and end > 1:
            end -= 1
        return range(begin, end, splits)

    def first(self, inputs: DecodeInputs, context: int) -> int:
        if not inputs.sliding_window:
            return 0
        return max(0, context - (inputs.query_length - 1) - inputs.sliding_window)

    def walk(
        self, inputs: DecodeInputs, sequence: int, context: int, tile: int, splits: int, split: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Max [L, Hq], sum [L, Hq] and accumulator [L, Hq, D] of one split."""
        length, (_, q_heads, head_dim) = inputs.query_length, inputs.query.shape
        token = torch.cat(
            [
                torch.arange(t * tile, (t + 1) * tile)
                for t in self.tiles(inputs, context, tile, splits, split)
            ]
            or [torch.arange(0)]
        )
        first = self.first(inputs, context)
        if self.bug == "window wide":
            first = max(0, first - 1)
        keys, values, key_scale, value_scale = self.load(
            inputs, sequence, token, first, context, tile
        )
        kept = (token >= first) & (token < context)
        if self.bug != "value tail unmasked":
            values = torch.where(kept[:, None, None], values, 0.0)
        if self.bug != "value scale tail unmasked":
            value_scale = torch.where(kept[:, None], value_scale, 0.0)
        rows = slice(sequence * length, (sequence + 1) * length)
        query, factor = self.query(inputs, rows)
        if self.bug == "heads interleaved":
            query = query.view(length, -1, inputs.kv_heads, head_dim).transpose(1, 2)
        query = query.reshape(length, inputs.kv_heads, -1, head_dim)
        scale = 1.0 if self.bug == "scale missing" else inputs.softmax_scale
        scores = torch.einsum("lhgd,khd->lhgk", query, keys)
        scores = scale * factor * (scores * key_scale.T[:, None]).flatten(1, 2)
        if inputs.softcap:
            scores = self.capped(inputs, scores)
        scores = torch.where(self.seen(inputs, token, context, tile)[:, None], scores, FLAT)
        if not len(token):
            return (
                torch.full((length, q_heads), FLAT),
                torch.zeros(length, q_heads),
                torch.zeros(length, q_heads, head_dim),
            )
        top = scores.amax(-1)
        if self.bug == "maximum of 0":
            top = top.clamp(min=0)
        if self.bug == "maximum not subtracted":
            top = torch.zeros_like(top)
        probs = torch.exp(scores - torch.where(top == FLAT, 0.0, top)[..., None])
        grouped = probs.view(length, inputs.kv_heads, -1, len(token))
        return top, probs.sum(-1), self.weigh(inputs, grouped, values, value_scale).flatten(1, 2)

    def seen(
        self, inputs: DecodeInputs, token: torch.Tensor, context: int, tile: int
    ) -> torch.Tensor:
        """[L, tokens]"""
        length, window = inputs.query_length, inputs.sliding_window
        limit = (context - length + torch.arange(length))[:, None]
        window += {"window wide": 1, "window narrow": -1}.get(self.bug, 0)
        if self.bug == "not causal":
            limit = torch.full_like(limit, context - 1)
        if self.bug == "causal late":
            limit = limit - 1
        seen = token <= limit
        if inputs.sliding_window:
            seen &= token > limit - window
        if self.bug == "window of the last row" and window:
            seen &= token >= context - window
        if self.bug == "token lost at tile edge":
            seen &= token != tile
        if self.bug == "tokens of early rows lost at split edge":
            seen &= ~((token % tile >= tile - 3) & (token < limit - 2) & (limit < context - 1))
        return seen

    def load(
        self,
        inputs: DecodeInputs,
        sequence: int,
        token: torch.Tensor,
        first: int,
        context: int,
        tile: int,
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values [tokens, Hkv, D] and their scales [tokens, Hkv]."""
        block = inputs.block_size
        table = inputs.block_tables[
            (sequence + 1) % inputs.batch if self.bug == "table row" else sequence
        ]
        slot = token % block
        if self.bug == "page offset missing":
            slot = torch.where(token // tile == 1, token % tile, slot)
        if self.bug == "one key slot late":
            slot = torch.where(token == token.max(), token.min() % block, slot)
        valid = (token >= first) & (token < context)
        page = torch.where(valid, table[torch.where(valid, token // block, 0)].long(), 0)
        if self.bug == "32-bit offsets":
            page = torch.where(page * inputs.key_cache.stride(0) >= 2**31, 0, page)
        if bool((page >= inputs.key_cache.shape[0]).any()):
            raise EmulatorError("load outside of key_ptr")
        key, value = (cache[page, slot] for cache in self.caches)
        if self.bug == "keys of head 0":
            key = key[:, :1].expand_as(key)
        scaled_page = (
            token // block % len(inputs.key_cache) if self.bug == "scale of wrong page" else page
        )
        return key, value, *self.scales(inputs, scaled_page, slot)

    def write(
        self,
        inputs: DecodeInputs,
        sequence: int,
        acc: torch.Tensor,
        total: torch.Tensor,
        top: torch.Tensor,
        splits: int,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        length = inputs.query_length
        rows = slice(sequence * length, (sequence + 1) * length)
        logs = top + total.log()
        if inputs.sinks is not None:
            sinks = inputs.sinks.float()
            if self.bug == "softcap on the sink":
                sinks = inputs.softcap * torch.tanh(sinks / inputs.softcap)
            if self.bug == "sink scaled":
                sinks = sinks * inputs.softmax_scale
            if self.bug == "sink per split":
                sinks = sinks + math.log(splits)
            if self.bug == "sink of head 0":
                sinks = sinks[:1].expand_as(sinks)
            if self.bug == "sink overflows":
                total = total * torch.exp(top) + torch.exp(sinks * 4) / torch.exp(sinks * 3)
                acc = acc * torch.exp(top)[..., None]
            else:
                safe = torch.maximum(top, sinks)
                factor = torch.exp(top - safe)
                total, acc = total * factor + torch.exp(sinks - safe), acc * factor[..., None]
            if self.bug == "lse with sink":
                logs = torch.logaddexp(logs, sinks)
        if self.bug != "empty rows divide by zero":
            total = torch.where(total > 0, total, 1.0)
        result = acc / total[..., None]
        if self.bug == "rows transposed":
            group = inputs.query.shape[1] // inputs.kv_heads
            grouped = result.view(length, inputs.kv_heads, group, -1).transpose(0, 1)
            result = (
                grouped.reshape(inputs.kv_heads, group, length, -1)
                .permute(2, 0, 1, 3)
                .flatten(1, 2)
            )
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = logs / math.log(2) if self.bug == "lse base 2" else logs


def oracle_plan(
    inputs: DecodeInputs, *_: Any, out: torch.Tensor, lse: torch.Tensor | None, **__: Any
) -> list[KernelCall]:
    """A perfect kernel for every problem, the quantised ones included."""

    def kernel() -> None:
        exact, exact_lse = reference_decode(inputs, dtype=torch.float64)
        out.copy_(exact)
        if lse is not None:
            lse.copy_(exact_lse)

    return [KernelCall(kernel={(1, 1, 1): kernel}, grid=(1, 1, 1), arguments={}, constants={})]


def make_problem(**fields: Any) -> Problem:
    return Problem(**({"block_size": 1024, "head_dim": 64, "qg": 4} | fields))


def make_knobs(tile: int = 128, splits: int = 3) -> CdnaKnobs:
    return CdnaKnobs(partition_tokens=tile, num_splits=splits, num_stages=1, num_warps=2)


def test_the_unbroken_simulation_agrees_with_the_oracle() -> None:
    problem = make_problem(block_size=16, query_length=3, sinks=True, windowed=True)
    case = Case(name="s", kind="random", contexts=(0, 2, 70, 300), window=50, kv_heads=2)
    inputs = build_inputs(case, problem, CpuExecutor.device)
    out = torch.empty(inputs.query.shape, dtype=torch.bfloat16)
    lse = torch.empty(inputs.query.shape[:2])
    knobs = make_knobs(tile=64, splits=3)
    workspace = torch.empty(workspace_elements(problem, inputs.workload(), knobs))
    calls = Simulation().plan(inputs, knobs, TARGET, out=out, workspace=workspace, lse=lse)
    CpuExecutor().run(calls)
    exact, exact_lse = reference_decode(inputs)
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.005)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
