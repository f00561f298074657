"""Ahead-of-time compilation of a kernel call for any target, without a GPU."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patune.environment import FP_FUSION

if TYPE_CHECKING:
    from patune.kernels.calls import KernelCall
    from patune.target import Target

POINTER_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
}
ALIGNED = [["tt.divisibility", 16]]
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A compiled kernel.

    Attributes:
        asm: amdgcn assembly text, or None for NVIDIA.
        cubin: NVIDIA machine code, or None for AMD.
        shared_b: shared memory (LDS) of a workgroup, bytes.
        num_warps: warps of a workgroup.
    """

    asm: str | None
    cubin: bytes | None
    shared_b: int
    num_warps: int

    @property
    def digest(self) -> str:
        """sha256 of the machine code: equal digests are one build."""
        code = self.asm.encode() if self.asm is not None else self.cubin or b""
        return hashlib.sha256(code).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Static resource facts; both vendors have ``spills`` (registers or bytes spilled) and ``shared_b``."""
        if self.asm is not None:
            from patune.emulator import static_facts

            facts = static_facts(self.asm, self.shared_b, self.num_warps).to_dict()
            # spilled SGPRs move to VGPR lanes; only spilled VGPRs go to memory
            return {**facts, "spills": facts["vgpr_spills"]}
        registers, stack_b = _cubin_usage(self.cubin or b"")
        return {"registers": registers, "spills": stack_b, "shared_b": self.shared_b}


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and stack bytes (spills) by cuobjdump, which Triton's wheel carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no register count: {text[:200]!r}")
    return int(match[1]), int(match[2])


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -INT32_MAX <= value <= INT32_MAX else "i64"


def signature_of(call: KernelCall) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """The types, constexprs and alignment attributes that Triton's JIT would specialise this call on."""
    types: dict[str, str] = {}
    constants = dict(call.constants)
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(call.kernel.params):
        name = parameter.name
        value = call.arguments.get(name)
        if name in constants or value is None:  # an absent pointer is a constexpr None
            constants.setdefault(name, None)
            types[name] = "constexpr"
            continue
        types[name] = _type_of(value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = ALIGNED
    return types, constants, attributes


def call_key(call: KernelCall) -> str:
    """What a build of the call depends on, besides the target."""
    function = call.kernel.fn
    return repr(
        (
            function.__module__,
            function.__qualname__,
            *signature_of(call),
            sorted(call.options.items()),
        )
    )


def compile_call(call: KernelCall, target: Target) -> Build:
    """Compile a call's kernel for ``target``. The tensors' dtypes count, their device and contents do not.

    Raises:
        triton.compiler.errors.CompilationError, RuntimeError: whatever the compiler says of the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    types, constants, attributes = signature_of(call)
    source = GluonASTSource(call.kernel, types, constants, attributes)
    arch: int | str = 90 if target.arch == "sm_90" else target.arch
    backend = "cuda" if target.vendor == "nvidia" else "hip"
    compiled = triton.compile(  # type: ignore[no-untyped-call]
        source,
        target=GPUTarget(backend, arch, target.limits.lanes),
        options={"enable_fp_fusion": FP_FUSION, **call.options},
    )
    return Build(
        asm=compiled.asm.get("amdgcn"),
        cubin=compiled.asm.get("cubin"),
        shared_b=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
    )
