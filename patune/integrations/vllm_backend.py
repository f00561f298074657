"""What patune computes of vLLM's attention layers, in the words of vLLM's backend interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from patune.integrations.layers import DTYPES_ALLOWED
from patune.problem import BLOCK_SIZES, HEAD_DIMS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config.cache import CacheDType
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from patune.integrations.vllm_impl import PatuneImpl
    from patune.integrations.vllm_metadata import PatuneMetadataBuilder

ALTERNATIVE = "--attention-backend FLASH_ATTN or TRITON_ATTN"
CACHE_DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}
NVIDIA_CAPABILITIES = ((9, 0),)
ROCM_CAPABILITIES = ((9, 4), (9, 5))  # gfx942 and gfx950; gfx90a is (9, 0) there


class PatuneBackend(AttentionBackend):
    """Decode by patune's paged-attention kernels, prefill by torch's varlen attention."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "bfloat16",
        "float16",
        "fp8",
        "fp8_e4m3",
    ]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enum: layers look it up by this name."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PatuneImpl]:
        """The class that runs a layer."""
        from patune.integrations.vllm_impl import PatuneImpl

        return PatuneImpl

    @staticmethod
    def get_builder_cls() -> type[PatuneMetadataBuilder]:
        """The class that prepares a batch for all layers."""
        from patune.integrations.vllm_metadata import PatuneMetadataBuilder

        return PatuneMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Page sizes of the kernels. Each is named, so that ``--block-size 1024`` gives pages of 1024 tokens and no split ones."""
        return list(BLOCK_SIZES)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Channels per head."""
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        """Sinks are part of the kernels."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are part of the kernels."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Batches are split by the query lengths on the CPU, so these have to be true."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Hopper, and on ROCm gfx942 and gfx950, whose kernels compile but never ran."""
        return tuple(capability) in _capabilities()

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: CacheDType | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        """All that patune cannot do of it, with what is allowed and the alternative: vLLM's own reasons name neither."""
        reasons = [
            *_shape_reasons(head_size, dtype, kv_cache_dtype, block_size),
            *_kind_reasons(use_mla, use_sparse, use_mm_prefix),
        ]
        if not cls.supports_compute_capability(device_capability):
            allowed = ", ".join(f"{major}.{minor}" for major, minor in _capabilities())
            reasons.append(
                f"compute capability {'.'.join(map(str, device_capability))}, allowed: {allowed}"
            )
        if not reasons:
            return None
        return f"patune does not serve {'; '.join(reasons)}. Use {ALTERNATIVE} instead"


def _capabilities() -> tuple[tuple[int, int], ...]:
    return ROCM_CAPABILITIES if current_platform.is_rocm() else NVIDIA_CAPABILITIES


def _shape_reasons(
    head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, block_size: int | None
) -> Iterator[str]:
    if head_size not in HEAD_DIMS:
        yield f"head_size={head_size}, allowed: {', '.join(map(str, HEAD_DIMS))}"
    if dtype not in PatuneBackend.supported_dtypes:
        yield f"{dtype} activations, allowed: {DTYPES_ALLOWED}"
    if kv_cache_dtype is not None and kv_cache_dtype not in CACHE_DTYPES:
        yield f"kv_cache_dtype={kv_cache_dtype}, allowed: {', '.join(CACHE_DTYPES)}"
    elif not fits(kv_cache_dtype, dtype):
        yield f"a {kv_cache_dtype} cache with {dtype} activations, allowed: auto or fp8"
    if block_size is not None and block_size % BLOCK_SIZES[0]:
        yield f"block_size={block_size}, allowed: {', '.join(map(str, BLOCK_SIZES))} and multiples of {BLOCK_SIZES[0]}"


def _kind_reasons(use_mla: bool, use_sparse: bool, use_mm_prefix: bool) -> Iterator[str]:
    if use_mla:
        yield "MLA"
    if use_sparse:
        yield "sparse attention"
    if use_mm_prefix:
        yield "a prefix that is attended both ways"


def fits(kv_cache_dtype: str | None, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply such a cache with such activations: of one type, or the cache in fp8."""
    stored = CACHE_DTYPES[kv_cache_dtype or "auto"]
    return stored is None or stored.itemsize == 1 or stored == dtype
