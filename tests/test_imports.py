"""Who may import whom, read from the syntax trees, and what `import patune` must not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import patune

PACKAGE = Path(patune.__file__).parent
FORBIDDEN = {  # layer -> what it must not import
    "patune.kernels": ("patune.tuner", "patune.configs", "patune.integrations"),
    "patune.emulator": ("patune.tuner", "patune.configs", "patune.integrations"),
    "patune.configs": ("patune.tuner", "patune.integrations"),
    "patune.tuner": ("patune.integrations",),
    "patune.integrations": ("patune.tuner",),
    "patune": (
        "patune.cli",
        "patune.terminal",
        "patune.check_table",
        "patune.verify_table",
        "patune.doctor",
        "patune.cli_tune",
        "patune.cli_packs",
        "patune.pack_view",
        "patune.sweep_view",
        "patune.cli_configs",
        "patune.cli_keys",
        "patune.adopt_view",
        "patune.config_view",
        "patune.why_view",
        "patune.simulate_view",
    ),
}
ON_TOP = (
    "patune.cli",
    "patune.terminal",
    "patune.check_table",
    "patune.verify_table",
    "patune.doctor",
    "patune.report",
    "patune.cli_tune",
    "patune.cli_packs",
    "patune.pack_view",
    "patune.sweep_view",
    "patune.cli_configs",
    "patune.cli_keys",
    "patune.adopt_view",
    "patune.config_view",
    "patune.why_view",
    "patune.simulate_view",
    "patune.__main__",
)
# The public operation looks its knobs up when the caller gives none: lazily, inside the function.
LAZY_EXCEPTIONS = {("patune.kernels.decode", "patune.configs.dispatcher")}
HEAVY = ("torch", "triton", "optuna", "sqlalchemy", "alembic", "numpy", "rich", "click")


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    in_function: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_in(source: str, importer: str) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found.extend(Import(importer, name, node.lineno, in_function) for name in names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), in_function=False)
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(imports: list[Import]) -> list[str]:
    bad = []
    for entry in imports:
        if within(entry.importer, "patune.cli") or entry.importer in ON_TOP:
            continue
        for layer, forbidden in FORBIDDEN.items():
            broken = within(entry.importer, layer) and any(
                within(entry.imported, name) for name in forbidden
            )
            excused = entry.in_function and any(
                entry.importer == who and within(entry.imported, what)
                for who, what in LAZY_EXCEPTIONS
            )
            if broken and not excused:
                bad.append(f"{entry.importer}:{entry.line} imports {entry.imported}")
    return bad


def test_layers_import_only_what_lies_below() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    imports = [
        entry
        for path in files
        for entry in imports_in(path.read_text(encoding="utf-8"), module_name(path))
    ]
    assert violations(imports) == []


def test_the_rule_sees_a_planted_violation() -> None:
    planted = [
        ("patune.kernels.tiles", "from patune.configs.store import Store", 1),
        ("patune.kernels.tiles", "def f():\n    import patune.tuner.sweep", 2),
        ("patune.emulator.wave", "from patune import tuner", 1),
        ("patune.configs.store", "if True:\n    from patune.tuner.sweep import SweepOptions", 2),
        ("patune.tuner.sweep", "import patune.cli", 1),
        ("patune.tuner.simulate", "from patune import simulate_view", 1),
        ("patune.configs.store", "from patune.sweep_view import print_report", 1),
        ("patune.kernels.decode", "from patune.configs.dispatcher import lookup", 1),
        ("patune.tuner.sweep", "from patune.integrations.layers import AttentionLayer", 1),
        ("patune.integrations.vllm", "def f():\n    import patune.tuner.sweep", 2),
    ]
    for importer, source, line in planted:
        found = violations(imports_in(source, importer))
        assert len(found) == 1, (importer, source)
        assert found[0].startswith(f"{importer}:{line} imports patune.")


def test_the_operation_may_look_up_lazily() -> None:
    source = "def f():\n    from patune.configs.dispatcher import lookup"
    assert violations(imports_in(source, "patune.kernels.decode")) == []
    assert len(violations(imports_in(source, "patune.kernels.reduce"))) == 1


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang"])
def test_importing_an_integration_loads_no_engine(engine: str) -> None:
    """SGLang's and vLLM's plugin loaders import it in every process; registering imports what is needed."""
    loaded = loaded_modules(f"import patune.integrations.{engine}")
    assert loaded.isdisjoint({"transformers", "vllm", "sglang", "optuna", "sqlalchemy", "sqlite3"})


def test_importing_patune_loads_nothing_heavy() -> None:
    loaded = loaded_modules("import patune; patune.Problem(block_size=16, head_dim=64, qg=1)")
    assert "patune.problem" in loaded
    assert loaded.isdisjoint(HEAVY)
