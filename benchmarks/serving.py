"""Tokens per second of transformers' continuous batching, by attention implementation and page size. Needs an sm_90 GPU and transformers 5.17 to 5.23.

    python benchmarks/serving.py [--requests 32] [--context 8192] [--new-tokens 128] [--layers 32] [--pages 64 1024] [--json FILE]

One model with random weights (the shape of Llama 3.1 8B; ``--layers`` makes it smaller) decodes the same prompts in one process, once per row.
All rows use a scheduler that prefills one prompt a step until none waits and decodes after that, so that the decode phase is the same for all: the
schedulers of transformers would put decodes and prefills into one step, which ``paged|sdpa`` and ``paged|eager`` compute as one dense product of all
queries with all keys.

``decode`` is tokens per second between the last request's first token and the first request's last; ``step`` the median time between tokens of one
request then; ``all`` counts the prefill too, but not the capture of graphs before it (``start``). ``same`` is how many of the new tokens equal the
first row's, up to the first that does not in each request; ``tie`` is the largest difference between the log-probabilities of the two tokens at those
places: random weights decide next to nothing, so two right implementations part early, where two tokens are nearly as likely. That tokens are right
is shown elsewhere, against a dense float32 forward: tests/integrations/test_transformers_gpu.py.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import scheduler as schedulers
from transformers.generation.continuous_batching.requests import RequestStatus

import patune
from patune.integrations.transformers import register

SEED = 0
VOCABULARY = 128_256


class PromptsFirst(schedulers.PrefillFirstScheduler):
    """One prompt a step until none waits; then decodes."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        active = dict(self.active_requests)
        decoding = {k for k, s in active.items() if s.status == RequestStatus.DECODING}
        if not self.waiting_requests and len(decoding) == len(active):
            return super().schedule_batch(token_budget, cache_budget)
        for name in decoding:
            del self.active_requests[name]
        try:
            return super().schedule_batch(token_budget, cache_budget)
        finally:
            added = {k: s for k, s in self.active_requests.items() if k not in active}
            self.active_requests.clear()
            self.active_requests.update(active | added)


@dataclass(frozen=True)
class Row:
    """One way to serve: an implementation, how it gets its block tables, and whether its decode steps may be CUDA graphs (then it has its defaults)."""

    label: str
    implementation: str
    block_tables: bool = True
    graphs: bool = False


def rows(patune_name: str) -> list[Row]:
    prefix = "paged|" if patune_name.startswith("paged|") else ""
    return [
        Row(f"{prefix}sdpa", f"{prefix}sdpa"),
        Row("paged|eager", "paged|eager"),
        Row("patune, tables from slots", patune_name, block_tables=False),
        Row("patune, no CUDA graphs", patune_name),
        Row("patune", patune_name, graphs=True),
    ]


def make_model(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def serve(
    model: LlamaForCausalLM, row: Row, page: int, prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """One row: what came out, and how fast."""
    register(block_tables=row.block_tables)
    model.set_attn_implementation(row.implementation)
    context = len(prompts[0])
    pages = -(-(context + new_tokens) // page) + 1
    named = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
    config = ContinuousBatchingConfig(
        **{named: page}, num_blocks=len(prompts) * pages, max_batch_tokens=context,
        scheduler_type="prompts_first", return_logprobs=True, allow_block_sharing=False,
        **({} if row.graphs else {"use_cuda_graph": False, "use_async_batching": False}),
    )  # fmt: skip
    generation = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    called = time.perf_counter()
    outputs = model.generate_batch(
        inputs=prompts, generation_config=generation, continuous_batching_config=config,
        progress_bar=False, record_timestamps=True, warmup=row.graphs,
    )  # fmt: skip
    results = [outputs[k] for k in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]
    errors = [result.error for result in results if result.error]
    if errors or len(results) != len(prompts):
        raise RuntimeError(f"{row.label} at page {page}: {errors[:1] or 'requests are missing'}")
    model.destroy_cached_continuous_batching_manager()
    del outputs
    gc.collect()
    torch.cuda.empty_cache()
    return measured(results, called)


def measured(results: list[Any], called: float) -> dict[str, Any]:
    times = [result.timestamps for result in results]
    started, ended = min(r.created_time for r in results), max(t[-1] for t in times)
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    within = sum(sum(begin < at <= end for at in t) for t in times)
    steps = [b - a for a, b in zip(times[0], times[0][1:], strict=False) if a >= begin and b <= end]
    return {
        "decode_tokens_per_s": within / (end - begin),
        "step_ms": statistics.median(steps) * 1e3,
        "start_s": started - called,
        "prefill_s": begin - started,
        "all_tokens_per_s": sum(len(t) for t in times) / (ended - started),
        "tokens": [result.generated_tokens for result in results],
        "logprobs": [result.logprobs for result in results],
    }


def agreement(run: dict[str, Any], first: dict[str, Any]) -> tuple[int, float]:
    """New tokens equal to the first row's before the first that is not, and the largest gap of log-probabilities there."""
    same, tie = 0, 0.0
    for mine, theirs, my_logs, their_logs in zip(
        run["tokens"], first["tokens"], run["logprobs"], first["logprobs"], strict=True
    ):
        apart = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        same += len(mine) if apart is None else apart
        if apart is not None:
            tie = max(tie, abs(my_logs[apart] - their_logs[apart]))
    return same, tie


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--context", type=int, default=8192, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pages", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--json", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("patune").setLevel(logging.INFO)
    schedulers.SCHEDULER_MAPPING["prompts_first"] = PromptsFirst
    name = register()
    model = make_model(options.layers)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e9:.2f} G parameters, bf16; {options.requests} prompts of {options.context} tokens, "
        f"{options.new_tokens} new ones each"
    )
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(
        3, VOCABULARY, (options.requests, options.context), generator=generator
    ).tolist()
    serve(model, rows(name)[3], options.pages[0], prompts[:2], 8)  # compiles, fills the allocator
    table = []
    print(f"{'page':>5}  {'implementation':<26} {'decode':>9} {'step':>9} {'start':>8} {'prefill':>8} {'all':>8}   {'same':>12}  tie")  # fmt: skip
    for page in options.pages:
        first: dict[str, Any] | None = None
        for row in rows(name):
            run = serve(model, row, page, prompts, options.new_tokens)
            first = run if first is None else first
            same, tie = agreement(run, first)
            table.append({
                "page": page, "implementation": row.label,
                **{k: v for k, v in run.items() if k not in ("tokens", "logprobs")},
                "same_tokens": same, "largest_tie": tie, "new_tokens": options.requests * options.new_tokens,
            })  # fmt: skip
            print(
                f"{page:>5}  {row.label:<26} {run['decode_tokens_per_s']:>6.0f}/s {run['step_ms']:>6.1f} ms "
                f"{run['start_s']:>6.1f} s {run['prefill_s']:>6.1f} s {run['all_tokens_per_s']:>6.0f}/s   {same:>4} of {options.requests * options.new_tokens:>4}  {tie:.3f}",
                flush=True,
            )
    document = {
        "command": f"benchmarks/serving.py --requests {options.requests} --context {options.context} --new-tokens {options.new_tokens} --layers {options.layers}",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "triton", "transformers")}
        | {"patune": patune.__version__, "python": platform.python_version()},
        "parameters": parameters,
        "rows": table,
        "lookups": {k: v for k, v in patune.stats().items() if k in ("lookups", "misses")},
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
