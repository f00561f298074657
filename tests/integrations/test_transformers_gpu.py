"""`paged|patune` on the GPU, with the Gluon kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import torch
import transformers_models as models

import patune
from patune.integrations.transformers import register

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("page", [16, 64, 256, 1024])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_tokens(name: str, page: int, dtype: torch.dtype) -> None:
    model, inputs = models.make_model(name, dtype=dtype, device="cuda"), models.prompts()
    mine = models.generate(model, register(), inputs, page=page)
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[dtype]
    if name != "gemma2":  # transformers' paged attentions drop its soft-cap
        theirs = "paged|eager" if name == "gpt_oss" else models.SDPA
        expected = models.generate(model, theirs, inputs, page=page)
        models.assert_same_up_to_ties(model, inputs, mine.tokens, expected.tokens)
    assert sum(patune.stats()["lookups"].values()) > 0


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("page", [16, 1024])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_decode_steps_in_cuda_graphs(name: str, page: int, asynchronous: bool) -> None:
    """Three requests in graphs of four: padding rows write nowhere."""
    model = models.make_model(name, device="cuda")
    inputs = models.prompts((5, 37, 130))
    mine = models.generate(
        model, register(), inputs, page=page, new_tokens=40,
        use_cuda_graph=(False, True), use_async_batching=asynchronous,
    )  # fmt: skip
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]


def test_inputs_that_are_cleared_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers clears the inputs of asynchronous batches on one stream and fills them on another: here the GPU is busy with something else meanwhile."""
    from transformers.generation.continuous_batching.input_outputs import HostDeviceIOPair

    real = HostDeviceIOPair.reset

    def late(self: HostDeviceIOPair) -> None:
        torch.cuda._sleep(400_000_000)  # cycles: 0.2 s
        real(self)

    monkeypatch.setattr(HostDeviceIOPair, "reset", late)
    model, inputs = models.make_model("llama", device="cuda"), models.prompts((5, 37, 130))
    mine = models.generate(
        model, register(), inputs, page=64, use_cuda_graph=(False, True), use_async_batching=True,
    )  # fmt: skip
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_all_steps_in_cuda_graphs(name: str) -> None:
    model, inputs = models.make_model(name, device="cuda"), models.prompts()
    mine = models.generate(model, register(), inputs, page=64, use_cuda_graph=(True, True))
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_defaults(name: str) -> None:
    """Nothing said about graphs: those of decode steps where there are block tables, none elsewhere."""
    model, inputs = models.make_model(name, device="cuda"), models.prompts()
    captured: list[object] = []
    real = torch.cuda.CUDAGraph.replay

    def counting(self: torch.cuda.CUDAGraph) -> None:
        captured.append(self)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", counting)
        mine = models.generate(
            model, register(), inputs, page=256, new_tokens=40,
            use_cuda_graph=None, use_async_batching=None,
        )  # fmt: skip
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]
    assert bool(captured) == (name == "llama")


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_asynchronous_steps_without_graphs(name: str) -> None:
    model, inputs = models.make_model(name, device="cuda"), models.prompts()
    mine = models.generate(
        model, register(), inputs, page=64, new_tokens=40, use_async_batching=True
    )
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_decode_steps_never_wait_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from patune.integrations import transformers_attention as attention

    real = attention.paged_attention
    decoded = 0

    def watched(*args: object, **kwargs: object) -> object:
        nonlocal decoded
        step = kwargs.get("max_length_q", kwargs.get("max_seqlen_q")) == 1
        decoded += step
        torch.cuda.set_sync_debug_mode("error" if step and decoded > 40 else "default")
        try:
            return real(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    from transformers import AttentionInterface

    name_of = register(block_tables=False)
    for key in ("patune", "paged|patune"):
        monkeypatch.setitem(AttentionInterface._global_mapping, key, watched)
    model = models.make_model(name, device="cuda")
    found = models.generate(model, name_of, models.prompts(), page=16)
    register()
    assert found.errors == []
    assert decoded >= 4 * (models.NEW_TOKENS - 1)
