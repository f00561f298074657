"""transformers: ``paged|patune`` as an attention implementation for continuous batching.

    from patune.integrations.transformers import register

    model.set_attn_implementation(register())
    model.generate_batch(inputs, continuous_batching_config=ContinuousBatchingConfig(page_size=1024))

Decode steps run :func:`patune.paged_attention_decode` on transformers' own paged cache, with looked-up knobs; all other steps run torch's varlen attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patune.errors import UnsupportedProblemError
from patune.integrations.announcement import announce
from patune.integrations.layers import AttentionLayer, target_of

if TYPE_CHECKING:
    from patune.target import Target

PREFIXED = "paged|patune"
PLAIN = "patune"  # transformers 5.19 and newer take the prefix off every name but their own
NAMES = (PREFIXED, PLAIN)
ALTERNATIVE = "transformers' own: attn_implementation='paged|sdpa' (5.18 and older) or 'sdpa' (5.19 and newer), or 'paged|eager'"
RELEASES = (
    "5.17 to 5.23"  # whose private parts are known, from the oldest to the newest that is tested
)
DEFAULT_BLOCK_SIZE = 256  # of transformers' continuous batching


def register(*, block_tables: bool = True) -> str:
    """Make ``paged|patune`` known to transformers; the name to choose it by in this version of transformers.

    Calling it again changes nothing. It touches no GPU and opens no database.

    Args:
        block_tables: let transformers hand its block tables over in decode steps, as it does to FlashAttention, instead of the slots of every cached
            token, which it lists in Python: that took 16 to 21 of a step's 43 ms (32 requests of 8192 tokens, 2026-11-23). Needed for CUDA graphs.

    Returns:
        For ``attn_implementation=`` and ``model.set_attn_implementation()``: ``paged|patune``, or ``patune`` where transformers takes the prefix off.

    Raises:
        UnsupportedProblemError: this transformers has no continuous batching that can be joined.
    """
    import transformers
    from transformers import AttentionInterface

    from patune.integrations import transformers_hooks
    from patune.integrations.transformers_attention import uncompiled_paged_attention

    prefixed = "paged|sdpa" in AttentionInterface()
    transformers_hooks.install(block_tables=block_tables)
    for name in NAMES:
        AttentionInterface.register(name, uncompiled_paged_attention)
    name = PREFIXED if prefixed else PLAIN
    announce(f"transformers {transformers.__version__} as attn_implementation={name!r}")
    return name


def check_model(model: Any, *, block_size: int = DEFAULT_BLOCK_SIZE) -> None:
    """Refuse a model that patune does not serve. Continuous batching asks this when it starts; a step asks it again of every layer.

    Args:
        model: a transformers model.
        block_size: tokens per cache page.

    Raises:
        UnsupportedProblemError: no kernel computes it; the message has the reasons and the alternative.
    """
    reasons = []
    if not getattr(model, "_supports_attention_backend", True):
        reasons.append("its layers do not ask transformers' AttentionInterface for their attention")
    device = getattr(model, "device", None)
    check_config(
        model.config, block_size=block_size, dtype=getattr(model, "dtype", None),
        target=None if device is None else target_of(device, alternative=ALTERNATIVE),
        others=tuple(reasons),
    )  # fmt: skip


def check_config(
    config: Any,
    *,
    block_size: int,
    dtype: Any = None,
    target: Target | None = None,
    others: tuple[str, ...] = (),
) -> None:
    """Refuse a model by its config.

    Args:
        config: of a transformers model.
        block_size: tokens per cache page.
        dtype: of the model; None is the config's, else bf16.
        target: the device that will serve; None where there is none.
        others: reasons that are known already.

    Raises:
        UnsupportedProblemError: no kernel computes it.
    """
    import torch

    text = config.get_text_config()
    reasons = list(others)
    if getattr(text, "alibi", False):
        reasons.append("it has ALiBi biases")
    if getattr(text, "kv_lora_rank", None):
        reasons.append("its KV cache is latent (MLA)")
    if getattr(text, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder")
    q_heads = getattr(text, "num_attention_heads", None)
    if not isinstance(q_heads, int):
        raise UnsupportedProblemError(
            f"patune does not serve {type(config).__name__}: it names no num_attention_heads. Use {ALTERNATIVE} instead."
        )
    given = getattr(text, "dtype", None) if dtype is None else dtype
    AttentionLayer(
        where=f"{type(config).__name__.removesuffix('Config')}",
        alternative=ALTERNATIVE,
        block_size=block_size,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // q_heads,
        q_heads=q_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or q_heads,
        dtype=given if isinstance(given, torch.dtype) else torch.bfloat16,
        others=tuple(reasons),
    ).problem(target)
