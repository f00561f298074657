"""What the backend says it supports, and what it says of the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", reason="vLLM is not installed")

from dataclasses import replace

from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.utils import select_common_block_size
from vllm_steps import LAYERS, Shape

from patune.errors import UnsupportedProblemError
from patune.integrations.vllm_backend import PatuneBackend
from patune.integrations.vllm_metadata import PatuneMetadataBuilder

HOPPER = DeviceCapability(9, 0)


def reasons(**asked: Any) -> list[str]:
    arguments = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 1024,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": HOPPER,
        "attn_type": "decoder",
    }
    return PatuneBackend.validate_configuration(**(arguments | asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"block_size": None},
        {"block_size": 16},
        {"block_size": 48},
        {"head_size": 64},
        {"head_size": 256, "dtype": torch.float16},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": "bfloat16"},
        {"has_sink": True, "has_sliding_window": True},
    ],
)
def test_what_is_supported(asked: dict[str, Any]) -> None:
    assert reasons(**asked) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"head_size": 80}, "head_size=80, allowed: 64, 128, 256"),
        ({"dtype": torch.float32}, "torch.float32 activations, allowed: torch.bfloat16 or"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype=fp8_e5m2, allowed: auto, bfloat16"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "kv_cache_dtype=fp8_per_token_head"),
        ({"kv_cache_dtype": "float16"}, "a float16 cache with torch.bfloat16 activations"),
        ({"block_size": 40}, "block_size=40, allowed: 16, 32, 64, 128, 256, 512, 1024"),
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse attention"),
        ({"use_mm_prefix": True}, "a prefix that is attended both ways"),
        ({"device_capability": DeviceCapability(10, 0)}, "compute capability 10.0, allowed: 9.0"),
        ({"device_capability": DeviceCapability(8, 0)}, "compute capability 8.0, allowed: 9.0"),
    ],
)
def test_what_is_refused_names_reason_and_alternative(asked: dict[str, Any], said: str) -> None:
    last = reasons(**asked)[-1]
    assert said in last
    assert last.endswith("Use --attention-backend FLASH_ATTN or TRITON_ATTN instead")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attn_type": "encoder"}, "attention type encoder not supported"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_rswa": True}, "R-SWA not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ],
)
def test_what_vllm_itself_refuses_for_us(asked: dict[str, Any], said: str) -> None:
    assert any(said in reason for reason in reasons(**asked))


def test_rocm_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_rocm", lambda _: True)
    supported = [
        minor for minor in range(6)
        if not reasons(device_capability=DeviceCapability(9, minor))
    ]  # fmt: skip
    assert supported == [4, 5]


@pytest.mark.parametrize(
    ("manager", "kernel"), [(16, 16), (1024, 1024), (2048, 1024), (48, 16), (96, 32)]
)
def test_pages_are_as_large_as_asked_for_and_divided_where_not(manager: int, kernel: int) -> None:
    assert select_common_block_size(manager, [PatuneBackend]) == kernel


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"alibi_slopes": [0.5] * 4}, "it has ALiBi slopes"),
        ({"attn_type": "encoder_only"}, "attn_type='encoder_only', allowed: 'decoder'"),
        ({"head_size": 96}, "head_dim=96, allowed: 64, 128, 256"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2', allowed: auto"),
        ({"kv_cache_dtype": "float16"}, "a float16 cache with torch.bfloat16 activations"),
        ({"num_heads": 130, "num_kv_heads": 1}, "130 query heads per KV head, allowed: at most 64"),
        ({"num_heads": 5}, "5 query heads over 2 KV heads"),
        ({"chunk_lookback": 7}, "chunk_lookback=7, which patune does not know"),
        ({"use_alibi_sqrt": True}, "use_alibi_sqrt=True"),
    ],
)
def test_layers_that_are_refused_when_they_are_made(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedProblemError) as refused:
        Shape().impl(**asked)
    assert said in str(refused.value)
    assert "Use --attention-backend FLASH_ATTN or TRITON_ATTN instead." in str(refused.value)


def test_a_block_size_that_has_no_kernel_page_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match="block_size=40, allowed: 16, 32"):
        Shape(page=40).impl()
    assert Shape(page=48).impl().num_kv_heads == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"head_size_v": 128}, "values of head_dim=128 beside keys of head_dim=64"),
        ({"state_content_bytes": 300}, "pages packed by another backend"),
    ],
)
def test_caches_that_are_refused_when_batches_are_set_up(
    changed: dict[str, Any], said: str
) -> None:
    shape = Shape()
    with pytest.raises(UnsupportedProblemError, match=said):
        PatuneMetadataBuilder(
            replace(shape.spec, **changed), LAYERS, shape.config(), torch.device("cpu")
        )


@pytest.mark.parametrize(
    ("speculated", "q_heads", "support", "threshold"),
    [
        (0, 4, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, 1),
        (1, 4, AttentionCGSupport.UNIFORM_BATCH, 2),
        (15, 4, AttentionCGSupport.UNIFORM_BATCH, 16),
        (16, 4, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, 1),
        (3, 32, AttentionCGSupport.UNIFORM_BATCH, 4),
        (4, 32, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, 1),
    ],
)
def test_graphs_cover_what_the_kernels_compute(
    speculated: int, q_heads: int, support: AttentionCGSupport, threshold: int
) -> None:
    """At most 16 query tokens, and 64 rows per KV head."""
    shape = Shape(speculated=speculated, q_heads=q_heads)
    assert PatuneMetadataBuilder.get_cudagraph_support(shape.config(), shape.spec) == support
    assert shape.builder().reorder_batch_threshold == threshold


def test_query_heads_are_the_layers_own_where_there_are_layers() -> None:
    """The model's count is wrong where layers differ: 130 heads of a layer over 1 are refused, 4 of the model's would pass."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Layer(AttentionLayerBase):
        impl = SimpleNamespace(num_heads=130)

        def get_attn_backend(self) -> Any: ...
        def get_kv_cache_spec(self, vllm_config: Any) -> Any: ...

    shape = Shape(kv_heads=1)
    config = shape.config()
    config.compilation_config.static_forward_context = {name: Layer() for name in LAYERS}
    with pytest.raises(UnsupportedProblemError, match="130 query heads per KV head"):
        PatuneMetadataBuilder(shape.spec, LAYERS, config, torch.device("cpu"))
