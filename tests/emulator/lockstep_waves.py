"""Several workgroups of four waves around a few assembly lines, for tests of what waves do to each other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asm_snippets import kernel_text

from patune.emulator import Execution, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

WAVES = 4
WORKGROUPS = 5
# s20 = wave, s21 = number of the wave in the launch, s[22:23] = first argument, s[24:25] = second, v1 = 4 * lane
HEAD = f"""
s_load_dwordx4 s[22:25], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
v_lshrrev_b32_e32 v2, 6, v0
v_readfirstlane_b32 s20, v2
s_mul_i32 s21, s2, {WAVES}
s_add_u32 s21, s21, s20
v_and_b32_e32 v1, 63, v0
v_lshlrev_b32_e32 v1, 2, v1
s_lshl_b32 s26, s21, 2
"""


def launch(
    body: str,
    arguments: Sequence[Any],
    *,
    arch: str = "gfx942",
    shared_b: int = 4096,
    watched: bool = True,
) -> Execution:
    program = Program(kernel_text(HEAD + body, ["ptr"] * len(arguments), arch), shared_b)
    return program.launch((WORKGROUPS, 1, 1), WAVES, arguments, detect_races=watched)


def dump(values: Sequence[str]) -> str:
    return "\n".join(
        f"v_mov_b32_e32 v21, {value}\nglobal_store_dword v20, v21, s[24:25] offset:{4 * i}"
        for i, value in enumerate(values)
    )


def in_order(execution: Execution) -> Execution:
    """Races by workgroup: their order in time depends on the batch."""
    return replace(execution, races=tuple(sorted(execution.races, key=lambda r: r.workgroup)))
