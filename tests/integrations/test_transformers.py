"""`paged|patune` in transformers' continuous batching, on the CPU: the oracle decodes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402
import transformers_models as models  # noqa: E402

from patune.errors import UnsupportedProblemError  # noqa: E402
from patune.integrations import (  # noqa: E402
    announcement,
    transformers_attention,
    transformers_hooks,
)
from patune.integrations.transformers import NAMES, check_model, register  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register()
    yield
    register(block_tables=True)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], int]:
    """Layers of steps, by kind of layer and by the way that they took."""
    seen: dict[tuple[str, str], int] = {}
    real = transformers_attention._tables

    def counting(layer: Any, kwargs: dict[str, Any]) -> Any:
        tables = real(layer, kwargs)
        way = "prefill" if tables is None else "table" if kwargs.get("block_table") is not None else "slots"  # fmt: skip
        seen[layer.kind, way] = seen.get((layer.kind, way), 0) + 1
        return tables

    monkeypatch.setattr(transformers_attention, "_tables", counting)
    return seen


FULL, SLIDING = "full_attention", "sliding_attention"
WAYS = {  # model -> kinds of layers, and how they decode
    "llama": {FULL: "table"},
    "llama_d128": {FULL: "table"},
    "qwen3": {FULL: "table"},
    "mistral": {SLIDING: "slots"},
    "gpt_oss": {FULL: "slots", SLIDING: "slots"},
    "gemma2": {FULL: "slots", SLIDING: "slots"},
}


@pytest.mark.parametrize("page", [16, 64, 1024])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_tokens_are_those_of_a_dense_forward(
    name: str, page: int, steps: dict[tuple[str, str], int]
) -> None:
    model, inputs = models.make_model(name), models.prompts()
    mine = models.generate(model, register(), inputs, page=page)
    assert mine.errors == []
    assert [len(tokens) for tokens in mine.tokens] == [models.NEW_TOKENS] * len(inputs)
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]
    decoded = {kind: way for (kind, way) in steps if way != "prefill"}
    assert decoded == WAYS[name]
    # all steps after the last prompt: more, where the generation thread saw some prompts late
    assert all(steps[kind, way] >= models.NEW_TOKENS - 1 for kind, way in decoded.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt_oss"])
def test_tokens_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    # gpt-oss has sinks, which transformers' SDPA does not compute
    theirs = "paged|eager" if name == "gpt_oss" else models.SDPA
    model, inputs = models.make_model(name, dtype=dtype), models.prompts()
    expected = models.generate(model, theirs, inputs, page=16)
    for page in (16, 1024):
        mine = models.generate(model, register(), inputs, page=page)
        models.assert_same_up_to_ties(model, inputs, mine.tokens, expected.tokens)


@pytest.mark.parametrize("page", [16, 1024])
def test_block_tables_from_slots(page: int, steps: dict[tuple[str, str], int]) -> None:
    name = register(block_tables=False)
    model, inputs = models.make_model("llama"), models.prompts()
    mine = models.generate(model, name, inputs, page=page)
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]
    assert set(steps) == {(FULL, "prefill"), (FULL, "slots")}
    assert steps[FULL, "slots"] >= models.NEW_TOKENS - 1


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_requests_that_come_and_go_and_prompts_in_chunks(
    name: str, steps: dict[tuple[str, str], int]
) -> None:
    """Prompts longer than a step's tokens, with decodes beside them; more requests than fit at once."""
    model = models.make_model(name)
    inputs = models.prompts((200, 3, 90, 1, 64, 150, 17))
    mine = models.generate(model, register(), inputs, page=16, max_batch_tokens=64)
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]
    assert steps[FULL, "prefill"] >= 9, "525 prompt tokens in steps of 64"


def test_a_shared_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that begin alike share pages, which no request may write into."""
    real = transformers_attention._tables
    processed = 0

    def counting(layer: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal processed
        processed += int(kwargs["cu_seq_lens_q"][-1])
        return real(layer, kwargs)

    monkeypatch.setattr(transformers_attention, "_tables", counting)
    model = models.make_model("llama")
    head = models.prompts((96,))[0]
    inputs = [head + tail for tail in models.prompts((4, 30, 9), seed=2)]
    mine = models.generate(model, register(), inputs, page=16, max_batch_tokens=128)
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]
    alone = sum(map(len, inputs)) + len(inputs) * (models.NEW_TOKENS - 1)
    # the generation thread may see all prompts in its first step or not
    assert alone - processed in (len(head), 2 * len(head)), "nobody found another's pages"


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padded_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CUDA graphs: 3 requests in a step of 4, whose last row has no tokens and must not write into anybody's cache."""
    from transformers.generation.continuous_batching.model_runner import (
        ModelRunner,
    )

    real = ModelRunner.__init__

    def padding(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.pad_inputs = True

    monkeypatch.setattr(ModelRunner, "__init__", padding)
    model, inputs = models.make_model(name), models.prompts((5, 37, 130))
    mine = models.generate(model, register(), inputs, page=16, max_requests_per_batch=4)
    assert mine.errors == []
    assert models.largest_gap(model, inputs, mine.tokens) <= models.TIE[torch.float16]


def test_other_implementations_are_served_as_before() -> None:
    model, inputs = models.make_model("llama"), models.prompts()
    found = models.generate(model, models.SDPA, inputs, page=16)
    assert found.errors == []
    assert models.largest_gap(model, inputs, found.tokens) <= models.TIE[torch.float16]


# ---- registration


def test_registering_twice_changes_nothing() -> None:
    from transformers.generation.continuous_batching import (
        continuous_api,
        initialization,
        input_outputs,
    )

    def hooked() -> tuple[Any, ...]:
        return (
            input_outputs.ContinuousBatchingAsyncIOs.reset,
            continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn,
            initialization.ensure_decode_fast_path_is_available,
            *(transformers.AttentionInterface()[name] for name in NAMES),
        )

    before = hooked()
    assert register() == ("paged|patune" if models.PREFIXED else "patune")
    assert hooked() == before
    for wrapped in before[:3]:
        original = getattr(wrapped, transformers_hooks.WRAPPED)
        assert not hasattr(original, transformers_hooks.WRAPPED)


def test_either_name_serves() -> None:
    model, inputs = models.make_model("llama"), models.prompts((5,))
    expected = models.generate(model, register(), inputs, page=16).tokens
    for name in NAMES:
        assert models.generate(model, name, inputs, page=16).tokens == expected


def test_one_line_names_the_source_of_the_configs(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    announcement.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="patune"):
        register()
        register()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert f"transformers {transformers.__version__}" in lines[0]
    assert f"database {tmp_path / 'patune.db'} (not there" in lines[0]
    assert "sm_90" in lines[0]


def test_importing_and_registering_touch_neither_gpu_nor_database(tmp_path: Path) -> None:
    code = (
        "import sys, json, patune.integrations.transformers as p\n"
        "early = [m for m in ('transformers', 'sqlalchemy', 'optuna') if m in sys.modules]\n"
        "p.register()\n"
        "import torch\n"
        "print(json.dumps([early, torch.cuda.is_initialized(), 'sqlalchemy' in sys.modules, 'sqlite3' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PATUNE_DB": str(tmp_path / "none.db")},
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [[], False, False, False]
    assert list(tmp_path.iterdir()) == []


def test_a_forked_worker_serves() -> None:
    """Registered before the fork, used after it."""
    code = (
        "import os, sys\n"
        "import transformers_models as models\n"
        "from patune.integrations.transformers import register\n"
        "import torch; torch.set_num_threads(1)\n"
        "name = register()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert register() == name\n"
        "    model, inputs = models.make_model('llama'), models.prompts((5, 20))\n"
        "    found = models.generate(model, name, inputs, page=16, new_tokens=4)\n"
        "    os._exit(0 if models.largest_gap(model, inputs, found.tokens) <= 0.01 else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0", done.stderr[-2000:]


# ---- refusals


def refused(name: str, **changes: Any) -> str:
    with pytest.raises(UnsupportedProblemError) as caught:
        check_model(models.make_model(name, **changes))
    return str(caught.value)


def test_models_that_patune_does_not_serve_are_refused_with_an_alternative() -> None:
    message = refused("llama", head_dim=80)
    assert "head_dim=80, allowed: 64, 128, 256" in message
    assert "attn_implementation='paged|sdpa'" in message
    assert "torch.float32 activations" in refused("llama", dtype=torch.float32)
    for name, why in (("alibi", "ALiBi"), ("kv_lora_rank", "MLA")):
        model = models.make_model("llama")
        setattr(model.config, name, 8)
        with pytest.raises(UnsupportedProblemError, match=why):
            check_model(model)


def test_a_refusal_reaches_the_caller_of_generate_batch() -> None:
    model = models.make_model("llama", head_dim=96)
    with pytest.raises(UnsupportedProblemError, match="head_dim=96"):
        models.generate(model, register(), models.prompts((5,)), page=16)


def test_a_page_size_that_no_kernel_has() -> None:
    model = models.make_model("llama")
    with pytest.raises(UnsupportedProblemError, match="block_size=48, allowed: 16, 32"):
        models.generate(model, register(), models.prompts((5,)), page=48)


def test_an_ordinary_forward_is_refused() -> None:
    model = models.make_model("llama")
    model.set_attn_implementation(register())
    with pytest.raises(UnsupportedProblemError, match="without a paged cache"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "it is given an attention mask"),
        ({"alibi": torch.zeros(8)}, "it is given alibi, which patune does not know"),
        ({"position_bias": torch.zeros(8)}, "it is given position_bias"),
        ({"output_attentions": True}, "attention weights are asked for"),
        ({"dropout": 0.1}, "dropout=0.1"),
    ],
    ids=["mask", "alibi", "bias", "weights", "dropout"],
)
def test_a_first_step_that_asks_for_more_is_refused(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transformers_attention.paged_attention

    def asking(*args: Any, **kwargs: Any) -> Any:
        if "attention_mask" in changes:
            args = (*args[:4], changes["attention_mask"])
            return real(*args, **kwargs)
        return real(*args, **(kwargs | changes))

    for name in NAMES:
        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, name, asking)
    found = models.generate(
        models.make_model("llama"), register_names(), models.prompts((5,)), page=16
    )
    assert len(found.errors) == 1
    assert why in found.errors[0]
    assert "Use transformers' own" in found.errors[0]


def register_names() -> str:
    """The name to choose, without registering anew."""
    return NAMES[0] if models.PREFIXED else NAMES[1]
