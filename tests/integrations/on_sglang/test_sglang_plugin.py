"""How SGLang finds the backend, in every kind of process, and that what it overrides is still what SGLang calls."""

from __future__ import annotations

import argparse
import inspect
import logging
import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import sglang_children
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.server_args import ServerArgs

from patune.integrations import announcement
from patune.integrations import sglang as integration
from patune.integrations.sglang_backend import PatuneAttnBackend

HERE = Path(__file__).parent
EXPECTED = {
    "choices": 1,
    "factory": "patune.integrations.sglang:create_backend",
    "cuda": False,
    "database": False,
}
OVERRIDDEN = (
    "init_forward_metadata",
    "init_cuda_graph_state",
    "init_forward_metadata_out_graph",
    "init_forward_metadata_in_graph",
    "get_cuda_graph_seq_len_fill_value",
    "forward_decode",
    "forward_extend",
)


def test_entry_point() -> None:
    found = [point for point in entry_points(group="sglang.srt.plugins") if point.name == "patune"]
    assert [point.value for point in found] == ["patune.integrations.sglang:register"]
    assert found[0].load() is integration.register


def test_registration_is_idempotent(caplog: pytest.LogCaptureFixture) -> None:
    announcement.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="patune"):
        for _ in range(3):
            integration.register()
    assert ATTENTION_BACKEND_CHOICES.count("patune") == 1
    assert ATTENTION_BACKENDS["patune"] is integration.create_backend
    assert [record.name for record in caplog.records] == ["patune"]
    assert "sglang 0." in caplog.text
    assert "--attention-backend patune" in caplog.text


def test_arguments_of_a_server() -> None:
    integration.register()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for option in (
        "--attention-backend",
        "--decode-attention-backend",
        "--prefill-attention-backend",
    ):
        parsed = parser.parse_args(["--model-path", "m", option, "patune", "--page-size", "64"])
        assert getattr(parsed, option.strip("-").replace("-", "_")) == "patune"
        assert parsed.page_size == 64


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes(method: str) -> None:
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=sglang_children.report, args=(answers,))
    child.start()
    assert answers.get() == EXPECTED
    child.join()
    assert child.exitcode == 0


def test_importing_the_integration_imports_no_engine() -> None:
    code = (
        "import sys, patune.integrations.sglang; "
        "print(sorted(m for m in ('torch', 'sglang', 'sqlalchemy', 'triton') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_backend_initialises_no_device() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import sglang_children; print(sglang_children.seen()); "
        "import os, torch, patune.integrations.sglang_backend; "
        "print(torch.cuda.is_initialized(), os.path.exists(os.environ['PATUNE_DB']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert done.stdout.splitlines()[-2:] == [str(EXPECTED), "False False"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_signatures(name: str) -> None:
    """Ours takes what the base class's takes, by position, name and default; more may follow if it has a default."""
    base = inspect.signature(getattr(AttentionBackend, name)).parameters
    ours = inspect.signature(getattr(PatuneAttnBackend, name)).parameters
    named = [p for p in base.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for theirs, mine in zip(named, ours.values(), strict=False):
        assert (mine.name, mine.default, mine.kind) == (theirs.name, theirs.default, theirs.kind)
    extra = [p for p in list(ours.values())[len(named) :] if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert all(p.default is not p.empty for p in extra)
    kinds = [{p.kind for p in each.values() if p.kind is p.VAR_KEYWORD} for each in (base, ours)]
    assert kinds[0] == kinds[1]


def test_every_override_is_checked() -> None:
    """What the class defines and the base class has is in the list above, so that a rename in SGLang shows."""
    public = {name for name in vars(PatuneAttnBackend) if not name.startswith("_")}
    attributes = {"needs_cpu_seq_lens"}
    assert public - attributes == set(OVERRIDDEN)
    assert all(hasattr(AttentionBackend, name) for name in public)
    assert isinstance(AttentionBackend.needs_cpu_seq_lens, bool)


def test_nothing_of_this_runs_on_a_device() -> None:
    assert not torch.cuda.is_initialized()
