"""What a measurement depends on besides the device: versions, compiler, and the kernels' own source."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patune.record import Record, check_bool, check_text, digest

if TYPE_CHECKING:
    from patune.target import Target

FP_FUSION = True  # handed to every build: the default changes in Triton 3.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment(Record):
    """Provenance of a trial.

    Attributes:
        patune, triton, torch, python: package versions.
        compiler: what turns Triton's IR into machine code (ptxas with its version, or Triton's own LLVM).
        driver: GPU driver version, ``none`` for emulated targets.
        fp_fusion: multiply-add contraction in the builds.
        kernel_source_hash: sha256 over the syntax trees of the kernel sources, so comments do not count.
    """

    patune: str
    triton: str
    torch: str
    python: str
    compiler: str
    driver: str
    fp_fusion: bool
    kernel_source_hash: str

    def __post_init__(self) -> None:
        for name in (
            "patune",
            "triton",
            "torch",
            "python",
            "compiler",
            "driver",
            "kernel_source_hash",
        ):
            check_text(name, getattr(self, name))
        check_bool("fp_fusion", self.fp_fusion)

    @property
    def key(self) -> str:
        """Trials are comparable, and a sweep resumes, only where this is equal."""
        return digest(self.to_dict())


@functools.cache
def kernel_source_hash() -> str:
    """sha256 over the syntax trees of patune/kernels: comments, blank lines and line numbers do not change it."""
    total = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        total.update(path.name.encode())
        total.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return total.hexdigest()


def _compiler(target: Target, triton_version: str) -> str:
    if target.vendor == "amd":
        return f"llvm of triton {triton_version}"
    from triton.backends.nvidia.compiler import get_ptxas_version

    return f"ptxas {get_ptxas_version(90).strip().splitlines()[-2].split('release ')[-1].split(',')[0]}"


def _driver(target: Target) -> str:
    if target.vendor == "amd":
        return "none"
    version = Path("/proc/driver/nvidia/version")
    if not version.exists():
        return "none"
    words = version.read_text(encoding="utf-8").split()
    return next((w for w in words if w.replace(".", "").isdigit() and "." in w), "unknown")


def current_environment(target: Target) -> Environment:
    """The environment of this process for builds of ``target``."""
    from patune import (
        __version__,
    )  # not from metadata: the package also runs uninstalled, by PYTHONPATH

    triton_version = importlib.metadata.version("triton")
    return Environment(
        patune=__version__,
        triton=triton_version,
        torch=importlib.metadata.version("torch"),
        python=platform.python_version(),
        compiler=_compiler(target, triton_version),
        driver=_driver(target),
        fp_fusion=FP_FUSION,
        kernel_source_hash=kernel_source_hash(),
    )
