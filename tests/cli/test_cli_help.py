"""Every command has help, is documented, and costs next to nothing to ask about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import patune
from patune.cli import main
from patune.cli_options import DEFAULT_EFFORT, EFFORTS, KNOB_SETS, REPLAYED, ROBUST, SAMPLERS
from patune.errors import InvalidValueError
from patune.problem import Problem, Workload
from patune.sweep_request import DEFAULT_SAMPLER
from patune.target import Target
from patune.tuner.progress import Key

if TYPE_CHECKING:
    from cli_fakes import Run

ROOT = Path(patune.__file__).parents[1]
HEAVY = ("torch", "triton", "optuna", "sqlalchemy", "alembic", "numpy", "rich")
COMMANDS = sorted(main.commands)


def test_the_commands_are_the_documented_ones() -> None:
    names = "doctor sweep models space simulate check verify list show lookup why history gc export import diff validate merge sign keygen export-study where"
    assert sorted(names.split()) == COMMANDS


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Run, name: str, flag: str) -> None:
    result = run(name, flag)
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: patune {name} ")
    assert main.commands[name].help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_in_the_docs(name: str) -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    heading = f"## patune {name}\n"
    assert heading in text
    section = text.split(heading, 1)[1].split("\n## ", 1)[0]
    shared = text.split("\n## ", 1)[0]
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert f"`{parameter.opts[0]}" in section or f"`{parameter.opts[0]}" in shared, (
                f"{name} {parameter.opts[0]}"
            )


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`patune {name}" not in text] == []


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version").output == f"patune {patune.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from patune.cli import main\n"
        "for words in (['-h'], ['sweep', '-h'], ['check', '-h'], ['verify', '-h'], ['space', '-h'], ['simulate', '-h'], ['models', '--json'], ['--version']):\n"
        "    main(words, standalone_mode=False)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "patune.cli" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_choices_are_the_tuners() -> None:
    from patune.tuner.sweep import SweepOptions

    key = Key(
        problem=Problem(block_size=16, head_dim=64, qg=1),
        workload=Workload(batch=1, kv_heads=1, context=16),
    )
    target = Target.named("gfx942")
    for sampler in SAMPLERS:
        assert SweepOptions(target=target, keys=(key,), sampler=sampler).sampler == sampler
    for robust in ROBUST:
        assert SweepOptions(target=target, keys=(key,), robust=robust).robust == robust
    for effort in EFFORTS:
        assert SweepOptions(target=target, keys=(key,), effort=effort).effort == effort
    assert SweepOptions(target=target, keys=(key,)).effort == DEFAULT_EFFORT
    assert SweepOptions(target=target, keys=(key,)).sampler == DEFAULT_SAMPLER
    with pytest.raises(InvalidValueError):
        SweepOptions(target=target, keys=(key,), sampler="pool")


def test_the_sets_of_knobs_are_the_tuners() -> None:
    from patune.tuner.check_cases import KNOB_SETS as OF_THE_TUNER

    assert KNOB_SETS == OF_THE_TUNER


def test_what_can_be_replayed_is_the_simulators() -> None:
    from patune.tuner.simulate import REPLAYED as OF_THE_TUNER

    assert REPLAYED == OF_THE_TUNER
