"""Matrix products: wgmma with its operands in shared memory or, the left one, in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import require
from gluon_evaluator.layouts import same
from gluon_evaluator.shared import Shared
from gluon_evaluator.values import Tensor

if TYPE_CHECKING:
    from gluon_evaluator.formats import Array

OPERAND_TYPES = (gl.float16, gl.bfloat16, gl.float8e4nv)


def _values(operand: Shared | Tensor) -> Array:
    values = operand.read() if isinstance(operand, Shared) else operand.array
    return values.astype(np.float64)


def warpgroup_mma(a: Shared | Tensor, b: Shared, acc: Tensor, *, use_acc: bool = True) -> Tensor:
    """``a @ b + acc``, summed in float64 and rounded to float32 once."""
    require(
        acc.dtype == gl.float32 and isinstance(acc.layout, gl.NVMMADistributedLayout),
        "accumulator {!r}",
        acc,
    )
    require(isinstance(b, Shared), "the right operand of wgmma lies in shared memory, seen {!r}", b)
    require(a.dtype == b.dtype and a.dtype in OPERAND_TYPES, "wgmma of {} and {}", a.dtype, b.dtype)
    (m, k), (k_of_b, n) = a.shape, b.shape
    require(k == k_of_b and acc.shape == [m, n], "wgmma of {}, {}, {}", a.shape, b.shape, acc.shape)
    depth = 256 // a.dtype.primitive_bitwidth
    require(
        acc.layout.instr_shape == [16, n, depth],
        "{} for {} columns of {}",
        acc.layout,
        n,
        a.dtype,
    )
    if isinstance(a, Tensor):
        layout = a.layout
        require(
            isinstance(layout, gl.DotOperandLayout)
            and layout.operand_index == 0
            and same(layout.parent, acc.layout),
            "left operand in layout {}, accumulator in {}",
            layout,
            acc.layout,
        )
    product = _values(a) @ _values(b)
    if use_acc:
        product += acc.array
    return Tensor(product.astype(np.float32), gl.float32, acc.layout)
