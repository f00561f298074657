"""What a planted kernel bug is, and the values that many of them are posed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("hopper_wgmma", "cdna_mfma")
PLACES = ("evaluator", "emulator", "device")


@dataclass(frozen=True)
class Mutant:
    """One planted bug: in ``module``, ``old`` becomes ``new``.

    Attributes:
        families: the kernel families that run through the text.
        problem: fields that the test's problem needs for the bug to show.
        knobs: fields that the test's knobs need.
        cdna_arch: where CDNA kernels show it.
        also: further (old, new) of the same module, where one replacement is no whole bug.
        shows: who can see it: a numpy evaluator of the source, the ISA emulator, a device.
        faults: on a device it follows addresses that nothing is mapped at, which ends the process.
        racy: on a device it is a matter of timing.
    """

    name: str
    module: str
    old: str
    new: str
    families: tuple[str, ...] = FAMILIES
    problem: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    cdna_arch: str = "gfx942"
    also: tuple[tuple[str, str], ...] = ()
    shows: tuple[str, ...] = PLACES
    faults: bool = False
    racy: bool = False

    @property
    def edits(self) -> tuple[tuple[str, str], ...]:
        """Every (old, new), in order."""
        return ((self.old, self.new), *self.also)

    def planted_in(self, text: str) -> str:
        """The module's text with the bug."""
        for old, new in self.edits:
            assert text.count(old) == 1, f"{self.name}: {text.count(old)} places for {old!r}"
            text = text.replace(old, new)
        return text


FP8 = {"kv_dtype": "fp8_e4m3fn"}
TENSOR_SCALE = FP8 | {"kv_quant": "per_tensor"}
TOKEN_SCALE = FP8 | {"kv_quant": "per_token"}
FP16 = {"query_dtype": "fp16", "kv_dtype": "fp16"}  # eight times finer than bf16
ONE_SHOT = {"num_splits": 1}
TWO_CHUNKS = {"num_splits": 6, "reduce_chunk": 4}  # the reduce kernel's loop comes round
# Without a window the first tile of a page is as good as the last: no NaN gives the address away.
LAST_TILE = {"block_size": 1024, "windowed": False}
# Tiles of a page count from 0 again at the next one, and its last tile is taken for the first: for a slot of tiles, and for t0.
LAST_IS_FIRST = "% (BLOCK_SIZE // TILE) % (BLOCK_SIZE // TILE - 1)"
LAST_TILE_FIRST = "(t0 // TILE) " + LAST_IS_FIRST + " * TILE"
