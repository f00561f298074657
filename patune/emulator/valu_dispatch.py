"""Which builder makes the step of a vector ALU instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from patune.emulator import valu_masks, valu_packed
from patune.emulator.mfma import build_mfma
from patune.emulator.valu import build_regular, split_form
from patune.emulator.valu_table import TABLE

if TYPE_CHECKING:
    from patune.emulator.assembly import Instruction
    from patune.emulator.sources import Context, Step

Builder = Callable[["Instruction", "Context", str, str], "Step"]

_SPECIAL: dict[str, Builder] = {
    "cndmask_b32": valu_masks.build_select,
    **dict.fromkeys(
        ("add_co_u32", "addc_co_u32", "sub_co_u32", "subb_co_u32", "subrev_co_u32"),
        valu_masks.build_carry,
    ),
    **dict.fromkeys(("mad_u64_u32", "mad_i64_i32"), valu_masks.build_mad64),
    "div_scale_f32": valu_masks.build_div_scale,
    **dict.fromkeys(("readlane_b32", "readfirstlane_b32"), valu_masks.build_read_lane),
    "writelane_b32": valu_masks.build_write_lane,
    **dict.fromkeys(("permlane16_swap_b32", "permlane32_swap_b32"), valu_masks.build_permlane_swap),
    "mov_b64": valu_packed.build_move_pair,
    **dict.fromkeys(valu_packed.PACKED_F32, valu_packed.build_packed_f32),
    **dict.fromkeys(valu_packed.PACKED_16, valu_packed.build_packed_16),
    "pk_mov_b32": valu_packed.build_packed_move,
    **dict.fromkeys(valu_packed.MIXED, valu_packed.build_mixed),
    "perm_b32": valu_packed.build_permute,
    **dict.fromkeys(("bitop3_b32", "bitop3_b16"), valu_packed.build_logic3),
    **dict.fromkeys(
        [f"cvt_{what}_{kind}" for what in ("f32", "pk_f32", "scalef32_pk_f32", "scalef32_pk_bf16", "scalef32_pk_f16") for kind in ("fp8", "bf8")],
        valu_packed.build_from_fp8,
    ),
    **dict.fromkeys(
        [f"cvt_{prefix}pk_{kind}_f32" for prefix in ("", "scalef32_") for kind in ("fp8", "bf8")],
        valu_packed.build_to_fp8,
    ),
}  # fmt: skip


def build_vector(instruction: Instruction, context: Context) -> Step:
    """The step of a ``v_`` instruction.

    Raises:
        EmulatorError: the instruction, or a modifier of it, has not been verified.
    """
    name, form = split_form(instruction.mnemonic)
    if name.startswith("mfma_"):
        return build_mfma(instruction, context, name)
    if name in TABLE:
        return build_regular(instruction, context, name, form)
    if name.startswith("cmp_"):
        return valu_masks.build_compare(instruction, context, name, form)
    if name.startswith("cmpx_"):
        return valu_masks.build_compare_exec(instruction, context, name, form)
    if name not in _SPECIAL:
        raise instruction.refusal()
    return _SPECIAL[name](instruction, context, name, form)
