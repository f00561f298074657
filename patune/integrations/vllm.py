"""vLLM: the plugin that makes ``vllm serve MODEL --attention-backend CUSTOM`` run patune's kernels.

vLLM calls :func:`register` in every process (command line, engine core, workers), some of them forked, maybe more than once. What subclasses vLLM's
classes is in :mod:`patune.integrations.vllm_backend` and beside it, which vLLM imports where the backend is chosen.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from patune.integrations.announcement import announce

LOGGER = logging.getLogger("patune")
BACKEND = "patune.integrations.vllm_backend.PatuneBackend"


def register() -> None:
    """Make patune vLLM's attention backend ``CUSTOM``: the entry point of ``vllm.general_plugins``.

    A name of its own would be an enum member that processes without the plugin cannot unpickle, and that cannot be registered twice.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        LOGGER.warning(
            "patune replaces %s as vLLM's attention backend CUSTOM, of which there is one. VLLM_PLUGINS chooses which plugins are loaded.",
            custom.get_path(),
        )
    register_backend(custom, BACKEND)
    announce(f"vLLM {version('vllm')}, --attention-backend CUSTOM")
