"""What an engine says about one attention layer, as the problem that patune computes for it, or a refusal that names reason and alternative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patune.errors import InvalidValueError, UnsupportedProblemError
from patune.kernels.feasibility import unsupported
from patune.kernels.inputs import DTYPE_NAMES
from patune.problem import BLOCK_SIZES, HEAD_DIMS, MAX_ROWS, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from patune.target import Target

DTYPES_ALLOWED = "torch.bfloat16 or torch.float16"


def target_of(device: torch.device, *, alternative: str) -> Target | None:
    """The target of an engine's device; None for the CPU, whose tensors the oracle computes.

    Args:
        device: where the layers will run.
        alternative: what to run there instead.

    Raises:
        UnsupportedProblemError: no kernel family serves it.
    """
    from patune.kernels import decode

    if device.type == "cpu":
        return None
    try:
        return decode._target_of(decode._device_index(device))
    except UnsupportedProblemError as error:
        raise UnsupportedProblemError(f"{error} Use {alternative} instead.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One attention layer as its engine describes it.

    Attributes:
        where: the layer in the engine's own words: ``layer 3 (LlamaAttention)``.
        alternative: what to run such a model with instead: ``attn_implementation='paged|sdpa'``.
        block_size: tokens per cache page.
        head_dim: channels of query and key heads.
        value_head_dim: channels of value heads; None is ``head_dim``.
        q_heads: query heads on this device.
        kv_heads: KV heads on this device.
        query_length: query tokens per sequence of a decode step.
        dtype: element type of queries and outputs.
        kv_dtype: element type of the cache; None is ``dtype``.
        kv_quant: kind of the cache's scales, as in :class:`patune.Problem`.
        kv_layout: ``nhd`` or ``hnd``, by which of the token and head axes of a page has the smaller stride.
        windowed: a sliding window limits what a query token sees.
        sinks: every query head has an attention-sink logit.
        softcap: scores are capped.
        others: reasons of the engine's own why this layer is nothing for patune, such as ``it has ALiBi slopes``.
    """

    where: str
    alternative: str
    block_size: int
    head_dim: int
    q_heads: int
    kv_heads: int
    dtype: torch.dtype
    value_head_dim: int | None = None
    query_length: int = 1
    kv_dtype: torch.dtype | None = None
    kv_quant: str = "none"
    kv_layout: str = "nhd"
    windowed: bool = False
    sinks: bool = False
    softcap: bool = False
    others: tuple[str, ...] = ()

    def problem(self, target: Target | None = None) -> Problem:
        """The decode problem of this layer, which some kernel of the target computes.

        Args:
            target: the device that will serve; None where there is none (CPU tensors are computed by the oracle).

        Raises:
            UnsupportedProblemError: no kernel computes it; the message has every reason found, and the alternative.
        """
        if reasons := [*self.others, *self._reasons()]:
            raise self._refusal("; ".join(reasons))
        kv_dtype = self.dtype if self.kv_dtype is None else self.kv_dtype
        try:
            problem = Problem(
                block_size=self.block_size,
                head_dim=self.head_dim,
                qg=self.q_heads // self.kv_heads,
                query_length=self.query_length,
                query_dtype=DTYPE_NAMES[self.dtype],
                kv_dtype=DTYPE_NAMES[kv_dtype],
                kv_quant=self.kv_quant,
                kv_layout=self.kv_layout,
                windowed=self.windowed,
                sinks=self.sinks,
                softcap=self.softcap,
            )
        except InvalidValueError as error:
            raise self._refusal(str(error).rstrip(".")) from error
        if target is not None and (reason := unsupported(problem, target)):
            raise self._refusal(reason)
        return problem

    def _refusal(self, reasons: str) -> UnsupportedProblemError:
        return UnsupportedProblemError(
            f"patune does not serve {self.where}: {reasons}. Use {self.alternative} instead."
        )

    def _reasons(self) -> Iterator[str]:
        if self.block_size not in BLOCK_SIZES:
            yield f"block_size={self.block_size}, allowed: {_listed(BLOCK_SIZES)}"
        if self.head_dim not in HEAD_DIMS:
            yield f"head_dim={self.head_dim}, allowed: {_listed(HEAD_DIMS)}"
        if self.value_head_dim not in (None, self.head_dim):
            yield (
                f"values of head_dim={self.value_head_dim} beside keys of head_dim={self.head_dim} "
                "(MLA and the like), allowed: the same"
            )
        if self.dtype not in DTYPE_NAMES or self.dtype.itemsize == 1:
            yield f"{self.dtype} activations, allowed: {DTYPES_ALLOWED}"
        if self.kv_dtype is not None and self.kv_dtype not in DTYPE_NAMES:
            yield f"a cache of {self.kv_dtype}, allowed: {_listed(DTYPE_NAMES)}"
        if self.kv_heads < 1 or self.q_heads % self.kv_heads:
            yield f"{self.q_heads} query heads over {self.kv_heads} KV heads, allowed: a multiple"
        elif self.q_heads // self.kv_heads > MAX_ROWS:
            yield f"{self.q_heads // self.kv_heads} query heads per KV head, allowed: at most {MAX_ROWS}"


def _listed(allowed: Iterable[object]) -> str:
    return ", ".join(str(value) for value in allowed)
