"""The plugin: found by its entry point, registered once or many times, in every kind of process, with nothing opened."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1.attention.backend", reason="vLLM is not installed")

from vllm.v1.attention import backend as interface
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from patune.integrations import vllm as plugin
from patune.integrations.vllm_backend import PatuneBackend
from patune.integrations.vllm_impl import PatuneImpl
from patune.integrations.vllm_metadata import PatuneMetadataBuilder

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"

# Registers twice, in a process where a GPU, a database or a socket would raise; then in a forked and in a spawned child.
PROCESSES = """
import multiprocessing, pickle, sqlite3, sys
import torch
def opened(*_, **__): raise AssertionError("opened")
sqlite3.connect = torch.cuda._lazy_init = opened
import patune.integrations.vllm as plugin
assert "vllm" not in sys.modules and "sqlalchemy" not in sys.modules, "import is not lazy"
plugin.register(); plugin.register()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert not torch.cuda.is_initialized() and "sqlalchemy" not in sys.modules
assert "patune.integrations.vllm_backend" not in sys.modules, "the backend was imported"

def child(pickled):
    sqlite3.connect = torch.cuda._lazy_init = opened
    from patune.integrations.vllm import register
    register()
    member = pickle.loads(pickled)
    assert member.get_class().get_name() == "CUSTOM"
    member.get_class().get_impl_cls(), member.get_class().get_builder_cls()
    assert not torch.cuda.is_initialized()

if __name__ == "__main__":
    pickled = pickle.dumps(AttentionBackendEnum.CUSTOM)
    assert pickle.loads(pickled) is AttentionBackendEnum.CUSTOM
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=child, args=(pickled,))
        process.start()
        process.join()
        print(method, process.exitcode)
"""


def test_the_entry_point_is_declared_and_resolves() -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    value = declared["vllm.general_plugins"]["patune"]
    entry = EntryPoint(name="patune", value=value, group="vllm.general_plugins")
    assert entry.load() is plugin.register


def test_registration_in_processes(tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["fork 0", "spawn 0"], done.stderr
    assert done.returncode == 0


def test_registering_again_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "patune"):
        plugin.register()
        plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is PatuneBackend
    assert AttentionBackendEnum[PatuneBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_another_plugins_backend_is_replaced_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    register_backend(AttentionBackendEnum.CUSTOM, "other.Backend")
    with caplog.at_level(logging.WARNING, "patune"):
        plugin.register()
    assert "other.Backend" in caplog.text
    assert "VLLM_PLUGINS" in caplog.text
    assert AttentionBackendEnum.CUSTOM.get_class() is PatuneBackend


def overridden() -> list[tuple[type, type, str]]:
    pairs = (
        (PatuneBackend, interface.AttentionBackend),
        (PatuneMetadataBuilder, interface.AttentionMetadataBuilder),
        (PatuneImpl, interface.AttentionImpl),
    )
    return [
        (ours, base, name)
        for ours, base in pairs
        for name, member in vars(ours).items()
        if hasattr(base, name) and inspect.isroutine(inspect.unwrap(getattr(ours, name)))
        if name != "__new__" and callable(getattr(ours, name)) and member is not None
    ]


@pytest.mark.parametrize(
    ("ours", "base", "name"), overridden(), ids=lambda value: getattr(value, "__name__", value)
)
def test_overridden_signatures_are_vllms(ours: type, base: type, name: str) -> None:
    """Names, kinds and defaults, in order; ours may take more at the end."""
    kept = [
        (p.name, p.kind, p.default)
        for p in inspect.signature(getattr(base, name)).parameters.values()
    ]
    mine = [
        (p.name, p.kind, p.default)
        for p in inspect.signature(getattr(ours, name)).parameters.values()
    ]
    assert mine[: len(kept)] == kept


def test_what_is_overridden() -> None:
    """Everything abstract, and these: a method that vLLM renames would otherwise never be called."""
    names = {(ours.__name__, name) for ours, _, name in overridden()}
    for cls in (PatuneBackend, PatuneMetadataBuilder, PatuneImpl):
        assert not inspect.isabstract(cls)
    assert {
        ("PatuneBackend", "supports_combination"),
        ("PatuneBackend", "supports_sink"),
        ("PatuneBackend", "supports_sliding_window"),
        ("PatuneBackend", "supports_compute_capability"),
        ("PatuneBackend", "supports_device_cpu_query_lens_mismatch"),
        ("PatuneBackend", "get_supported_kernel_block_sizes"),
        ("PatuneBackend", "get_supported_head_sizes"),
        ("PatuneMetadataBuilder", "get_cudagraph_support"),
        ("PatuneMetadataBuilder", "build"),
        ("PatuneImpl", "forward"),
    } <= names


def test_the_write_that_vllm_calls_by_name() -> None:
    """It is in no base class: vLLM's caller hands over these, in this order."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    theirs = inspect.signature(TritonAttentionImpl.do_kv_cache_update).parameters
    assert list(inspect.signature(PatuneImpl.do_kv_cache_update).parameters) == list(theirs)
    assert PatuneBackend.forward_includes_kv_cache_update is False
