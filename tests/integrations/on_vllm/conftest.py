"""Runs where vLLM's interfaces are importable: scripts/install_vllm.sh makes such an environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """What vLLM sets while it builds a model in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)
