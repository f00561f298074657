"""What a layer computes, against attention written out per token and head."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", reason="vLLM is not installed")

from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm_steps import FP8, POISON, Shape, Step, allocate

from patune.errors import UnsupportedProblemError
from patune.integrations import vllm_impl, vllm_metadata

BF16 = {"rtol": 8e-3, "atol": 4e-3}  # one rounding of the output is 4e-3 of it at most
FP8_PREFILL = {"rtol": 2e-2, "atol": 1e-2}  # and one of every key and value
DECODE = [(20, 1), (63, 1), (130, 1)]
PREFILL = [(0, 17), (0, 40)]
CHUNK = [(48, 9), (33, 20)]


def check(step: Step, **tolerance: float) -> None:
    output, _ = step.run()
    torch.testing.assert_close(
        output[: step.tokens].float(), step.expected(), **(tolerance or BF16)
    )


@pytest.mark.parametrize("sequences", [DECODE, PREFILL, CHUNK, DECODE + CHUNK + PREFILL])
@pytest.mark.parametrize("page", [16, 64, 1024])
def test_decode_prefill_chunks_and_mixed_batches(
    sequences: list[tuple[int, int]], page: int
) -> None:
    check(Step(Shape(page=page), sequences))


def test_contexts_of_several_large_pages() -> None:
    check(Step(Shape(page=1024, q_heads=2, kv_heads=1), [(2047, 1), (1024, 1), (2040, 30)]))


@pytest.mark.parametrize("layout", [layout.name for layout in KVCacheLayout])
def test_every_physical_layout(layout: str) -> None:
    shape = Shape(layout=layout, q_heads=6, kv_heads=3)
    check(Step(shape, DECODE + CHUNK + PREFILL))


@pytest.mark.parametrize("speculated", [1, 3])
def test_verification_batches_go_to_the_kernels(
    speculated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_impl, "varlen_attention", None)
    step = Step(Shape(speculated=speculated), [(20, speculated + 1), (63, speculated + 1)])
    assert step.metadata().query_length == speculated + 1
    check(step)


def test_verification_with_fewer_drafts_and_a_prefill() -> None:
    step = Step(Shape(speculated=3), [(20, 4), (63, 4), (31, 2), (50, 4), (0, 30)])
    assert step.metadata().decodes == 2
    check(step)


@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize("sequences", [DECODE, DECODE + CHUNK + PREFILL])
def test_sliding_windows(window: int, sequences: list[tuple[int, int]]) -> None:
    check(Step(Shape(window=window), sequences))


@pytest.mark.parametrize(
    "options", [{"sinks": True}, {"softcap": 2.0}, {"sinks": True, "window": 20}]
)
def test_sinks_and_softcap(options: dict[str, object]) -> None:
    check(Step(Shape(**options), DECODE + CHUNK))


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(8, 8, 64), (8, 1, 128), (16, 2, 256)]
)
def test_head_groups_and_head_dims(q_heads: int, kv_heads: int, head_dim: int) -> None:
    shape = Shape(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float16)
    check(Step(shape, [(20, 1), (40, 5)]))


@pytest.mark.parametrize("cache", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("layout", ["LBNHC", "BLHNC"])
def test_fp8_caches(cache: str, layout: str) -> None:
    shape = Shape(cache=cache, layout=layout)
    check(Step(shape, DECODE))
    check(Step(shape, DECODE + CHUNK), **FP8_PREFILL)


def test_fp8_values_past_the_largest_saturate() -> None:
    step = Step(Shape(cache="fp8"), [(5, 1)])
    step.keys[0][2], step.values[0][2] = 1e4, -1e4
    cache = allocate(step.shape, step.pages)
    step.fill(cache)
    page, place = divmod(int(step.slots[0][2]), 16)
    stored = cache.view(FP8)[page, 0, place].float()
    assert stored.unique().tolist() == [-448.0, 448.0]


@pytest.mark.parametrize("new", [1, 3])
def test_a_batch_padded_for_a_graph(new: int) -> None:
    """Rows of padded sequences are zero; tokens past the batch are not written."""
    shape = Shape(speculated=new - 1)
    step = Step(shape, [(20, new), (63, new)], padded_sequences=2, padded_tokens=4 * new)
    assert step.metadata().decodes == 4
    output, _ = step.run()
    torch.testing.assert_close(output[: 2 * new].float(), step.expected(), **BF16)
    assert output[2 * new :].abs().max() == 0


def test_tokens_padded_past_the_batch_are_not_written() -> None:
    step = Step(Shape(), [*DECODE, (9, 12)], padded_tokens=24)
    output, _ = step.run()
    torch.testing.assert_close(output[: step.tokens].float(), step.expected(), **BF16)
    assert output[step.tokens :].unique().tolist() == [7.0]


def test_lengths_that_the_cpu_only_bounds() -> None:
    check(Step(Shape(), DECODE + CHUNK, optimism=20))


def test_lengths_that_the_cpu_does_not_know() -> None:
    step = Step(Shape(), DECODE + CHUNK)
    step.common.seq_lens_cpu_upper_bound = None
    check(step)


def test_a_prefill_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_metadata, "GATHERED_TOKENS", 64)
    step = Step(Shape(), [(20, 1), (48, 9), (0, 8), (0, 20), (100, 3), (0, 4)])
    assert len(step.metadata().pieces) == 4
    check(step)


@pytest.mark.parametrize("layout", [layout.name for layout in KVCacheLayout])
def test_the_write_fills_the_slots_and_nothing_else(layout: str) -> None:
    """Keys lie before values, and a slot of -1 is nobody's: neither the last page's nor the null block's."""
    step = Step(Shape(layout=layout), [(20, 1), (7, 5)], padded_tokens=9)
    cache = allocate(step.shape, step.pages)
    step.fill(cache)
    by_slot = cache.transpose(1, 2).flatten(0, 1)
    for key, value, slots in zip(step.keys, step.values, step.slots, strict=True):
        assert by_slot[slots, :, :64].equal(key)
        assert by_slot[slots, :, 64:].equal(value)
    unused = torch.ones(len(by_slot), dtype=torch.bool)
    unused[torch.cat(step.slots)] = False
    assert by_slot[unused].view(torch.uint8).unique().tolist() == [POISON]


def test_a_layer_that_shares_another_layers_cache() -> None:
    """vLLM does not call the write for it, and hands it the other's cache."""
    step = Step(Shape(), DECODE + CHUNK)
    cache = allocate(step.shape, step.pages)
    step.fill(cache)
    before = cache.view(torch.uint8).clone()
    shared = step.shape.impl(kv_sharing_target_layer_name="layers.0.attn")
    output = torch.empty_like(step.query)
    shared.forward(step.layer, step.query, None, None, cache, step.metadata(), output)
    torch.testing.assert_close(output.float(), step.expected(), **BF16)
    assert cache.view(torch.uint8).equal(before)


def test_the_profiling_run_reserves_what_a_prefill_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: shapes.append(tuple(a[0])) or empty(*a, **k)
    )
    shape = Shape()
    output = torch.full((5, 4, 64), 7.0)
    query = torch.zeros(5, 4, 64)
    nothing = torch.tensor([])
    result = shape.impl().forward(None, query, query, query, nothing, None, output)
    assert result is output
    assert output.abs().max() == 0
    assert (2, 65536, 2, 64) in shapes


def test_a_write_before_there_is_a_cache_does_nothing() -> None:
    new = torch.zeros(1, 2, 64)
    Shape().impl().do_kv_cache_update(None, new, new, torch.tensor([]), torch.tensor([3]))


@pytest.mark.parametrize("scale", ["output_scale", "output_block_scale"])
def test_quantised_output_is_refused(scale: str) -> None:
    step = Step(Shape(), DECODE)
    with pytest.raises(UnsupportedProblemError, match=r"quantised output.*TRITON_ATTN"):
        step.impl.forward(
            step.layer, step.query, None, None, None, None, step.query, **{scale: torch.ones(1)}
        )
