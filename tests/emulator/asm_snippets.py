"""Minimal kernels around a few assembly lines: registers in, registers out.

A snippet runs as one wave (or several) with v0 = work-item, s[0:1] = argument block. ``run_lanes`` loads named uint32[64] arrays
into vector registers, runs the body, and returns chosen registers of every lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patune.emulator import Execution, Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LANE = np.arange(64)
VGPRS = 64
TEXT = """
\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
\t.text
snippet:                                ; @snippet
{body}
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\t.amdhsa_kernel snippet
\t\t.amdhsa_group_segment_fixed_size 0
\t\t.amdhsa_private_segment_fixed_size {scratch}
\t\t.amdhsa_kernarg_size {kernarg}
\t\t.amdhsa_user_sgpr_count 2
\t\t.amdhsa_user_sgpr_kernarg_segment_ptr 1
\t\t.amdhsa_system_sgpr_workgroup_id_x 1
\t\t.amdhsa_system_sgpr_workgroup_id_y 1
\t\t.amdhsa_system_sgpr_workgroup_id_z 1
\t\t.amdhsa_system_vgpr_workitem_id 0
\t\t.amdhsa_next_free_vgpr {registers}
\t\t.amdhsa_accum_offset {vgprs}
\t.end_amdhsa_kernel
\t.text
.Lfunc_end0:
; Kernel info:
; codeLenInByte = 64
; NumVgprs: 10
; NumAgprs: 0
amdhsa.kernels:
  - .agpr_count:     0
    .args:
{arguments}
    .max_flat_workgroup_size: 512
    .sgpr_count:     32
    .sgpr_spill_count: 0
    .vgpr_spill_count: 0
"""
POINTER = "      - .address_space:  global\n        .offset:         {}\n        .size:           8\n        .value_kind:     global_buffer\n"
VALUE = (
    "      - .offset:         {}\n        .size:           {}\n        .value_kind:     by_value\n"
)


def kernel_text(
    body: str, arguments: Sequence[str | int], arch: str = "gfx942", scratch_b: int = 0
) -> str:
    """The text of a kernel: ``arguments`` are "ptr" or the bytes of a value."""
    lines, offset = "", 0
    for argument in arguments:
        size = 8 if argument == "ptr" else int(argument)
        offset = -(-offset // size) * size
        lines += POINTER.format(offset) if argument == "ptr" else VALUE.format(offset, size)
        offset += size
    indented = "\n".join(
        line if line.endswith(":") else "\t" + line.strip() for line in body.strip().split("\n")
    )
    return TEXT.format(
        arch=arch, body=indented, arguments=lines, kernarg=max(offset, 8), scratch=scratch_b,
        vgprs=VGPRS, registers=VGPRS + 32,
    )  # fmt: skip


def run(
    body: str,
    arguments: Sequence[Any],
    *,
    arch: str = "gfx942",
    waves: int = 1,
    shared_b: int = 0,
    scratch_b: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    watched: bool = True,
) -> Execution:
    """Run a body whose arguments are arrays, Python floats (4 bytes) or Python ints (4 bytes).

    Not ``watched``, it may read shared memory that nobody has written.
    """
    kinds = ["ptr" if isinstance(a, np.ndarray) else 4 for a in arguments]
    program = Program(kernel_text(body, kinds, arch, scratch_b), shared_b)
    return program.launch(grid, waves, arguments, detect_races=watched)


def run_lanes(
    body: str,
    sources: Mapping[int, np.ndarray] | None = None,
    *,
    out: Sequence[int] = (1,),
    arch: str = "gfx942",
    exec_mask: int | None = None,
    shared_b: int = 0,
    scratch_b: int = 0,
    watched: bool = True,
) -> list[np.ndarray]:
    """Vector registers ``out`` of one wave as uint32[64] after the body ran on the given source registers.

    v50..v53 and s[10:13] belong to the harness. With ``exec_mask`` the body runs under that EXEC, and registers of
    inactive lanes keep the marker 0x1234.
    """
    sources = sources or {}
    table = np.zeros((max(len(sources), 1), 64), np.uint32)
    lines = [
        "s_load_dwordx4 s[10:13], s[0:1], 0x0",
        "s_waitcnt lgkmcnt(0)",
        "v_lshlrev_b32_e32 v50, 2, v0",
    ]
    for row, (register, values) in enumerate(sources.items()):
        table[row] = np.asarray(values).view(np.uint32)
        lines.append(f"global_load_dword v{register}, v50, s[10:11] offset:{256 * row}")
    lines += [f"v_mov_b32_e32 v{register}, 0x1234" for register in out if register not in sources]
    lines.append("s_waitcnt vmcnt(0)")
    if exec_mask is not None:
        lines += [
            f"s_mov_b32 exec_lo, {exec_mask & 0xFFFF_FFFF:#x}",
            f"s_mov_b32 exec_hi, {exec_mask >> 32:#x}",
        ]
    lines.append(body)
    lines.append("s_waitcnt vmcnt(0) lgkmcnt(0)")
    if exec_mask is not None:
        lines.append("s_mov_b64 exec, -1")
    lines += [
        f"global_store_dword v50, v{register}, s[12:13] offset:{256 * i}"
        for i, register in enumerate(out)
    ]
    result = np.zeros((len(out), 64), np.uint32)
    run(
        "\n".join(lines), [table, result],
        arch=arch, shared_b=shared_b, scratch_b=scratch_b, watched=watched,
    )  # fmt: skip
    return list(result)


def run_scalars(body: str, out: Sequence[int], arch: str = "gfx942") -> list[int]:
    """Scalar registers ``out`` after the body ran; s[10:13] belong to the harness."""
    moves = "\n".join(f"v_mov_b32_e32 v{1 + i}, s{register}" for i, register in enumerate(out))
    rows = run_lanes(f"{body}\n{moves}", out=[1 + i for i in range(len(out))], arch=arch)
    assert all((row == row[0]).all() for row in rows)
    return [int(row[0]) for row in rows]


# Addresses of the first two arguments in s[20:23], lane * 2**shift in v1.
LOAD_ADDRESSES = """
s_load_dwordx4 s[20:23], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
v_lshlrev_b32_e32 v1, {shift}, v0
"""
