"""Planted bugs in the CDNA kernel's own text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mutants_base import (
    FP8,
    FP16,
    LAST_IS_FIRST,
    LAST_TILE,
    LAST_TILE_FIRST,
    ONE_SHOT,
    TENSOR_SCALE,
    TOKEN_SCALE,
    Mutant,
)


def _cdna(
    name: str, module: str, old: str, new: str, *also: tuple[str, str], knobs: dict[str, Any] | None = None, **problem: Any
) -> Mutant:  # fmt: skip
    return Mutant(name, module, old, new, ("cdna_mfma",), problem, knobs or {}, also=also)


def _gfx950(
    name: str, module: str, old: str, new: str, *also: tuple[str, str], knobs: dict[str, Any] | None = None, **problem: Any
) -> Mutant:  # fmt: skip
    return replace(_cdna(name, module, old, new, *also, knobs=knobs, **problem), cdna_arch="gfx950")


def _ring(name: str, module: str, old: str, new: str, **problem: Any) -> Mutant:
    return _gfx950(name, module, old, new, knobs=RING, **{"block_size": 64} | problem)


def _parts(name: str, module: str, old: str, new: str) -> Mutant:
    return _cdna(name, module, old, new, knobs={"program_rows": 16}, qg=12)


RING = {"lds_ring": True, "num_stages": 3, "num_warps": 2}
WIDE = {"partition_tokens": 128, "num_warps": 4}  # merges in two parts at head_dim 128

WALK = (
    _cdna("tile_in_two_splits", "cdna", "range(begin, end, num_splits)", "range(begin, end, num_splits - 1)"),
    _cdna("keys_of_another_split", "cdna", "t0 + AHEAD_K * step, key_token", "t0 + AHEAD_K * TILE, key_token", knobs={"num_stages": 2}, block_size=1024),
    _cdna("values_of_another_split", "cdna", "t0 + AHEAD_V * step, load_token", "t0 + AHEAD_V * TILE, load_token", knobs={"num_stages": 3}, block_size=1024),
    _cdna("key_pages_of_the_tile_before", "cdna", "t0 + (1 + AHEAD_K) * step", "t0 + AHEAD_K * step"),
    _cdna("value_pages_of_the_tile_before", "cdna", "t0 + (1 + AHEAD_V) * step", "t0 + AHEAD_V * step"),
    _cdna("first_values_twice", "cdna", "next_value = loaded_value", "next_value = next_value", knobs={"num_stages": 3}),
    _cdna("partial_tile_of_a_page_unmapped", "cdna_loads", "mask=t0 < context", "mask=t0 + TILE <= context", block_size=1024),
    _cdna("context_of_the_first_sequence", "cdna", "gl.load(context_ptr + sequence)", "gl.load(context_ptr)"),
    _cdna("context_of_the_sequence_before", "cdna", "gl.load(context_ptr + sequence)", "gl.load(context_ptr + gl.maximum(sequence - 1, 0))"),
    _cdna("table_assumed_dense", "cdna", "sequence.to(gl.int64) * stride_table", "sequence.to(gl.int64) * ((length + BLOCK_SIZE - 1) // BLOCK_SIZE)"),
)  # fmt: skip

SEEN = "seen = visible(t0 + score_token, limit, window, WINDOWED)"
LAST_ROW = "(limit == context - 1))"
UNSEEN = "(t0 + TILE > context) | (t0 < first)"
KEPT = "(position >= first) & (position < context)\n    return"

MASKS = (
    _cdna("first_token_of_a_tile_for_the_last_row", "cdna", SEEN, f"{SEEN} & ((score_token > 0) | {LAST_ROW}"),
    _cdna("first_token_of_a_split_for_the_last_row", "cdna", SEEN, f"{SEEN} & ((t0 + score_token > begin * TILE) | {LAST_ROW}"),
    _cdna("window_of_the_last_row", "cdna", SEEN, SEEN.replace("window,", "window + limit - (context - 1),")),
    _cdna("window_without_the_query_tokens", "cdna", SEEN, SEEN.replace("window,", "window - QUERY_LENGTH,")),
    _cdna("every_query_token_sees_all", "cdna", "length - QUERY_LENGTH + row // GROUP", "context - 1 + row * 0"),
    _cdna("limit_by_head", "cdna", "length - QUERY_LENGTH + row // GROUP", "length - QUERY_LENGTH + row % QUERY_LENGTH"),
    _cdna("window_tail_of_values_kept", "cdna", UNSEEN, "(t0 + TILE > context)"),
    _cdna("context_tail_of_values_kept", "cdna", UNSEEN, "(t0 < first)"),
    _cdna("last_value_zeroed", "cdna_loads", KEPT, KEPT.replace("< context", "< context - 1")),
    _cdna("first_value_zeroed", "cdna_loads", KEPT, KEPT.replace(">= first", "> first")),
    _parts("parts_see_one_token_less", "cdna", "(QUERY_LENGTH - 1 - last_token)", "(QUERY_LENGTH - last_token)"),
    _parts("first_part_sees_from_the_second_on", "cdna", "first_visible(length + first_token,", "first_visible(length + last_token,"),
    _parts(
        "output_of_every_part_in_the_first", "cdna",
        "sequence, kv_head, split, first_row, kv_heads, num_splits, stride_out_token, stride_out_head,\n            N,",
        "sequence, kv_head, split, 0, kv_heads, num_splits, stride_out_token, stride_out_head,\n            N,",
    ),
    _parts("query_of_the_first_part", "cdna", "sequence, kv_head, first_row,\n", "sequence, kv_head, 0,\n"),
    _cdna("masks_in_memory_order", "cdna", "column_token(along(TW, MMA, 2), RUN, MFMA_ROWS)", "along(TW, MMA, 2)"),
    _cdna("keys_in_memory_order", "cdna", "column_token(along(TW, KEY, 2), RUN, MFMA_ROWS)", "along(TW, KEY, 2)"),
)  # fmt: skip

RESCALED = "acc * gl.expand_dims(rescale, 2)"
SCALE = "score_scale = score_scale_log2"

ARITHMETIC = (
    _cdna("fixed_softmax_scale", "cdna", SCALE, "score_scale = 1.4426950408889634 / HEAD_DIM**0.5"),
    _cdna("softmax_scale_in_natural_units", "cdna", SCALE, f"{SCALE} * 0.6931471805599453"),
    _cdna("maximum_starts_at_zero", "cdna", 'row_max = gl.full([WARPS, N], -float("inf")', "row_max = gl.full([WARPS, N], 0.0", sinks=False),
    _cdna("accumulator_not_rescaled", "cdna", RESCALED, "acc * 1.0"),
    _cdna("accumulator_in_bf16", "cdna", RESCALED, f"({RESCALED}).to(gl.bfloat16).to(gl.float32)", knobs=ONE_SHOT, **FP16),
    _cdna("warps_not_weighted", "cdna", "acc * gl.expand_dims(weight * out_scale, 2)", "acc * out_scale"),
    _cdna("warp_sums_not_weighted", "cdna", "gl.sum(gl.sum(sums, 2) * weight, 0)", "gl.sum(gl.sum(sums, 2), 0)"),
    _cdna("merge_guard_removed", "cdna", "finite_top = gl.where(top == NEG_INF, 0.0, top)", "finite_top = top"),
    _cdna("parts_in_the_first_channels", "cdna", "i * (HEAD_DIM >> LEVELS)", "0 * i", knobs=WIDE, head_dim=128),
    _cdna("parts_by_pairs", "cdna", "[WARPS, N, 2, COLUMNS // 2]).permute((0, 1, 3, 2))", "[WARPS, N, COLUMNS // 2, 2])", knobs=WIDE, head_dim=128),
    _cdna("softcap_ignored", "cdna", "scores = capped(scores, softcap_log2)", "scores = scores", softcap=True),
)  # fmt: skip

LOAD_KEY = "loaded_key = load_tile(\n                key_ptr, key_page, t0 + AHEAD_K * step,"
LOAD_VALUE = (
    "loaded_value = load_tile(\n                value_ptr, value_page, t0 + AHEAD_V * step,"
)
SCALE_SLOT = "slot = ((t0 // TILE) % (BLOCK_SIZE // TILE)) * TILE + token"
RING_TILE = "+ tile_offset(t0,"
BEFORE = "    PARTS: gl.constexpr = (ROWS + N - 1) // N\n"
LARGE_PAGE = "+ page.to(gl.int64) * stride_page\n            + tile_offset"
SMALL_PAGE = "page.to(gl.int64) * stride_page\n            + token_offset"
RING_PAGE = "+ page.to(gl.int64) * stride_page"
SCALE_PAGE = "page.to(gl.int64) * stride_page + slot"
VALUE_PAGES = "t0 + AHEAD_V * step, load_token, value_offset, stride_value_page"
X = "VECTOR: gl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth"

ADDRESSES = (
    _cdna("tile_offset_in_the_page_lost", "cdna_loads", "return slot * stride_token", "return slot * 0", block_size=1024),
    _cdna("shuffled_tile_offset_of_one_channel", "cdna_loads", "return slot * HEAD_DIM", "return slot", block_size=1024, kv_layout="aiter_5d"),
    _cdna("last_key_tile_of_a_page_is_its_first", "cdna", LOAD_KEY, LOAD_KEY.replace("t0 + AHEAD_K * step", LAST_TILE_FIRST), **LAST_TILE),
    _cdna("last_value_tile_of_a_page_is_its_first", "cdna", LOAD_VALUE, LOAD_VALUE.replace("t0 + AHEAD_V * step", LAST_TILE_FIRST), **LAST_TILE),
    _cdna(
        "last_shuffled_tile_of_a_page_is_its_first", "cdna_loads", "return slot * HEAD_DIM",
        "return slot % (BLOCK_SIZE - TILE) * HEAD_DIM", **LAST_TILE, kv_layout="aiter_5d",
    ),
    _gfx950(
        "last_scale_tile_of_a_page_is_its_first", "cdna_loads", SCALE_SLOT,
        SCALE_SLOT.replace("% (BLOCK_SIZE // TILE)", LAST_IS_FIRST), **LAST_TILE, **TOKEN_SCALE,
    ),
    _ring("ring_last_tile_of_a_page_is_its_first", "cdna_ring", RING_TILE, RING_TILE.replace("t0", LAST_TILE_FIRST), **LAST_TILE),
    _cdna("shuffled_values_by_vector", "cdna_loads", "(token // VECTOR) * (HEAD_DIM * VECTOR)", "(token // VECTOR) * HEAD_DIM", kv_layout="aiter_5d"),
    _cdna("key_vectors_of_page_64", "cdna", "(BLOCK_SIZE * VECTOR) + key_channel", "(64 * VECTOR) + key_channel"),
    _gfx950(
        "key_vectors_of_8_bytes", "cdna", "(key_channel // VECTOR) * (BLOCK_SIZE * VECTOR) + key_channel % VECTOR",
        "(key_channel // 8) * (BLOCK_SIZE * 8) + key_channel % 8", ("key_stride: gl.constexpr = VECTOR", "key_stride: gl.constexpr = 8"), **FP8,
    ),
    _gfx950("value_vectors_of_8_bytes", "cdna_loads", X, "VECTOR: gl.constexpr = 8", block_size=64, kv_layout="aiter_5d", **FP8),
    _cdna(
        "output_channels_in_lane_order", "cdna_layouts",
        "(position % MFMA_ROWS) * (HEAD_DIM // MFMA_ROWS) + position // MFMA_ROWS", "position", kv_layout="hnd",
    ),
    _cdna("values_by_key_strides", "cdna", VALUE_PAGES, VALUE_PAGES.replace("stride_value_page", "stride_key_page")),
    _cdna("value_heads_by_key_stride", "cdna", "kv_head.to(gl.int64) * stride_value_head", "kv_head.to(gl.int64) * stride_key_head"),
    _cdna("value_tokens_by_key_stride", "cdna", "value_stride = stride_value_token", "value_stride = stride_key_token", kv_layout="nhd"),
    _cdna("key_tokens_assumed_dense", "cdna", "key_stride = stride_key_token", "key_stride = HEAD_DIM", kv_layout="nhd"),
    _cdna("key_pages_assumed_dense", "cdna", BEFORE, f"{BEFORE}    stride_key_page = kv_heads * BLOCK_SIZE * HEAD_DIM\n", kv_layout="hnd"),
    _cdna("value_pages_assumed_dense", "cdna", BEFORE, f"{BEFORE}    stride_value_page = kv_heads * BLOCK_SIZE * HEAD_DIM\n", kv_layout="hnd"),
    _cdna("page_offset_in_32_bits", "cdna_loads", LARGE_PAGE, LARGE_PAGE.replace(".to(gl.int64)", ""), block_size=1024),
    _cdna("small_page_offset_in_32_bits", "cdna_loads", SMALL_PAGE, SMALL_PAGE.replace(".to(gl.int64)", "")),
    _ring("ring_page_offset_in_32_bits", "cdna_ring", RING_PAGE, RING_PAGE.replace(".to(gl.int64)", "")),
    _gfx950("scale_page_offset_in_32_bits", "cdna_loads", SCALE_PAGE, SCALE_PAGE.replace(".to(gl.int64)", ""), **TOKEN_SCALE),
    _cdna("key_head_offset_in_32_bits", "cdna", "kv_head.to(gl.int64) * stride_key_head", "kv_head * stride_key_head"),
    _cdna("value_head_offset_in_32_bits", "cdna", "kv_head.to(gl.int64) * stride_value_head", "kv_head * stride_value_head"),
)  # fmt: skip

KEY_SCALE = "score_scale *= gl.load(key_scale_ptr)"
VALUE_SCALE = "out_scale *= gl.load(value_scale_ptr)"
PROBS_SCALED = "probs = probs * value_scale\n"
VALUE_SCALE_PAGE = (
    "load_scales(value_scale_ptr, scale_page, t0, score_token, kept, stride_value_scale_page"
)
CAP = "        if SOFTCAPPED:\n            scores = capped(scores, softcap_log2)\n"
FP8_MATH = TENSOR_SCALE | {"fp8_math": True}

SCALES = (
    _gfx950("tensor_key_scale_dropped", "cdna", KEY_SCALE, "score_scale *= 1.0", **TENSOR_SCALE),
    _gfx950("tensor_key_scale_twice", "cdna", KEY_SCALE, f"{KEY_SCALE} * gl.load(key_scale_ptr)", **TENSOR_SCALE),
    _gfx950("tensor_key_scale_per_head", "cdna", KEY_SCALE, "score_scale *= gl.load(key_scale_ptr + kv_head)", **TENSOR_SCALE),
    _gfx950("tensor_value_scale_dropped", "cdna", VALUE_SCALE, "out_scale *= 1.0", **TENSOR_SCALE),
    _gfx950("tensor_value_scale_twice", "cdna", VALUE_SCALE, f"{VALUE_SCALE} * gl.load(value_scale_ptr)", **TENSOR_SCALE),
    _gfx950("token_key_scale_dropped", "cdna", "scores = scores * load_scales", "scores = scores + 0.0 * load_scales", **TOKEN_SCALE),
    _gfx950("token_value_scale_dropped", "cdna", PROBS_SCALED, "probs = probs\n", **TOKEN_SCALE),
    _gfx950("token_scale_of_the_first_token", "cdna_loads", "slot = token % BLOCK_SIZE\n    return", "slot = token * 0\n    return", **TOKEN_SCALE),
    _gfx950("token_scales_taken_for_a_tensors_too", "cdna", "if key_scale_ptr is not None and not TOKEN_SCALES:", "if key_scale_ptr is not None:", **TOKEN_SCALE),
    _gfx950("key_scales_of_the_first_head", "cdna", "kv_head.to(gl.int64) * stride_key_scale_head", "kv_head.to(gl.int64) * 0", **TOKEN_SCALE),
    _gfx950("value_scales_of_the_first_head", "cdna", "kv_head.to(gl.int64) * stride_value_scale_head", "kv_head.to(gl.int64) * 0", **TOKEN_SCALE),
    _gfx950("token_value_scale_is_the_keys", "cdna", "load_scales(value_scale_ptr", "load_scales(key_scale_ptr", **TOKEN_SCALE),
    _gfx950("value_scale_by_key_strides", "cdna", VALUE_SCALE_PAGE, VALUE_SCALE_PAGE.replace("stride_value", "stride_key"), **TOKEN_SCALE),
    _gfx950("scales_of_the_first_tile_of_a_page", "cdna_loads", SCALE_SLOT, "slot = token", block_size=1024, **TOKEN_SCALE),
    _gfx950("unused_scales_kept", "cdna_loads", "+ slot, mask=kept, other=0.0", "+ slot", **TOKEN_SCALE),
    _gfx950(
        "value_scale_after_rounding", "cdna", PROBS_SCALED, "probs = probs\n",
        ("tokens_in_order(probs.to(MATH),", "tokens_in_order((probs.to(MATH).to(gl.float32) * value_scale).to(MATH),"),
        **TOKEN_SCALE, fp8_math=True,
    ),
    _gfx950("fp8_max_factor_missing", "cdna", "probs = probs * largest_fp8(CACHE)", "probs = probs", **FP8_MATH),
    _gfx950(
        "fp8_probabilities_at_most_1", "cdna", "probs = probs * largest_fp8(CACHE)", "probs = probs",
        ("out_scale *= 1.0 / largest_fp8(CACHE)", "out_scale *= 1.0"), **FP8_MATH,
    ),
    _gfx950(
        "softcap_before_the_key_scales", "cdna", CAP, "",
        ("        value_scale_log2 = None\n", CAP + "        value_scale_log2 = None\n"), softcap=True, **TOKEN_SCALE,
    ),
)  # fmt: skip

RINGS = (
    _ring("ring_reads_one_slot", "cdna", "slot = gl.where(slot == AHEAD, 0, slot + 1)", "slot = slot"),
    _ring("ring_overwrites_what_is_read", "cdna", "gl.where(slot == 0, AHEAD, slot - 1)", "slot"),
    _ring("ring_key_not_waited_for", "cdna", "wait_group(2 * AHEAD - 1)", "wait_group(2 * AHEAD)"),
    _ring("ring_value_not_waited_for", "cdna", "async_copy.wait_group(2 * AHEAD)\n", "async_copy.wait_group(2 * AHEAD + 1)\n"),
    _ring("ring_not_drained_before_the_merge", "cdna", "async_copy.wait_group(0)", "async_copy.wait_group(2 * AHEAD)"),
    _ring("ring_pages_of_the_first_tile", "cdna", "held_page(pages, held, WARPS)", "held_page(pages, 0, WARPS)"),
    _ring("ring_pages_of_the_tile_before", "cdna", "held_page(pages, held, WARPS)", "held_page(pages, held - 1, WARPS)"),
    _ring("ring_refill_from_the_tile_that_is_read", "cdna", "look_up_pages(table_ptr, tile + AHEAD * num_splits,", "look_up_pages(table_ptr, tile,"),
    _ring("ring_keys_in_memory_order", "cdna_ring", "column_token(column, RUN, MFMA_ROWS)", "column"),
    _ring(
        "ring_values_by_wrong_rows", "cdna_ring", "(row // RUN) * (GROUPS * RUN) + group * RUN + row % RUN", "row * GROUPS + group",
        kv_layout="hnd", head_dim=128,
    ),
)  # fmt: skip

CDNA = WALK + MASKS + ARITHMETIC + ADDRESSES + SCALES + RINGS
