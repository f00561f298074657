"""GPU time of decode steps: CUDA graphs over rotating KV data, cold L2, medians with spread.

Graphs, because an eager Triton launch costs 17 us of host time on an H200 machine, more than a small decode step takes. The GPU is kept
busy while the host submits a graph: otherwise the wait for the host would count as time of the first calls.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patune.kernels.plan import plan_decode, workspace_elements
from patune.trial import Timing
from patune.tuner.gate.tolerances import out_dtype
from patune.tuner.rotation import COLD_B, FlatPool, make_sets, make_table, plan_rotation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from patune.kernels.inputs import DecodeInputs
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target
    from patune.tuner.rotation import Rotation

GRAPH_US = 1500.0  # of calls per graph: the 11 us around a replay stay under 1 %
MAX_CALLS = 4096  # per graph
REPLAYS = 24
RACE_REPLAYS = 3
RACE_FACTOR = 1.5  # slower than this times the incumbent after RACE_REPLAYS ends the measurement
WARM_UP_US = 30_000.0  # of replays, so that the clocks are up
MIN_WARM_UPS = 2
# 0.1 ms at 1980 MHz, in which the host submits the graph; 26 us were seen for one node
DELAY_CYCLES = 200_000
DELAY_CYCLES_PER_CALL = 1000  # 0.5 us, for graphs of many nodes
MEMORY_SHARE = 0.8  # of the free device memory that KV data may take
GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Recording:
    """A captured graph.

    Attributes:
        calls: decode steps (or whatever was recorded) per replay.
        flush: read before each replay, to push the rotation out of the L2; or None.
        steps: what was captured. Held because it owns the tensors whose addresses the graph has.
    """

    graph: torch.cuda.CUDAGraph
    calls: int
    flush: torch.Tensor | None = None
    steps: Sequence[Callable[[], None]] = ()

    def replay_us(self) -> float:
        """Replay once; microseconds per call."""
        start, end = _event(), _event()
        if self.flush is not None:
            self.flush.amax()
        delay = DELAY_CYCLES + DELAY_CYCLES_PER_CALL * self.calls
        torch.cuda._sleep(delay)  # type: ignore[no-untyped-call]
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self.calls


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _capture(
    steps: Sequence[Callable[[], None]], rounds: int, flush: torch.Tensor | None
) -> Recording:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for step in steps:
                step()
    return Recording(graph, rounds * len(steps), flush, steps)


def rounds_for(round_us: float, steps: int) -> int:
    """How often a graph goes over its steps to last GRAPH_US."""
    return max(1, min(math.ceil(GRAPH_US / max(round_us, 1e-3)), MAX_CALLS // steps))


def record(
    steps: Sequence[Callable[[], None]],
    flush: torch.Tensor | None = None,
    warm_up_us: float = WARM_UP_US,
) -> Recording:
    """Capture the steps in a graph, over and over until a replay lasts GRAPH_US, and replay it for ``warm_up_us``.

    A flushed graph goes over its steps once: the second time would find them in the L2.
    """
    steps[0]()  # compiles and loads what a capture cannot
    torch.cuda.synchronize()
    recording = _capture(steps, 1, flush)
    recording.replay_us()
    if flush is None:
        rounds = rounds_for(recording.replay_us() * len(steps), len(steps))
        if rounds > 1:
            recording = _capture(steps, rounds, flush)
    warm_us, replays = 0.0, 0
    while replays < MIN_WARM_UPS or warm_us < warm_up_us:
        warm_us += recording.replay_us() * recording.calls
        replays += 1
    return recording


def race(sample: Callable[[], float], incumbent_us: float | None) -> list[float]:
    """REPLAYS samples, or RACE_REPLAYS when those say that the incumbent is out of reach."""
    samples: list[float] = []
    while len(samples) < REPLAYS:
        samples.append(sample())
        lost = incumbent_us is not None and statistics.median(samples) > RACE_FACTOR * incumbent_us
        if len(samples) == RACE_REPLAYS and lost:
            break
    return samples


def summarise(samples: Sequence[float], moved_b: int, ceiling_gb_s: float) -> Timing:
    """Median, spread and share of the read bandwidth.

    Args:
        samples: microseconds per call, one per replay.
        moved_b: bytes of K and V that a call has to read.
        ceiling_gb_s: read bandwidth measured in the same run.
    """
    ordered = sorted(samples)
    last = len(ordered) - 1
    median_us = statistics.median(ordered)
    return Timing(
        median_us=median_us,
        p20_us=ordered[math.floor(0.2 * last)],
        p80_us=ordered[math.ceil(0.8 * last)],
        replays=len(ordered),
        read_fraction=moved_b / (median_us * 1e-6) / (ceiling_gb_s * GIGA),
    )


class Bench:
    """Times knobs on one problem and workload, on the current CUDA device.

    Args:
        pool: shared by the benches of a process.
        ceiling_gb_s: read bandwidth measured in the same run.
        lengths: tokens of each sequence; None: all are as long as the workload says.
    """

    def __init__(
        self,
        problem: Problem,
        workload: Workload,
        target: Target,
        pool: FlatPool,
        *,
        device: torch.device,
        ceiling_gb_s: float,
        lengths: Sequence[int] | None = None,
    ) -> None:
        free_b, _ = torch.cuda.mem_get_info(device)
        memory_b = int((free_b + pool.held_b) * MEMORY_SHARE)
        self._problem, self._workload, self._target = problem, workload, target
        self._pool, self._device = pool, device
        self._ceiling_gb_s = ceiling_gb_s
        self._rotation = plan_rotation(problem, workload, memory_b, lengths)
        self._table = make_table(self._rotation, device)

    @property
    def rotation(self) -> Rotation:
        """How calls rotate over data, and how many bytes one has to read."""
        return self._rotation

    def sets(self) -> list[DecodeInputs]:
        """The inputs of the calls of a rotation. Not to be kept: the pool may be refilled for another problem."""
        return make_sets(self._problem, self._workload, self._rotation, self._pool, self._table)

    def output(self, knobs: Knobs) -> torch.Tensor:
        """What knobs compute from the first set: the second of two launches on one workspace, each over an output of NaN."""
        inputs = self.sets()[0]
        out, workspace = self._out(inputs), self._workspace(knobs)
        step = _step(inputs, knobs, self._target, out, workspace)
        for _ in range(2):
            out.fill_(math.nan)
            step()
        return out

    def record(self, knobs: Knobs, warm_up_us: float = WARM_UP_US) -> Recording:
        """A graph of decode steps that rotates over the sets."""
        sets = self.sets()
        out, workspace = self._out(sets[0]), self._workspace(knobs)
        steps = [_step(inputs, knobs, self._target, out, workspace) for inputs in sets]
        return self.record_steps(steps, warm_up_us)

    def record_steps(
        self, steps: Sequence[Callable[[], None]], warm_up_us: float = WARM_UP_US
    ) -> Recording:
        """A graph of anything else that takes a step per set."""
        flush = flush_buffer(self._device) if self._rotation.flushes else None
        return record(steps, flush, warm_up_us)

    def time(self, knobs: Knobs, incumbent_us: float | None = None) -> Timing:
        """GPU time of a decode step; given up early when it is far behind ``incumbent_us``."""
        return self.summary(race(self.record(knobs).replay_us, incumbent_us))

    def retime(self, finalists: Sequence[Knobs]) -> list[Timing]:
        """GPU times measured in turns, so that drift of the clocks hits all finalists alike."""
        recordings = [self.record(knobs) for knobs in finalists]
        samples: list[list[float]] = [[] for _ in recordings]
        for _ in range(REPLAYS):
            for taken, recording in zip(samples, recordings, strict=True):
                taken.append(recording.replay_us())
        return [self.summary(taken) for taken in samples]

    def summary(self, samples: Sequence[float]) -> Timing:
        """Samples as a timing. K and V count, scales do not: peers are compared by K and V."""
        return summarise(samples, self._rotation.kv_b, self._ceiling_gb_s)

    def _out(self, inputs: DecodeInputs) -> torch.Tensor:
        dtype = out_dtype(self._problem)
        return torch.empty(inputs.query.shape, dtype=dtype, device=self._device)

    def _workspace(self, knobs: Knobs) -> torch.Tensor:
        elements = workspace_elements(self._problem, self._workload, knobs)
        return torch.empty(elements, dtype=torch.float32, device=self._device)


def _step(
    inputs: DecodeInputs,
    knobs: Knobs,
    target: Target,
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> Callable[[], None]:
    calls = plan_decode(inputs, knobs, target, out=out, workspace=workspace)

    def step() -> None:
        for call in calls:
            call.launch()

    return step


@functools.cache
def flush_buffer(device: torch.device) -> torch.Tensor:
    """Memory to read instead of what is in the L2; written dirty lines would be paid for by the next reader."""
    return torch.zeros(COLD_B // 4, dtype=torch.int32, device=device)
