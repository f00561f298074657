"""What other processes of an SGLang server do: load the plugins and say what they see. Importable by spawned processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import sgl_kernel_stub
import torchvision_stub

if TYPE_CHECKING:
    from multiprocessing.queues import Queue


def seen() -> dict[str, object]:
    """Load SGLang's plugins twice, as servers may; what the process has then."""
    torchvision_stub.stand_in_where_missing()
    sgl_kernel_stub.stand_in_where_missing()
    import torch
    from sglang.srt import plugins
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    plugins.load_plugins()
    plugins._plugins_loaded = False
    plugins.load_plugins()
    factory = ATTENTION_BACKENDS["patune"]
    return {
        "choices": ATTENTION_BACKEND_CHOICES.count("patune"),
        "factory": f"{factory.__module__}:{factory.__name__}",
        "cuda": torch.cuda.is_initialized(),
        "database": os.path.exists(os.environ["PATUNE_DB"]),  # noqa: PTH110
    }


def report(answers: Queue[dict[str, object]]) -> None:
    """:func:`seen`, for a child process."""
    answers.put(seen())
