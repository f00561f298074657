"""Workspaces of calls that bring none: one per thread, device and stream, that grows."""

from __future__ import annotations

import threading

import torch


class _Own(threading.local):
    """By (device, stream). A thread has its own: two threads on one stream could put a decode between the other's decode and reduce."""

    def __init__(self) -> None:
        self.by_stream: dict[tuple[int, int], torch.Tensor] = {}


_own = _Own()


def own_workspace(elements: int, device: torch.device) -> torch.Tensor:
    """Scratch memory for at least ``elements`` float32 values, the same for every call that follows on this thread and stream.

    A graph keeps the addresses that it was captured with, so a capture gets one from the graph's own pool.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if _is_capturing(index):
        return torch.empty(elements, dtype=torch.float32, device=device)
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    workspace = _own.by_stream.get(key)
    if workspace is None or workspace.numel() < elements:
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        _own.by_stream[key] = workspace
    return workspace


def _is_capturing(index: int) -> bool:
    """Whether the current stream of a CUDA device records a graph."""
    if torch._C._cuda_getDevice() == index:
        return torch._C._cuda_isCurrentStreamCapturing()
    with torch.cuda.device(index):
        return torch._C._cuda_isCurrentStreamCapturing()
