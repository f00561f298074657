"""What differs on a GPU, as far as it runs without one: nothing waits for the device, and vLLM's write kernel, interpreted, fills the same slots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", reason="vLLM is not installed")

from vllm.v1.attention.ops import triton_reshape_and_cache_flash as vllm_write
from vllm_steps import Shape, Step, allocate

from patune.integrations import vllm_impl, vllm_metadata

META = torch.device("meta")  # has shapes and no values: reading one raises

# The write kernel of vLLM on the CPU, for every layout and cache type, against the torch write.
INTERPRETED = """
import torch
torch.cuda.get_device_capability = lambda *_: (9, 0)
from vllm.platforms import current_platform
type(current_platform).has_device_capability = lambda *_, **__: True
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm_steps import FP8, Shape, Step, allocate

for cache_dtype in ("auto", "fp8"):
    for layout in KVCacheLayout:
        step = Step(Shape(layout=layout.name, cache=cache_dtype), [(20, 1), (7, 5)], padded_tokens=9)
        # the interpreter rounds to fp8 wrongly (0.499 becomes 0.25): values that fp8 has
        step.keys = [(key.float() / 0.5).to(FP8).float().mul(0.5).bfloat16() for key in step.keys]
        step.values = [(value.float() / 0.25).to(FP8).float().mul(0.25).bfloat16() for value in step.values]
        ours, theirs = allocate(step.shape, step.pages), allocate(step.shape, step.pages)
        step.fill(ours)
        step.impl.do_kv_cache_update = lambda layer, key, value, cache, slots: step.impl._write_by_vllm(
            layer, key, value, *step.impl._caches(cache), slots)
        step.fill(theirs)
        print(cache_dtype, layout.name, ours.view(torch.uint8).equal(theirs.view(torch.uint8)))
"""


def test_the_write_kernel_of_vllm_fills_the_same_slots() -> None:
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",  # without it vLLM puts a stand-in in Triton's place
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, env=env
    )
    layouts = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
    expected = [f"{cache} {layout} True" for cache in ("auto", "fp8") for layout in layouts]
    assert done.stdout.splitlines() == expected, done.stderr


def on_meta(step: Step) -> None:
    """The step with everything that vLLM keeps on the device without values."""
    for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
        setattr(step.common, name, getattr(step.common, name).to(META))
    step.query = step.query.to(META)
    step.layer._k_scale = step.layer._k_scale.to(META)
    step.layer._v_scale = step.layer._v_scale.to(META)


@pytest.fixture(autouse=True)
def _copies_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a GPU."""
    monkeypatch.setattr(vllm_metadata, "async_tensor_h2d", lambda values, device: values.to(device))


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_nothing_around_the_kernels_reads_the_device(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        vllm_impl,
        "paged_attention_decode",
        lambda *_, **options: called.append(("decode", options)),
    )

    def varlen(query: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        called.append(("prefill", options))
        return query

    monkeypatch.setattr(vllm_impl, "varlen_attention", varlen)
    step = Step(Shape(cache=cache, speculated=2), [(20, 3), (63, 3), (5, 7), (0, 9)])
    on_meta(step)
    kv_cache = allocate(step.shape, step.pages).to(META)
    output = torch.empty_like(step.query)
    step.impl.forward(step.layer, step.query, None, None, kv_cache, step.metadata(), output)
    assert [name for name, _ in called] == ["decode", "prefill"]
    decode = called[0][1]
    assert decode["out"].shape == (6, 4, 64)
    assert (decode["query_length"], decode["max_context"]) == (3, 128)
    assert (decode["key_scale"] is None) == (cache == "auto")
    assert called[1][1]["key_lengths"].device == META


def test_on_a_device_the_kernel_of_vllm_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        vllm_write, "triton_reshape_and_cache_flash", lambda *arguments: called.append(arguments)
    )
    step = Step(Shape(cache="fp8"), [(20, 1)])
    on_meta(step)
    kv_cache = allocate(step.shape, step.pages).to(META)
    new = torch.empty(1, 2, 64, device=META)
    step.impl.do_kv_cache_update(step.layer, new, new, kv_cache, step.common.slot_mapping)
    ((key, value, key_cache, value_cache, slots, cache_dtype, k_scale, v_scale),) = called
    assert key is new
    assert value is new
    assert key_cache.shape == value_cache.shape == (step.pages, 16, 2, 64)
    assert key_cache.storage_offset() + 64 == value_cache.storage_offset()
    assert slots is step.common.slot_mapping
    assert cache_dtype == "fp8"
    assert k_scale is step.layer._k_scale
    assert v_scale is step.layer._v_scale
