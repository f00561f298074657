"""The example programs: as a shell runs them, and as modules."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"
COLUMNS = 100


def load(name: str) -> ModuleType:
    """An example as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses ask for it
        spec.loader.exec_module(module)
    return sys.modules[name]


def run(
    name: str, *arguments: str, folder: Path, gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """An example as a program, in a folder where nothing of the checkout lies; without ``gpu`` it sees none."""
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=False,
    )


def is_readable(text: str) -> bool:
    """No line is longer than a terminal is wide."""
    return all(len(line) <= COLUMNS for line in text.splitlines())
