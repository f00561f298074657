"""The backend on a GPU: patune's kernels under SGLang's own batches, layers and pools, against the naive float32 attention of the CPU tests."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sglang.kernels.ops.kvcache.kvcache import can_use_store_cache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_fakes import Server
from test_sglang_forward import BF16, STEPS
from test_sglang_graph import Graph, verify_input

from patune.integrations.sglang import create_backend
from patune.integrations.sglang_pages import keys_at

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
EXTEND, DECODE, VERIFY = ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.TARGET_VERIFY
ROW_CHANNELS = (
    256  # of a token's keys: few widths, as SGLang compiles its cache writer once for each
)
LAYOUTS = ("nhd", "hnd")
SCALES = (0.5, 2.0)  # of keys and values: powers of two, so that dividing by them rounds nothing

PAGES, HEAD_DIMS = (16, 64, 1024), (64, 128, 256)
DTYPES, GROUPS = (torch.bfloat16, torch.float16), (4, 8)
# every pair of values of two parameters is in some case
CASES = [
    (page, head_dim, layout, DTYPES[(p + d + (layout == "hnd")) % 2], GROUPS[(p + 2 * d) % 3 % 2 ^ (layout == "hnd")])
    for p, page in enumerate(PAGES)
    for d, head_dim in enumerate(HEAD_DIMS)
    for layout in LAYOUTS
]  # fmt: skip


def make_server(
    page_tokens: int = 16, *, head_dim: int = 128, group: int = 4, **options: Any
) -> Server:
    """A server whose layers have ``group`` query heads per KV head."""
    kv_heads = ROW_CHANNELS // head_dim
    return Server(
        page_tokens=page_tokens, head_dim=head_dim, kv_heads=kv_heads, q_heads=group * kv_heads,
        device=DEVICE, **options,
    )  # fmt: skip


def use_layout(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", str(int(layout == "hnd")))


def assert_right(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out.float().cpu(), expected, **BF16)


def run_steps(
    server: Server, layer: Any = None, *, steps: Any = STEPS, sinks: Any = None, **mask: Any
) -> None:
    """Forwards through SGLang's own dispatch, each one's result compared; ``mask`` says what ``layer`` does."""
    backend = create_backend(server.runner)
    given = {} if sinks is None else {"sinks": sinks}
    for mode, new in steps:
        batch, q, k, v = server.batch(mode, new)
        backend.init_forward_metadata(batch)
        out = backend.forward(q, k, v, layer or server.layers[0], batch, **given)
        assert out.dtype == q.dtype
        assert_right(out, server.expected(q, new, sinks=sinks, **mask))


def prefill(server: Server, backend: Any, layers: Any, new: dict[int, int]) -> None:
    batch, q, k, v = server.batch(EXTEND, new)
    backend.init_forward_metadata(batch)
    for layer in layers:
        backend.forward(q, k, v, layer, batch)


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("itemsize", [1, 2])
def test_cache_writer_is_the_compiled_one(itemsize: int) -> None:
    """Says which writer the other tests have: without this one SGLang's pools write by torch's indexing, which is as right."""
    if not can_use_store_cache(ROW_CHANNELS * itemsize):
        pytest.skip(
            "SGLang's cache writer did not compile here: its pools wrote by torch's indexing"
        )
    server = make_server(kv_dtype=torch.float8_e4m3fn if itemsize == 1 else None)
    batch, q, k, v = server.batch(EXTEND, {1: 20})
    backend = create_backend(server.runner)
    backend.init_forward_metadata(batch)
    backend.forward(q, k.clone(), v.clone(), server.layers[0], batch)
    stored = keys_at(server.pool.get_key_buffer(0), batch.out_cache_loc, 16).float()
    torch.testing.assert_close(stored, k.to(server.pool.dtype).float(), atol=0, rtol=0)


@pytest.mark.parametrize(("page_tokens", "head_dim", "layout", "dtype", "group"), CASES)
def test_prefill_and_decode(
    monkeypatch: pytest.MonkeyPatch, page_tokens: int, head_dim: int, layout: str, dtype: torch.dtype, group: int,
) -> None:  # fmt: skip
    """Prompts with and without a prefix, mixed batches and decode steps of sequences of different lengths."""
    use_layout(monkeypatch, layout)
    server = make_server(page_tokens, head_dim=head_dim, group=group, dtype=dtype)
    assert server.pool.kv_cache_layout == layout
    run_steps(server)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_tokens", PAGES)
def test_long_and_short_sequences(
    monkeypatch: pytest.MonkeyPatch, page_tokens: int, layout: str
) -> None:
    """Contexts that kernels split, of which two come to a new page in the second step."""
    use_layout(monkeypatch, layout)
    server = make_server(page_tokens, pages=5200 // page_tokens + 6, group=8)
    prefill(server, create_backend(server.runner), server.layers, {1: 2047, 2: 1023, 3: 5, 4: 1500})
    run_steps(server, steps=[(DECODE, {3: 1, 1: 1, 4: 1, 2: 1})] * 2)
    run_steps(server, steps=[(EXTEND, {5: 17, 1: 3}), (DECODE, {1: 1})])


@pytest.mark.parametrize("window", [17, 64])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_sliding_window(page_tokens: int, window: int) -> None:
    server = make_server(page_tokens)
    run_steps(server, server.layer(sliding_window_size=window - 1), window=window)


@pytest.mark.parametrize("page_tokens", [16, 64])
def test_hybrid_sliding_window_pool(page_tokens: int) -> None:
    """Full and windowed layers in two pools; what left the window of a long sequence has no slot any more."""
    server = make_server(page_tokens, window_layers=(1,), pages=60)
    layers = ((server.layer(0), 0), (server.layer(1, sliding_window_size=24), 25))
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        batch, q, k, v = server.batch(mode, new)
        backend.init_forward_metadata(batch)
        for layer, window in layers:
            assert_right(
                backend.forward(q, k, v, layer, batch), server.expected(q, new, window=window)
            )
    prefill(server, backend, [layer for layer, _ in layers], {6: 300})
    gone = server.requests_table.req_to_token[6, :256].long()
    server.pool.full_to_swa_index_mapping[gone] = -1
    run_steps(server, layers[1][0], steps=[(DECODE, {6: 1, 1: 1}), (EXTEND, {6: 7})], window=25)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(dtype: torch.dtype) -> None:
    server = make_server(64, head_dim=64, group=8, dtype=dtype)
    run_steps(server, sinks=torch.linspace(-2, 3, server.q_heads).to(dtype).to(DEVICE))


def test_logit_cap() -> None:
    server = make_server(64, head_dim=256)
    run_steps(server, server.layer(logit_cap=0.5), softcap=0.5)


def rounded_history(server: Server, scales: tuple[float, float]) -> None:
    """Make the naive attention read keys and values as the fp8 cache has them."""
    for request, tensors in server.history.items():
        server.history[request] = tuple(  # type: ignore[assignment]
            (tensor / scale).to(torch.float8_e4m3fn).float() * scale
            for tensor, scale in zip(tensors, scales, strict=True)
        )


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "layout"), [(16, 64, "nhd"), (64, 128, "hnd"), (1024, 256, "nhd")]
)
def test_fp8_cache(
    monkeypatch: pytest.MonkeyPatch, page_tokens: int, head_dim: int, layout: str, scales: tuple[float, float] | None,
) -> None:  # fmt: skip
    use_layout(monkeypatch, layout)
    server = make_server(page_tokens, head_dim=head_dim, kv_dtype=torch.float8_e4m3fn)
    layer = scaled_layer(server, scales)
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        batch, q, k, v = server.batch(mode, new)
        rounded_history(server, scales or (1, 1))
        backend.init_forward_metadata(batch)
        assert_right(backend.forward(q, k, v, layer, batch), server.expected(q, new))


def scaled_layer(server: Server, scales: tuple[float, float] | None) -> Any:
    layer = server.layer()
    if scales is not None:
        layer.k_scale, layer.v_scale = (
            torch.nn.Parameter(torch.tensor(s, device=DEVICE), requires_grad=False) for s in scales
        )
    return layer


@pytest.mark.parametrize("query_length", [2, 4])
@pytest.mark.parametrize("page_tokens", PAGES)
def test_verification_of_a_chain(page_tokens: int, query_length: int) -> None:
    server = make_server(page_tokens)
    backend = create_backend(server.runner)
    prefill(server, backend, server.layers, {1: 30, 2: 14, 3: 64})
    for _ in range(2):
        new = {2: query_length, 1: query_length, 3: query_length}
        batch, q, k, v = server.batch(VERIFY, new, verify_input(query_length))
        backend.init_forward_metadata(batch)
        assert_right(backend.forward(q, k, v, server.layers[0], batch), server.expected(q, new))


@pytest.mark.parametrize("mode", [DECODE, VERIFY, EXTEND])
@pytest.mark.parametrize("pool", ["nhd", "hnd", "hybrid", "fp8"])
def test_no_step_waits_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, pool: str, mode: ForwardMode
) -> None:
    """Metadata and forward; the first step of each shape compiles, the others run under torch's check of synchronisations."""
    use_layout(monkeypatch, pool)
    hybrid, fp8 = pool == "hybrid", pool == "fp8"
    server = make_server(
        pages=60, window_layers=(1,) if hybrid else (), kv_dtype=torch.float8_e4m3fn if fp8 else None,
    )  # fmt: skip
    layer = (
        server.layer(1, sliding_window_size=24)
        if hybrid
        else scaled_layer(server, SCALES if fp8 else None)
    )
    backend = create_backend(server.runner)
    prefill(server, backend, [layer], {1: 40, 2: 16, 3: 99})
    tokens = {DECODE: 1, VERIFY: 4, EXTEND: 9}[mode]
    spec = verify_input(tokens) if mode == VERIFY else None
    for step in range(3):
        new = {3: tokens, 1: tokens, 2: tokens}
        batch, q, k, v = server.batch(mode, new, spec)
        if fp8:
            rounded_history(server, SCALES)
        if step == 0:
            backend.init_forward_metadata(batch)
            out = backend.forward(q, k, v, layer, batch)
        else:
            with no_host_sync():
                backend.init_forward_metadata(batch)
                out = backend.forward(q, k, v, layer, batch)
        assert_right(out, server.expected(q, new, window=25 if hybrid else 0))


def test_the_check_of_synchronisations_sees_one() -> None:
    tensor = torch.ones(1, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        tensor.item()


class Captured(Graph):
    """A CUDA graph of a forward through some layers, as a runner of SGLang captures it."""

    def __init__(
        self, server: Server, backend: Any, rows: int, layers: Any, query_length: int = 1
    ) -> None:
        super().__init__(server, backend, rows, query_length)
        self.layers = layers
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outs = self.step()

    def step(self) -> list[torch.Tensor]:
        self.backend.init_forward_metadata_in_graph(self.batch)
        return [
            self.backend.forward(self.query, self.key.clone(), self.value.clone(), layer, self.batch)  # writers divide in place
            for layer in self.layers
        ]  # fmt: skip

    def results(self, new: dict[int, int], live: Any) -> list[torch.Tensor]:
        """One replay for this batch, the rest of the rows padded."""
        self.load(live)
        for out in self.outs:
            out.fill_(float("nan"))
        with no_host_sync():
            self.graph.replay()
        return [self.checked(out, len(new)) for out in self.outs]


REPLAYS = (
    (4, (2, 1, 3)),
    (8, (5, 4, 3, 2, 1)),
    (4, (5,)),
    (8, (1, 5, 2, 4, 3)),
    (4, (1, 5, 2, 4)),
)


@pytest.mark.parametrize("page_tokens", PAGES)
@pytest.mark.parametrize("pool", ["nhd", "hnd", "hybrid", "fp8"])
def test_cuda_graphs(monkeypatch: pytest.MonkeyPatch, pool: str, page_tokens: int) -> None:
    """Two captured batch sizes share buffers; other requests, lengths and numbers of padded rows with each replay."""
    use_layout(monkeypatch, pool)
    hybrid, fp8 = pool == "hybrid", pool == "fp8"
    server = make_server(
        page_tokens, pages=1800 // page_tokens + 8,
        window_layers=(1,) if hybrid else (), kv_dtype=torch.float8_e4m3fn if fp8 else None,
    )  # fmt: skip
    layers = [scaled_layer(server, SCALES if fp8 else None)]
    windows = [0]
    if hybrid:
        layers.append(server.layer(1, sliding_window_size=24))
        windows.append(25)
    backend = create_backend(server.runner)
    backend.init_cuda_graph_state(8, 8)
    graphs = {rows: Captured(server, backend, rows, layers) for rows in (8, 4)}
    prefill(server, backend, layers, {1: 40, 2: 16, 3: 1400, 4: 1, 5: 15})
    for rows, requests in REPLAYS:
        new = dict.fromkeys(requests, 1)
        live = server.batch(DECODE, new)
        if fp8:
            rounded_history(server, SCALES)
        outs = graphs[rows].results(new, live)
        for out, window in zip(outs, windows, strict=True):
            assert_right(out, server.expected(live[1], new, window=window))


@pytest.mark.parametrize("pool", ["nhd", "hybrid"])
@pytest.mark.parametrize("query_length", [2, 4])
def test_cuda_graph_of_verification(query_length: int, pool: str) -> None:
    hybrid = pool == "hybrid"
    server = make_server(window_layers=(1,) if hybrid else ())
    layer = server.layer(1, sliding_window_size=24) if hybrid else server.layers[0]
    backend = create_backend(server.runner)
    backend.init_cuda_graph_state(4, 4 * query_length)
    graph = Captured(server, backend, 4, [layer], query_length)
    prefill(server, backend, [layer], {1: 30, 2: 14, 3: 64})
    for requests in ((2, 1, 3), (3,), (1, 2)):
        new = dict.fromkeys(requests, query_length)
        live = server.batch(VERIFY, new, verify_input(query_length))
        (out,) = graph.results(new, live)
        assert_right(out, server.expected(live[1], new, window=25 if hybrid else 0))
