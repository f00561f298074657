"""The backend's numbers, with SGLang's own batches, layers and pools, against a naive float32 attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_fakes import Server

from patune.integrations.sglang import create_backend

BF16 = {"atol": 1e-2, "rtol": 1e-2}  # results of order one, rounded to bf16: 2**-9 of them, twice
FP8 = {"atol": 0.15, "rtol": 0.05}  # keys and values rounded to 3 mantissa bits, 2**-4 of them each


def run(
    server: Server,
    backend: Any,
    mode: ForwardMode,
    new: dict[int, int],
    layer: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward through SGLang's own dispatch; (query, output)."""
    batch, q, k, v = server.batch(mode, new)
    backend.init_forward_metadata(batch)
    out = backend.forward(q, k, v, layer or server.layers[0], batch, **options)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    return q, out


def check(
    server: Server, steps: list[tuple[ForwardMode, dict[int, int]]], **tolerance: float
) -> None:
    backend = create_backend(server.runner)
    for mode, new in steps:
        q, out = run(server, backend, mode, new)
        torch.testing.assert_close(out.float(), server.expected(q, new), **(tolerance or BF16))


EXTEND, DECODE, MIXED = ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED
STEPS = [
    (EXTEND, {1: 37, 4: 1, 2: 90}),
    (DECODE, {4: 1, 1: 1, 2: 1}),  # another order than the prefill's
    (EXTEND, {3: 20, 1: 33}),  # one with a prefix, one without
    (MIXED, {2: 1, 5: 40, 4: 1}),
    (DECODE, {5: 1, 3: 1, 2: 1, 1: 1, 4: 1}),
]


@pytest.mark.parametrize("page_tokens", [16, 64])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (4, 4), (8, 1)])
def test_prefill_and_decode(page_tokens: int, q_heads: int, kv_heads: int) -> None:
    check(Server(page_tokens=page_tokens, q_heads=q_heads, kv_heads=kv_heads), STEPS)


def test_pages_of_1024_tokens() -> None:
    server = Server(page_tokens=1024, pages=5, q_heads=2, kv_heads=1)
    steps = [(EXTEND, {1: 1024, 2: 9}), (DECODE, {2: 1, 1: 1}), (EXTEND, {1: 5}), (DECODE, {1: 1})]
    check(server, steps)


def test_pages_are_out_of_order() -> None:
    server = Server(page_tokens=16)
    check(server, STEPS[:2])
    pages = server.requests_table.req_to_token[2, :91:16] // 16
    assert pages.diff().lt(0).any(), "the test's own pages are to be shuffled"


@pytest.mark.parametrize("head_dim", [128, 256])
def test_head_dims(head_dim: int) -> None:
    check(Server(page_tokens=32, head_dim=head_dim, q_heads=4), STEPS[:3])


def test_fp16() -> None:
    check(Server(page_tokens=16, dtype=torch.float16), STEPS)


def test_hnd_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    server = Server(page_tokens=16)
    assert server.pool.kv_cache_layout == "hnd"
    check(server, STEPS)


def _five_d(buffer: torch.Tensor, flat: torch.Tensor, page_tokens: int, *, key: bool) -> None:
    """What SGLang's kernel for the AITER layout writes: token by token, by the layout's definition."""
    run = buffer.shape[4]
    for slot, token in enumerate(flat):
        page, at = divmod(slot, page_tokens)
        if key:
            buffer[page, :, :, at] = token.unflatten(-1, (-1, run))
        else:
            buffer[page, :, at // run, :, at % run] = token


def test_vectorized_5d_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of SGLang on ROCm; its writer is a GPU kernel, so the test writes what it would."""
    monkeypatch.setattr(memory_pool, "_use_aiter", True)
    monkeypatch.setenv("SGLANG_AITER_KV_CACHE_LAYOUT", "vectorized_5d")
    server = Server(page_tokens=64, pages=8)
    assert server.pool.kv_cache_layout == "vectorized_5d"
    shape = server.pool.size + 64, server.kv_heads, server.head_dim
    flat = [torch.zeros(shape, dtype=server.dtype) for _ in range(2)]

    def write(layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor, *_: Any) -> None:
        for new, kept, buffers in zip(
            (k, v), flat, (server.pool.k_buffer, server.pool.v_buffer), strict=True
        ):
            kept[where.loc] = new
            _five_d(buffers[layer.layer_id], kept, 64, key=buffers is server.pool.k_buffer)

    monkeypatch.setattr(server.pool, "set_kv_buffer", write)
    check(server, STEPS)


@pytest.mark.parametrize("window", [1, 17, 64])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_sliding_window(page_tokens: int, window: int) -> None:
    """SGLang's sliding_window_size does not count the query token, a model's window does."""
    server = Server(page_tokens=page_tokens)
    layer = server.layer(sliding_window_size=window - 1) if window > 1 else server.layer()
    if window == 1:
        layer.sliding_window_size = 0  # its constructor takes 0 for no window
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        q, out = run(server, backend, mode, new, layer)
        expected = server.expected(q, new, window=window)
        torch.testing.assert_close(out.float(), expected, **BF16)


def test_hybrid_sliding_window_pool() -> None:
    """Full and windowed layers in two pools, each with slots of its own."""
    server = Server(page_tokens=16, window_layers=(1,))
    full, windowed = server.layer(0), server.layer(1, sliding_window_size=24)
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        batch, q, k, v = server.batch(mode, new)
        backend.init_forward_metadata(batch)
        for layer, window in ((full, 0), (windowed, 25)):
            out = backend.forward(q, k, v, layer, batch)
            expected = server.expected(q, new, window=window)
            torch.testing.assert_close(out.float(), expected, **BF16)
    with pytest.raises(AssertionError):  # the pools' contents differ slot by slot
        torch.testing.assert_close(server.pool.get_key_buffer(0), server.pool.get_key_buffer(1))


def test_tokens_that_left_the_window_have_no_slot() -> None:
    """SGLang frees the window pool's pages behind the window; their slots become -1 or are given to others."""
    server = Server(page_tokens=16, window_layers=(1,))
    layer = server.layer(1, sliding_window_size=24)
    backend = create_backend(server.runner)
    run(server, backend, EXTEND, {1: 100}, layer)
    gone = server.requests_table.req_to_token[1, :64].long()
    server.pool.full_to_swa_index_mapping[gone] = -1
    for mode, new in ((DECODE, {1: 1}), (EXTEND, {1: 7})):
        q, out = run(server, backend, mode, new, layer)
        expected = server.expected(q, new, window=25)
        torch.testing.assert_close(out.float(), expected, **BF16)
        if (
            mode is DECODE
        ):  # a kernel's tile may begin before the window: its pages have to be there
            assert backend.forward_metadata.window_tables.min() == 0


def test_sinks() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    sinks = torch.linspace(-2, 3, server.q_heads).to(torch.bfloat16)
    for mode, new in STEPS:
        q, out = run(server, backend, mode, new, sinks=sinks)
        torch.testing.assert_close(out.float(), server.expected(q, new, sinks=sinks), **BF16)


def test_logit_cap() -> None:
    server = Server(page_tokens=16)
    layer = server.layer(logit_cap=0.5)
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        q, out = run(server, backend, mode, new, layer)
        torch.testing.assert_close(out.float(), server.expected(q, new, softcap=0.5), **BF16)


@pytest.mark.parametrize("scales", [None, (0.5, 2.0)])
def test_fp8_cache(scales: tuple[float, float] | None) -> None:
    server = Server(page_tokens=16, kv_dtype=torch.float8_e4m3fn)
    layer = server.layer()
    if scales is not None:
        layer.k_scale, layer.v_scale = (
            torch.nn.Parameter(torch.tensor(s), requires_grad=False) for s in scales
        )
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        q, out = run(server, backend, mode, new, layer)
        torch.testing.assert_close(out.float(), server.expected(q, new), **FP8)
    stored = server.pool.get_key_buffer(0)[
        server.requests_table.req_to_token[1, :37].long()
    ].float()
    divided = server.history[1][0][:37] / (scales[0] if scales else 1)
    torch.testing.assert_close(stored, divided, atol=0.02, rtol=0.07)


def test_layer_without_keys_of_its_own() -> None:
    """A layer that shares another's cache hands over none, and writes none."""
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    for mode, new in STEPS:
        batch, q, k, v = server.batch(mode, new)
        backend.init_forward_metadata(batch)
        backend.forward(q, k, v, server.layers[0], batch)
        out = backend.forward(q, None, None, server.layers[0], batch, save_kv_cache=False)
        torch.testing.assert_close(out.float(), server.expected(q, new), **BF16)


def test_keys_are_not_written_when_told_so() -> None:
    server = Server(page_tokens=16)
    run(server, create_backend(server.runner), EXTEND, {1: 20}, save_kv_cache=False)
    assert server.pool.get_key_buffer(0).abs().max() == 0


def test_rows_past_the_batch_are_zero() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    batch, q, k, v = server.batch(EXTEND, {1: 20, 2: 3})
    backend.init_forward_metadata(batch)
    padded = torch.cat([q, torch.ones(5, q.shape[1], dtype=q.dtype)])
    out = backend.forward(padded, k, v, server.layers[0], batch)
    torch.testing.assert_close(out[:23].float(), server.expected(q, {1: 20, 2: 3}), **BF16)
    assert out[23:].abs().max() == 0


def test_idle_batch() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    batch, *_ = server.batch(DECODE, {1: 1})
    batch.forward_mode, batch.batch_size = ForwardMode.IDLE, 0
    batch.spec_info = (
        object()
    )  # an idle rank of data-parallel attention has one where the others speculate
    batch.out_cache_loc = batch.out_cache_loc[:0]
    batch.req_pool_indices, batch.seq_lens = batch.req_pool_indices[:0], batch.seq_lens[:0]
    backend.init_forward_metadata(batch)
    q = torch.zeros(0, server.q_heads * server.head_dim)
    assert backend.forward(q, None, None, server.layers[0], batch).shape == q.shape
