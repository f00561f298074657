"""Small Gluon kernels that the emulator's tests compile for gfx942 and gfx950, and how to compile them without a GPU.

No ``from __future__ import annotations`` here: Triton 3.6 reads the annotations of kernels.
"""

import functools
import math
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

LOG2E = 1.0 / math.log(2)


@gluon.jit
def vadd(x_ptr, y_ptr, out_ptr, n, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    offset = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=LAYOUT)
    inside = offset < n
    x = gl.load(x_ptr + offset, mask=inside, other=0.0)
    gl.store(out_ptr + offset, x + gl.load(y_ptr + offset, mask=inside, other=0.0), mask=inside)


@gluon.jit
def softmax(x_ptr, out_ptr, columns, stride, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    row = gl.program_id(0)
    offset = gl.arange(0, BLOCK, layout=LAYOUT)
    inside = offset < columns
    x = gl.load(x_ptr + row * stride + offset, mask=inside, other=float("-inf")).to(gl.float32)
    e = gl.exp2((x - gl.max(x, 0)) * 1.4426950408889634)
    gl.store(out_ptr + row * stride + offset, e / gl.sum(e, 0), mask=inside)


@gluon.jit
def dot_mfma(
    a_ptr, b_ptr, c_ptr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    LA: gl.constexpr, LB: gl.constexpr, MMA: gl.constexpr, KW: gl.constexpr,
):  # fmt: skip
    """c[M, N] float32 = a[M, K] b[K, N]; both operands go through LDS."""
    am = gl.arange(0, M, layout=gl.SliceLayout(1, LA))
    ak = gl.arange(0, K, layout=gl.SliceLayout(0, LA))
    bk = gl.arange(0, K, layout=gl.SliceLayout(1, LB))
    bn = gl.arange(0, N, layout=gl.SliceLayout(0, LB))
    a = gl.amd.cdna3.buffer_load(a_ptr, am[:, None] * K + ak[None, :])
    b = gl.amd.cdna3.buffer_load(b_ptr, bk[:, None] * N + bn[None, :])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 16, order=[1, 0])
    a_shared = gl.allocate_shared_memory(a.dtype, [M, K], SHARED, a)
    b_shared = gl.allocate_shared_memory(b.dtype, [K, N], SHARED, b)
    a_operand = a_shared.load(gl.DotOperandLayout(0, MMA, KW))
    b_operand = b_shared.load(gl.DotOperandLayout(1, MMA, KW))
    c = gl.amd.cdna3.mfma(a_operand, b_operand, gl.zeros([M, N], gl.float32, layout=MMA))
    cm = gl.arange(0, M, layout=gl.SliceLayout(1, MMA))
    cn = gl.arange(0, N, layout=gl.SliceLayout(0, MMA))
    gl.amd.cdna3.buffer_store(c, c_ptr, cm[:, None] * N + cn[None, :])


@gluon.jit
def decode(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr,
    scale_log2, context,
    G: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr,
    LOAD: gl.constexpr, MMA: gl.constexpr, KW: gl.constexpr,
):  # fmt: skip
    """out[G, D] = softmax(q k^T) v over one sequence whose caches are [page, PAGE, D]; K, V and P are converted through LDS."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, KW)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, KW)
    g = gl.arange(0, G, layout=gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, LOAD))
    q = gl.convert_layout(gl.load(q_ptr + g[:, None] * D + d[None, :]), A)
    m = gl.full([G], -1e30, gl.float32, layout=gl.SliceLayout(1, MMA))
    total = gl.zeros([G], gl.float32, layout=gl.SliceLayout(1, MMA))
    acc = gl.zeros([G, D], gl.float32, layout=MMA)
    for t0 in range(0, context, TILE):
        page = gl.load(table_ptr + t0 // PAGE)
        offset = (page * PAGE + t0 % PAGE + t)[:, None] * D + d[None, :]
        in_context = (t0 + t < context)[:, None]
        k = gl.load(k_ptr + offset, mask=in_context, other=0.0)
        v = gl.load(v_ptr + offset, mask=in_context, other=0.0)
        SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 16, order=[1, 0])
        k_shared = gl.allocate_shared_memory(k.dtype, [TILE, D], SHARED, k)
        v_shared = gl.allocate_shared_memory(v.dtype, [TILE, D], SHARED, v)
        zero = gl.zeros([G, TILE], gl.float32, layout=MMA)
        s = gl.amd.cdna3.mfma(q, k_shared.permute([1, 0]).load(B), zero) * scale_log2
        visible = t0 + gl.arange(0, TILE, layout=gl.SliceLayout(0, MMA)) < context
        s = gl.where(visible[None, :], s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))
        alpha = gl.exp2(m - m_new)
        p = gl.exp2(s - m_new[:, None])
        total = total * alpha + gl.sum(p, 1)
        p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), A)
        acc = gl.amd.cdna3.mfma(p_operand, v_shared.load(B), acc * alpha[:, None])
        m = m_new
    row = gl.arange(0, G, layout=gl.SliceLayout(1, MMA))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, MMA))
    gl.store(out_ptr + row[:, None] * D + column[None, :], acc / total[:, None])


@gluon.jit
def async_sum(x_ptr, out_ptr, tiles, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """out[BLOCK] = sum over tiles of x[tile, BLOCK]; gfx950 loads from global memory straight into LDS."""
    shared = gl.allocate_shared_memory(
        gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    offset = gl.arange(0, BLOCK, layout=LAYOUT)
    total = gl.zeros([BLOCK], gl.float32, layout=LAYOUT)
    for tile in range(tiles):
        gl.amd.cdna4.async_copy.buffer_load_to_shared(shared, x_ptr, tile * BLOCK + offset)
        gl.amd.cdna4.async_copy.commit_group()
        gl.amd.cdna4.async_copy.wait_group(0)
        total += shared.load(LAYOUT)
    gl.store(out_ptr + offset, total)


@functools.cache
def mfma_layout(arch: str, rows: int = 16) -> Any:
    """The MFMA layout of 16-bit operands of an architecture, four warps along N."""
    version, depth = (3, 16) if arch == "gfx942" else (4, 32)
    depth = depth if rows == 16 else depth // 2
    shape = [rows, rows, depth]
    return gl.amd.AMDMFMALayout(
        version=version, instr_shape=shape, transposed=True, warps_per_cta=[1, 4]
    )


def compile_for(
    arch: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> Any:
    """Compile ahead of time: ``types`` of the run-time arguments, ``constants`` of the constexpr ones."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = {(position[n],): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"}
    constexprs = {(position[name],): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, constexprs, aligned)
    settings = {"num_warps": 4, "enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("hip", arch, 64), options=settings)


def compile_vadd(arch: str) -> Any:
    layout = gl.BlockedLayout([4], [64], [4], [0])
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    return compile_for(arch, vadd, types, {"BLOCK": 1024, "LAYOUT": layout})


def compile_softmax(arch: str) -> Any:
    layout = gl.BlockedLayout([4], [64], [4], [0])
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "columns": "i32", "stride": "i32"}
    return compile_for(arch, softmax, types, {"BLOCK": 1024, "LAYOUT": layout})


def compile_dot(arch: str, dtype: str, rows: int) -> Any:
    constants = {
        "M": rows, "N": 128, "K": 64, "KW": 4 if rows == 32 and arch == "gfx942" else 8,
        "LA": gl.BlockedLayout([1, 8], [8, 8], [4, 1], [1, 0]),
        "LB": gl.BlockedLayout([1, 8], [4, 16], [4, 1], [1, 0]),
        "MMA": mfma_layout(arch, rows),
    }  # fmt: skip
    return compile_for(
        arch, dot_mfma, {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32"}, constants
    )


def compile_decode(arch: str, dtype: str, head_dim: int, tile: int, **options: Any) -> Any:
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    types |= {"table_ptr": "*i32", "out_ptr": "*fp32", "scale_log2": "fp32", "context": "i32"}
    constants = {
        "G": 16, "D": head_dim, "PAGE": 128, "TILE": tile, "KW": 8,
        "LOAD": gl.BlockedLayout([1, 8], [512 // head_dim, head_dim // 8], [4, 1], [1, 0]),
        "MMA": mfma_layout(arch),
    }  # fmt: skip
    return compile_for(arch, decode, types, constants, **options)


def compile_async_sum() -> Any:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "tiles": "i32"}
    constants = {"BLOCK": 1024, "LAYOUT": gl.BlockedLayout([4], [64], [4], [0])}
    return compile_for("gfx950", async_sum, types, constants)
