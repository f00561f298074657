"""From (inputs, knobs, target) to the kernel launches of one decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patune.environment import FP_FUSION
from patune.kernels.calls import KernelCall
from patune.kernels.feasibility import padded_rows, programs_per_walk
from patune.kernels.knobs import CdnaKnobs, HopperKnobs

if TYPE_CHECKING:
    import torch

    from patune.kernels.inputs import DecodeInputs
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target

LOG2E = 1.4426950408889634
MFMA_VERSIONS = {"gfx942": 3, "gfx950": 4}


def workspace_elements(problem: Problem, workload: Workload, knobs: Knobs) -> int:
    """float32 elements of the workspace: partial outputs, maxima and sums of every split; 0 for one split."""
    if knobs.one_shot:
        return 0
    slots = workload.walks * knobs.num_splits * problem.rows
    return slots * problem.head_dim + 2 * _aligned(slots)


def _aligned(elements: int) -> int:
    """Round up to 16 bytes of float32: kernels are specialised on 16-byte aligned pointers."""
    return -(-elements // 4) * 4


def _partials(
    inputs: DecodeInputs, problem: Problem, knobs: Knobs, workspace: torch.Tensor | None
) -> dict[str, Any]:
    """Views of the workspace: partial_out, then partial_max and partial_sum; None for one split."""
    names = ("partial_out_ptr", "partial_max_ptr", "partial_sum_ptr")
    if knobs.one_shot:
        return dict.fromkeys(names)
    assert workspace is not None, "a split decode needs a workspace"
    slots = inputs.batch * inputs.kv_heads * knobs.num_splits * problem.rows
    maxima = slots * problem.head_dim
    sums = maxima + _aligned(slots)
    views = (workspace[:maxima], workspace[maxima:sums], workspace[sums : sums + slots])
    return dict(zip(names, views, strict=True))


def _decode_arguments(
    inputs: DecodeInputs, out: torch.Tensor, lse: torch.Tensor | None, partials: dict[str, Any]
) -> dict[str, Any]:
    """What both families' kernels take; a split of several writes partial results and needs no output of its own."""
    key, value = inputs.key_cache, inputs.value_cache
    one_shot = partials["partial_out_ptr"] is None
    return {
        "query_ptr": inputs.query,
        "key_ptr": key,
        "value_ptr": value,
        "table_ptr": inputs.block_tables,
        "context_ptr": inputs.context_lengths,
        "out_ptr": out if one_shot else None,
        "lse_ptr": lse if one_shot else None,
        "sinks_ptr": inputs.sinks if one_shot else None,
        **partials,
        "stride_table": inputs.block_tables.stride(0),
        "stride_query_token": inputs.query.stride(0),
        "stride_query_head": inputs.query.stride(1),
        "stride_out_token": out.stride(0),
        "stride_out_head": out.stride(1),
        "stride_key_page": key.stride(0),
        "stride_key_head": key.stride(1),
        "stride_value_page": value.stride(0),
        "stride_value_head": value.stride(1),
        "query_scale_ptr": inputs.query_scale,
        "key_scale_ptr": inputs.key_scale,
        "value_scale_ptr": inputs.value_scale,
        "stride_key_token": key.stride(-2),
        "stride_value_token": value.stride(-2),
        **_scale_strides("key", inputs.key_scale),
        **_scale_strides("value", inputs.value_scale),
        "query_scale_step": int(inputs.query_scale is not None and inputs.query_scale.numel() > 1),
        "score_scale_log2": inputs.softmax_scale * LOG2E,
        "softcap_log2": float(inputs.softcap * LOG2E),
        "kv_heads": inputs.kv_heads,
    }


def _in_order(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments in the order of the kernel's parameters."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def _scale_strides(name: str, scale: torch.Tensor | None) -> dict[str, int]:
    """Strides of per-token scales [pages, kv_heads, block_size, 1]; 0 where there is one scale or none."""
    page, head = (
        (scale.stride(0), scale.stride(1)) if scale is not None and scale.ndim == 4 else (0, 0)
    )
    return {f"stride_{name}_scale_page": page, f"stride_{name}_scale_head": head}


def _decode_constants(problem: Problem, knobs: Knobs) -> dict[str, Any]:
    """What both families' kernels are compiled for."""
    return {
        "ROWS": problem.rows,
        "N": padded_rows(problem, knobs),
        "QUERY_LENGTH": problem.query_length,
        "GROUP": problem.qg,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_SIZE": problem.block_size,
        "AITER": problem.kv_layout.startswith("aiter"),
        # pages of one vector: 4-D and 5-D values are the same bytes
        "SHUFFLED": problem.kv_layout == "aiter_5d" and problem.block_size > problem.kv_vector,
        "WINDOWED": problem.windowed,
        "SOFTCAPPED": problem.softcap,
        "TOKEN_SCALES": problem.kv_quant == "per_token",
        "FP8_MATH": problem.fp8_math,
        "TILE": knobs.partition_tokens,
        "STAGES": knobs.num_stages,
        "WARPS": knobs.num_warps,
    }


def _reduce_call(
    inputs: DecodeInputs,
    problem: Problem,
    knobs: Knobs,
    target: Target,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partials: dict[str, Any],
) -> KernelCall:
    from patune.kernels.reduce import reduce_kernel

    overlap = isinstance(knobs, HopperKnobs) and knobs.overlap_launch
    options: dict[str, Any] = {"num_warps": knobs.reduce_warps, "enable_fp_fusion": FP_FUSION}
    if overlap:
        options["launch_pdl"] = True
    return KernelCall(
        kernel=reduce_kernel,
        grid=(problem.rows, inputs.kv_heads, inputs.batch),
        arguments={
            **partials,
            "out_ptr": out,
            "lse_ptr": lse,
            "sinks_ptr": inputs.sinks,
            "kv_heads": inputs.kv_heads,
            "num_splits": knobs.num_splits,
            "stride_out_token": out.stride(0),
            "stride_out_head": out.stride(1),
        },
        constants={
            "ROWS": problem.rows,
            "QUERY_LENGTH": problem.query_length,
            "GROUP": problem.qg,
            "HEAD_DIM": problem.head_dim,
            "CHUNK": knobs.reduce_chunk,
            "WARPS": knobs.reduce_warps,
            "LANES": target.limits.lanes,
            "OVERLAP": overlap,
        },
        options=options,
    )


def plan_decode(
    inputs: DecodeInputs,
    knobs: Knobs,
    target: Target,
    *,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> list[KernelCall]:
    """The launches of one decode step: the decode kernel, and the reduce kernel when there is more than one split.

    Args:
        inputs: validated tensors of the step.
        knobs: feasible knobs of the target's kernel family.
        target: what the calls are compiled for.
        out: [batch * query_length, q_heads, head_dim], last axis contiguous.
        workspace: float32, at least :func:`workspace_elements`; only for more than one split.
        lse: [batch * query_length, q_heads] float32, contiguous; gets the natural-log LSE without the sinks.
    """
    problem = inputs.problem
    partials = _partials(inputs, problem, knobs, workspace)
    arguments = _decode_arguments(inputs, out, lse, partials)
    arguments |= {"num_splits": knobs.num_splits, "window": inputs.sliding_window}
    constants = _decode_constants(problem, knobs)
    options: dict[str, Any] = {"num_warps": knobs.num_warps, "enable_fp_fusion": FP_FUSION}
    if isinstance(knobs, HopperKnobs):
        from patune.kernels.hopper import hopper_decode_kernel

        kernel: Any = hopper_decode_kernel
        arguments["table_width"] = inputs.block_tables.shape[1]
        constants |= {"PROBS_K_MAJOR": knobs.probs_k_major, "OVERLAP": knobs.overlap_launch}
        if knobs.maxnreg:
            options["maxnreg"] = knobs.maxnreg
        if knobs.overlap_launch:
            options["launch_pdl"] = True
    else:
        from patune.kernels.cdna import cdna_decode_kernel

        kernel = cdna_decode_kernel
        assert isinstance(knobs, CdnaKnobs)
        constants |= {
            "MFMA_ROWS": knobs.mfma_rows,
            "MFMA_VERSION": MFMA_VERSIONS[target.arch],
            "LDS_RING": knobs.lds_ring,
            "CACHE_MODIFIER": knobs.cache_modifier,
        }
        options["waves_per_eu"] = knobs.waves_per_eu
    grid = (inputs.kv_heads * programs_per_walk(problem, knobs), knobs.num_splits, inputs.batch)
    calls = [
        KernelCall(
            kernel=kernel,
            grid=grid,
            arguments=_in_order(kernel, arguments),
            constants=constants,
            options=options,
        )
    ]
    if not knobs.one_shot:
        calls.append(_reduce_call(inputs, problem, knobs, target, out, lse, partials))
    return calls
