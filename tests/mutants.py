"""Planted kernel bugs: copies of the real kernel sources with one text replaced, behind the real plan."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patune.kernels
from patune.kernels.knobs import CdnaKnobs
from patune.kernels.plan import plan_decode
from patune.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.kernels.calls import KernelCall

SOURCES = (
    "tiles", "overlap", "query", "epilogue", "reduce", "hopper_layouts", "hopper_copy", "hopper_operands", "hopper",
    "cdna_layouts", "cdna_loads", "cdna_ring", "cdna",
)  # fmt: skip
FAMILIES = ("hopper_wgmma", "cdna_mfma")
_serial = itertools.count()


@dataclass(frozen=True)
class Mutant:
    """One planted bug: in ``module``, ``old`` becomes ``new``.

    Attributes:
        families: the kernel families that run through the text.
        problem: fields that the test's problem needs for the bug to show.
        knobs: fields that the test's knobs need.
        cdna_arch: where CDNA kernels show it.
    """

    name: str
    module: str
    old: str
    new: str
    families: tuple[str, ...] = FAMILIES
    problem: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    cdna_arch: str = "gfx942"


FP8 = {"kv_dtype": "fp8_e4m3fn"}
TENSOR_SCALE = FP8 | {"kv_quant": "per_tensor"}
TOKEN_SCALE = FP8 | {"kv_quant": "per_token"}
# Text that both families run through, so every mutant is planted for each of them.
SHARED = (
    Mutant("causal_off_by_one", "tiles", "position <= limit", "position < limit"),
    Mutant("sees_past_context", "tiles", "position <= limit", "position <= limit + 1"),
    Mutant(
        "window_one_short", "tiles", "position > limit - window", "position > limit - window + 1"
    ),
    Mutant(
        "window_one_long", "tiles", "position > limit - window", "position > limit - window - 1"
    ),
    Mutant(
        "first_token_of_the_window_lost",
        "tiles",
        "context - QUERY_LENGTH - window + 1",
        "context - QUERY_LENGTH - window + 2",
    ),
    Mutant("lost_last_tile", "tiles", "(context + TILE - 1) // TILE", "context // TILE"),
    Mutant("splits_walk_the_same_tiles", "tiles", "first // TILE + split,", "first // TILE,"),
    Mutant(
        "sum_not_rescaled", "tiles", "sums * gl.expand_dims(rescale, AXIS) + probs", "sums + probs"
    ),
    Mutant("sink_in_wrong_base", "tiles", ".to(gl.float32) * LOG2E", ".to(gl.float32)"),
    Mutant("lse_in_base_2", "tiles", ") * LN2, NEG_INF)", "), NEG_INF)"),
    Mutant(
        "head_map_transposed",
        "tiles",
        "row // GROUP) * stride_token + (kv_head * GROUP + row % GROUP)",
        "row % QUERY_LENGTH) * stride_token + (kv_head * GROUP + row // QUERY_LENGTH)",
    ),
    Mutant("reduce_reads_empty_splits", "reduce", "wrote = part_sum > 0.0", "wrote = in_range"),
    Mutant(
        "reduce_drops_last_chunk",
        "reduce",
        "range(0, num_splits, CHUNK)",
        "range(0, num_splits - CHUNK + 1, CHUNK)",
    ),
    Mutant(
        "split_slot_collision",
        "epilogue",
        "* num_splits + split) * (QUERY_LENGTH",
        "* num_splits + split // 2) * (QUERY_LENGTH",
    ),
    Mutant("softcap_in_base_2", "tiles", "2.0 * LOG2E / softcap_log2", "2.0 / softcap_log2", problem={"softcap": True}),
    Mutant(
        "query_factor_dropped_fp8_math", "query", "factor = gl.exp2(-shift)", "factor = gl.exp2(shift * 0.0)",
        problem=TENSOR_SCALE | {"fp8_math": True}, cdna_arch="gfx950",
    ),
    Mutant(
        "query_scale_of_every_row", "query", "row % GROUP) * query_scale_step", "row % GROUP)",
        problem=TENSOR_SCALE | {"query_dtype": "fp8_e4m3fn"}, cdna_arch="gfx950",
    ),
)  # fmt: skip


def _hopper(
    name: str, module: str, old: str, new: str, problem: dict[str, Any] | None = None
) -> Mutant:
    return Mutant(name, module, old, new, ("hopper_wgmma",), problem or {})


# None of them follows a block-table entry that is not needed: that would be an illegal access, and the end of the process's device.
HOPPER = (
    _hopper("tile_in_two_splits", "hopper", "step = num_splits * TILE", "step = (num_splits - 1) * TILE"),
    _hopper("lost_last_round", "hopper", "(end - begin + num_splits - 1) // num_splits", "(end - begin) // num_splits"),
    _hopper(
        "first_pages_of_the_tile_before", "hopper",
        "t0 = begin * TILE + tile * step", "t0 = begin * TILE + tile // 2 * step",
    ),
    _hopper(
        "later_pages_of_the_tile_before", "hopper",
        "t0 + (STAGES + PAGES_AHEAD) * step", "t0 + (STAGES + PAGES_AHEAD - 1) * step",
    ),
    _hopper(
        "later_page_of_the_tile_before", "hopper",  # the same with one page per tile
        "t0 + (STAGES + PAGES_AHEAD) * step", "t0 + (STAGES + PAGES_AHEAD - 1) * step",
        {"block_size": 64},
    ),
    _hopper(
        "key_pages_of_the_tile_before", "hopper",
        "next_key_pages = pages_of_tile(page_smem, (ahead + 1) % PAGE_SLOTS",
        "next_key_pages = pages_of_tile(page_smem, gl.maximum(ahead, STAGES) % PAGE_SLOTS",
    ),
    _hopper(
        "window_tail_of_values_kept", "hopper",
        "if (t0 + TILE > context) | (t0 < first):", "if t0 + TILE > context:",
    ),
    _hopper(
        "first_value_vector_lost", "hopper_copy",
        "kept = (vector >= first // VECTOR)", "kept = (vector > first // VECTOR)",
    ),
    _hopper(
        "last_value_vector_lost", "hopper_copy",
        "(vector * VECTOR < context)", "((vector + 1) * VECTOR < context)",
    ),
    _hopper(
        "shuffled_values_by_page_stride", "hopper_copy",
        "vector_in_page * (HEAD_DIM * VECTOR)", "vector_in_page * (BLOCK_SIZE * VECTOR)",
        {"kv_layout": "aiter_5d"},
    ),
    _hopper("values_by_key_strides", "hopper",
            "value_ptr, value_smem, value_pages, t0, first, context, stride_value_page,\n",
            "value_ptr, value_smem, value_pages, t0, first, context, stride_key_page,\n"),
    _hopper("softcap_ignored", "hopper", "scores = capped(scores, softcap_log2)", "scores = scores", {"softcap": True}),
    _hopper("tensor_key_scale_dropped", "hopper", "score_scale *= gl.load(key_scale_ptr)", "score_scale *= 1.0", TENSOR_SCALE),
    _hopper("tensor_value_scale_dropped", "hopper", "out_scale *= gl.load(value_scale_ptr)", "out_scale *= 1.0", TENSOR_SCALE),
    _hopper(
        "token_key_scale_dropped", "hopper",
        "scores = scores * key_scale_smem.index(slot).load(gl.SliceLayout(1, KEY_MMA))[:, None]", "scores = scores",
        TOKEN_SCALE,
    ),
    _hopper("token_value_scale_dropped", "hopper", "probs = probs * value_scale", "probs = probs", TOKEN_SCALE),
    _hopper(
        "value_scale_by_key_strides", "hopper",
        "value_scale_smem, pages, t0, first, context, stride_value_scale_page",
        "value_scale_smem, pages, t0, first, context, stride_key_scale_page",
        TOKEN_SCALE,
    ),
    # fp16 products only: bf16's do not overflow
    _hopper("value_scale_not_in_the_reference", "tiles", "gl.max(scores + value_log2, AXIS)", "gl.max(scores, AXIS)", TOKEN_SCALE),
    _hopper("query_factor_dropped", "query", "factor = gl.exp2(-shift)", "factor = gl.exp2(shift * 0.0)", FP8),
    _hopper(
        "fp8_max_factor_missing", "hopper", "probs = probs * FP8_MAX", "probs = probs",
        TENSOR_SCALE | {"fp8_math": True},
    ),
    _hopper(
        "query_channels_without_half_bit", "hopper_operands",
        "step * 4 + half * 2 + position % 2", "step * 4 + position % 2", FP8,
    ),
    _hopper(
        "probabilities_in_memory_order", "hopper",
        "probs = gl.permute(contraction_order(gl.permute(probs, (1, 0)), TILE), (1, 0))", "probs = probs", FP8,
    ),
    _hopper(
        "output_channels_in_memory_order", "hopper", "channel = paired_channel(channel)", "channel = channel",
        FP8 | {"kv_layout": "hnd"},
    ),
)  # fmt: skip


def _cdna(
    name: str, module: str, old: str, new: str, knobs: dict[str, Any] | None = None, **problem: Any
) -> Mutant:
    return Mutant(name, module, old, new, ("cdna_mfma",), problem, knobs or {})


def _gfx950(
    name: str, module: str, old: str, new: str, knobs: dict[str, Any] | None = None, **problem: Any
) -> Mutant:
    return replace(_cdna(name, module, old, new, knobs, **problem), cdna_arch="gfx950")


RING = {"lds_ring": True, "num_stages": 3, "num_warps": 2}
WIDE = {"partition_tokens": 128, "num_warps": 4}  # merges in two parts at head_dim 128
PARTS = {"program_rows": 16}

CDNA = (
    _cdna("tile_in_two_splits", "cdna", "range(begin, end, num_splits)", "range(begin, end, num_splits - 1)"),
    _cdna("keys_of_another_split", "cdna", "t0 + AHEAD_K * step, key_token", "t0 + AHEAD_K * TILE, key_token", {"num_stages": 2}, block_size=1024),
    _cdna("values_of_another_split", "cdna", "t0 + AHEAD_V * step, load_token", "t0 + AHEAD_V * TILE, load_token", {"num_stages": 3}, block_size=1024),
    _cdna("key_pages_of_the_tile_before", "cdna", "t0 + (1 + AHEAD_K) * step", "t0 + AHEAD_K * step"),
    _cdna("value_pages_of_the_tile_before", "cdna", "t0 + (1 + AHEAD_V) * step", "t0 + AHEAD_V * step"),
    _cdna("first_values_twice", "cdna", "next_value = loaded_value", "next_value = next_value", {"num_stages": 3}),
    _cdna("window_tail_of_values_kept", "cdna", "(t0 + TILE > context) | (t0 < first)", "(t0 + TILE > context)"),
    _cdna("context_tail_of_values_kept", "cdna", "(t0 + TILE > context) | (t0 < first)", "(t0 < first)"),
    _cdna("last_value_zeroed", "cdna_loads", "(position >= first) & (position < context)", "(position >= first) & (position < context - 1)"),
    _cdna("first_value_zeroed", "cdna_loads", "(position >= first) & (position < context)", "(position > first) & (position < context)"),
    _cdna("parts_see_one_token_less", "cdna", "(QUERY_LENGTH - 1 - last_token)", "(QUERY_LENGTH - last_token)", PARTS, qg=12),
    _cdna("first_part_sees_from_the_second_on", "cdna", "first_visible(length + first_token,", "first_visible(length + last_token,", PARTS, qg=12),
    _cdna("output_of_every_part_in_the_first", "cdna", "sequence, kv_head, split, first_row, kv_heads, num_splits, stride_out_token, stride_out_head,\n            N,", "sequence, kv_head, split, 0, kv_heads, num_splits, stride_out_token, stride_out_head,\n            N,", PARTS, qg=12),
    _cdna("query_of_the_first_part", "cdna", "sequence, kv_head, first_row,\n", "sequence, kv_head, 0,\n", PARTS, qg=12),
    _cdna("every_query_token_sees_all", "cdna", "length - QUERY_LENGTH + row // GROUP", "context - 1 + row * 0"),
    _cdna("masks_in_memory_order", "cdna", "column_token(along(TW, MMA, 2), RUN, MFMA_ROWS)", "along(TW, MMA, 2)"),
    _cdna("keys_in_memory_order", "cdna", "column_token(along(TW, KEY, 2), RUN, MFMA_ROWS)", "along(TW, KEY, 2)"),
    _cdna("accumulator_not_rescaled", "cdna", "acc = acc * gl.expand_dims(rescale, 2)", "acc = acc * 1.0"),
    _cdna("warps_not_weighted", "cdna", "acc * gl.expand_dims(weight * out_scale, 2)", "acc * out_scale"),
    _cdna("warp_sums_not_weighted", "cdna", "gl.sum(gl.sum(sums, 2) * weight, 0)", "gl.sum(gl.sum(sums, 2), 0)"),
    _cdna("parts_in_the_first_channels", "cdna", "i * (HEAD_DIM >> LEVELS)", "0 * i", WIDE, head_dim=128),
    _cdna("parts_by_pairs", "cdna", "[WARPS, N, 2, COLUMNS // 2]).permute((0, 1, 3, 2))", "[WARPS, N, COLUMNS // 2, 2])", WIDE, head_dim=128),
    _cdna("tile_offset_in_the_page_lost", "cdna_loads", "return slot * stride_token", "return slot * 0", block_size=1024),
    _cdna("shuffled_tile_offset_of_one_channel", "cdna_loads", "return slot * HEAD_DIM", "return slot", block_size=1024, kv_layout="aiter_5d"),
    _cdna(
        "shuffled_values_by_vector", "cdna_loads", "(token // VECTOR) * (HEAD_DIM * VECTOR)", "(token // VECTOR) * HEAD_DIM", kv_layout="aiter_5d",
    ),
    _cdna("key_vectors_of_page_64", "cdna", "(BLOCK_SIZE * VECTOR) + key_channel", "(64 * VECTOR) + key_channel"),
    _cdna(
        "output_channels_in_lane_order", "cdna_layouts",
        "(position % MFMA_ROWS) * (HEAD_DIM // MFMA_ROWS) + position // MFMA_ROWS", "position", kv_layout="hnd",
    ),
    _cdna("softcap_ignored", "cdna", "scores = capped(scores, softcap_log2)", "scores = scores", softcap=True),
    _gfx950("tensor_key_scale_dropped", "cdna", "score_scale *= gl.load(key_scale_ptr)", "score_scale *= 1.0", **TENSOR_SCALE),
    _gfx950("tensor_value_scale_dropped", "cdna", "out_scale *= gl.load(value_scale_ptr)", "out_scale *= 1.0", **TENSOR_SCALE),
    _gfx950("token_key_scale_dropped", "cdna", "scores = scores * load_scales", "scores = scores + 0.0 * load_scales", **TOKEN_SCALE),
    _gfx950("token_value_scale_dropped", "cdna", "probs = probs * value_scale", "probs = probs", **TOKEN_SCALE),
    _gfx950("token_value_scale_is_the_keys", "cdna", "load_scales(value_scale_ptr", "load_scales(key_scale_ptr", **TOKEN_SCALE),
    _gfx950(
        "scales_of_the_first_tile_of_a_page", "cdna_loads",
        "slot = ((t0 // TILE) % (BLOCK_SIZE // TILE)) * TILE + token", "slot = token", block_size=1024, **TOKEN_SCALE,
    ),
    _gfx950("unused_scales_kept", "cdna_loads", "+ slot, mask=kept, other=0.0", "+ slot", **TOKEN_SCALE),
    _gfx950("fp8_max_factor_missing", "cdna", "probs = probs * largest_fp8(CACHE)", "probs = probs", fp8_math=True, **TENSOR_SCALE),
    _gfx950("ring_reads_one_slot", "cdna", "slot = gl.where(slot == AHEAD, 0, slot + 1)", "slot = slot", RING, block_size=64),
    _gfx950("ring_overwrites_what_is_read", "cdna", "gl.where(slot == 0, AHEAD, slot - 1)", "slot", RING, block_size=64),
    _gfx950("ring_key_not_waited_for", "cdna", "wait_group(2 * AHEAD - 1)", "wait_group(2 * AHEAD)", RING, block_size=64),
    _gfx950("ring_value_not_waited_for", "cdna", "async_copy.wait_group(2 * AHEAD)\n", "async_copy.wait_group(2 * AHEAD + 1)\n", RING, block_size=64),
    _gfx950("ring_not_drained_before_the_merge", "cdna", "async_copy.wait_group(0)", "async_copy.wait_group(2 * AHEAD)", RING, block_size=64),
    _gfx950("ring_pages_of_the_first_tile", "cdna", "held_page(pages, held, WARPS)", "held_page(pages, 0, WARPS)", RING, block_size=64),
    _gfx950("ring_pages_of_the_tile_before", "cdna", "held_page(pages, held, WARPS)", "held_page(pages, held - 1, WARPS)", RING, block_size=64),
    _gfx950(
        "ring_refill_from_the_tile_that_is_read", "cdna",
        "look_up_pages(table_ptr, tile + AHEAD * num_splits,", "look_up_pages(table_ptr, tile,", RING, block_size=64,
    ),
    _gfx950("ring_keys_in_memory_order", "cdna_ring", "column_token(column, RUN, MFMA_ROWS)", "column", RING, block_size=64),
    _gfx950(
        "ring_values_by_wrong_rows", "cdna_ring", "(row // RUN) * (GROUPS * RUN) + group * RUN + row % RUN", "row * GROUPS + group",
        RING, block_size=64, kv_layout="hnd", head_dim=128,
    ),
)  # fmt: skip


MUTANTS = SHARED + HOPPER + CDNA
# Every CDNA mutant shows here: windowed, several query tokens, sinks, pages smaller than a tile, two splits; and what it asks for besides.
CDNA_PROBLEM = Problem(block_size=16, head_dim=64, qg=4, query_length=2, windowed=True, sinks=True)
CDNA_KNOBS = CdnaKnobs(
    partition_tokens=64, num_splits=2, num_stages=1, num_warps=2, reduce_chunk=8, reduce_warps=1
)


def mutants_of(family: str) -> list[Mutant]:
    """Every bug that can be planted in a family's kernels."""
    return [mutant for mutant in MUTANTS if family in mutant.families]


def plant(mutant: Mutant, folder: Path) -> Callable[..., list[KernelCall]]:
    """A plan whose kernels carry the bug. The copies are real modules in ``folder``: Triton reads the source of what it compiles."""
    package = f"mutant_{next(_serial)}"
    root = folder / package
    root.mkdir()
    (root / "__init__.py").write_text("")
    for name in SOURCES:
        text = (Path(patune.kernels.__path__[0]) / f"{name}.py").read_text()
        for other in SOURCES:
            text = text.replace(f"patune.kernels.{other} import", f"{package}.{other} import")
        if name == mutant.module:
            assert text.count(mutant.old) == 1, (
                f"{mutant.name}: {text.count(mutant.old)} places to plant it"
            )
            text = text.replace(mutant.old, mutant.new)
        (root / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    modules = {
        f"patune.kernels.{name}": importlib.import_module(f"{package}.{name}") for name in SOURCES
    }

    def plan(*args: Any, **kwargs: Any) -> list[KernelCall]:
        calls = plan_decode(*args, **kwargs)
        return [
            replace(
                call, kernel=getattr(modules[call.kernel.fn.__module__], call.kernel.fn.__name__)
            )
            for call in calls
        ]

    return plan
