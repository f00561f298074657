"""The arguments of a launch: arrays placed in emulated memory, numbers packed into the kernel's argument block."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patune.emulator.registers import LANES
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.emulator.memory import Memory
    from patune.emulator.metadata import Argument, Metadata

KERNARG = "kernel arguments"
# global scratch and profile scratch, which Triton appends to every kernel's arguments
TRITON_POINTERS = 2


def place_arguments(
    metadata: Metadata,
    memory: Memory,
    arguments: Sequence[npt.NDArray[Any] | np.generic | int | float],
    labels: Sequence[str],
    hidden: dict[str, int],
) -> int:
    """Put arrays into memory and everything into the argument block; the block's address.

    Raises:
        EmulatorError: an argument that does not fit its slot.
    """
    slots = metadata.arguments[: len(arguments)]
    missing = metadata.arguments[len(arguments) :]
    if (
        not len(slots) == len(arguments) == len(labels)
        or len(missing) > TRITON_POINTERS
        or not all(slot.is_pointer for slot in missing)
    ):
        raise EmulatorError(
            f"{metadata.name} has {len(metadata.arguments)} argument slots, of which the last {TRITON_POINTERS} may be "
            f"Triton's own pointers; given: {len(arguments)} arguments, {len(labels)} names."
        )
    for slot, value, label in zip(slots, arguments, labels, strict=True):
        if slot.is_pointer != isinstance(value, np.ndarray):
            wanted = "an array" if slot.is_pointer else "a number"
            raise EmulatorError(
                f"argument {label} is {type(value).__name__}, the kernel wants {wanted}."
            )
    arrays = [(n, v) for n, v in zip(labels, arguments, strict=True) if isinstance(v, np.ndarray)]
    addresses = iter(memory.add_arrays(arrays))
    block = bytearray(metadata.kernarg_b)
    for slot, value, label in zip(slots, arguments, labels, strict=True):
        if isinstance(value, np.ndarray):
            _pack_number(block, slot, next(addresses), label)
        else:
            _pack_number(block, slot, value, label)
    for slot in metadata.hidden:
        # A hidden argument that the emulator does not know is poisoned: as a pointer it is out of bounds.
        known = hidden.get(slot.kind)
        fill = b"\xde" * slot.size if known is None else known.to_bytes(slot.size, "little")
        block[slot.offset : slot.offset + slot.size] = fill
    return memory.add(KERNARG, np.frombuffer(bytes(block), np.uint8)).start


def hidden_values(grid: tuple[int, int, int], num_warps: int) -> dict[str, int]:
    """The launch as the hidden arguments describe it (HSA code object v5)."""
    values = {"hidden_grid_dims": 3}
    for axis, size in zip("xyz", grid, strict=True):
        values[f"hidden_block_count_{axis}"] = size
        values[f"hidden_group_size_{axis}"] = LANES * num_warps if axis == "x" else 1
        values[f"hidden_remainder_{axis}"] = 0
        values[f"hidden_global_offset_{axis}"] = 0
    return values


def _pack_number(
    block: bytearray, slot: Argument, value: np.generic | int | float, label: str
) -> None:
    """Put a number into its slot: the slot's size says which integer or float it is."""
    number = value.item() if isinstance(value, np.generic) else value
    is_float = isinstance(number, float)
    codes = {8: "d", 4: "f", 2: "e"} if is_float else {8: "q", 4: "i", 2: "h", 1: "b"}
    try:
        struct.pack_into("<" + codes[slot.size], block, slot.offset, number)
    except (KeyError, struct.error, OverflowError) as error:
        raise EmulatorError(
            f"argument {label}={number!r} does not fit a slot of {slot.size} bytes: {error}."
        ) from None
