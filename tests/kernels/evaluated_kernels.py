"""Small Gluon kernels, each with one thing that the evaluator promises something about."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)

from patune.kernels.gluon_compat import cp_async, reinterpret_shared
from patune.kernels.hopper_operands import UNPAIR

LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
OTHER_LANES = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
SQUARE = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
PLAIN_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def copy_masked(from_ptr, to_ptr, first, kept, other, N: gl.constexpr, WITH_OTHER: gl.constexpr):
    """Lanes below ``kept`` of [first, first + N), and ``other`` or nothing in the rest."""
    lane = gl.arange(0, N, layout=LANES)
    if WITH_OTHER:
        values = gl.load(from_ptr + first + lane, mask=lane < kept, other=other)
    else:
        values = gl.load(from_ptr + first + lane, mask=lane < kept)
    gl.store(to_ptr + lane, values)


@gluon.jit
def store_masked(from_ptr, to_ptr, first, kept, N: gl.constexpr):
    """To [first, first + kept), cast to what ``to_ptr`` points to."""
    lane = gl.arange(0, N, layout=LANES)
    gl.store(to_ptr + first + lane, gl.load(from_ptr + lane), mask=lane < kept)


@gluon.jit
def multiply_offsets(from_ptr, to_ptr, page, stride, WIDE: gl.constexpr):
    """from[page * stride], the product in 64 or in 32 bits."""
    if WIDE:
        gl.store(to_ptr, gl.load(from_ptr + page.to(gl.int64) * stride))
    else:
        gl.store(to_ptr, gl.load(from_ptr + page * stride))


@gluon.jit
def integer_arithmetic(to_ptr, a, b):
    """Wrapping and C's division, as int64 elements."""
    gl.store(to_ptr, (a * b).to(gl.int64))
    gl.store(to_ptr + 1, a.to(gl.int64) * b)
    gl.store(to_ptr + 2, (a + 2147483647).to(gl.int64))
    gl.store(to_ptr + 3, (-a // b).to(gl.int64))
    gl.store(to_ptr + 4, (-a % b).to(gl.int64))
    gl.store(to_ptr + 5, (a - b + 1).to(gl.int64))


@gluon.jit
def through_registers(from_ptr, to_ptr, N: gl.constexpr, DTYPE: gl.constexpr):
    """A cast to DTYPE and back."""
    lane = gl.arange(0, N, layout=LANES)
    gl.store(to_ptr + lane, gl.load(from_ptr + lane).to(DTYPE).to(gl.float32))


@gluon.jit
def copy_twice(from_ptr, to_ptr, kept, WAIT: gl.constexpr, READ: gl.constexpr, N: gl.constexpr):
    """Two copies, a group each, into the halves of one allocation; the half READ is read after all but WAIT groups have landed."""
    lane = gl.arange(0, N, layout=LANES)
    smem = gl.allocate_shared_memory(gl.float32, [2, N], PLAIN_SHARED)
    for half in gl.static_range(2):
        cp_async(smem.index(half), from_ptr + half * N + lane, mask=lane < kept)
        async_copy.commit_group()
    async_copy.wait_group(WAIT)
    gl.store(to_ptr + lane, smem.index(READ).load(LANES))


@gluon.jit
def copy_uncommitted(from_ptr, to_ptr, N: gl.constexpr):
    """A copy that no group holds, so that no wait waits for it."""
    lane = gl.arange(0, N, layout=LANES)
    smem = gl.allocate_shared_memory(gl.float32, [N], PLAIN_SHARED)
    cp_async(smem, from_ptr + lane)
    async_copy.wait_group(0)
    gl.store(to_ptr + lane, smem.load(LANES))


@gluon.jit
def write_under_a_copy(from_ptr, N: gl.constexpr, BY_COPY: gl.constexpr):
    """A second copy, or a store, into a place that a copy is on its way to."""
    lane = gl.arange(0, N, layout=LANES)
    smem = gl.allocate_shared_memory(gl.float32, [N], PLAIN_SHARED)
    cp_async(smem, from_ptr + lane)
    async_copy.commit_group()
    if BY_COPY:
        cp_async(smem, from_ptr + lane)
    else:
        smem.store(gl.load(from_ptr + lane))


@gluon.jit
def read_unwritten(to_ptr, N: gl.constexpr):
    """Shared memory as it is found."""
    smem = gl.allocate_shared_memory(to_ptr.dtype.element_ty, [N], PLAIN_SHARED)
    gl.store(to_ptr + gl.arange(0, N, layout=LANES), smem.load(LANES))


@gluon.jit
def index_past_the_end(to_ptr, slot, N: gl.constexpr):
    """A slot of a ring of two."""
    smem = gl.allocate_shared_memory(gl.float32, [2, N], PLAIN_SHARED)
    gl.store(to_ptr + gl.arange(0, N, layout=LANES), smem.index(slot).load(LANES))


@gluon.jit
def unpair(from_ptr, even_ptr, odd_ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WIDE: gl.constexpr, NARROW: gl.constexpr):  # fmt: skip
    """fp8 [ROWS, COLUMNS] by 16-bit pairs of neighbours: the even and the odd columns."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SQUARE))[:, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SQUARE))[None, :]
    smem = gl.allocate_shared_memory(
        gl.float8e4nv, [ROWS, COLUMNS], NARROW, gl.load(from_ptr + row * COLUMNS + column)
    )
    pairs = reinterpret_shared(smem, gl.int16, ROWS, COLUMNS // 2, WIDE).load(SQUARE)
    even, odd = gl.inline_asm_elementwise(
        UNPAIR, "=r,=r,=r,=r,r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=4
    )
    half = gl.arange(0, COLUMNS // 2, layout=gl.SliceLayout(0, SQUARE))[None, :]
    gl.store(even_ptr + row * (COLUMNS // 2) + half, even)
    gl.store(odd_ptr + row * (COLUMNS // 2) + half, odd)


@gluon.jit
def multiply(a_ptr, b_ptr, acc_ptr, to_ptr, K: gl.constexpr, USE_ACC: gl.constexpr):
    """[64, K] @ [K, 8] + acc."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    DTYPE: gl.constexpr = a_ptr.dtype.element_ty
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SQUARE))[:, None]
    depth = gl.arange(0, K, layout=gl.SliceLayout(0, SQUARE))[None, :]
    column = gl.arange(0, 8, layout=gl.SliceLayout(1, SQUARE))[:, None]
    a = gl.allocate_shared_memory(
        DTYPE, [64, K], gl.NVMMASharedLayout.get_default_for([64, K], DTYPE), gl.load(a_ptr + row * K + depth)
    )  # fmt: skip
    b = gl.allocate_shared_memory(
        DTYPE, [8, K], gl.NVMMASharedLayout.get_default_for([8, K], DTYPE), gl.load(b_ptr + column * K + depth)
    )  # fmt: skip
    fence_async_shared()
    at = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None] * 8
    at = at + gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))[None, :]
    product = warpgroup_mma(a, b.permute((1, 0)), gl.load(acc_ptr + at), use_acc=USE_ACC)
    gl.store(to_ptr + at, product)


@gluon.jit
def elementary_functions(from_ptr, exp2_ptr, log2_ptr, N: gl.constexpr):
    """exp2 of the values, and log2 of that."""
    lane = gl.arange(0, N, layout=LANES)
    power = gl.exp2(gl.load(from_ptr + lane))
    gl.store(exp2_ptr + lane, power)
    gl.store(log2_ptr + lane, gl.log2(power))


@gluon.jit
def promise_constancy(from_ptr, to_ptr, RUN: gl.constexpr, N: gl.constexpr):
    """Says of the values that they repeat."""
    lane = gl.arange(0, N, layout=LANES)
    gl.store(to_ptr + lane, gl.max_constancy(gl.load(from_ptr + lane), [RUN]))


# What Gluon refuses to compile.


@gluon.jit
def mix_layouts(to_ptr, N: gl.constexpr):
    """The sum of two layouts."""
    lane = gl.arange(0, N, layout=LANES)
    gl.store(to_ptr + lane, lane + gl.arange(0, N, layout=OTHER_LANES))


@gluon.jit
def mask_in_another_layout(to_ptr, N: gl.constexpr):
    """A mask that the pointers' threads do not hold."""
    lane = gl.arange(0, N, layout=LANES)
    gl.store(to_ptr + lane, lane, mask=gl.arange(0, N, layout=OTHER_LANES) < 3)


@gluon.jit
def expand_the_wrong_axis(to_ptr, N: gl.constexpr):
    """A slice of axis 1 has lost axis 1."""
    gl.store(to_ptr, gl.max(gl.arange(0, N, layout=gl.SliceLayout(1, SQUARE))[None, :], 1))


@gluon.jit
def assert_what_does_not_hold(to_ptr, N: gl.constexpr):
    """A static assertion about a constant."""
    gl.static_assert(N == 3, "N is 3")


@gluon.jit
def store_another_type(to_ptr, N: gl.constexpr):
    """int32 to float32 shared memory."""
    smem = gl.allocate_shared_memory(gl.float32, [N], PLAIN_SHARED)
    smem.store(gl.arange(0, N, layout=LANES))


# What the evaluator does not know.


@gluon.jit
def take_a_cosine(to_ptr, N: gl.constexpr):
    """A function that no kernel of ours uses."""
    gl.store(to_ptr, gl.cos(gl.load(to_ptr)))


@gluon.jit
def run_unknown_assembly(to_ptr, N: gl.constexpr):
    """Inline assembly that differs by a character from one of ours."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait;// $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def sort_a_constant(to_ptr, N: gl.constexpr):
    """A builtin of Python's that Gluon has not."""
    gl.static_assert(sorted([N]) == [N])
