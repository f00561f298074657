"""Workspaces of calls that bring none: what they are shared by, and what a graph capture changes."""

from __future__ import annotations

import threading

import pytest
import torch
from without_gpu import Cuda

from patune.kernels import workspace as module
from patune.kernels.workspace import own_workspace

ELEMENTS = 64
CPU = torch.device("cpu", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    machine = Cuda()
    machine.install(monkeypatch)
    return machine


def test_the_own_workspace_grows_and_never_shrinks(cuda: Cuda) -> None:
    first = own_workspace(ELEMENTS, CPU)
    assert (first.shape, first.dtype) == ((ELEMENTS,), torch.float32)
    assert own_workspace(ELEMENTS - 8, CPU) is first
    larger = own_workspace(2 * ELEMENTS, CPU)
    assert larger.numel() == 2 * ELEMENTS
    assert own_workspace(ELEMENTS, CPU) is larger


def test_the_own_workspace_belongs_to_a_device_a_stream_and_a_thread(cuda: Cuda) -> None:
    found = {"main": own_workspace(ELEMENTS, CPU)}
    cuda.stream = 5
    found["stream"] = own_workspace(ELEMENTS, CPU)
    cuda.stream = 0
    found["device"] = own_workspace(ELEMENTS, torch.device("cpu", 1))
    thread = threading.Thread(target=lambda: found.update(thread=own_workspace(ELEMENTS, CPU)))
    thread.start()
    thread.join()
    assert len({workspace.data_ptr() for workspace in found.values()}) == 4
    assert own_workspace(ELEMENTS, CPU) is found["main"]


def test_a_device_without_a_number_is_the_current_one(cuda: Cuda) -> None:
    cuda.device = 1
    assert own_workspace(ELEMENTS, torch.device("cpu")) is own_workspace(
        ELEMENTS, torch.device("cpu", 1)
    )


def test_a_capture_gets_a_workspace_of_its_own_each_time(cuda: Cuda) -> None:
    shared = own_workspace(ELEMENTS, CPU)
    cuda.capturing = True
    captured = [own_workspace(ELEMENTS, CPU) for _ in range(2)]
    assert len({w.data_ptr() for w in (shared, *captured)}) == 3
    cuda.capturing = False
    assert own_workspace(ELEMENTS, CPU) is shared


def test_the_capture_of_the_tensors_device_counts(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: cuda.device == 1)
    assert not module._is_capturing(0)
    assert module._is_capturing(1)
    assert cuda.device == 0
