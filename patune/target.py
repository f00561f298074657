"""Where kernels run: an architecture and the device part that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patune.errors import NoUsableGpuError, reject
from patune.record import Record, check_choice, check_int, check_text

KernelFamily = Literal["hopper_wgmma", "cdna_mfma"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """Limits of one architecture that knobs are checked against.

    Attributes:
        family: the kernel family that serves it.
        lanes: threads per warp (wavefront).
        shared_limit_b: shared memory (LDS) that one workgroup can get.
    """

    name: str
    family: KernelFamily
    lanes: int
    shared_limit_b: int


ARCHS = {
    a.name: a
    for a in (
        Arch(
            name="sm_90", family="hopper_wgmma", lanes=32, shared_limit_b=232_448
        ),  # opt-in maximum of a block, CUDA
        Arch(
            name="gfx942", family="cdna_mfma", lanes=64, shared_limit_b=65_536
        ),  # LLVM AMDGPUUsage
        Arch(
            name="gfx950", family="cdna_mfma", lanes=64, shared_limit_b=163_840
        ),  # LLVM target parser
    )
}
# The part that a bare architecture name stands for when no device of it is there.
REFERENCE_PARTS = {
    "sm_90": ("NVIDIA H200", 132),
    "gfx942": ("AMD Instinct MI300X", 304),
    "gfx950": ("AMD Instinct MI355X", 256),
}
NO_GPU_ARCH = "gfx942"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Record):
    """One kind of device: H100 and H200, MI300X and MI308X are different targets.

    Attributes:
        arch: ``sm_90``, ``gfx942`` or ``gfx950``.
        device_name: the vendor's name of the part.
        compute_units: streaming multiprocessors (NVIDIA) or compute units (AMD).
    """

    arch: str
    device_name: str
    compute_units: int

    def __post_init__(self) -> None:
        check_choice("arch", self.arch, tuple(ARCHS))
        check_text("device_name", self.device_name)
        check_int("compute_units", self.compute_units, low=1)

    @classmethod
    def named(cls, arch: str) -> Target:
        """The reference part of an architecture.

        Raises:
            InvalidValueError: the architecture is unknown.
        """
        if arch not in REFERENCE_PARTS:
            raise reject(
                "target", arch, tuple(ARCHS), "Run `patune doctor` to see what this machine has."
            )
        device_name, compute_units = REFERENCE_PARTS[arch]
        return cls(arch=arch, device_name=device_name, compute_units=compute_units)

    @property
    def limits(self) -> Arch:
        """The architecture's limits."""
        return ARCHS[self.arch]

    @property
    def vendor(self) -> Literal["nvidia", "amd"]:
        """Who makes it."""
        return "nvidia" if self.arch.startswith("sm_") else "amd"


def detect_target() -> Target | None:
    """The target of the current torch device, or None when this process sees no GPU that a kernel family serves."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        arch = str(properties.gcnArchName).split(":", 1)[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    if arch not in ARCHS:
        return None
    return Target(
        arch=arch, device_name=properties.name, compute_units=properties.multi_processor_count
    )


def default_target() -> Target:
    """The device that is there, else the reference part of ``gfx942``. Sweep and lookup share this rule."""
    return detect_target() or Target.named(NO_GPU_ARCH)


def resolve_target(arch: str | None) -> Target:
    """The target that ``--target`` names: the device here when it has that architecture, else its reference part.

    Raises:
        InvalidValueError: the architecture is unknown.
    """
    if arch is None:
        return default_target()
    named = Target.named(arch)
    here = detect_target()
    return here if here is not None and here.arch == arch else named


def require_device(target: Target) -> None:
    """Refuse a target that has to be measured but is not in this machine.

    Raises:
        NoUsableGpuError: an NVIDIA target without its GPU. AMD targets can always be emulated.
    """
    if target.vendor == "nvidia" and detect_target() != target:
        raise NoUsableGpuError(
            f"target {target.arch} ({target.device_name}) is measured on the device, and this machine has none of it. "
            "Without a GPU run `patune sweep --target gfx942` or `--target gfx950`: compiled and emulated."
        )
