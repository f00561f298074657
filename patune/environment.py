"""What a measurement depends on besides the device: versions, compiler, and the kernels' own source."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patune.record import Record, check_bool, check_text, digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.target import KernelFamily, Target

# Modules of patune.kernels that decide what machine code runs, and with which arguments: what every family shares, and its own.
SHARED_SOURCES = ("epilogue", "gluon_compat", "overlap", "plan", "query", "reduce", "tiles")
FAMILY_SOURCES = {
    "hopper_wgmma": ("hopper", "hopper_copy", "hopper_layouts", "hopper_operands"),
    "cdna_mfma": ("cdna", "cdna_layouts", "cdna_loads", "cdna_ring"),
}
PARSE_TRIES = 5
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


# A string, or a comment in the place of one. Ours are without nested quotes in f-strings; a test compares with Python's own tokenizer,
# with which the Hopper kernels took 127 ms, not 70 (2026-11).
_STRING_OR_COMMENT = re.compile(
    r"""(?P<triple>\"{3}|'{3})(?:\\.|(?!(?P=triple)).)*(?P=triple)"""
    r"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
    r"""|(?P<comment>\#[^\n]*)""",
    re.DOTALL,
)


def code_of(source: str) -> str:
    """Python source without comments, docstrings and blank lines. The same text under every Python version, unlike a syntax tree."""
    bare = _STRING_OR_COMMENT.sub(lambda m: "" if m["comment"] else m[0], source)
    lines = bare.splitlines()
    for node in _blocks(_parsed(source)):
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
            and first.value.value.strip()
        ):
            for row in range(first.lineno, (first.end_lineno or first.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _parsed(source: str) -> ast.Module:
    """The syntax tree. While another thread parses, CPython 3.11 may raise SystemError for its own counter (python/cpython#106905)."""
    for _ in range(PARSE_TRIES - 1):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def _blocks(
    node: ast.Module | ast.ClassDef | ast.FunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """Everything that can have a docstring, wherever statements are; expressions are not walked."""
    yield node
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            yield from _blocks(statement)
        elif isinstance(statement, ast.stmt | ast.ExceptHandler | ast.match_case):
            for name in ("body", "orelse", "finalbody", "handlers", "cases"):
                waiting += getattr(statement, name, ())


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


@functools.lru_cache(maxsize=64)
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def present_fields(target: Target) -> dict[str, str | bool | int]:
    """What is known here of a target and its environment without importing Triton or torch: what a stored one is compared with.

    The compiler of an NVIDIA target is left out until Triton is imported, and a package that is not installed always.
    """
    from patune import __version__

    fields: dict[str, str | bool | int] = {
        **target.to_dict(),
        "family": target.limits.family,
        "patune": __version__,
        "python": platform.python_version(),
        "fp_fusion": FP_FUSION,
        "kernel_source_hash": kernel_source_hash(target.limits.family),
    }
    for package in ("triton", "torch"):
        try:
            fields[package] = _version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    triton = str(fields.get("triton", ""))
    if triton and (target.vendor == "amd" or "triton" in sys.modules):
        try:
            fields["compiler"] = _compiler(target, triton)
        except (ImportError, OSError, RuntimeError, IndexError, AttributeError):
            fields.pop("compiler", None)  # an unusual Triton: nothing to compare
    return fields
