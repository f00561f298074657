"""Planted bugs in the text that both kernel families run through: each is planted for each of them."""

from __future__ import annotations

from typing import Any

from mutants_base import FP16, ONE_SHOT, PLACES, TENSOR_SCALE, TWO_CHUNKS, Mutant


def _shared(
    name: str, module: str, old: str, new: str, *also: tuple[str, str], knobs: dict[str, Any] | None = None,
    shows: tuple[str, ...] = PLACES, **problem: Any,
) -> Mutant:  # fmt: skip
    """On gfx950 where fp8 is asked for: only there CDNA's is Hopper's e4m3fn."""
    arch = "gfx950" if "kv_dtype" in problem and problem["kv_dtype"].startswith("fp8") else "gfx942"
    return Mutant(name, module, old, new, also=also, problem=problem, knobs=knobs or {}, cdna_arch=arch, shows=shows)  # fmt: skip


def _faulting(name: str, module: str, old: str, new: str) -> Mutant:
    return Mutant(name, module, old, new, faults=True)


FP8_QUERY = TENSOR_SCALE | {"query_dtype": "fp8_e4m3fn"}

WALK = (
    _shared("causal_off_by_one", "tiles", "position <= limit", "position < limit"),
    _shared("sees_past_context", "tiles", "position <= limit", "position <= limit + 1"),
    _shared("window_one_short", "tiles", "position > limit - window", "position > limit - window + 1"),
    _shared("window_one_long", "tiles", "position > limit - window", "position > limit - window - 1"),
    _shared("first_token_of_the_window_lost", "tiles", "context - QUERY_LENGTH - window + 1", "context - QUERY_LENGTH - window + 2"),
    _shared("first_of_the_last_query_token", "tiles", "context - QUERY_LENGTH - window + 1", "context - window", query_length=4),
    _shared("lost_last_tile", "tiles", "(context + TILE - 1) // TILE", "context // TILE"),
    _shared("splits_walk_the_same_tiles", "tiles", "first // TILE + split,", "first // TILE,"),
    _shared("first_tile_of_the_window_skipped", "tiles", "first // TILE + split,", "(first + TILE - 1) // TILE + split,"),
    _shared("tile_of_one_seen_token_skipped", "tiles", "first // TILE + split,", "(first + 1) // TILE + split,"),
    _shared(
        "tile_skipped_that_the_window_starts_with", "tiles", "first // TILE + split,",
        "gl.where((first > 0) & (first % TILE == 0), first // TILE + 1, first // TILE) + split,",
    ),
    _shared("last_partial_page_unmapped", "tiles", "(index * BLOCK_SIZE < context)", "((index + 1) * BLOCK_SIZE <= context)"),
    _shared("first_partial_page_unmapped", "tiles", "(index >= first // BLOCK_SIZE)", "(index * BLOCK_SIZE >= first)"),
)  # fmt: skip

# sinks=False: a sink would be the denominator, and larger than the bug.
SOFTMAX = (
    _shared("sum_not_rescaled", "tiles", "sums * gl.expand_dims(rescale, AXIS) + probs", "sums + probs"),
    _shared("guard_of_rows_without_tokens_removed", "tiles", "finite_max = gl.where(new_max == NEG_INF, 0.0, new_max)", "finite_max = new_max"),
    _shared("no_maximum_subtracted", "tiles", "new_max = gl.maximum(row_max, gl.max(scores, AXIS))", "new_max = gl.maximum(row_max, 0.0)"),
    _shared(
        "maximum_over_masked_tokens", "tiles", "    scores = gl.where(seen, scores, NEG_INF)\n", "",
        ("    finite_max = gl.where(new_max", "    scores = gl.where(seen, scores, NEG_INF)\n    finite_max = gl.where(new_max"),
    ),
    _shared("masked_by_a_large_number", "tiles", "scores = gl.where(seen, scores, NEG_INF)", "scores = gl.where(seen, scores, -3.4e38)", sinks=False),
    _shared(  # the LSE shows it; the evaluator has sm_90's tolerance, and few rows
        "sum_of_fp8_probabilities", "tiles", "gl.expand_dims(rescale, AXIS) + probs",
        "gl.expand_dims(rescale, AXIS) + (probs * 448.0).to(gl.float8e4nv).to(gl.float32) * (1.0 / 448.0)",
        shows=("emulator", "device"), **TENSOR_SCALE, fp8_math=True,
    ),
    _shared("softcap_in_base_2", "tiles", "2.0 * LOG2E / softcap_log2", "2.0 / softcap_log2", softcap=True),
    _shared("sink_in_wrong_base", "tiles", ".to(gl.float32) * LOG2E", ".to(gl.float32)"),
    _shared("sink_times_softmax_scale", "tiles", ".to(gl.float32) * LOG2E", ".to(gl.float32) * (LOG2E * 0.125)"),
    _shared("sink_not_in_the_maximum", "tiles", "top = gl.maximum(row_max, sink)", "top = row_max"),
    _shared("sink_of_the_first_head", "tiles", "gl.load(sinks_ptr + head,", "gl.load(sinks_ptr + head * 0,"),
    _shared(
        "rows_without_tokens_divide_by_zero", "tiles",
        "gl.where(row_sum > 0.0, 1.0 / gl.where(row_sum > 0.0, row_sum, 1.0), 0.0)", "1.0 / row_sum", sinks=False,
    ),
    _shared(
        "reciprocal_in_bf16", "tiles", "1.0 / gl.where(row_sum > 0.0, row_sum, 1.0), 0.0)",
        "1.0 / gl.where(row_sum > 0.0, row_sum, 1.0), 0.0).to(gl.bfloat16).to(gl.float32)", **FP16,
    ),
    _shared("lse_in_base_2", "tiles", ") * LN2, NEG_INF)", "), NEG_INF)"),
    _shared("lse_of_a_row_without_tokens_is_zero", "tiles", ") * LN2, NEG_INF)", ") * LN2, 0.0)"),
    _shared("lse_without_the_sum", "tiles", "(row_max + gl.log2(gl.where(row_sum > 0.0, row_sum, 1.0))) * LN2", "row_max * LN2"),
)  # fmt: skip

ROWS = (
    _shared(
        "head_map_transposed", "tiles", "row // GROUP) * stride_token + (kv_head * GROUP + row % GROUP)",
        "row % QUERY_LENGTH) * stride_token + (kv_head * GROUP + row // QUERY_LENGTH)",
    ),
    _shared("heads_by_query_length", "tiles", "(kv_head * GROUP + row % GROUP) * stride_head", "(kv_head * QUERY_LENGTH + row % GROUP) * stride_head"),
    _shared("query_length_missing_in_the_row", "tiles", "sequence.to(gl.int64) * QUERY_LENGTH", "sequence.to(gl.int64)"),
    _faulting("row_offset_in_32_bits", "tiles", "sequence.to(gl.int64) * QUERY_LENGTH", "sequence * QUERY_LENGTH"),
    _shared(
        "query_assumed_dense", "query", "row_offset(sequence, kv_head, row, stride_query_token,",
        "row_offset(sequence, kv_head, row, kv_heads * GROUP * stride_query_head,",
    ),
    _shared(
        "query_heads_interleaved", "query",
        "offset = row_offset(sequence, kv_head, row, stride_query_token, stride_query_head, QUERY_LENGTH, GROUP)",
        "offset = (sequence.to(gl.int64) * QUERY_LENGTH + row // GROUP) * stride_query_token + (row % GROUP * kv_heads + kv_head) * stride_query_head",
    ),
    _shared(
        "query_factor_dropped_fp8_math", "query", "factor = gl.exp2(-shift)", "factor = gl.exp2(shift * 0.0)", **TENSOR_SCALE, fp8_math=True,
    ),
    _shared(
        "query_cast_without_scaling", "query", "FITS: gl.constexpr = query.dtype == DTYPE or query.dtype.primitive_bitwidth == 8",
        "FITS: gl.constexpr = True", **TENSOR_SCALE, fp8_math=True,
    ),
    _shared("query_never_scaled_down", "query", "shift = gl.minimum(gl.maximum(shift, -100.0), 100.0)", "shift = gl.minimum(gl.maximum(shift, 0.0), 100.0)", **TENSOR_SCALE, fp8_math=True),
    _shared("query_never_scaled_up", "query", "shift = gl.minimum(gl.maximum(shift, -100.0), 100.0)", "shift = gl.minimum(gl.maximum(shift, -100.0), 0.0)", **TENSOR_SCALE, fp8_math=True),
    _shared("query_scale_of_every_row", "query", "row % GROUP) * query_scale_step", "row % GROUP)", **FP8_QUERY),
    _shared("query_scale_of_the_first_kv_head", "query", "kv_head * GROUP + row % GROUP) * query_scale_step", "row % GROUP) * query_scale_step", **FP8_QUERY),
    _shared("query_scale_of_the_first_token", "query", "token = sequence * QUERY_LENGTH + row // GROUP", "token = sequence * QUERY_LENGTH", **FP8_QUERY),
)  # fmt: skip

SINK_IN_LSE = "        _, total_with_sink = with_sink(sinks_ptr, head, top, total, True)\n"
OUT_ROW = (
    "row_offset(sequence, kv_head, row, stride_out_token, stride_out_head, QUERY_LENGTH, GROUP)"
)
DENSE_ROW = (
    "row_offset(sequence, kv_head, row, stride_out_token,",
    "row_offset(sequence, kv_head, row, kv_heads * GROUP * stride_out_head,",
)
INTERLEAVED_ROW = (
    "(sequence.to(gl.int64) * QUERY_LENGTH + row // GROUP) * stride_out_token"
    " + (row % GROUP * kv_heads + kv_head) * stride_out_head"
)
LSE_TRANSPOSED = (
    "lse_ptr + token * (kv_heads * GROUP) + head",
    "lse_ptr + (sequence * QUERY_LENGTH + row % QUERY_LENGTH) * (kv_heads * GROUP) + kv_head * GROUP + row // QUERY_LENGTH",
)
LSE_DENSE = ("token * (kv_heads * GROUP) + head", "token * GROUP + head")

REDUCE = (
    _shared("reduce_reads_empty_splits", "reduce", "wrote = part_sum > 0.0", "wrote = in_range"),
    _shared("reduce_drops_last_chunk", "reduce", "range(0, num_splits, CHUNK)", "range(0, num_splits - CHUNK + 1, CHUNK)", knobs=TWO_CHUNKS),
    _shared("reduce_first_split_only", "reduce", "in_range = split < num_splits", "in_range = split < 1"),
    _shared("reduce_weighs_no_accumulators", "reduce", "gl.sum(part * weight[:, None], 0)", "gl.sum(part, 0)"),
    _shared("reduce_weighs_no_sums", "reduce", "gl.sum(part_sum * weight, 0)", "gl.sum(part_sum, 0)"),
    _shared("reduce_keeps_earlier_accumulators", "reduce", "acc = acc * rescale +", "acc = acc +", knobs=TWO_CHUNKS),
    _shared("reduce_keeps_earlier_sums", "reduce", "total = total * rescale +", "total = total +", knobs=TWO_CHUNKS),
    _shared("reduce_forgets_the_maximum", "reduce", "top = new_top", "top = top", knobs=TWO_CHUNKS),
    _shared("reduce_maximum_of_the_last_chunk", "reduce", "gl.maximum(top, gl.max(part_max, 0))", "gl.max(part_max, 0)", knobs=TWO_CHUNKS),
    _shared("reduce_guard_removed", "reduce", "finite_top = gl.where(new_top == NEG_INF, 0.0, new_top)", "finite_top = new_top"),
    _shared("reduce_walks_without_kv_heads", "reduce", "(sequence * kv_heads + kv_head)", "(sequence + kv_head)"),
    _shared(
        "reduce_sink_of_every_split", "reduce", "factor, total = with_sink(sinks_ptr, head, top, total, True)",
        "factor, total_with_sink = with_sink(sinks_ptr, head, top, total, True)\n"
        "    total = total_with_sink + (num_splits - 1) * (total_with_sink - total * factor)",
    ),
    _shared("reduce_sinks_of_the_first_kv_head", "reduce", "with_sink(sinks_ptr, head, top", "with_sink(sinks_ptr, row % GROUP, top"),
    _shared("reduce_sinks_transposed", "reduce", "with_sink(sinks_ptr, head, top", "with_sink(sinks_ptr, kv_head * GROUP + row // QUERY_LENGTH, top"),
    _shared(
        "reduce_lse_with_the_sink", "reduce", "        token = sequence * QUERY_LENGTH", SINK_IN_LSE + "        token = sequence * QUERY_LENGTH",
        ("log_sum_exp(top, total))", "log_sum_exp(top, total_with_sink))"),
    ),
    _shared("reduce_lse_transposed", "reduce", *LSE_TRANSPOSED),
    _shared("reduce_lse_without_kv_heads", "reduce", *LSE_DENSE),
    _shared("reduce_output_assumed_dense", "reduce", *DENSE_ROW),
    _shared("reduce_output_heads_interleaved", "reduce", OUT_ROW, INTERLEAVED_ROW),
    # right for every sequence, and not the same bits: only a sequence that is moved in its batch shows it, and the last bit only in one
    # row of some thousands, of which the short lists have hundreds
    _shared(
        "reduce_order_by_sequence", "reduce", "in_range = split < num_splits",
        "in_range = split < num_splits\n        split = (split + sequence % 2) % num_splits", knobs=TWO_CHUNKS, shows=("device",), **FP16,
    ),
)  # fmt: skip

EPILOGUE = (
    _shared("split_slot_collision", "epilogue", "* num_splits + split) * (QUERY_LENGTH", "* num_splits + split // 2) * (QUERY_LENGTH"),
    _shared(
        "empty_splits_write_nothing", "epilogue", "row_max, mask=is_row)", "row_max, mask=is_row & has_tiles)",
        ("gl.store(partial_sum_ptr + slot + row, row_sum, mask=is_row)", "gl.store(partial_sum_ptr + slot + row, row_sum, mask=is_row & has_tiles)"),
    ),
    _shared(
        "empty_contexts_write_nothing", "epilogue", "out.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(is_row,",
        "out.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(is_row & has_tiles,", knobs=ONE_SHOT,
    ),
    _shared(
        "padded_rows_in_the_output", "epilogue", "out.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(is_row, CHANNEL_AXIS))",
        "out.to(out_ptr.dtype.element_ty))", knobs=ONE_SHOT, qg=7, query_length=1,
    ),
    _shared("output_rows_by_padded_group", "epilogue", OUT_ROW, OUT_ROW.replace(" GROUP)", " N // QUERY_LENGTH)"), knobs=ONE_SHOT, qg=5),
    _shared("padded_rows_in_the_workspace", "epilogue", "gl.store(pointers, acc, mask=gl.expand_dims(is_row, CHANNEL_AXIS))", "gl.store(pointers, acc)", qg=5),
    _shared("partial_results_in_bf16", "epilogue", "gl.store(pointers, acc,", "gl.store(pointers, acc.to(gl.bfloat16).to(gl.float32),", **FP16),
    _shared("sinks_of_the_first_kv_head", "epilogue", "with_sink(sinks_ptr, head, row_max", "with_sink(sinks_ptr, row % GROUP, row_max", knobs=ONE_SHOT),
    _shared(
        "lse_with_the_sink", "epilogue", "            lse = log_sum_exp(row_max, row_sum)",
        "            _, sum_with_sink = with_sink(sinks_ptr, head, row_max, row_sum, is_row)\n            lse = log_sum_exp(row_max, sum_with_sink)",
        knobs=ONE_SHOT,
    ),
    _shared("lse_transposed", "epilogue", *LSE_TRANSPOSED, knobs=ONE_SHOT),
    _shared("lse_without_kv_heads", "epilogue", *LSE_DENSE, knobs=ONE_SHOT),
    _shared("output_assumed_dense", "epilogue", *DENSE_ROW, knobs=ONE_SHOT),
    _shared("output_heads_interleaved", "epilogue", OUT_ROW, INTERLEAVED_ROW, knobs=ONE_SHOT),
)  # fmt: skip

SHARED = WALK + SOFTMAX + ROWS + REDUCE + EPILOGUE
