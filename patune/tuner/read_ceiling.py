"""The read bandwidth that decode kernels are held against, measured in the same run as they are."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

import torch

from patune.kernels.calls import KernelCall
from patune.tuner.clock import GIGA, record

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS = (2048, 4096, 8192)  # int32 words of one load
UNROLLS = (2, 4)
WARPS = (4, 8)
PROGRAMS_PER_CU = (4, 8, 16)
REPLAYS = 5
CEILING_B = 4 << 30  # 68 times the L2 of an H200


def read_ceiling_gb_s(nbytes: int = CEILING_B) -> float:
    """Best of 36 shapes of a read-only kernel over ``nbytes`` bytes; they lie within 1.2 % of each other on an H200."""
    words = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device="cuda")
    best_us = min(_read_us(words, *shape) for shape in itertools.product(BLOCKS, UNROLLS, WARPS))
    size_b = words.numel() * 4
    del words
    torch.cuda.empty_cache()
    return size_b / (best_us * 1e-6) / GIGA


def _read_us(words: torch.Tensor, block: int, unroll: int, warps: int) -> float:
    """Median time of the best grid."""
    compute_units = torch.cuda.get_device_properties(words.device).multi_processor_count
    out = torch.empty(compute_units * max(PROGRAMS_PER_CU), dtype=torch.int32, device=words.device)
    times = []
    for per_cu in PROGRAMS_PER_CU:
        read = _reader(words, out, per_cu * compute_units, (block, unroll, warps))
        recording = record([read])
        times.append(statistics.median(recording.replay_us() for _ in range(REPLAYS)))
    return min(times)


def _reader(
    words: torch.Tensor, out: torch.Tensor, programs: int, shape: tuple[int, int, int]
) -> Callable[[], None]:
    from patune.kernels.read_ceiling import read_sum_kernel

    block, unroll, warps = shape
    call = KernelCall(
        kernel=read_sum_kernel,
        grid=(programs, 1, 1),
        arguments={"x_ptr": words, "out_ptr": out, "n": words.numel()},
        constants={"BLOCK": block, "UNROLL": unroll, "WARPS": warps},
        options={"num_warps": warps},
    )
    return call.launch
