"""The places in transformers' continuous batching that patune has to change: there is no public way in (transformers 5.17 to 5.23).

- ``ContinuousBatchingManager.switch_to_cb_friendly_attn`` refuses every name but its own since 5.19, and may put FlashAttention in an unprefixed
  name's place in all versions;
- ``ensure_decode_fast_path_is_available`` hands block tables to FlashAttention 2 and 3 only;
- ``ContinuousBatchingAsyncIOs.reset`` clears the inputs on one stream and does not wait, while the first batch is copied to them on another: on a
  busy GPU the first step may see zeros and generate from those (2 of 112 runs, 8 processes on an H200, 2026-11-23).

Each is wrapped once: models of other implementations go through as before, and gain the third. What does not look as expected is left alone, and a
log line says so.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

from patune.errors import UnsupportedProblemError
from patune.integrations.transformers import NAMES, RELEASES, check_config, check_model

if TYPE_CHECKING:
    from collections.abc import Callable

LOGGER = logging.getLogger("patune")
WRAPPED = "_patune_wrapped"  # on a wrapper: the function that it stands for
MODULE = "transformers.generation.continuous_batching"

_block_tables = True


def install(*, block_tables: bool) -> None:
    """Wrap all, once; the last call says whether block tables are asked for.

    Raises:
        UnsupportedProblemError: continuous batching cannot be joined.
    """
    global _block_tables
    _block_tables = block_tables
    try:
        from transformers.generation.continuous_batching import (
            continuous_api,
            initialization,
            input_outputs,
        )
    except ImportError as error:
        import transformers

        raise UnsupportedProblemError(
            f"transformers {transformers.__version__} has no {MODULE} that patune knows ({error}); allowed: {RELEASES}."
        ) from error
    _wrap(
        continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", ("self", "model"), _admitting,
    )  # fmt: skip
    _wrap(
        initialization, "ensure_decode_fast_path_is_available", ("config", "cb_config", "user_requested"), _granting,
    )  # fmt: skip
    _wrap(input_outputs.ContinuousBatchingAsyncIOs, "reset", ("self",), _waiting)


def _wrap(
    owner: Any, name: str, expected: tuple[str, ...], wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:  # fmt: skip
    """Replace ``owner.name`` by ``wrapper(owner.name)``, if it takes the expected arguments first."""
    original = getattr(owner, name, None)
    if (
        original is None
        or tuple(inspect.signature(original).parameters)[: len(expected)] != expected
    ):
        LOGGER.warning(
            "transformers' %s is not as patune knows it (%s); it is left alone.", name, RELEASES
        )
        return
    if not hasattr(original, WRAPPED):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, WRAPPED, original)
        setattr(owner, name, wrapped)


def _admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a model of ours as it is, after a check of it in the caller's thread: a step's error only fails requests."""

    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.config._attn_implementation not in NAMES:
            return original(self, model, *args, **kwargs)
        check_model(model)
        return None

    return switch_to_cb_friendly_attn


def _granting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Grant block tables to a model of ours whose layers all have one, and check its page size.

    With block tables, decode steps become CUDA graphs and steps overlap, unless the caller says otherwise: what transformers does for FlashAttention.
    """
    import torch

    def ensure_decode_fast_path_is_available(
        config: Any, cb_config: Any, user_requested: bool
    ) -> Any:
        if config._attn_implementation not in NAMES:
            return original(config, cb_config, user_requested)
        check_config(config, block_size=page_size(cb_config))
        if not _block_tables or has_sliding_layers(config):
            cb_config.max_blocks_per_request = 0
        if cb_config.max_blocks_per_request and torch.cuda.is_available():
            if cb_config.use_cuda_graph is None:
                cb_config.use_cuda_graph = (False, True)  # prefill, decode
            if cb_config.use_async_batching is None:
                cb_config.use_async_batching = any(cb_config.cuda_graph_booleans)
        return None

    return ensure_decode_fast_path_is_available


def _waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the GPU have cleared the inputs before anything is copied to them."""
    import torch

    def reset(self: Any) -> None:
        original(self)
        torch.cuda.current_stream().synchronize()

    return reset


def page_size(cb_config: Any) -> int:
    """Tokens per page of a continuous batching config: ``page_size``, called ``block_size`` until 5.17."""
    size = getattr(cb_config, "page_size", None)
    return int(cb_config.block_size if size is None else size)


def has_sliding_layers(config: Any) -> bool:
    """Whether some layer keeps a window of its tokens only: transformers makes no block tables for rings."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None) is not None
    return any(layer_type != "full_attention" for layer_type in layer_types)
