"""Memory that tells who touched it: outputs that are poison until they are written, and inputs that must stay as they are."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from patune.tuner.gate.verdict import Rejected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.inputs import DecodeInputs
    from patune.tuner.gate.case import Far

GUARD = 4096  # elements before and after every output buffer, which nobody may write
# NaNs by width that no arithmetic produces: an element that still has this value was not written.
POISON = {16: 0x7FE5, 32: 0x7FE5A5A5}
CACHES = ("key_cache", "value_cache")
FAR = {
    "": (),
    "pages": (*CACHES, "key_scale", "value_scale"),
    "heads": CACHES,
    "rows": ("query",),
}  # too large to be copied


class GuardedBuffer:
    """An output that is poison until a kernel writes it, between guards and with a gap after each row, which must stay poison.

    Attributes:
        inner: what a kernel is given.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        gap: int = 0,
    ) -> None:
        padded = torch.Size((shape[0], shape[1] + gap, *shape[2:]) if gap else shape)
        buffer = torch.empty(padded.numel() + 2 * GUARD, dtype=dtype, device=device)
        self.bits = buffer.view(torch.int16 if buffer.itemsize == 2 else torch.int32)
        self.poison = POISON[8 * buffer.itemsize]
        whole = slice(GUARD, GUARD + padded.numel())
        self.inner = buffer[whole].view(padded)
        self.guards = {f"before {name}": self.bits[:GUARD], f"after {name}": self.bits[-GUARD:]}
        if gap:
            self.guards[f"between rows of {name}"] = self.bits[whole].view(padded)[:, shape[1] :]
            self.inner = self.inner[:, : shape[1]]

    def poison_all(self) -> None:
        """Forget everything that was written."""
        self.bits.fill_(self.poison)

    def check_guards(self) -> None:
        """Reject a kernel that wrote beside the buffer."""
        for where, guard in self.guards.items():
            if written := int((guard != self.poison).sum()):
                raise Rejected("wrong", f"{written} elements {where} were written")


class Untouched:
    """What the memory of all inputs holds, what lies around them included; what is far apart is left out."""

    def __init__(self, inputs: DecodeInputs, far: Far) -> None:
        names = [field.name for field in fields(inputs) if field.name not in FAR[far]]
        tensors = {name: getattr(inputs, name) for name in names}
        self._memory = {n: _memory_of(t) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        self._before = {name: memory.clone() for name, memory in self._memory.items()}

    def check(self) -> None:
        """Reject a kernel that wrote to an input."""
        for name, memory in self._memory.items():
            if not torch.equal(memory, self._before[name]):
                raise Rejected("wrong", f"{name} was written, which is an input")


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes that a tensor lies in."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())
