"""Metadata, and what a CUDA graph would record and replay: the same buffers, filled in place by operations that read nothing on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from sglang_fakes import PADDING_ROW, Server
from torch.utils._python_dispatch import TorchDispatchMode

from patune.errors import InvalidValueError
from patune.integrations.sglang import create_backend

BF16 = {"atol": 1e-2, "rtol": 1e-2}
EXTEND, DECODE, VERIFY = ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.TARGET_VERIFY
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")


class NoHostReads(TorchDispatchMode):
    """Refuses the operations that make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS, func
        return func(*args, **(kwargs or {}))


def verify_input(tokens: int, topk: int = 1) -> EagleVerifyInput:
    """A chain of draft tokens."""
    nothing = torch.zeros(0)
    return EagleVerifyInput(
        draft_token=nothing,
        custom_mask=None,
        positions=nothing,
        retrieve_index=nothing,
        retrieve_next_token=nothing,
        retrieve_next_sibling=nothing,
        retrieve_cum_len=nothing,
        spec_steps=tokens - 1,
        topk=topk,
        draft_token_num=tokens,
        capture_hidden_mode=None,
        seq_lens_sum=0,
        seq_lens_cpu=nothing,
    )


class Graph:
    """A runner's static inputs for one batch size, and a forward on them as a graph would replay it."""

    def __init__(self, server: Server, backend: Any, rows: int, query_length: int = 1) -> None:
        self.server, self.backend, self.rows, self.query_length = (
            server,
            backend,
            rows,
            query_length,
        )
        spec = verify_input(query_length) if query_length > 1 else None
        tokens = rows * query_length
        self.batch = ForwardBatch(
            forward_mode=VERIFY if spec else DECODE,
            batch_size=rows,
            input_ids=server.integers([0] * tokens),
            req_pool_indices=server.integers([PADDING_ROW] * rows),
            seq_lens=server.integers([backend.get_cuda_graph_seq_len_fill_value()] * rows),
            out_cache_loc=server.integers([0] * tokens),
            seq_lens_sum=rows,
            positions=server.integers([0] * tokens),
            spec_info=spec,
        )
        like = {"dtype": server.dtype, "device": server.device}
        self.query = torch.zeros(tokens, server.q_heads * server.head_dim, **like)
        self.key = torch.zeros(tokens, server.kv_heads, server.head_dim, **like)
        self.value = self.key.clone()
        with NoHostReads():
            backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
            backend.init_forward_metadata_in_graph(self.batch)
        self.metadata = backend.forward_metadata

    def replay(self, new: dict[int, int], live: Any, layer: Any) -> torch.Tensor:
        """Copy a batch into the static inputs, the rest padded, and run what was recorded."""
        self.load(live)
        self.backend.init_forward_metadata_in_graph(self.batch)  # recorded, so the graph repeats it
        out = self.backend.forward(self.query, self.key, self.value, layer, self.batch)
        return self.checked(out, len(new))

    def load(self, live: Any) -> None:
        """What a runner does on the host before a replay."""
        batch, q, k, v = live
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        for static, values, padding in (
            (self.batch.req_pool_indices, batch.req_pool_indices, PADDING_ROW),
            (self.batch.seq_lens, batch.seq_lens, fill),
            (self.batch.out_cache_loc, batch.out_cache_loc, 0),
            (self.query, q, 7.0),
            (self.key, k, 7.0),
            (self.value, v, 7.0),
        ):
            static.fill_(padding)
            static[: len(values)] = values
        with NoHostReads():
            self.backend.init_forward_metadata_out_graph(self.batch)
        assert self.backend.forward_metadata is self.metadata

    def checked(self, out: torch.Tensor, real: int) -> torch.Tensor:
        """The real rows' results; the padding is harmless and has the lengths that it should have."""
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        drafts = self.query_length if self.batch.spec_info else 0
        assert set(self.metadata.lengths[real:].tolist()) <= {fill + drafts}
        assert torch.isfinite(out).all()
        return out[: real * self.query_length]


@pytest.mark.parametrize("hybrid", [False, True])
def test_replays_of_padded_batches(*, hybrid: bool) -> None:
    server = Server(page_tokens=16, window_layers=(1,) if hybrid else ())
    layers = [(server.layer(0), 0)] + (
        [(server.layer(1, sliding_window_size=24), 25)] if hybrid else []
    )
    backend = create_backend(server.runner)
    backend.init_cuda_graph_state(8, 8)
    graphs = {
        rows: Graph(server, backend, rows) for rows in (8, 4)
    }  # SGLang captures the largest first
    pointers = {rows: graph.metadata.tables.data_ptr() for rows, graph in graphs.items()}
    prefill = {1: 40, 2: 16, 3: 99, 4: 1, 5: 15}
    batch, q, k, v = server.batch(EXTEND, prefill)
    backend.init_forward_metadata(batch)
    for layer, _ in layers:
        backend.forward(q, k, v, layer, batch)
    for rows, new in (
        (4, {2: 1, 1: 1, 3: 1}),
        (8, {5: 1, 4: 1, 3: 1, 2: 1, 1: 1}),
        (4, {5: 1}),
        (4, {1: 1, 5: 1, 2: 1, 4: 1}),
    ):
        live = server.batch(DECODE, new)
        for layer, window in layers:
            out = graphs[rows].replay(new, live, layer)
            expected = server.expected(live[1], new, window=window)
            torch.testing.assert_close(out.float(), expected, **BF16)
        assert graphs[rows].metadata.tables.data_ptr() == pointers[rows]


@pytest.mark.parametrize("query_length", [2, 4])
@pytest.mark.parametrize("hybrid", [False, True])
def test_verification_of_a_chain(*, query_length: int, hybrid: bool) -> None:
    """Draft tokens are written, and each sees its predecessors; eager and as a graph."""
    server = Server(page_tokens=16, window_layers=(1,) if hybrid else ())
    layer = server.layer(1, sliding_window_size=24) if hybrid else server.layers[0]
    window = 25 if hybrid else 0
    backend = create_backend(server.runner)
    backend.init_cuda_graph_state(4, 4 * query_length)
    graph = Graph(server, backend, 4, query_length)
    batch, q, k, v = server.batch(EXTEND, {1: 30, 2: 14, 3: 64})
    backend.init_forward_metadata(batch)
    backend.forward(q, k, v, layer, batch)
    new = {2: query_length, 1: query_length, 3: query_length}
    live = server.batch(VERIFY, new, verify_input(query_length))
    backend.init_forward_metadata(live[0])
    out = backend.forward(*live[1:], layer, live[0])
    torch.testing.assert_close(out.float(), server.expected(live[1], new, window=window), **BF16)
    live = server.batch(VERIFY, new, verify_input(query_length))
    out = graph.replay(new, live, layer)
    torch.testing.assert_close(out.float(), server.expected(live[1], new, window=window), **BF16)


def test_metadata_of_decode() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    server.batch(EXTEND, {1: 31, 2: 32})
    batch, *_ = server.batch(DECODE, {2: 1, 1: 1})
    with NoHostReads():
        backend.init_forward_metadata(batch)
    metadata = backend.forward_metadata
    table = server.requests_table.req_to_token
    assert metadata.lengths.tolist() == [33, 32]
    assert metadata.tables.dtype == metadata.lengths.dtype == torch.int32
    assert metadata.tables.shape == (2, server.context // 16)
    assert metadata.tables[0, :3].tolist() == [int(table[2, at]) // 16 for at in (0, 16, 32)]
    assert metadata.tables[1, :2].tolist() == [int(table[1, at]) // 16 for at in (0, 16)]
    assert metadata.window_tables is None


def test_metadata_of_prefill() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    server.batch(EXTEND, {1: 5})
    batch, *_ = server.batch(EXTEND, {2: 3, 1: 4})
    with NoHostReads():
        backend.init_forward_metadata(batch)
    metadata = backend.forward_metadata
    table = server.requests_table.req_to_token
    assert metadata.cu_query.tolist() == [0, 3, 7]
    assert metadata.cu_key.tolist() == [0, 3, 12]
    assert (metadata.max_query, metadata.max_key, metadata.tokens) == (4, 9, 7)
    assert metadata.slots.tolist() == [*table[2, :3].tolist(), *table[1, :9].tolist()]
    assert metadata.has_prefix


def test_decode_needs_no_lengths_on_the_host() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    assert backend.needs_cpu_seq_lens is False
    batch, *_ = server.batch(DECODE, {1: 1})
    batch.seq_lens_cpu = batch.seq_lens_sum = None
    backend.init_forward_metadata(batch)
    assert backend.forward_metadata.lengths.tolist() == [1]


def test_no_graph_of_prefill() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    backend.init_cuda_graph_state(4, 4)
    batch, *_ = server.batch(EXTEND, {1: 3})
    with pytest.raises(InvalidValueError, match="--disable-prefill-cuda-graph"):
        backend.init_forward_metadata_out_graph(batch, in_capture=True)


def test_capture_before_its_buffers() -> None:
    server = Server(page_tokens=16)
    batch, *_ = server.batch(DECODE, {1: 1})
    with pytest.raises(InvalidValueError, match="init_cuda_graph_state"):
        create_backend(server.runner).init_forward_metadata_out_graph(batch, in_capture=True)
