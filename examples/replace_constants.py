"""Replace the launch constants of an attention call by what was tuned for its sizes.

Engines that call AITER's paged-attention decode tell it how to cut up the walk over a context by a constant, and by a number that follows batch, KV
heads and device, but not the context:

    pa_decode_gluon(..., context_partition_size=256, max_context_partition_num=get_recommended_splits(batch, kv_heads), ps=True)

``patune.lookup`` answers for the sizes of the call, and says where its answer comes from:

    pa_decode_gluon(..., **tuned_arguments(patune.lookup(...)), ps=True)

What maps, and what does not:

    partition_tokens -> context_partition_size      tokens that a workgroup takes at a time; AITER has layouts for 128 and 256
    num_splits       -> max_context_partition_num   workgroups that share the walk over one context (with ps=True)
    the other knobs  -> nothing                     warps, stages, MFMA rows, waves per EU, reduce: AITER has no arguments for them

The scratch tensors are [batch, kv_heads, max_context_partition_num, ...], so they follow the looked-up number. On pages larger than a partition
AITER wants a multiple of the partitions of a page. And patune ranks its own kernel, which is another one: measure the numbers in yours, or call
``patune.paged_attention_decode``, which takes the same cache and all knobs.

    python examples/replace_constants.py

prints both for gfx942, anywhere, without a latency: nothing here was run on AMD hardware. On an sm_90 GPU it also decodes with both and exits 1
where the outputs differ by more than the tolerance.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import patune
from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import HopperKnobs
from patune.target import Target, detect_target

if TYPE_CHECKING:
    from patune.configs.answer import Answer

BLOCK_SIZE, HEAD_DIM, KV_HEADS, QG = 64, 128, 8, 8
AITER_CACHE = patune.Problem(block_size=BLOCK_SIZE, head_dim=HEAD_DIM, qg=QG, kv_layout="aiter_5d")
BATCHES, CONTEXTS = (1, 16, 128), (1024, 8192, 65536)
COMPARED = ((1, 8192), (16, 8192))
LEAST_AITER_PARTITION = 128  # tokens; patune has tiles of 64, too
TOLERANCE = 0.02  # of the largest output; bf16 rounds probabilities and output by 0.4 % each


def recommended_splits(batch: int, compute_units: int) -> int:
    """Workgroups per walk as AITER recommends them: two per compute unit over all walks, 8 at most. Versions differ in the bound."""
    return min(8, -(-2 * compute_units // (batch * KV_HEADS)))


def constant_arguments(batch: int, compute_units: int) -> dict[str, int]:
    """What the call site passed: nothing of it knows the context."""
    return {
        "context_partition_size": 256,
        "max_context_partition_num": recommended_splits(batch, compute_units),
    }


def tuned_arguments(answer: Answer) -> dict[str, int]:
    """What it passes now."""
    return {
        "context_partition_size": max(LEAST_AITER_PARTITION, answer.knobs.partition_tokens),
        "max_context_partition_num": answer.knobs.num_splits,
    }


def look_up(problem: patune.Problem, batch: int, context: int, arch: str) -> Answer:
    """What is known for these sizes; a warm call takes less than a microsecond."""
    sizes: dict[str, Any] = {"batch": batch, "kv_heads": KV_HEADS, "context": context}
    return patune.lookup(**problem.to_dict(), **sizes, target=arch)


def print_table() -> None:
    """Constants against looked-up values for gfx942."""
    target = Target.named("gfx942")
    heads = f"{KV_HEADS * QG} query and {KV_HEADS} KV heads of {HEAD_DIM}"
    print(f"{target.device_name}: {heads}, pages of {BLOCK_SIZE}. partition x splits:")
    print(f"{'batch':>5} {'context':>8}  {'constants':>9}  {'looked up':>9}  source     evidence")
    for batch in BATCHES:
        for context in CONTEXTS:
            answer = look_up(AITER_CACHE, batch, context, target.arch)
            pairs = constant_arguments(batch, target.compute_units), tuned_arguments(answer)
            before, after = ("{} x {:<3}".format(*pair.values()) for pair in pairs)
            origin = f"{answer.source:<9}  {answer.evidence}"
            print(f"{batch:>5} {context:>8}  {before:>9}  {after:>9}  {origin}")
    batches, contexts = (",".join(map(str, values)) for values in (BATCHES, CONTEXTS))
    print("heuristic: computed, nobody tuned it. This tunes these keys, on any machine:")
    print(
        f"  patune sweep --target gfx942 --block-size {BLOCK_SIZE} --head-dim {HEAD_DIM} --qg {QG} "
        f"--layout aiter_5d \\\n    --kv-heads {KV_HEADS} --batch {batches} --context {contexts}"
    )


def constants_as_hopper_knobs(answer: Answer, arguments: dict[str, int]) -> HopperKnobs:
    """Knobs that cut a walk up as the constants do, with the most tiles in flight that fit into shared memory beside it."""
    assert isinstance(answer.knobs, HopperKnobs), answer.target
    for stages in (3, 2, 1):
        knobs = replace(
            answer.knobs,
            partition_tokens=arguments["context_partition_size"],
            num_splits=arguments["max_context_partition_num"],
            num_stages=stages,
        )
        reason = is_feasible(knobs, answer.problem, answer.target)
        if reason is None:
            return knobs
    raise ValueError(reason)


def compare(target: Target, device: torch.device) -> float:
    """Decode with the constants and with the looked-up knobs; returns the largest difference as a part of the largest output."""
    problem = replace(AITER_CACHE, kv_layout="hnd")
    worst = 0.0
    for batch, context in COMPARED:
        answer = look_up(problem, batch, context, target.arch)
        constants = constants_as_hopper_knobs(
            answer, constant_arguments(batch, target.compute_units)
        )
        pages = batch * context // BLOCK_SIZE
        query = torch.randn((batch, KV_HEADS * QG, HEAD_DIM), dtype=torch.bfloat16, device=device)
        cache = torch.randn(
            (2, pages, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype=torch.bfloat16, device=device
        )
        tables = torch.randperm(pages, device=device).view(batch, -1).int()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        tensors = (query, *cache, tables, lengths)
        before, after = (
            patune.paged_attention_decode(
                *tensors, softmax_scale=HEAD_DIM**-0.5, knobs=knobs
            ).float()
            for knobs in (constants, answer.knobs)
        )
        difference = float((before - after).abs().max() / after.abs().max())
        print(
            f"{batch:>5} {context:>8}  {constants.partition_tokens} x {constants.num_splits:<3}  "
            f"{answer.knobs.partition_tokens:>3} x {answer.knobs.num_splits:<3}  "
            f"{answer.source:<9}  {answer.evidence:<8}  {difference:.4f}"
        )
        worst = max(worst, difference)
    return worst


def main() -> int:
    """Print what the lookup changes, and check it where there is a GPU; returns the exit code."""
    print_table()
    target = detect_target()
    if target is None or target.arch != "sm_90":
        print("no sm_90 GPU here: nothing was decoded")
        return 0
    print(
        f"{target.device_name}: the same, and by how much the outputs differ (tolerance {TOLERANCE})"
    )
    return 0 if compare(target, torch.device("cuda")) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
