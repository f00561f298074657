"""Stand-ins for the device: Triton's JIT compiles for sm_90, a CUDA driver writes down what it was told to launch.

No ``from __future__ import annotations``: it breaks the kernel in Triton 3.6.
"""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from patune.kernels import decode, launch, workspace
from patune.kernels.calls import KernelCall

FUNCTION = 0xF00  # handle of the first kernel; the next ones follow
ATTRIBUTE_B = 72  # CUlaunchAttribute: an int, 4 bytes of padding, a union of 64 bytes
KINDS = {
    ".u64": "i64",
    ".u32": "i32",
    ".f32": "fp32",
}  # PTX type of a parameter -> Triton's, pointers aside


@triton.jit(do_not_specialize=["count"])
def mixed_kernel(
    a_ptr, absent_ptr, count, one, even, wide, scale, out_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """One parameter of every sort: pointers, None, an unspecialised 1, a specialised 1, int32, int64, float, constexpr."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(a_ptr + i) * scale + count + even + wide + one)


def mixed_call(a: torch.Tensor, out: torch.Tensor, **changed: Any) -> KernelCall:
    arguments = {
        "a_ptr": a, "absent_ptr": None, "count": 1, "one": 1, "even": 32, "wide": 2**40, "scale": 0.1, "out_ptr": out,
    }  # fmt: skip
    return KernelCall(
        kernel=mixed_kernel,
        grid=(2, 3, 4),
        arguments=arguments | changed,
        constants={"BLOCK": 32},
        options={"num_warps": 4, "enable_fp_fusion": True},  # left open, Triton 3.9 warns
    )


class _Jit:
    """The part of Triton's driver that compiling through the JIT asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@dataclass
class Launch:
    """What reached the driver: 8 bytes of every parameter, read when it was launched."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_b: int
    stream: int
    function: int
    words: list[int]
    attributes: bytes

    def scalar(self, place: int, kind: Any) -> Any:
        return kind.from_buffer_copy(self.words[place].to_bytes(8, "little")).value


class Cuda:
    """The machine: current device, stream and capture, and the launches that were made."""

    def __init__(self) -> None:
        self.device = 0
        self.stream = 0
        self.capturing = False
        self.status = 0
        self.launches: list[Launch] = []

    def cuLaunchKernelEx(self, config_ref: Any, function: Any, parameters: Any, extra: None) -> int:
        config = config_ref._obj
        assert bool(config.attributes) == bool(config.n_attributes)
        attributes = (
            ctypes.string_at(config.attributes, config.n_attributes * ATTRIBUTE_B)
            if config.n_attributes
            else b""
        )
        words = [ctypes.c_uint64.from_address(pointer).value for pointer in parameters]
        self.launches.append(
            Launch(
                grid=tuple(config.grid),
                block=tuple(config.block),
                shared_b=config.shared_b,
                stream=config.stream or 0,
                function=function.value,
                words=words,
                attributes=attributes,
            )
        )
        return self.status

    def cuGetErrorName(self, status: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_INVALID_HANDLE"
        return 0

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        before, self.device = self.device, index
        yield
        self.device = before

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(triton.runtime.driver, "_active", _Jit())
        patch.setattr(launch, "_driver", lambda: self)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        patch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False
        )
        patch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: self.capturing)
        patch.setattr(torch.cuda, "current_device", lambda: self.device)
        patch.setattr(torch.cuda, "device", self.on_device)
        patch.setattr(workspace, "_own", workspace._Own())
        decode.forget_steps()
        patch.setattr(decode, "_changed", False)


def compile_by_jit(call: KernelCall) -> Any:
    """The kernel that a launch of the call would build, specialised as the JIT does it."""
    kernel = call.kernel.run(
        *call.arguments.values(),
        grid=call.grid,
        warmup=True,
        **call.constants,
        **call.options,
    )
    call.kernel.device_caches.clear()  # what the JIT keeps was made for a driver that is not there
    return kernel


def load(calls: list[KernelCall]) -> list[Any]:
    """Compiled kernels with a function handle, as after a launch."""
    kernels = [compile_by_jit(call) for call in calls]
    for number, kernel in enumerate(kernels):
        kernel.function = FUNCTION + number
    return kernels


def ptx_parameters(kernel: Any) -> list[str]:
    """Triton types of the parameters that the machine code declares; ``*`` is a pointer."""
    entry = kernel.asm["ptx"].split(".entry", 1)[1].split("\n)", 1)[0]
    return [
        "*" if ".ptr" in rest else KINDS[kind]
        for kind, rest in re.findall(r"\.param (\.\w+)(.*)", entry)
    ]


def aligned(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that start on a 16-byte boundary."""
    tensor = torch.zeros(elements, dtype=dtype)
    assert tensor.data_ptr() % launch.ALIGNMENT_B == 0
    return tensor
