"""Other libraries' decode kernels on the data of a row, when they are installed: torch SDPA on contiguous K and V, FlashInfer on pages.

A peer is planned outside of the timing, as serving engines do once per step. Peers are timed on HND caches, which all of them read.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from patune.tuner.rotation import KEY_SCALE, VALUE_SCALE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from patune.kernels.inputs import DecodeInputs
    from patune.problem import Problem

FLASHINFER_WORKSPACE_B = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer that is ready to run.

    Attributes:
        steps: one call per set of K and V.
        run_once: the first set's output [batch * query_length, q_heads, head_dim].
        reference_inputs: what that output is of, for the oracle.
    """

    steps: list[Callable[[], None]]
    run_once: Callable[[], torch.Tensor]
    reference_inputs: DecodeInputs


def make_peer(name: str, problem: Problem, sets: Sequence[DecodeInputs]) -> Peer:
    """A peer over the sets of a row."""
    if name == "flashinfer_fa2":
        return _flashinfer(problem, sets)
    return _sdpa(name, problem, sets)


def _sdpa(name: str, problem: Problem, sets: Sequence[DecodeInputs]) -> Peer:
    """The pages of a set, read as contiguous K and V [batch, kv_heads, context, head_dim] of the same size."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    }[name]
    first = sets[0]
    batch, kv_heads, dim = first.batch, first.kv_heads, problem.head_dim
    context = first.block_tables.shape[1] * problem.block_size
    query = first.query.view(batch, -1, 1, dim)

    def attend(inputs: DecodeInputs) -> torch.Tensor:
        key, value = (
            cache.view(batch, kv_heads, context, dim)
            for cache in (inputs.key_cache, inputs.value_cache)
        )
        with sdpa_kernel([backend]):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, scale=inputs.softmax_scale, enable_gqa=True
            )

    def step(inputs: DecodeInputs) -> None:
        attend(inputs)

    contiguous = dataclasses.replace(
        first,
        key_cache=first.key_cache.view(batch, kv_heads, context, dim),
        value_cache=first.value_cache.view(batch, kv_heads, context, dim),
        block_tables=torch.arange(batch, dtype=torch.int32, device=query.device).view(batch, 1),
    )
    return Peer(
        steps=[functools.partial(step, inputs) for inputs in sets],
        run_once=lambda: attend(first).view(first.query.shape),
        reference_inputs=contiguous,
    )


def _flashinfer(problem: Problem, sets: Sequence[DecodeInputs]) -> Peer:
    """FlashInfer's paged decode on tensor cores (FA2), planned once."""
    import flashinfer  # type: ignore[import-not-found]

    first = sets[0]
    device, page = first.query.device, problem.block_size
    lengths = first.context_lengths.tolist()
    pages = [math.ceil(length / page) for length in lengths]
    starts = [sum(pages[:i]) for i in range(len(pages) + 1)]
    indices = torch.cat([row[:n] for row, n in zip(first.block_tables, pages, strict=True)])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(FLASHINFER_WORKSPACE_B, dtype=torch.uint8, device=device),
        "HND",
        use_tensor_cores=True,
        backend="fa2",
    )
    several = {"q_len_per_req": problem.query_length} if problem.query_length > 1 else {}
    wrapper.plan(
        torch.tensor(starts, dtype=torch.int32),
        indices,
        torch.tensor(
            [length - (n - 1) * page for length, n in zip(lengths, pages, strict=True)],
            dtype=torch.int32,
        ),
        first.query.shape[1],
        first.kv_heads,
        problem.head_dim,
        page,
        window_left=first.sliding_window - 1 if first.sliding_window else -1,
        q_data_type=first.query.dtype,
        kv_data_type=first.key_cache.dtype,
        sm_scale=first.softmax_scale,
        **several,
    )
    scales: dict[str, Any] = {}
    if problem.kv_quant == "per_tensor":
        scales = {"k_scale": KEY_SCALE, "v_scale": VALUE_SCALE}
    out = torch.empty_like(first.query)

    def step(inputs: DecodeInputs) -> None:
        wrapper.run(inputs.query, (inputs.key_cache, inputs.value_cache), out=out, **scales)

    def run_once() -> torch.Tensor:
        out.fill_(math.nan)
        step(first)
        return out

    return Peer(
        steps=[functools.partial(step, inputs) for inputs in sets],
        run_once=run_once,
        reference_inputs=first,
    )


PACKAGES = {"sdpa_cudnn": "torch", "sdpa_flash": "torch", "flashinfer_fa2": "flashinfer-python"}
PEERS = tuple(PACKAGES)


def version_of(peer: str) -> str | None:
    """The version of the package that a peer comes in, or None where it is not installed."""
    try:
        return importlib.metadata.version(PACKAGES[peer])
    except importlib.metadata.PackageNotFoundError:
        return None


def refusal(peer: str, problem: Problem, lengths: Sequence[int]) -> str | None:
    """Why a peer is not run on a problem, or None."""
    if (peer_version := version_of(peer)) is None:
        return f"{PACKAGES[peer]} is not installed"
    assert peer_version
    if problem.kv_layout != "hnd":
        return "peers are timed on hnd caches"
    if problem.fp8_math:
        return "computes in 16 bits: see the class without fp8 products"
    if peer.startswith("sdpa"):
        whole = len(set(lengths)) == 1 and lengths[0] % problem.block_size == 0
        if problem.query_length > 1 or problem.windowed or problem.kv_itemsize == 1 or not whole:
            return "contiguous 16-bit K and V of one length, one query token and no window only"
    return None
