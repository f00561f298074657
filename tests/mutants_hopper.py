"""Planted bugs in the Hopper kernel's own text."""

from __future__ import annotations

from typing import Any

from mutants_base import (
    FP8,
    FP16,
    LAST_IS_FIRST,
    LAST_TILE,
    ONE_SHOT,
    TENSOR_SCALE,
    TOKEN_SCALE,
    Mutant,
)

HOPPER_ONLY = ("hopper_wgmma",)


def _hopper(
    name: str, module: str, old: str, new: str, *also: tuple[str, str], knobs: dict[str, Any] | None = None, **problem: Any
) -> Mutant:  # fmt: skip
    return Mutant(name, module, old, new, HOPPER_ONLY, problem, knobs or {}, also=also)


def _faulting(name: str, module: str, old: str, new: str, **problem: Any) -> Mutant:
    return Mutant(name, module, old, new, HOPPER_ONLY, problem, faults=True)


def _race(name: str, old: str, new: str, *, knobs: dict[str, Any]) -> Mutant:
    """A wait that is too short: a device may have the data in time, an evaluator that counts copies has not."""
    return Mutant(name, "hopper", old, new, HOPPER_ONLY, {}, knobs, racy=True)


WALK = (
    _hopper("tile_in_two_splits", "hopper", "step = num_splits * TILE", "step = (num_splits - 1) * TILE"),
    _hopper("lost_last_round", "hopper", "(end - begin + num_splits - 1) // num_splits", "(end - begin) // num_splits"),
    _hopper("first_pages_of_the_tile_before", "hopper", "t0 = begin * TILE + tile * step", "t0 = begin * TILE + tile // 2 * step"),
    _hopper("later_pages_of_the_tile_before", "hopper", "t0 + (STAGES + PAGES_AHEAD) * step", "t0 + (STAGES + PAGES_AHEAD - 1) * step"),
    # the same with one page per tile
    _hopper("later_page_of_the_tile_before", "hopper", "t0 + (STAGES + PAGES_AHEAD) * step", "t0 + (STAGES + PAGES_AHEAD - 1) * step", block_size=64),
    _hopper(
        "key_pages_of_the_tile_before", "hopper", "next_key_pages = pages_of_tile(page_smem, (ahead + 1) % PAGE_SLOTS",
        "next_key_pages = pages_of_tile(page_smem, gl.maximum(ahead, STAGES) % PAGE_SLOTS",
    ),
    _hopper("later_partial_page_unmapped", "hopper_copy", "(index * BLOCK_SIZE < context)\n    cp_async", "((index + 1) * BLOCK_SIZE <= context)\n    cp_async"),
    _hopper("partial_tile_of_a_page_unmapped", "hopper_copy", "mask=t0 < mapped_end", "mask=t0 + TILE <= mapped_end", block_size=1024),
    _hopper(
        "keys_of_the_next_slot", "hopper", "else:\n            key = key_smem.index(slot)", "else:\n            key = key_smem.index((slot + 1) % STAGES)",
    ),
    _hopper("values_of_the_slot_that_is_filled", "hopper", "elif AITER:\n            value_t = value_smem.index(slot)", "elif AITER:\n            value_t = value_smem.index(into)"),
    _faulting("context_of_the_first_sequence", "hopper", "gl.load(context_ptr + sequence)", "gl.load(context_ptr)"),
    _faulting("context_of_the_sequence_before", "hopper", "gl.load(context_ptr + sequence)", "gl.load(context_ptr + gl.maximum(sequence - 1, 0))"),
    _faulting("table_assumed_dense", "hopper", "sequence.to(gl.int64) * stride_table", "sequence.to(gl.int64) * table_width"),
)  # fmt: skip

SEEN = "seen = visible((t0 + token)[:, None], limit[None, :], window, WINDOWED)"
LAST_ROW = "(limit == context - 1)[None, :])"

MASKS = (
    _hopper("first_token_of_a_tile_for_the_last_row", "hopper", SEEN, f"{SEEN} & ((token > 0)[:, None] | {LAST_ROW}"),
    _hopper("first_token_of_a_split_for_the_last_row", "hopper", SEEN, f"{SEEN} & ((t0 + token > begin * TILE)[:, None] | {LAST_ROW}"),
    _hopper("window_of_the_last_row", "hopper", SEEN, SEEN.replace("window,", "window + limit[None, :] - (context - 1),")),
    _hopper("window_without_the_query_tokens", "hopper", SEEN, SEEN.replace("window,", "window - QUERY_LENGTH,")),
    _hopper("every_query_token_sees_all", "hopper", "context - QUERY_LENGTH + row // GROUP", "context - 1 + row * 0"),
    _hopper("limit_by_head", "hopper", "context - QUERY_LENGTH + row // GROUP", "context - QUERY_LENGTH + row % QUERY_LENGTH"),
    _hopper("window_tail_of_values_kept", "hopper", "if (t0 + TILE > context) | (t0 < first):", "if t0 + TILE > context:"),
    _hopper("value_behind_the_context_kept", "hopper_copy", "((token >= first) & (token < context))", "((token >= first) & (token <= context))"),
    _hopper("first_value_vector_lost", "hopper_copy", "kept = (vector >= first // VECTOR)", "kept = (vector > first // VECTOR)"),
    _hopper("last_value_vector_lost", "hopper_copy", "(vector * VECTOR < context)", "((vector + 1) * VECTOR < context)"),
    _hopper("last_key_zeroed", "hopper_copy", "(t0 + token < context)\n    cp_async(tile_smem", "(t0 + token < context - 1)\n    cp_async(tile_smem"),
    _hopper("unseen_rows_copied", "hopper_copy", "channel_offset[None, :], mask=kept[:, None])", "channel_offset[None, :])", kv_layout="hnd"),
    _hopper("rows_behind_the_context_copied", "hopper_copy", "(t0 + token < context)\n    cp_async(tile_smem", "(t0 + token < context + 16)\n    cp_async(tile_smem", kv_layout="hnd"),
    _hopper("first_key_zeroed", "hopper_copy", "(t0 + token >= first) & (t0 + token < context)\n    cp_async(tile_smem", "(t0 + token > first) & (t0 + token < context)\n    cp_async(tile_smem"),
)  # fmt: skip

AT_SHUFFLED = "_in_page(t0 // VECTOR, token // VECTOR,"
TOKEN_SLOT = "slot = _in_page(t0, token, BLOCK_SIZE, TILE)"
VALUE_SLOT = "token_offset = _in_page(t0, token, BLOCK_SIZE, TILE)"
SCALE_SLOT = "* stride_page + _in_page(t0, token, BLOCK_SIZE, TILE)"
LAST_FIRST = f"_in_page((t0 // TILE) {LAST_IS_FIRST} * TILE, token,"
KEY_PAGE = "pages.to(gl.int64) * stride_page + token_offset\n    kept"
VALUE_PAGE = "pages.to(gl.int64) * stride_page + token_offset\n    vector"
SCALE_PAGE = "pages.to(gl.int64) * stride_page + _in_page"
X_OF_KEYS = "VECTOR: gl.constexpr = vector_length(cache_ptr.dtype.element_ty)\n    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))"
X_OF_VALUES = X_OF_KEYS.replace("SliceLayout(1,", "SliceLayout(0,")
X, X_8 = "vector_length(cache_ptr.dtype.element_ty)", "8"
START = "    start_after_previous_kernel(OVERLAP)\n"
VALUE_STRIDES = "stride_value_page, stride_value_token,\n                False"

ADDRESSES = (
    _hopper("last_key_tile_of_a_page_is_its_first", "hopper_copy", TOKEN_SLOT, TOKEN_SLOT.replace("_in_page(t0, token,", LAST_FIRST), **LAST_TILE),
    _hopper("last_value_tile_of_a_page_is_its_first", "hopper_copy", VALUE_SLOT, VALUE_SLOT.replace("_in_page(t0, token,", LAST_FIRST), **LAST_TILE),
    _hopper(
        "last_shuffled_tile_of_a_page_is_its_first", "hopper_copy", AT_SHUFFLED,
        f"_in_page((t0 // TILE) {LAST_IS_FIRST} * (TILE // VECTOR), token // VECTOR,", **LAST_TILE, kv_layout="aiter_5d",
    ),
    _hopper(
        "last_scale_tile_of_a_page_is_its_first", "hopper_copy", SCALE_SLOT, SCALE_SLOT.replace("_in_page(t0, token,", LAST_FIRST),
        **LAST_TILE, **TOKEN_SCALE,
    ),
    _hopper("scales_of_the_first_tile_of_a_page", "hopper_copy", SCALE_SLOT, SCALE_SLOT.replace("(t0,", "(t0 * 0,"), block_size=1024, **TOKEN_SCALE),
    _hopper("shuffled_tile_offset_in_the_page_lost", "hopper_copy", AT_SHUFFLED, AT_SHUFFLED.replace("t0 //", "t0 * 0 //"), block_size=1024, kv_layout="aiter_5d"),
    _hopper("shuffled_values_by_page_stride", "hopper_copy", "vector_in_page * (HEAD_DIM * VECTOR)", "vector_in_page * (BLOCK_SIZE * VECTOR)", kv_layout="aiter_5d"),
    _hopper("key_vectors_of_8_bytes", "hopper_copy", X_OF_KEYS, X_OF_KEYS.replace(X, X_8), **FP8),
    _hopper("value_vectors_of_8_bytes", "hopper_copy", X_OF_VALUES, X_OF_VALUES.replace(X, X_8), block_size=64, kv_layout="aiter_5d", **FP8),
    _hopper(
        "values_by_key_strides", "hopper", "value_ptr, value_smem, value_pages, t0, first, context, stride_value_page,\n",
        "value_ptr, value_smem, value_pages, t0, first, context, stride_key_page,\n",
    ),
    _hopper("value_heads_by_key_stride", "hopper", "value_ptr += kv_head * stride_value_head", "value_ptr += kv_head * stride_key_head"),
    _hopper("value_tokens_by_key_stride", "hopper", VALUE_STRIDES, VALUE_STRIDES.replace("stride_value_token", "stride_key_token"), kv_layout="nhd"),
    _hopper("tokens_assumed_dense", "hopper_copy", "token_offset = slot * stride_token", "token_offset = slot * HEAD_DIM", kv_layout="nhd"),
    _hopper("key_pages_assumed_dense", "hopper", START, f"{START}    stride_key_page = kv_heads * BLOCK_SIZE * HEAD_DIM\n", kv_layout="hnd"),
    _hopper("value_pages_assumed_dense", "hopper", START, f"{START}    stride_value_page = kv_heads * BLOCK_SIZE * HEAD_DIM\n", kv_layout="hnd"),
    _faulting("key_page_offset_in_32_bits", "hopper_copy", KEY_PAGE, KEY_PAGE.replace(".to(gl.int64)", "")),
    _faulting("value_page_offset_in_32_bits", "hopper_copy", VALUE_PAGE, VALUE_PAGE.replace(".to(gl.int64)", "")),
    _faulting("kv_head_offset_in_32_bits", "hopper", "gl.program_id(0).to(gl.int64)", "gl.program_id(0)"),
)  # fmt: skip

KEY_SCALE = "score_scale *= gl.load(key_scale_ptr)"
VALUE_SCALE = "out_scale *= gl.load(value_scale_ptr)"
TOKEN_KEY_SCALE = (
    "scores = scores * key_scale_smem.index(slot).load(gl.SliceLayout(1, KEY_MMA))[:, None]"
)
PROBS_SCALED = "probs = probs * value_scale\n"
CAP = "        if SOFTCAPPED:\n            scores = capped(scores, softcap_log2)\n"
FP8_MATH = TENSOR_SCALE | {"fp8_math": True}

SCALES = (
    _hopper("tensor_key_scale_dropped", "hopper", KEY_SCALE, "score_scale *= 1.0", **TENSOR_SCALE),
    _hopper("tensor_key_scale_twice", "hopper", KEY_SCALE, f"{KEY_SCALE} * gl.load(key_scale_ptr)", **TENSOR_SCALE),
    _hopper("tensor_key_scale_per_head", "hopper", KEY_SCALE, "score_scale *= gl.load(key_scale_ptr + kv_head)", **TENSOR_SCALE),
    _hopper("tensor_value_scale_dropped", "hopper", VALUE_SCALE, "out_scale *= 1.0", **TENSOR_SCALE),
    _hopper("tensor_value_scale_twice", "hopper", VALUE_SCALE, f"{VALUE_SCALE} * gl.load(value_scale_ptr)", **TENSOR_SCALE),
    _hopper("token_key_scale_dropped", "hopper", TOKEN_KEY_SCALE, "scores = scores", **TOKEN_SCALE),
    _hopper("token_value_scale_dropped", "hopper", PROBS_SCALED, "probs = probs\n", **TOKEN_SCALE),
    _hopper("token_scale_of_the_first_token", "hopper_copy", SCALE_SLOT, SCALE_SLOT.replace("token,", "token * 0,"), **TOKEN_SCALE),
    _hopper("token_scales_taken_for_a_tensors_too", "hopper", "if key_scale_ptr is not None and not TOKEN_SCALES:", "if key_scale_ptr is not None:", **TOKEN_SCALE),
    _hopper("key_scales_of_the_first_head", "hopper", "key_scale_ptr += kv_head * stride_key_scale_head", "key_scale_ptr += kv_head * 0", **TOKEN_SCALE),
    _hopper("value_scales_of_the_first_head", "hopper", "value_scale_ptr += kv_head * stride_value_scale_head", "value_scale_ptr += kv_head * 0", **TOKEN_SCALE),
    _hopper("token_value_scale_is_the_keys", "hopper", "copy_scales(value_scale_ptr,", "copy_scales(key_scale_ptr,", **TOKEN_SCALE),
    _hopper(
        "value_scale_by_key_strides", "hopper", "value_scale_smem, pages, t0, first, context, stride_value_scale_page",
        "value_scale_smem, pages, t0, first, context, stride_key_scale_page", **TOKEN_SCALE,
    ),
    _faulting("scale_page_offset_in_32_bits", "hopper_copy", SCALE_PAGE, SCALE_PAGE.replace(".to(gl.int64)", ""), **TOKEN_SCALE),
    # fp16 products only: bf16's do not overflow
    _hopper("value_scale_not_in_the_reference", "tiles", "gl.max(scores + value_log2, AXIS)", "gl.max(scores, AXIS)", **TOKEN_SCALE),
    _hopper(
        "value_scale_after_rounding", "hopper", PROBS_SCALED, "probs = probs\n",
        ("probs = probs.to(VALUE_MATH)\n", "probs = (probs.to(VALUE_MATH).to(gl.float32) * value_scale).to(VALUE_MATH)\n"), **TOKEN_SCALE,
    ),
    _hopper("query_factor_dropped", "query", "factor = gl.exp2(-shift)", "factor = gl.exp2(shift * 0.0)", **FP8),
    _hopper("fp8_max_factor_missing", "hopper", "probs = probs * FP8_MAX", "probs = probs", **FP8_MATH),
    _hopper(
        "fp8_probabilities_at_most_1", "hopper", "probs = probs * FP8_MAX", "probs = probs",
        ("out_scale *= 1.0 / FP8_MAX", "out_scale *= 1.0"), **FP8_MATH,
    ),
    _hopper("query_channels_without_half_bit", "hopper_operands", "step * 4 + half * 2 + position % 2", "step * 4 + position % 2", **FP8),
    _hopper(
        "probabilities_in_memory_order", "hopper",
        "probs = gl.permute(contraction_order(gl.permute(probs, (1, 0)), TILE), (1, 0))", "probs = probs", **FP8,
    ),
    _hopper("output_channels_in_memory_order", "hopper", "channel = paired_channel(channel)", "channel = channel", kv_layout="hnd", **FP8),
    _hopper("softcap_ignored", "hopper", "scores = capped(scores, softcap_log2)", "scores = scores", softcap=True),
    _hopper(
        "softcap_before_the_key_scales", "hopper", CAP, "",
        ("        value_scale_log2 = None\n", CAP + "        value_scale_log2 = None\n"), softcap=True, **TOKEN_SCALE,
    ),
)  # fmt: skip

SCALE = "score_scale = score_scale_log2"
RESCALED = "acc * gl.convert_layout(rescale, gl.SliceLayout(0, MMA))[None, :]"

ARITHMETIC = (
    _hopper("fixed_softmax_scale", "hopper", SCALE, "score_scale = 1.4426950408889634 / HEAD_DIM**0.5"),
    _hopper("softmax_scale_in_natural_units", "hopper", SCALE, f"{SCALE} * 0.6931471805599453"),
    _hopper("maximum_starts_at_zero", "hopper", 'row_max = gl.full([N], -float("inf")', "row_max = gl.full([N], 0.0", sinks=False),
    _hopper("accumulator_not_rescaled", "hopper", RESCALED, "acc * 1.0"),
    _hopper("accumulator_in_bf16", "hopper", RESCALED, f"({RESCALED}).to(gl.bfloat16).to(gl.float32)", knobs=ONE_SHOT, **FP16),
)  # fmt: skip

ONE_STAGE, THREE_STAGES = {"num_stages": 1}, {"num_stages": 3}
KEY_WAIT, VALUE_WAIT = "wait_group(2 * STAGES - 3)", "wait_group(2 * STAGES - 2)  # V(i)"

# No barrier and no fence: without ours the compiler puts one of its own there (Triton 3.9, read from PTX).
RACES = (
    _race("keys_not_waited_for", KEY_WAIT, "wait_group(2 * STAGES - 2)", knobs=THREE_STAGES),
    _race("keys_not_waited_for_one_stage", "wait_group(1)", "wait_group(2)", knobs=ONE_STAGE),
    _race("values_not_waited_for", VALUE_WAIT, "wait_group(2 * STAGES - 1)", knobs=THREE_STAGES),
    _race("values_not_waited_for_one_stage", VALUE_WAIT, "wait_group(2 * STAGES - 1)", knobs=ONE_STAGE),
    _race("key_and_value_in_one_group", "    async_copy.commit_group()\n    if live:", "    if live:", knobs=THREE_STAGES),
    _race("copy_into_the_slot_that_is_read", "into = ahead % STAGES", "into = slot", knobs=THREE_STAGES),
    Mutant(
        "kernel_before_not_waited_for", "overlap",
        'gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)\n        ', "",
        HOPPER_ONLY, {}, {"overlap_launch": True}, shows=("device",), racy=True,
    ),
)  # fmt: skip

HOPPER = WALK + MASKS + ADDRESSES + SCALES + ARITHMETIC + RACES
