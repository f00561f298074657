"""The inline assembly that our kernels use, known by its text: any other is refused, as is a change of one character.

The texts are written out here and not taken from the kernels: who changes the assembly has to say here what it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import UnknownToEvaluatorError
from gluon_evaluator.formats import values_of
from gluon_evaluator.values import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

UNPAIR = """{
    .reg .b32 even, odd; .reg .b16 a, b, c, d;
    prmt.b32 even, $4, $5, 0x6420;
    prmt.b32 odd, $4, $5, 0x7531;
    mov.b32 {a, b}, even;
    mov.b32 {c, d}, odd;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    cvt.rn.f16x2.e4m3x2 $2, c;
    cvt.rn.f16x2.e4m3x2 $3, d;
}"""


def _unpaired(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high bytes of 16-bit elements, fp8 widened to fp16, which holds them exactly."""
    bits = pairs.array.view(np.uint16)
    low, high = (values_of(byte, gl.float8e4nv) for byte in (bits & 0xFF, bits >> 8))
    return Tensor(low, gl.float16, pairs.layout), Tensor(high, gl.float16, pairs.layout)


def _no_effect() -> Tensor:
    """Programs run one after another, so the kernel before has always ended."""
    return Tensor(np.int32(0), gl.int32)


# (text, constraints, types in, type out, pack) -> what it does
KNOWN: dict[tuple[Any, ...], Callable[..., Any]] = {
    ("griddepcontrol.wait; // $0", "=r", (), gl.int32, 1): _no_effect,
    ("griddepcontrol.launch_dependents; // $0", "=r", (), gl.int32, 1): _no_effect,
    (UNPAIR, "=r,=r,=r,=r,r,r", (gl.int16,), (gl.float16, gl.float16), 4): _unpaired,
}


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Tensor], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """``gl.inline_asm_elementwise``.

    Raises:
        UnknownToEvaluatorError: assembly that is not in the table.
    """
    key = (asm, constraints, tuple(x.dtype for x in args), dtype, pack)
    if key not in KNOWN:
        raise UnknownToEvaluatorError(f"inline assembly {asm!r} with {key[1:]}")
    return KNOWN[key](*args)
