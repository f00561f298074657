"""Planted kernel bugs: copies of the real kernel sources with one text replaced, behind the real plan."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patune.kernels
from patune.kernels.plan import plan_decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.kernels.calls import KernelCall

SOURCES = (
    "tiles", "overlap", "epilogue", "reduce", "hopper_layouts", "hopper_copy", "hopper_operands", "hopper", "cdna",
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
    """

    name: str
    module: str
    old: str
    new: str
    families: tuple[str, ...] = FAMILIES
    problem: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)


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
        "* num_splits + split) * ROWS",
        "* num_splits + split // 2) * ROWS",
    ),
)
FP8 = {"kv_dtype": "fp8_e4m3fn"}
TENSOR_SCALE = FP8 | {"kv_quant": "per_tensor"}
TOKEN_SCALE = FP8 | {"kv_quant": "per_token"}


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
    _hopper("softcap_in_base_2", "tiles", "2.0 * LOG2E / softcap_log2", "2.0 / softcap_log2", {"softcap": True}),
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
    _hopper("value_scale_not_in_the_reference", "tiles", "gl.max(scores + value_log2, AXIS)", "gl.max(scores, AXIS)", TOKEN_SCALE),
    _hopper("query_factor_dropped", "hopper", "factor = gl.exp2(-shift)", "factor = gl.exp2(shift * 0.0)", FP8),
    _hopper(
        "query_factor_dropped_fp8_math", "hopper", "factor = gl.exp2(-shift)", "factor = gl.exp2(shift * 0.0)",
        TENSOR_SCALE | {"fp8_math": True},
    ),
    _hopper(
        "query_scale_of_every_row", "hopper", "row % GROUP) * query_scale_step", "row % GROUP)",
        TENSOR_SCALE | {"query_dtype": "fp8_e4m3fn"},
    ),
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
        "output_channels_in_memory_order", "epilogue", "channel = paired_channel(channel)", "channel = channel",
        FP8 | {"kv_layout": "hnd"},
    ),
)  # fmt: skip


def _cdna(name: str, old: str, new: str, knobs: dict[str, Any] | None = None) -> Mutant:
    return Mutant(name, "cdna", old, new, ("cdna_mfma",), {}, knobs or {})


CDNA = (
    _cdna("tile_in_two_splits", "range(begin, end, num_splits)", "range(begin, end, num_splits - 1)"),
    _cdna(
        "prefetches_the_next_tile",
        "gl.minimum(tile + num_splits, end - 1)", "gl.minimum(tile + 1, end - 1)",
        {"num_stages": 2},
    ),
    _cdna("window_tail_of_values_kept", "if (t0 + TILE > context) | (t0 < first):", "if t0 + TILE > context:"),
)  # fmt: skip


MUTANTS = SHARED + HOPPER + CDNA


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
