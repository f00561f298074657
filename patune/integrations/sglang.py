"""SGLang: ``--attention-backend patune``, offered to SGLang by the entry point ``sglang.srt.plugins``.

SGLang calls :func:`register` once in every process, before it parses its arguments. The backend itself is in
:mod:`patune.integrations.sglang_backend`, which is imported only when a model runner asks for it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from patune.integrations.announcement import announce

if TYPE_CHECKING:
    from typing import Any

    from patune.integrations.sglang_backend import PatuneAttnBackend

    ModelRunner = Any

NAME = "patune"


def register() -> None:
    """Make ``patune`` an attention backend of the SGLang that runs in this process; any number of calls is one.

    It opens no database and initialises no device.
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(NAME)(create_backend)
    if NAME not in choices.ATTENTION_BACKEND_CHOICES:  # a list: adding twice would show it twice
        choices.add_attention_backend_choices([NAME])
    announce(f"sglang {_version()}, --attention-backend {NAME} --page-size 64")


def create_backend(runner: ModelRunner) -> PatuneAttnBackend:
    """The backend of one model runner.

    Raises:
        UnsupportedProblemError: it would not serve this model or these server arguments; the message has the reasons and what to use.
    """
    from patune.integrations.sglang_backend import PatuneAttnBackend

    return PatuneAttnBackend(runner)


def _version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:  # run from a source tree
        return "of unknown version"
