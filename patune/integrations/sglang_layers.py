"""What of SGLang's models, pools and server arguments patune serves: each refusal names its reason and what to use instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from patune.errors import UnsupportedProblemError
from patune.integrations.layers import AttentionLayer
from patune.integrations.sglang_pages import layout_of
from patune.problem import BLOCK_SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.target import Target

    ModelRunner = Any
    RadixAttention = Any

ALTERNATIVE = "--attention-backend triton"
PAGE_REMEDY = "--page-size 64"


def check_runner(runner: ModelRunner, target: Target | None) -> None:
    """Refuse a model runner that patune would not serve.

    Raises:
        UnsupportedProblemError: every reason found, and what to use instead.
    """
    if reasons := [*_runner_reasons(runner, target)]:
        raise UnsupportedProblemError(
            f"patune does not serve this model runner: {'; '.join(reasons)}. Else use {ALTERNATIVE} instead."
        )


def check_layer(
    layer: RadixAttention,
    runner: ModelRunner,
    target: Target | None,
    *,
    sinks: bool = False,
    query_length: int = 1,
) -> None:
    """Refuse a layer that patune would compute wrongly or not at all.

    Raises:
        UnsupportedProblemError: every reason found, and what to use instead.
    """
    keys = runner.token_to_kv_pool.get_key_buffer(layer.layer_id)
    fp8 = keys.element_size() == 1
    AttentionLayer(
        where=f"layer {layer.layer_id} (RadixAttention)",
        alternative=ALTERNATIVE,
        block_size=runner.page_size,
        head_dim=layer.qk_head_dim,
        value_head_dim=layer.v_head_dim,
        q_heads=layer.tp_q_head_num,
        kv_heads=layer.tp_k_head_num,
        query_length=query_length,
        dtype=runner.dtype,
        kv_dtype=keys.dtype,
        kv_quant="per_tensor" if fp8 else "none",
        kv_layout=layout_of(keys, runner.page_size),
        windowed=window_tokens(layer) > 0,
        sinks=sinks,
        softcap=layer.logit_cap > 0,
        others=tuple(_layer_reasons(layer)),
    ).problem(target)


def window_tokens(layer: RadixAttention) -> int:
    """Tokens that a query token sees, itself included; 0 is all. SGLang does not count the query token, and -1 is no window."""
    size = layer.sliding_window_size
    return 0 if size is None or size < 0 else int(size) + 1


def check_mode(batch: Any) -> None:
    """Refuse a forward of which patune does not know the mask.

    Raises:
        UnsupportedProblemError: the reason, and what to use instead.
    """
    mode, spec = batch.forward_mode, batch.spec_info
    if mode.is_target_verify():
        reason = _verify_reason(spec)
    elif mode.is_decode():
        reason = "it is a step of a draft model" if spec is not None else None
    elif mode.is_idle():
        reason = None
    elif mode.is_draft_extend_v2() or mode.is_dllm_extend() or not mode.is_extend():
        reason = "only prefill, decode and verification of a chain are served"
    else:
        reason = None
    if reason is not None:
        raise UnsupportedProblemError(
            f"patune does not serve a forward of mode {mode.name}: {reason}. Use {ALTERNATIVE} instead."
        )


def check_arguments(given: dict[str, object]) -> None:
    """Refuse arguments of a model that patune's backend does not know.

    Raises:
        UnsupportedProblemError: their names, and what to use instead.
    """
    if names := sorted(n for n, value in given.items() if value is not None and value is not False):
        raise UnsupportedProblemError(
            f"patune does not serve attention with {', '.join(names)}. Use {ALTERNATIVE} instead."
        )


def _verify_reason(spec: Any) -> str | None:
    if getattr(spec, "topk", None) != 1:
        return "its draft tokens are a tree, allowed: a chain (--speculative-eagle-topk 1)"
    if spec.ragged_verify_layout is not None:
        return "its sequences have different numbers of draft tokens"
    return None


def _runner_reasons(runner: ModelRunner, target: Target | None) -> Iterator[str]:
    from sglang.srt.runtime_context import get_parallel

    if runner.page_size not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        default = " (SGLang's default)" if runner.page_size == 1 else ""
        yield (
            f"page_size={runner.page_size}{default}, allowed: {allowed}; "
            f"start the server with {PAGE_REMEDY}"
        )
    if runner.use_mla_backend:
        yield "the model has MLA attention"
    if runner.is_draft_worker:
        yield "it is a draft model's; give it --speculative-draft-attention-backend triton"
    if runner.model_config.is_encoder_decoder:
        yield "the model is an encoder and a decoder"
    if runner.kv_index_translator is not None and runner.kv_index_translator.is_translating:
        yield "its unified KV pool has virtual slots"
    parallel = get_parallel()
    if parallel.dcp_enabled or parallel.attn_cp_size > 1:
        yield "attention is split along the context (context parallelism)"
    if torch.device(runner.device).type not in ("cuda", "cpu"):
        yield f"the device is {runner.device}"
    elif target is None and torch.device(runner.device).type == "cuda":
        yield "no kernel family of patune serves this GPU; `patune doctor` says which are served"
    yield from _pool_reasons(runner.token_to_kv_pool)


def _pool_reasons(pool: Any) -> Iterator[str]:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pools = (pool.full_kv_pool, pool.swa_kv_pool) if type(pool) is SWAKVPool else (pool,)
    for one in pools:
        if type(one) is not MHATokenToKVPool:  # a subclass stores something else
            yield f"its KV pool is a {type(one).__name__}, allowed: MHATokenToKVPool"
        elif one.is_quantized_kv_cache:
            yield "its KV cache is quantised to blocks (FP4)"
        elif one.kv_cache_layout not in ("nhd", "hnd", "vectorized_5d"):
            yield f"its KV pool has the layout {one.kv_cache_layout!r}"


def _layer_reasons(layer: RadixAttention) -> Iterator[str]:
    from sglang.srt.layers.radix_attention import AttentionType

    if layer.is_cross_attention:
        yield "it is cross attention"
    if layer.attn_type != AttentionType.DECODER:
        yield f"its attention is of type {layer.attn_type.value}, allowed: decoder (causal)"
    if layer.use_irope:
        yield "it attends within chunks (iRoPE)"
    if layer.xai_temperature_len is not None and layer.xai_temperature_len > 0:
        yield "its scores have a temperature by position"
    if layer.pos_encoding_mode != "NONE":
        yield f"its scores have the position encoding {layer.pos_encoding_mode}"
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        yield f"its scores are capped by {layer.logit_capping_method}, allowed: tanh"
    if layer.tp_v_head_num != layer.tp_k_head_num:
        yield f"{layer.tp_v_head_num} value heads beside {layer.tp_k_head_num} key heads"
