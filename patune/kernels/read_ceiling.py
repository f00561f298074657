"""Read-only kernel: the bandwidth that a decode kernel is held against.

Every program xors a strided set of blocks of int32 words, 16 bytes per load; one word per program is written so that nothing is dropped.
x [n] int32, out [programs] int32; grid (programs,).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def read_sum_kernel(x_ptr, out_ptr, n, BLOCK: gl.constexpr, UNROLL: gl.constexpr, WARPS: gl.constexpr):
    """Read a strided share of x; see the module docstring."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    word = gl.arange(0, BLOCK, layout=LAYOUT)
    acc = gl.zeros([BLOCK], gl.int32, LAYOUT)
    for block in range(program * UNROLL, n // BLOCK, programs * UNROLL):
        for step in gl.static_range(UNROLL):
            acc = acc ^ gl.load(x_ptr + (block + step).to(gl.int64) * BLOCK + word)
    gl.store(out_ptr + program, gl.sum(acc, 0))
