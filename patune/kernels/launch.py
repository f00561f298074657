"""Bound launches: kernels that Triton compiled, launched again with nothing but new addresses.

A launch through Triton specialises its arguments and checks every pointer, each time: 17.6 us for an empty kernel (host of an H200, 2026-11).
What that finds out is fixed once shapes, strides, scalars and the pointers' alignment are. So it is done once: the parameters are laid out in
memory, and a launch writes the addresses there and calls the driver.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import struct
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.kernels.calls import KernelCall

    Tensors = tuple[torch.Tensor | None, ...]
    Source = tuple[int, int]  # place among the tensors, byte offset

ALIGNMENT_B = 16  # Triton builds another kernel for a pointer off this boundary
SLOT_B = 8  # every parameter has a slot of its own
WARP_LANES = 32
HIDDEN_PARAMETERS = 2  # global and profile scratch, which Triton appends to a kernel's parameters
SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
NOT_ZERO = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "instrumentation_mode")  # fmt: skip
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID of cuda.h
# 0.11 us a tensor, by operator.methodcaller 0.21 (2026-11, one core)
_address = torch.Tensor.data_ptr


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute`` of cuda.h."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_uint64 * 8),
    )


# what Triton's launcher says for launch_pdl: the kernel may get on the device while the one before it runs
_OVERLAP = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,))


class _Config(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_b", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    )


def parameters(kernel: Any) -> list[tuple[str, str]]:
    """Name and Triton type of what a compiled kernel takes, in order: None, 1 and constexprs became constants and are not among them."""
    return [(name, kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"]


def why_unbound(kernel: Any) -> str | None:
    """Why a compiled kernel can be launched through Triton only, or None."""
    metadata = getattr(kernel, "metadata", None)
    if metadata is None or metadata.target.backend != "cuda":
        return "not a compiled CUDA kernel"
    for name in NOT_ZERO:
        if value := getattr(metadata, name, None):
            return f"{name}={value}"
    if metadata.num_ctas != 1:
        return f"num_ctas={metadata.num_ctas}"
    for name, kind in parameters(kernel):
        if not isinstance(kind, str) or not (kind.startswith("*") or kind in SCALARS):
            return f"parameter {name} is of type {kind}"
    return None


def bind(
    calls: Sequence[KernelCall], kernels: Sequence[Any], tensors: Tensors, device: int
) -> BoundLaunch | None:
    """The calls as one bound launch, or None where they have to go through Triton.

    Args:
        calls: what was launched just now.
        kernels: what :meth:`KernelCall.launch` returned for each.
        tensors: every tensor that the calls were made from, no object twice, and last the workspace, of which the calls may take parts.
            Later launches give them in the same places.
        device: index of the CUDA device that the kernels are loaded on.
    """
    driver = _driver()
    if driver is None or not calls or any(why_unbound(kernel) for kernel in kernels):
        return None
    assert len({id(t) for t in tensors if t is not None}) == sum(t is not None for t in tensors)
    pairs = list(zip(calls, kernels, strict=True))
    pointers = [
        call.arguments[name]
        for call, kernel in pairs
        for name, kind in parameters(kernel)
        if kind.startswith("*")
    ]
    sources = [_source(pointer, tensors) for pointer in pointers]
    known = {source for source in sources if source is not None}
    if None in sources or not known:
        return None
    block = _Block(known, len(tensors) - 1, sum(len(parameters(kernel)) for kernel in kernels))
    source_of = {id(p): s for p, s in zip(pointers, sources, strict=True) if s is not None}
    launches = [_prepared(call, kernel, block, source_of) for call, kernel in pairs]
    return BoundLaunch(driver.cuLaunchKernelEx, block, launches, kernels, device)


def _source(pointer: object, tensors: Tensors) -> Source | None:
    """Where a pointer argument comes from, or None when later launches could not tell its address."""
    if not isinstance(pointer, torch.Tensor) or pointer.data_ptr() % ALIGNMENT_B:
        return None
    for place, tensor in enumerate(tensors):
        if pointer is tensor:
            return place, 0
    if (workspace := tensors[-1]) is None:
        return None
    offset = pointer.data_ptr() - workspace.data_ptr()
    inside = 0 <= offset < workspace.numel() * workspace.element_size()
    return (len(tensors) - 1, offset) if inside and offset % ALIGNMENT_B == 0 else None


class _Block:
    """Memory of the parameters: addresses of whole tensors, of parts of the workspace, one null, then scalars."""

    def __init__(self, sources: set[Source], workspace: int, n_scalars: int) -> None:
        """Lay out the slots.

        Args:
            sources: what pointers come from.
            workspace: place of the workspace among the tensors.
            n_scalars: upper bound of the scalars to come.
        """
        self.places = sorted({place for place, _ in sources})
        self.offsets = sorted({offset for _, offset in sources if offset})
        self.workspace = self.places.index(workspace) if workspace in self.places else -1
        wholes = [(place, 0) for place in self.places]
        parts = [(workspace, offset) for offset in self.offsets]
        self.slots = {source: slot for slot, source in enumerate([*wholes, *parts])}
        self._null = len(self.slots)
        self._free = self._null + 1
        self.memory = (ctypes.c_uint64 * (self._free + n_scalars))()

    def scalar(self, kind: str, value: object) -> int:
        """Store a scalar; returns its slot."""
        slot = self._free
        self._free += 1
        SCALARS[kind].from_buffer(self.memory, slot * SLOT_B).value = value
        return slot

    def parameter_list(self, slots: list[int]) -> ctypes.Array[ctypes.c_void_p]:
        """The driver's ``kernelParams``: the addresses of these slots, and of a null for each hidden parameter."""
        start = ctypes.addressof(self.memory)
        all_slots = [*slots, *[self._null] * HIDDEN_PARAMETERS]
        return (ctypes.c_void_p * len(all_slots))(*(start + slot * SLOT_B for slot in all_slots))


_Launch = tuple[_Config, ctypes.c_void_p, "ctypes.Array[ctypes.c_void_p]"]


def _prepared(
    call: KernelCall, kernel: Any, block: _Block, source_of: dict[int, Source]
) -> _Launch:
    """Configuration, function and parameters of one launch."""
    slots = []
    for name, kind in parameters(kernel):
        value = call.arguments[name]
        pointer = kind.startswith("*")
        slots.append(block.slots[source_of[id(value)]] if pointer else block.scalar(kind, value))
    metadata = kernel.metadata
    overlap = bool(getattr(metadata, "launch_pdl", False))
    config = _Config(
        grid=call.grid,
        block=(WARP_LANES * metadata.num_warps, 1, 1),
        shared_b=metadata.shared,
        attributes=ctypes.addressof(_OVERLAP) if overlap else None,
        n_attributes=int(overlap),
    )
    return config, ctypes.c_void_p(kernel.function), block.parameter_list(slots)


class BoundLaunch:
    """The kernels of one decode step with everything but addresses and stream fixed. For one device and one thread.

    One thread, because a second one would write the same block. Since no other thread touches the block, the driver is called without the GIL
    (CDLL), as Triton does: a launch into a full queue waits for the device, which may wait for a host callback, which may wait for the GIL.
    Keeping the GIL (PyDLL) would save 0.1 of 0.46 us (call of an empty C function, 2026-11, one core).
    """

    def __init__(
        self,
        launch_ex: Any,
        block: _Block,
        launches: Sequence[_Launch],
        kernels: Sequence[Any],
        device: int,
    ) -> None:
        import triton

        self._launch_ex = launch_ex
        self._block = block
        self._configs = [config for config, _, _ in launches]
        self._launches = [(ctypes.byref(c), function, list_) for c, function, list_ in launches]
        self._kernels = list(kernels)  # Triton unloads a kernel that nothing holds
        self._device = device
        self._runtime = triton.knobs.runtime
        self._current_device = torch._C._cuda_getDevice
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._stream: int | None = None
        self._pick = _picker(block.places)
        self._pack = struct.Struct(f"={len(block.places)}Q").pack_into
        self._pack_parts = struct.Struct(f"={len(block.offsets)}Q").pack_into
        self._parts_of: int | None = None  # workspace that the parts were written for

    def launch(self, tensors: Tensors) -> bool:
        """Launch on the device's current stream; False, and nothing launched, when only Triton can launch these.

        Args:
            tensors: like those given to :func:`bind`: same places, same shapes, strides and dtypes.

        Raises:
            RuntimeError: the driver refused the launch.
        """
        runtime = self._runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # Triton keeps a chain of calls, often an empty one; profilers put a function or None in its place
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return False
        addresses = tuple(map(_address, self._pick(tensors)))
        if functools.reduce(operator.or_, addresses) % ALIGNMENT_B:
            return False
        if self._current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.launch(tensors)
        stream = self._current_stream(self._device)
        if stream != self._stream:
            for config in self._configs:
                config.stream = stream
            self._stream = stream
        memory = self._block.memory
        self._pack(memory, 0, *addresses)
        if self._block.offsets and addresses[self._block.workspace] != self._parts_of:
            self._write_parts(addresses[self._block.workspace])
        for config_ref, function, parameter_list in self._launches:
            if status := self._launch_ex(config_ref, function, parameter_list, None):
                raise RuntimeError(f"CUDA refused a launch of {self._names()}: {_reason(status)}.")
        return True

    def _write_parts(self, workspace: int) -> None:
        block = self._block
        parts = [workspace + offset for offset in block.offsets]
        self._pack_parts(block.memory, len(block.places) * SLOT_B, *parts)
        self._parts_of = workspace

    def _names(self) -> str:
        return ", ".join(kernel.metadata.name for kernel in self._kernels)


def _picker(places: list[int]) -> Any:
    """Tensors in these places, always as a tuple: ``itemgetter`` gives a single one bare."""
    return (
        operator.itemgetter(*places) if len(places) > 1 else lambda tensors: (tensors[places[0]],)
    )


@functools.cache
def _driver() -> Any:
    """libcuda, or None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _reason(status: int) -> str:
    text = ctypes.c_char_p()
    driver = _driver()
    if driver is None or driver.cuGetErrorName(status, ctypes.byref(text)) or text.value is None:
        return f"error {status}"
    return f"{text.value.decode()} ({status})"
