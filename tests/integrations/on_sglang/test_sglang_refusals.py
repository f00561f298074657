"""What the backend does not compute: each is refused with its reason and what to use instead, most when the server starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel
from sglang_fakes import Server
from test_sglang_graph import verify_input

from patune.errors import UnsupportedProblemError
from patune.integrations.sglang import create_backend
from patune.problem import BLOCK_SIZES

ALTERNATIVE = "--attention-backend triton"


def refusal(server: Server) -> str:
    with pytest.raises(UnsupportedProblemError) as caught:
        create_backend(server.runner)
    assert ALTERNATIVE in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("page_tokens", [1, 8, 48, 2048])
def test_page_sizes(page_tokens: int) -> None:
    message = refusal(Server(page_tokens=page_tokens, pages=4))
    assert f"page_size={page_tokens}" in message
    assert "--page-size 64" in message
    assert ("SGLang's default" in message) == (page_tokens == 1)


@pytest.mark.parametrize("page_tokens", BLOCK_SIZES)
def test_page_sizes_that_are_served(page_tokens: int) -> None:
    assert (
        create_backend(Server(page_tokens=page_tokens, pages=2).runner).tables.page_tokens
        == page_tokens
    )


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("use_mla_backend", True, "MLA"),
        ("is_draft_worker", True, "--speculative-draft-attention-backend triton"),
        ("device", "xpu", "the device is xpu"),
    ],
)
def test_runners(field: str, value: object, reason: str) -> None:
    server = Server(page_tokens=16)
    setattr(server.runner, field, value)
    assert reason in refusal(server)


def test_encoder_decoder() -> None:
    server = Server(page_tokens=16)
    server.runner.model_config.is_encoder_decoder = True
    assert "an encoder and a decoder" in refusal(server)


def test_virtual_slots() -> None:
    server = Server(page_tokens=16)
    server.runner.kv_index_translator.is_translating = True
    assert "virtual slots" in refusal(server)


def test_context_parallelism() -> None:
    server = Server(page_tokens=16)
    with get_parallel().override(dcp_enabled=True, attn_dcp_size=2):
        assert "context parallelism" in refusal(server)


def test_other_pools() -> None:
    server = Server(page_tokens=16)
    server.runner.token_to_kv_pool = MLATokenToKVPool(
        size=64, page_size=16, dtype=torch.bfloat16, kv_lora_rank=512, qk_rope_head_dim=64,
        layer_num=1, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    assert "MLATokenToKVPool" in refusal(server)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "decoder_bidirectional"),
        ({"use_irope": True}, "iRoPE"),
        ({"head_dim": 80}, "head_dim=80"),
        ({"v_head_dim": 128}, "values of head_dim=128"),
        ({"num_heads": 9}, "9 query heads over 2 KV heads"),
        ({"num_heads": 130}, "65 query heads per KV head"),
        ({"logit_cap": 30.0, "logit_capping_method": "rcp"}, "capped by rcp"),
        ({"pos_encoding_mode": "ALIBI"}, "ALIBI"),
    ],
)
def test_layers(options: dict[str, Any], reason: str) -> None:
    server = Server(page_tokens=16)
    server.runner.model = torch.nn.ModuleList([server.layer(), server.layer(1, **options)])
    message = refusal(server)
    assert reason in message
    assert "layer 1 (RadixAttention)" in message


def test_temperature_by_position() -> None:
    server = Server(page_tokens=16)
    server.layers[0].xai_temperature_len = 1024
    assert "temperature" in refusal(server)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_cache_types(dtype: torch.dtype) -> None:
    assert str(dtype) in refusal(Server(page_tokens=16, kv_dtype=dtype))


def test_activation_types() -> None:
    assert "torch.float32" in refusal(Server(page_tokens=16, dtype=torch.float32))


def test_layers_that_the_model_did_not_show() -> None:
    """A layer is checked when it first runs, if it was not there when the server started."""
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    batch, q, k, v = server.batch(ForwardMode.DECODE, {1: 1})
    backend.init_forward_metadata(batch)
    with pytest.raises(UnsupportedProblemError, match="iRoPE"):
        backend.forward(q, k, v, server.layer(use_irope=True), batch)


@pytest.mark.parametrize(
    "mode", [ForwardMode.DRAFT_EXTEND_V2, ForwardMode.DLLM_EXTEND, ForwardMode.PREBUILT]
)
def test_modes(mode: ForwardMode) -> None:
    server = Server(page_tokens=16)
    batch, *_ = server.batch(ForwardMode.EXTEND, {1: 3})
    batch.forward_mode = mode
    with pytest.raises(UnsupportedProblemError, match=mode.name):
        create_backend(server.runner).init_forward_metadata(batch)


def _metadata_error(server: Server, tokens: int, spec: Any, mode: ForwardMode) -> str:
    batch, *_ = server.batch(mode, {1: tokens}, spec)
    with pytest.raises(UnsupportedProblemError) as caught:
        create_backend(server.runner).init_forward_metadata(batch)
    assert ALTERNATIVE in str(caught.value)
    return str(caught.value)


def test_speculation() -> None:
    server = Server(page_tokens=16)
    verify, decode = ForwardMode.TARGET_VERIFY, ForwardMode.DECODE
    assert "a tree" in _metadata_error(server, 4, verify_input(4, topk=2), verify)
    ragged = verify_input(4)
    ragged.ragged_verify_layout = object()
    assert "different numbers" in _metadata_error(server, 4, ragged, verify)
    assert "a draft model" in _metadata_error(server, 1, verify_input(2), decode)


def test_too_many_draft_tokens() -> None:
    server = Server(page_tokens=16, q_heads=16, kv_heads=1)
    backend = create_backend(server.runner)
    batch, q, k, v = server.batch(ForwardMode.TARGET_VERIFY, {1: 8}, verify_input(8))
    backend.init_forward_metadata(batch)
    with pytest.raises(UnsupportedProblemError, match="makes 128 query rows per KV head"):
        backend.forward(q, k, v, server.layers[0], batch)


def test_arguments_of_other_models() -> None:
    server = Server(page_tokens=16)
    backend = create_backend(server.runner)
    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE):
        batch, q, k, v = server.batch(mode, {1: 1})
        backend.init_forward_metadata(batch)
        with pytest.raises(UnsupportedProblemError, match="k_rope, return_lse"):
            backend.forward(
                q,
                k,
                v,
                server.layers[0],
                batch,
                return_lse=True,
                k_rope=torch.ones(3),
                q_rope=None,
                x=False,
            )
