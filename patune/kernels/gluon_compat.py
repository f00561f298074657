"""Gluon names that moved between Triton 3.6 and 3.9; kernels import them from here."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

# 3.6 names it after both ends, 3.9 removed that name and calls it async_load.
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
workgroup_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret_shared(smem, DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
        """The same shared memory as [ROWS, COLUMNS] of another type."""
        return smem.reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)

else:  # 3.6

    @gluon.jit
    def reinterpret_shared(smem, DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
        """The same shared memory as [ROWS, COLUMNS] of another type."""
        return smem._reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)
