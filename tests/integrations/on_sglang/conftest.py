"""These tests run with the interpreter of scripts/install_sglang.sh; where SGLang is not installed there is nothing to collect."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

try:
    version("sglang")
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    import sgl_kernel_stub
    import torchvision_stub

    torchvision_stub.stand_in_where_missing()
    sgl_kernel_stub.stand_in_where_missing()

SINGLE_DEVICE = {"dcp_enabled": False, "attn_dcp_size": 1, "attn_cp_size": 1}


@pytest.fixture(autouse=True)
def _single_device(request: pytest.FixtureRequest) -> object:
    """What a server with one device publishes before it makes model runners."""
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(**SINGLE_DEVICE):
        yield
