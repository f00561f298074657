"""What an engine says about a layer becomes a problem, or a refusal with every reason and the alternative."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from patune.errors import UnsupportedProblemError
from patune.integrations.layers import AttentionLayer, target_of
from patune.problem import Problem
from patune.target import Target

LAYER = AttentionLayer(
    where="layer 3 (SomeAttention)", alternative="--backend other", block_size=64, head_dim=128, q_heads=32, kv_heads=8,
    dtype=torch.bfloat16,
)  # fmt: skip


def test_a_plain_layer() -> None:
    assert LAYER.problem() == Problem(block_size=64, head_dim=128, qg=4, kv_layout="nhd")
    assert LAYER.problem(Target.named("sm_90")) == LAYER.problem()


def test_everything_that_a_layer_can_ask_for() -> None:
    layer = replace(
        LAYER, block_size=1024, value_head_dim=128, query_length=3, dtype=torch.float16, kv_dtype=torch.float8_e4m3fn,
        kv_quant="per_tensor", kv_layout="hnd", windowed=True, sinks=True, softcap=True,
    )  # fmt: skip
    assert layer.problem() == Problem(
        block_size=1024, head_dim=128, qg=4, query_length=3, query_dtype="fp16", kv_dtype="fp8_e4m3fn",
        kv_quant="per_tensor", kv_layout="hnd", windowed=True, sinks=True, softcap=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 48}, "block_size=48, allowed: 16, 32, 64, 128, 256, 512, 1024"),
        ({"head_dim": 96}, "head_dim=96, allowed: 64, 128, 256"),
        ({"value_head_dim": 64}, "values of head_dim=64 beside keys of head_dim=128 (MLA"),
        ({"dtype": torch.float32}, "torch.float32 activations, allowed: torch.bfloat16 or torch.float16"),
        ({"dtype": torch.float8_e4m3fn}, "torch.float8_e4m3fn activations"),
        ({"kv_dtype": torch.int8}, "a cache of torch.int8, allowed: "),
        ({"q_heads": 30}, "30 query heads over 8 KV heads, allowed: a multiple"),
        ({"q_heads": 65, "kv_heads": 1}, "65 query heads per KV head, allowed: at most 64"),
        ({"query_length": 17}, "query_length=17"),
        ({"query_length": 16, "q_heads": 64}, "128 query rows per KV head"),
        ({"others": ("it has ALiBi slopes",)}, "it has ALiBi slopes"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedProblemError) as caught:
        replace(LAYER, **changes).problem()
    message = str(caught.value)
    assert message.startswith("patune does not serve layer 3 (SomeAttention): ")
    assert reason in message
    assert message.endswith(". Use --backend other instead.")


def test_a_refusal_has_every_reason() -> None:
    with pytest.raises(
        UnsupportedProblemError, match=r"it is odd; block_size=1, .*; head_dim=80, "
    ):
        replace(LAYER, block_size=1, head_dim=80, others=("it is odd",)).problem()


def test_a_device_that_does_not_compute_it() -> None:
    fp8 = replace(LAYER, kv_dtype=torch.float8_e4m3fn, kv_quant="per_tensor")
    assert fp8.problem(Target.named("gfx950")).kv_dtype == "fp8_e4m3fn"
    with pytest.raises(UnsupportedProblemError, match=r"gfx942 has fp8_e4m3fnuz only.* Use --back"):
        fp8.problem(Target.named("gfx942"))


def test_devices() -> None:
    assert target_of(torch.device("cpu"), alternative="--backend other") is None
    with pytest.raises(
        UnsupportedProblemError, match=r"device='meta' has no kernels.* Use --backend"
    ):
        target_of(torch.device("meta"), alternative="--backend other")
