"""The layout rules that Gluon checks. Layouts never change a value here: they are carried to be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon import language as gl

from gluon_evaluator.errors import RefusedProgramError, UnknownToEvaluatorError, require


@dataclass(frozen=True, slots=True)
class Inferred:
    """The layout of a permuted, reshaped or joined tensor: the compiler works it out, here it equals what was made in the same way."""

    made_by: str
    detail: tuple[int, ...]
    parent: Any


def same(left: Any, right: Any) -> bool:
    """Whether two layouts are equal."""
    return left is right or left == right


def common(what: str, *operands: Any) -> Any:
    """The layout of an elementwise result. Scalars have none and go with every tensor.

    Raises:
        RefusedProgramError: tensors of different layouts.
    """
    found = None
    for operand in operands:
        layout = operand.layout
        if layout is None:
            continue
        if found is not None and not same(found, layout):
            raise RefusedProgramError(f"layout mismatch in {what}: {found} and {layout}")
        found = layout
    return found


def expanded(layout: Any, axis: int) -> Any:
    """The layout of a tensor that gets an axis of 1."""
    require(
        isinstance(layout, gl.SliceLayout) and layout.dim == axis,
        "expand_dims at {} needs a SliceLayout of that axis, seen {}",
        axis,
        layout,
    )
    return layout.parent


def reduced(layout: Any, axis: int, rank: int) -> Any:
    """The layout of a tensor that loses an axis; a scalar has none."""
    return gl.SliceLayout(axis, layout) if rank > 1 else None


def explicit(layout: Any) -> Any:
    """A layout that the source names.

    Raises:
        UnknownToEvaluatorError: none was named: Gluon would choose one.
    """
    if layout is None or isinstance(layout, gl.AutoLayout):
        raise UnknownToEvaluatorError("AutoLayout")
    return layout


def check_pairs(wide: Any, narrow: Any) -> None:
    """Refuse to see 8-bit shared memory as 16-bit pairs where its layout moves the bytes of a pair apart.

    Panels of the same width in bytes, swizzled by 16 bytes at a time, hold each row's bytes at the same places.
    """
    both = (wide, narrow)
    require(
        all(isinstance(layout, gl.NVMMASharedLayout) for layout in both)
        and not any(layout.transposed for layout in both)
        and (wide.element_bitwidth, narrow.element_bitwidth) == (16, 8)
        and wide.swizzle_byte_width == narrow.swizzle_byte_width,
        "{} seen as {}",
        narrow,
        wide,
    )
