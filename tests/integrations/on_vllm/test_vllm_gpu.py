"""The backend on the GPU: decode by the Gluon kernels, writes by vLLM's Triton kernel, nothing that waits, and decode steps in CUDA graphs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", reason="vLLM is not installed")

from vllm.config import AttentionConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm_steps import FP8, LAYERS, POISON, Shape, Step, allocate

from patune.integrations import vllm_impl
from patune.integrations.vllm import register
from patune.integrations.vllm_backend import PatuneBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

# of a row: its RMS error over its RMS, its largest error over its largest value. Rounding probabilities and the output is all that shows.
ROWS = {torch.bfloat16: (0.01, 0.03), torch.float16: (0.003, 0.01)}
LAYOUTS = [layout.name for layout in KVCacheLayout]
DECODE = [(20, 1), (63, 1), (130, 1), (1, 1), (1500, 1)]
PREFILL = [(0, 17), (0, 40)]
CHUNK = [(48, 9), (33, 20), (1100, 30)]
MIXED = DECODE + CHUNK + PREFILL
ON_GPU = Shape(q_heads=8, kv_heads=2, head_dim=128, device="cuda")


def assert_rows_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    rms, peak = ROWS[found.dtype]
    off = found.cpu().float() - expected
    assert bool(off.isfinite().all())
    assert float((off.norm(dim=-1) / expected.norm(dim=-1)).max()) < rms
    assert float((off.abs().amax(-1) / expected.abs().amax(-1)).max()) < peak


def check(shape: Shape, sequences: list[tuple[int, int]], **padding: int) -> None:
    step = Step(shape, sequences, **padding)
    output, _ = step.run()
    assert_rows_close(output[: step.tokens], step.expected())


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_impl, "varlen_attention", None)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_vllm_sees_the_gpu() -> None:
    """What the other tests take from vLLM's platform is the device's, not a stand-in's."""
    assert current_platform.is_cuda()
    assert current_platform.get_device_capability() == DeviceCapability(9, 0)
    assert current_platform.fp8_dtype() == FP8


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("page", [16, 64, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_of_every_layout(layout: str, page: int) -> None:
    check(replace(ON_GPU, layout=layout, page=page), DECODE)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_decode_of_head_groups_and_head_dims(group: int, head_dim: int, dtype: torch.dtype) -> None:
    check(replace(ON_GPU, q_heads=2 * group, head_dim=head_dim, dtype=dtype), DECODE)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("page", [16, 1024])
def test_decode_of_a_batch_as_served(page: int) -> None:
    draw = torch.Generator().manual_seed(1)
    computed = torch.randint(0, 3000, (32,), generator=draw).tolist()
    check(replace(ON_GPU, q_heads=16, page=page), [(count, 1) for count in computed])


@pytest.mark.parametrize("page", [16, 64, 1024])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("sequences", [PREFILL, CHUNK, MIXED], ids=["prefill", "prefix", "mixed"])
def test_prefill_chunks_and_mixed_batches(
    sequences: list[tuple[int, int]], layout: str, page: int
) -> None:
    check(replace(ON_GPU, layout=layout, page=page), sequences)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("page", [16, 1024])
def test_verification_batches(page: int, group: int) -> None:
    shape = replace(ON_GPU, q_heads=2 * group, page=page, speculated=2)
    step = Step(shape, [(20, 3), (63, 3), (1500, 3)])
    assert step.metadata().query_length == 3
    check(shape, step.sequences)


def test_verification_with_fewer_drafts_and_a_prefill() -> None:
    check(replace(ON_GPU, speculated=2), [(20, 3), (63, 3), (31, 2), (50, 3), (0, 30)])


@pytest.mark.parametrize("window", [1, 33, 512])
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_sliding_windows(sequences: list[tuple[int, int]], window: int) -> None:
    check(replace(ON_GPU, window=window), sequences)


@pytest.mark.parametrize(
    "options",
    [{"sinks": True}, {"softcap": 2.0}, {"sinks": True, "window": 128}],
    ids=["sinks", "softcap", "windowed_sinks"],
)
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_sinks_and_softcap(sequences: list[tuple[int, int]], options: dict[str, Any]) -> None:
    check(replace(ON_GPU, **options), sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("page", [16, 1024])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLHNC"])
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_fp8_caches(
    sequences: list[tuple[int, int]], layout: str, page: int, dtype: torch.dtype
) -> None:
    """Keys are scaled by 0.5 and values by 0.25."""
    check(replace(ON_GPU, cache="fp8", layout=layout, page=page, dtype=dtype), sequences)


@pytest.mark.parametrize("page", [16, 1024])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_write_fills_the_slots_and_nothing_else(layout: str, cache: str, page: int) -> None:
    """By vLLM's kernel: keys lie before values, and a slot of -1 is nobody's."""
    shape = replace(ON_GPU, layout=layout, cache=cache, page=page)
    step = Step(shape, [(20, 1), (7, 5)], padded_tokens=9)
    written = allocate(shape, step.pages)
    step.fill(written)
    stored = written.cpu()
    if cache == "fp8":
        stored = stored.view(torch.uint8).view(FP8).float()
    by_slot = stored.transpose(1, 2).flatten(0, 1)
    factors = {"_k_scale": 0.5, "_v_scale": 0.25} if cache == "fp8" else {}
    for key, value, slots in zip(step.keys, step.values, step.slots, strict=True):
        for new, scale, at in ((key, "_k_scale", 0), (value, "_v_scale", 128)):
            there = by_slot[slots, :, at : at + 128].float() * factors.get(scale, 1.0)
            assert there.equal(step._stored(new, scale))
    unused = torch.ones(len(by_slot), dtype=torch.bool)
    unused[torch.cat(step.slots)] = False
    raw = written.cpu().transpose(1, 2).flatten(0, 1)[unused]
    assert raw.view(torch.uint8).unique().tolist() == [POISON]


def test_fp8_values_past_the_largest_saturate() -> None:
    step = Step(replace(ON_GPU, cache="fp8"), [(5, 1)])
    step.keys[0][2], step.values[0][2] = 1e4, -1e4
    cache = allocate(step.shape, step.pages)
    step.fill(cache)
    page, place = divmod(int(step.slots[0][2]), 16)
    stored = cache.view(torch.uint8).cpu().view(FP8)[page, 0, place].float()
    assert stored.unique().tolist() == [-448.0, 448.0]


@pytest.mark.parametrize("new", [1, 3])
def test_a_batch_padded_for_a_graph(new: int) -> None:
    """Rows of padded sequences are zero."""
    shape = replace(ON_GPU, speculated=new - 1)
    step = Step(shape, [(20, new), (63, new)], padded_sequences=2, padded_tokens=4 * new)
    assert step.metadata().decodes == 4
    output, _ = step.run()
    assert_rows_close(output[: 2 * new], step.expected())
    assert float(output[2 * new :].abs().max()) == 0


def test_tokens_padded_past_the_batch_are_not_written() -> None:
    step = Step(ON_GPU, [(20, 1), (63, 1), (9, 12)], padded_tokens=24)
    output, _ = step.run()
    assert_rows_close(output[: step.tokens], step.expected())
    assert output[step.tokens :].unique().tolist() == [7.0]


STEPS = {
    "plain": {},
    "page_1024": {"page": 1024},
    "verification": {"speculated": 2},
    "fp8": {"cache": "fp8"},
    "windowed_sinks": {"window": 40, "sinks": True},
    "softcap": {"softcap": 2.0},
    "head_dim_256_fp16": {"head_dim": 256, "dtype": torch.float16},
}


@pytest.mark.parametrize("name", STEPS)
def test_decode_steps_never_wait_for_the_gpu(name: str) -> None:
    """Batch, write and attention; the first step compiles."""
    shape = replace(ON_GPU, **STEPS[name])
    new = shape.speculated + 1
    step = Step(shape, [(20, new), (63, new), (700, new)])
    cache = allocate(shape, step.pages)
    step.fill(cache)
    builder, tokens, output = shape.builder(), step.new_tokens(), torch.empty_like(step.query)

    def run() -> None:
        batch = builder.build(0, step.common)
        step.impl.do_kv_cache_update(step.layer, *tokens, cache, step.common.slot_mapping)
        step.impl.forward(step.layer, step.query, *tokens, cache, batch, output)

    run()
    output.fill_(7.0)
    with no_waiting():
        run()
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        output.max().item()
    assert_rows_close(output, step.expected())


def test_a_mixed_batch_is_taken_apart_without_waiting() -> None:
    """What waits in its prefill, if anything, is torch's attention."""
    step = Step(ON_GPU, MIXED)
    builder = ON_GPU.builder()
    builder.build(0, step.common)
    with no_waiting():
        batch = builder.build(0, step.common)
    assert (batch.decodes, len(batch.pieces)) == (len(DECODE), 1)
    assert batch.pieces[0].pages.device.type == ON_GPU.device


class CapturedStep:
    """A decode step of ``sequences`` sequences, captured once over buffers that stay where they are, as vLLM's runner keeps them."""

    def __init__(self, shape: Shape, sequences: int, pages: int, width: int) -> None:
        new = shape.speculated + 1
        self.step = Step(shape, [(30, new)] * sequences)
        self.cache = allocate(shape, pages)
        common = self.step.common
        table = torch.zeros(sequences, width, dtype=torch.int32, device=shape.device)
        table[:, : common.block_table_tensor.shape[1]] = common.block_table_tensor
        common.block_table_tensor = table
        common.max_seq_len = width * shape.page  # of the model: any batch may follow
        self.tokens = self.step.new_tokens()
        self.output = torch.empty_like(self.step.query)
        self.batch = shape.builder().build(0, common)
        self.step.fill(self.cache)
        self._run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()

    def _run(self) -> None:
        step = self.step
        step.impl.do_kv_cache_update(step.layer, *self.tokens, self.cache, step.common.slot_mapping)
        step.impl.forward(step.layer, step.query, *self.tokens, self.cache, self.batch, self.output)

    def replay(self, other: Step) -> torch.Tensor:
        """The output of another batch, padded to this one's size, whose history is in the cache and whose new tokens the graph writes."""
        mine, theirs = self.step.common, other.common
        self.cache.view(torch.uint8).fill_(POISON)
        other.fill_history(self.cache)
        for buffer, values in zip(self.tokens, other.new_tokens(), strict=True):
            buffer.copy_(values)
        self.step.query.copy_(other.query)
        mine.seq_lens.copy_(theirs.seq_lens)
        mine.slot_mapping.copy_(theirs.slot_mapping)
        mine.block_table_tensor.fill_(2**30)  # what lies past a sequence's pages is not read
        mine.block_table_tensor[:, : theirs.block_table_tensor.shape[1]] = theirs.block_table_tensor
        self.output.fill_(7.0)
        self.graph.replay()
        return self.output


@pytest.mark.parametrize("name", STEPS)
def test_a_captured_decode_step_serves_other_batches(name: str) -> None:
    """Other lengths and pages, then fewer sequences: padded rows write nowhere and are zero."""
    shape = replace(ON_GPU, **STEPS[name])
    new = shape.speculated + 1
    captured = CapturedStep(shape, sequences=4, pages=256, width=80)
    batches = [[900, 20, 63, 400], [5, 700], [1, 2, 3], [1000, 1001, 1002, 1003], [63]]
    for seed, computed in enumerate(batches, 1):
        step = Step(
            shape, [(count, new) for count in computed],
            padded_sequences=4 - len(computed), padded_tokens=4 * new, seed=seed,
        )  # fmt: skip
        step.impl.sinks = captured.step.impl.sinks  # a layer's own, the same in every step
        step.sinks = captured.step.sinks
        assert step.metadata().decodes == 4
        output = captured.replay(step)
        assert_rows_close(output[: step.tokens], step.expected())
        if step.tokens < len(output):
            assert float(output[step.tokens :].abs().max()) == 0


def test_the_profiling_run_has_the_memory_of_a_prefill_counted() -> None:
    """Keys and values of 65,536 tokens, in the activations' type."""
    impl = ON_GPU.impl()
    query = torch.zeros(5, 8, 128, dtype=torch.bfloat16, device="cuda")
    output = torch.full_like(query, 7.0)
    nothing = torch.empty(0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    impl.forward(SimpleNamespace(), query, query, query, nothing, None, output)
    assert float(output.abs().max()) == 0
    assert torch.cuda.max_memory_allocated() - before == 2 * 65536 * 2 * 128 * 2


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_vllms_own_attention_layer_runs_it(sequences: list[tuple[int, int]], cache: str) -> None:
    """Chosen by --attention-backend CUSTOM for the device, called through vLLM's custom operations."""
    from vllm.model_executor.layers.attention import Attention

    register()
    shape = replace(ON_GPU, cache=cache)
    step = Step(shape, sequences)
    config = shape.config()
    config.attention_config = AttentionConfig(backend=AttentionBackendEnum.CUSTOM)
    config.cache_config.cache_dtype = cache
    # what a layer of a model may ask of its configuration, beside what the backend reads
    config.model_config.is_mm_prefix_lm = False
    config.model_config.rswa_window = None
    config.model_config.dtype = shape.dtype
    with set_current_vllm_config(config), torch.device(shape.device):
        layer = Attention(
            shape.q_heads, shape.head_dim, shape.head_dim**-0.5, shape.kv_heads,
            cache_config=config.cache_config, prefix=LAYERS[1],
        )  # fmt: skip
    assert layer.attn_backend is PatuneBackend
    for scale in ("_k_scale", "_v_scale"):
        getattr(layer, scale).copy_(getattr(step.layer, scale))
    layer.kv_cache = allocate(shape, step.pages)
    step.fill_history(layer.kv_cache)
    key, value = step.new_tokens()
    context = {"slot_mapping": {LAYERS[1]: step.common.slot_mapping}}
    with set_forward_context({LAYERS[1]: step.metadata()}, config, **context):
        output = layer(step.query.flatten(1), key.flatten(1), value.flatten(1))
    assert_rows_close(output.view(step.query.shape), step.expected())
