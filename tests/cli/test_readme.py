"""The README's promises that a machine can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import patune

ROOT = Path(patune.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_it_begins_with_the_two_commands() -> None:
    assert blocks()[0] == "make sweep\nmake test\n"
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    used = set(re.findall(r"^make ([a-z0-9 ,-]+)", "\n".join(blocks()), re.MULTILINE))
    assert {name for words in used for name in words.split()} <= set(targets)


def test_the_python_example_runs_as_printed() -> None:
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=True, timeout=120
    )
    (expected,) = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    assert done.stdout.strip() == expected


def test_every_environment_variable_is_listed() -> None:
    used: set[str] = set()
    for path in (ROOT / "patune").rglob("*.py"):
        used |= set(re.findall(r"environ(?:\.get\(|\[)\"(PATUNE_\w+)", path.read_text("utf-8")))
    names = ("DB", "TARGET", "STRICT", "KNOBS", "WATCH", "CAPTURE")
    assert used == {f"PATUNE_{name}" for name in names}
    assert all(f"| `{name}` |" in README for name in used)


def test_the_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_no_line_names_a_machine() -> None:
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", ROOT / ".ci" / "run"]
    for folder, pattern in (("docs", "*.md"), ("scripts", "*"), ("constraints", "*.txt")):
        files += sorted(path for path in (ROOT / folder).glob(pattern) if path.is_file())
    for path in files:
        text = path.read_text("utf-8")
        assert not any(str(place) in text for place in (ROOT.resolve(), Path.home())), path.name
