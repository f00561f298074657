"""How a decode step is computed: the knobs of each kernel family, as frozen values.

``num_stages`` is a constexpr of our kernels: Gluon ignores Triton's compile option of that name (identical code for 1..8, both vendors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from patune.errors import DocumentError
from patune.record import Record, check_bool, check_choice, check_int

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SPLITS = 128
MAX_WAVES_PER_SIMD = 8  # CDNA3 and CDNA4, where accumulation registers exist
REDUCE_CHUNKS = (4, 8, 16, 32, 64)
REDUCE_WARPS = (1, 2, 4)
CACHE_MODIFIERS = ("", ".cg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs(Record):
    """Knobs that every family has.

    Attributes:
        partition_tokens: tokens of one inner-loop tile, the context partition.
        num_splits: workgroups that share one walk over a context; 1 writes the output without a reduce kernel.
        num_stages: tiles in flight: ring depth in shared memory (Hopper, CDNA's ``lds_ring``); else 1 none ahead, 2 the next key tile,
            3 the next value tile too.
        num_warps: warps per workgroup of the decode kernel.
        reduce_chunk: splits that the reduce kernel combines per step (its tile cap).
        reduce_warps: warps per workgroup of the reduce kernel.
    """

    family: ClassVar[str]
    partition_tokens: int
    num_splits: int
    num_stages: int
    num_warps: int
    reduce_chunk: int = 16
    reduce_warps: int = 4

    def __post_init__(self) -> None:
        check_choice("partition_tokens", self.partition_tokens, (64, 128, 256))
        check_int("num_splits", self.num_splits, low=1, high=MAX_SPLITS)
        check_int("num_stages", self.num_stages, low=1, high=4)
        check_choice("num_warps", self.num_warps, (1, 2, 4, 8))
        check_choice("reduce_chunk", self.reduce_chunk, REDUCE_CHUNKS)
        check_choice("reduce_warps", self.reduce_warps, REDUCE_WARPS)

    @property
    def one_shot(self) -> bool:
        """One workgroup walks the whole context and writes the output itself."""
        return self.num_splits == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperKnobs(Knobs):
    """Knobs of the swapped-wgmma kernel (sm_90).

    Attributes:
        maxnreg: register cap per thread handed to ptxas; 0 leaves the choice to it.
        probs_k_major: store the probabilities [rows, tokens] for the second product, not [tokens, rows].
        overlap_launch: launch the kernels while the one before still runs (programmatic dependent launch); they wait before they read.
    """

    family: ClassVar[str] = "hopper_wgmma"
    maxnreg: int = 0
    probs_k_major: bool = True
    overlap_launch: bool = True

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        check_choice("maxnreg", self.maxnreg, (0, 96, 128, 168))
        check_bool("probs_k_major", self.probs_k_major)
        check_bool("overlap_launch", self.overlap_launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class CdnaKnobs(Knobs):
    """Knobs of the register-direct MFMA kernel (gfx942, gfx950).

    Attributes:
        waves_per_eu: N > 0 makes the compiler allow exactly N waves per SIMD (minimum and maximum): it caps registers at 512 / N
            and throttles occupancy to N. 0 leaves the choice to it.
        mfma_rows: M and N of the matrix instruction, 16 or 32.
        program_rows: query rows of a walk (query tokens x group) that one program computes; 0 is all of them. Fewer take fewer
            registers, and K and V are read once per program.
        lds_ring: tiles wait in LDS, copied there past the registers (gfx950); else in registers.
        cache_modifier: Triton's cache modifier of the K and V loads: ``""`` none, or ``.cg``, which is `nt` on CDNA: not to be kept.
    """

    family: ClassVar[str] = "cdna_mfma"
    waves_per_eu: int = 0
    mfma_rows: int = 16
    program_rows: int = 0
    lds_ring: bool = False
    cache_modifier: str = ""

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        check_int("waves_per_eu", self.waves_per_eu, low=0, high=MAX_WAVES_PER_SIMD)
        check_choice("mfma_rows", self.mfma_rows, (16, 32))
        check_choice("program_rows", self.program_rows, (0, 16, 32))
        check_bool("lds_ring", self.lds_ring)
        check_choice("cache_modifier", self.cache_modifier, CACHE_MODIFIERS)


FAMILIES: dict[str, type[HopperKnobs] | type[CdnaKnobs]] = {
    k.family: k for k in (HopperKnobs, CdnaKnobs)
}


def knobs_to_dict(knobs: Knobs) -> dict[str, Any]:
    """The knobs with their ``family``, ready for JSON."""
    return {"family": knobs.family, **knobs.to_dict()}


def knobs_from_dict(data: Mapping[str, Any]) -> HopperKnobs | CdnaKnobs:
    """The knobs of the family that the document names.

    Raises:
        DocumentError: unknown family, unknown or missing knob.
        InvalidValueError: a knob's value is outside of what is allowed.
    """
    fields = dict(data)
    family = fields.pop("family", None)
    if family not in FAMILIES:
        raise DocumentError(
            f"knobs: family={family!r} is unknown; known families: {', '.join(FAMILIES)}."
        )
    if family == HopperKnobs.family:
        # written before there was one: launched and measured in turn
        fields.setdefault("overlap_launch", False)
    return FAMILIES[family].from_dict(fields)
