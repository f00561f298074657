"""What the assembly text says about a kernel besides its instructions: launch conventions, arguments, resources."""

from __future__ import annotations

import re
from dataclasses import dataclass

from patune.errors import EmulatorError

MAX_WORKGROUP = 1024  # work-items
ARCHS = ("gfx942", "gfx950")


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One slot of the kernel argument block.

    Attributes:
        offset, size: bytes.
        kind: ``global_buffer`` (a pointer), ``by_value``, or ``hidden_*`` (the launcher's own).
    """

    offset: int
    size: int
    kind: str

    @property
    def is_pointer(self) -> bool:
        """A global buffer; else a value."""
        return self.kind == "global_buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """The facts of one kernel's text.

    Attributes:
        arch: gfx942 or gfx950.
        name: symbol.
        arguments: argument slots, Triton's two trailing pointers included.
        hidden: slots that the launcher fills from the launch itself.
        kernarg_b: size of the argument block.
        kernarg_sgpr: first of the two scalar registers with its address.
        user_sgprs: scalar registers before the workgroup numbers.
        workgroup_axes: which of x, y, z follow them.
        vgprs: vector registers before the accumulation registers.
        vector_registers: allocated in all.
        shared_b: statically allocated shared memory.
        scratch_b: private memory of one lane.
        max_workgroup: work-items of the largest workgroup that it was compiled for.
    """

    arch: str
    name: str
    arguments: tuple[Argument, ...]
    hidden: tuple[Argument, ...]
    kernarg_b: int
    kernarg_sgpr: int
    user_sgprs: int
    workgroup_axes: tuple[bool, bool, bool]
    vgprs: int
    vector_registers: int
    shared_b: int
    scratch_b: int
    max_workgroup: int


def body_lines(asm: str, name: str) -> list[str]:
    """Instructions and labels of a kernel, comments and directives removed.

    Raises:
        EmulatorError: the text has no such kernel.
    """
    match = re.search(rf"^{re.escape(name)}:.*?$(.*?)^\.Lfunc_end0:", asm, re.MULTILINE | re.DOTALL)
    if match is None:
        raise EmulatorError(f"the assembly text has no body of {name}.")
    lines: list[str] = []
    for raw in match[1].split("\n"):
        line = " ".join(raw.split(";")[0].split("//")[0].split())
        if line == ".text" or line.startswith(".section"):
            # The kernel descriptor follows the code; nothing after it is an instruction.
            if lines and line.startswith(".section"):
                break
            continue
        if line.endswith(":") or (line and not line.startswith(".")):
            lines.append(line)
    return lines


def parse_metadata(asm: str) -> Metadata:
    """Read the metadata of a kernel's assembly text.

    Raises:
        EmulatorError: something that every Triton kernel says is missing, or the architecture is another one.
    """
    target = re.search(r'\.amdgcn_target\s+"[^"]*?(gfx\w+)', asm)
    symbol = re.search(r"\.amdhsa_kernel\s+(\S+)", asm)
    if target is None or symbol is None:
        raise EmulatorError("this is not the assembly text of an AMD kernel (asm['amdgcn']).")
    if target[1] not in ARCHS:
        raise EmulatorError(
            f"architecture {target[1]} is not emulated; allowed: {', '.join(ARCHS)}."
        )
    directives = dict(re.findall(r"\.amdhsa_(\w+)\s+(\S+)", asm))

    def number(name: str, default: int | None = None) -> int:
        if name not in directives and default is None:
            raise EmulatorError(f".amdhsa_{name} is missing from the assembly text of {symbol[1]}.")
        return int(directives.get(name, str(default)), 0)

    largest = re.search(r"\.max_flat_workgroup_size:\s+(\d+)", asm)
    before_kernarg = {"private_segment_buffer": 4, "dispatch_ptr": 2, "queue_ptr": 2}
    slots = [
        Argument(offset=int(offset), size=int(size), kind=kind)
        for offset, size, kind in re.findall(
            r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", asm
        )
    ]
    vector_registers = number("next_free_vgpr")
    return Metadata(
        arch=target[1],
        name=symbol[1],
        arguments=tuple(slot for slot in slots if not slot.kind.startswith("hidden_")),
        hidden=tuple(slot for slot in slots if slot.kind.startswith("hidden_")),
        kernarg_b=number("kernarg_size"),
        kernarg_sgpr=sum(n for k, n in before_kernarg.items() if number(f"user_sgpr_{k}", 0)),
        user_sgprs=number("user_sgpr_count"),
        workgroup_axes=(
            bool(number("system_sgpr_workgroup_id_x", 1)),
            bool(number("system_sgpr_workgroup_id_y", 0)),
            bool(number("system_sgpr_workgroup_id_z", 0)),
        ),
        vgprs=number("accum_offset", vector_registers),
        vector_registers=vector_registers,
        shared_b=number("group_segment_fixed_size", 0),
        scratch_b=number("private_segment_fixed_size", 0),
        max_workgroup=int(largest[1]) if largest else MAX_WORKGROUP,
    )
