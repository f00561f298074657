"""The kernel source hash: of code, not of words, and the same under every Python."""

from __future__ import annotations

import re
from pathlib import Path

import patune.kernels
from patune.environment import KERNEL_SOURCES, code_of, kernel_source_hash

SOURCE = '''"""Module."""

import x  # why

# a comment


@jit
def f(a, b="# no comment"):
    """Docstring,
    two lines."""
    return a + b  # sum


class C:
    """Doc."""

    y = f"{x!r} # text"
'''


def test_comments_docstrings_and_blank_lines_do_not_count() -> None:
    assert code_of(SOURCE) == (
        'import x\n@jit\ndef f(a, b="# no comment"):\n    return a + b\nclass C:\n    y = f"{x!r} # text"'
    )


def test_code_counts() -> None:
    assert code_of(SOURCE) != code_of(SOURCE.replace("a + b", "a - b"))


def test_every_module_with_a_decode_kernel_is_in_the_hash() -> None:
    folder = Path(patune.kernels.__path__[0])
    with_kernels = {
        p.stem for p in folder.glob("*.py") if re.search(r"^@gluon\.", p.read_text(), re.MULTILINE)
    }
    assert with_kernels - set(KERNEL_SOURCES) == {"read_ceiling"}
    assert all((folder / f"{name}.py").exists() for name in KERNEL_SOURCES)
    assert len(kernel_source_hash()) == 64
