"""The kernel source hash: of code, not of words, and the same under every Python."""

from __future__ import annotations

import ast
import dataclasses
import io
import itertools
import re
import tokenize
from pathlib import Path

import pytest

import patune.kernels
from patune.environment import (
    FAMILY_SOURCES,
    SHARED_SOURCES,
    code_of,
    current_environment,
    kernel_source_hash,
)
from patune.target import ARCHS, Target

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
    hashed = {*SHARED_SOURCES}.union(*FAMILY_SOURCES.values())
    assert with_kernels - hashed == {"read_ceiling"}
    assert all((folder / f"{name}.py").exists() for name in hashed)


def test_a_family_hashes_what_its_kernels_import() -> None:
    """What a kernel module imports of ours is shared or of its own family, so no change of it can go unseen."""
    folder = Path(patune.kernels.__path__[0])
    for sources in FAMILY_SOURCES.values():
        for name in sources:
            imported = re.findall(r"^from patune\.kernels\.(\w+) import", (folder / f"{name}.py").read_text(), re.MULTILINE)  # fmt: skip
            assert set(imported) <= {*SHARED_SOURCES, *sources}


def test_each_family_has_a_hash_of_its_own() -> None:
    assert set(FAMILY_SOURCES) == {arch.family for arch in ARCHS.values()}
    hashes = [kernel_source_hash(family) for family in FAMILY_SOURCES]
    assert len(set(hashes)) == len(hashes)
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in hashes)


def test_changes_are_the_fields_that_differ() -> None:
    stored = current_environment(Target.named("gfx942"))
    assert stored.changes_to(stored) == {}
    present = dataclasses.replace(stored, fp_fusion=False, kernel_source_hash="5" * 64)
    assert stored.changes_to(present) == {
        "fp_fusion": (True, False),
        "kernel_source_hash": (stored.kernel_source_hash, "5" * 64),
    }


def by_tokenizer(source: str) -> str:
    """The code of a source by Python's own tokenizer and a walk over the whole tree."""
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


@pytest.mark.parametrize(
    "name", sorted({*SHARED_SOURCES, *itertools.chain(*FAMILY_SOURCES.values())})
)
def test_the_scanner_sees_what_the_tokenizer_sees(name: str) -> None:
    folder = Path(patune.kernels.__file__).parent
    source = (folder / f"{name}.py").read_text(encoding="utf-8")
    assert code_of(source) == by_tokenizer(source)
    assert by_tokenizer(source) != source
