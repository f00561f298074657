"""The benchmarks are scripts beside the package: tests import their modules by name, as the scripts' worker processes do."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in (ROOT / "benchmarks", Path(__file__).parent):
    sys.path.insert(0, str(folder))
