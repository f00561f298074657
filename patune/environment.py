"""What a measurement depends on besides the device: versions, compiler, and the kernels' own source."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import io
import platform
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patune.record import Record, check_bool, check_text, digest

if TYPE_CHECKING:
    from patune.target import KernelFamily, Target

# Modules of patune.kernels that decide what machine code runs, and with which arguments: what every family shares, and its own.
SHARED_SOURCES = ("epilogue", "gluon_compat", "overlap", "plan", "query", "reduce", "tiles")
FAMILY_SOURCES = {
    "hopper_wgmma": ("hopper", "hopper_copy", "hopper_layouts", "hopper_operands"),
    "cdna_mfma": ("cdna", "cdna_layouts", "cdna_loads", "cdna_ring"),
}
FP_FUSION = True  # handed to every build: the default changes in Triton 3.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment(Record):
    """Provenance of a trial.

    Attributes:
        patune, triton, torch, python: package versions.
        compiler: what turns Triton's IR into machine code (ptxas with its version, or Triton's own LLVM).
        driver: GPU driver version, ``none`` for emulated targets.
        fp_fusion: multiply-add contraction in the builds.
        kernel_source_hash: sha256 over the code of the target's kernel family; comments and docstrings do not count.
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

    def changes_to(self, other: Environment) -> dict[str, tuple[str | bool, str | bool]]:
        """The fields that ``other`` has otherwise: the value here, and there."""
        here, there = self.to_dict(), other.to_dict()
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}


def code_of(source: str) -> str:
    """Python source without comments, docstrings and blank lines. The same text under every Python version, unlike a syntax tree."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            for row in range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


@functools.cache
def kernel_source_hash(family: KernelFamily) -> str:
    """sha256 over the code that a family's builds and launches are made from: evidence of one family outlives changes of another."""
    total = hashlib.sha256()
    for name in sorted(SHARED_SOURCES + FAMILY_SOURCES[family]):
        source = (Path(__file__).parent / "kernels" / f"{name}.py").read_text(encoding="utf-8")
        total.update(f"{name}\n{code_of(source)}\n".encode())
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
        kernel_source_hash=kernel_source_hash(target.limits.family),
    )
