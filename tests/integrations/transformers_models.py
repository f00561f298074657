"""Small models with random weights, what continuous batching makes of them, and what a dense float32 forward says about that."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

NEW_TOKENS = 12
PROMPTS = (5, 37, 70, 130)  # tokens: within a page of 16, over pages, over a window of 48
WINDOW = 48  # no multiple of any page size above 16
# How far below the largest logit a new token may be. Right implementations were off by 0.0012 and 0.113 at most (2026-11-23, six models, CPU and
# H200), a dropped soft-cap (transformers 5.17 to 5.23, Gemma 2 with `paged|eager`) by 1.55.
TIE = {torch.float16: 0.01, torch.bfloat16: 0.2}
PREFIXED = "paged|sdpa" in transformers.AttentionInterface()
SDPA = "paged|sdpa" if PREFIXED else "sdpa"

_COMMON = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 64}),
    "llama_d128": ("Llama", {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "mistral": ("Mistral", {"head_dim": 64, "sliding_window": WINDOW}),
    # as many experts as are chosen: a router's choice is no near-tie
    "gpt_oss": ("GptOss", {"head_dim": 64, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", {"head_dim": 256, "sliding_window": WINDOW, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 2.0}),
}  # fmt: skip


def make_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A causal model of four layers with random weights."""
    family, own = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**_COMMON | own | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)  # they begin as zeros
    return model.to(dtype).to(device).eval()


def prompts(lengths: tuple[int, ...] = PROMPTS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 511, (n,), generator=generator).tolist() for n in lengths]


@dataclass(frozen=True)
class Generated:
    tokens: list[list[int]]
    errors: list[str]


def generate(
    model: Any,
    implementation: str,
    inputs: list[list[int]],
    *,
    page: int,
    new_tokens: int = NEW_TOKENS,
    **config: Any,
) -> Generated:
    """Greedy tokens by continuous batching."""
    model.set_attn_implementation(implementation)
    options: dict[str, Any] = {
        "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size": page,
        "num_blocks": 4 * -(-400 // page) + 4,
        "max_batch_tokens": 256,
        "use_cuda_graph": False,
        "use_async_batching": False,
    }
    outputs = model.generate_batch(
        inputs=inputs,
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(**options | config),
        progress_bar=False,
        warmup=config.get("use_cuda_graph", False) is not False,
    )
    results = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]
    return Generated(
        tokens=[list(result.generated_tokens) for result in results],
        errors=[str(result.error) for result in results if result.error],
    )


def dense_gaps(model: Any, inputs: list[list[int]], tokens: list[list[int]]) -> list[list[float]]:
    """By how much each new token's logit is below the largest, in a dense float32 forward of its whole sequence."""
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    found = []
    for prompt, new in zip(inputs, tokens, strict=True):
        sequence = torch.tensor([prompt + new[:-1]], device=model.device)
        with torch.no_grad():
            logits = exact(sequence, use_cache=False).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(new, device=model.device)[:, None])[:, 0]
        found.append((logits.max(dim=1).values - chosen).tolist())
    return found


def largest_gap(model: Any, inputs: list[list[int]], tokens: list[list[int]]) -> float:
    return max(gap for gaps in dense_gaps(model, inputs, tokens) for gap in gaps)


def assert_same_up_to_ties(
    model: Any, inputs: list[list[int]], mine: list[list[int]], theirs: list[list[int]]
) -> None:
    """Equal tokens, but for requests that part where the dense forward finds both tokens as likely."""
    allowed = TIE[next(model.parameters()).dtype]
    gaps, other_gaps = dense_gaps(model, inputs, mine), dense_gaps(model, inputs, theirs)
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert len(a) == len(b)
        apart = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if apart is not None:
            there = gaps[number][apart], other_gaps[number][apart]
            assert max(there) <= allowed, f"request {number}, token {apart}: {there} below the best"
