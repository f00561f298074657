"""Which builds get faults planted into their assembly text, and which of the faults are no faults there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from assembly_faults import (
    Fault,
    removed_barriers,
    shifted_offsets,
    short_buffers,
    weakened_waits,
)

from patune.kernels.knobs import CdnaKnobs
from patune.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

DECODE, REDUCE = "cdna_decode_kernel", "reduce_kernel"
DECODE_BUFFERS = (
    "query_ptr", "key_ptr", "value_ptr", "table_ptr", "context_ptr", "partial_out_ptr", "partial_max_ptr", "partial_sum_ptr",
)  # fmt: skip
REDUCE_BUFFERS = ("partial_out_ptr", "partial_max_ptr", "partial_sum_ptr", "out_ptr")


@dataclass(frozen=True)
class Setting:
    """A configuration, one of its kernels, and that kernel's buffers. More splits than a chunk, so that the reduce kernel's loop comes round."""

    name: str
    arch: str
    problem: Problem
    knobs: CdnaKnobs
    kernel: str = DECODE
    buffers: tuple[str, ...] = DECODE_BUFFERS

    def faults(self, asm: str) -> Iterator[Fault]:
        """Every fault that can be planted into the kernel's text."""
        if not self.knobs.lds_ring or self.kernel == REDUCE:
            return itertools.chain(
                removed_barriers(asm), shifted_offsets(asm), short_buffers(self.buffers)
            )
        # Lanes of the ring read only what they copied themselves: the barriers that the compiler puts into its loop protect nothing,
        # and the merge behind it reads memory that the ring has written, where a wrong row maximum is still a reference like any other.
        merge = asm.index("\n", asm.rindex("ds_read_b128"))
        ring, rest = asm[:merge], asm[merge:]
        return itertools.chain(
            (Fault(f.kind, f.place, ring + f.asm) for f in removed_barriers(rest)),
            (Fault(f.kind, f.place, f.asm) for f in shifted_offsets(asm) if "ds_read_b128" in f.place),
            weakened_waits(asm),
            short_buffers(self.buffers),
        )  # fmt: skip


SMALL = CdnaKnobs(
    partition_tokens=64, num_splits=12, num_stages=1, num_warps=2, reduce_chunk=8, reduce_warps=1
)
WIDE = CdnaKnobs(
    partition_tokens=128, num_splits=12, num_stages=2, num_warps=4, reduce_chunk=8, reduce_warps=4
)
RING = CdnaKnobs(
    partition_tokens=64, num_splits=2, num_stages=3, num_warps=2, lds_ring=True, reduce_chunk=8, reduce_warps=1
)  # fmt: skip
PLAIN = Problem(block_size=1024, head_dim=128, qg=8)
WINDOWED = Problem(block_size=16, head_dim=64, qg=4, query_length=2, windowed=True, sinks=True)
STRIDED = Problem(block_size=64, head_dim=128, qg=8, kv_layout="hnd")

SETTINGS = (
    Setting("gfx942-windowed", "gfx942", WINDOWED, SMALL),
    Setting("gfx950-page1024", "gfx950", PLAIN, WIDE),
    Setting("gfx942-reduce", "gfx942", PLAIN, WIDE, REDUCE, REDUCE_BUFFERS),
    Setting("gfx950-ring", "gfx950", STRIDED, RING),
)
