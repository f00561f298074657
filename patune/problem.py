"""What must be computed (:class:`Problem`) and how large it is (:class:`Workload`)."""

from __future__ import annotations

from dataclasses import dataclass

from patune.errors import InvalidValueError
from patune.record import Record, check_bool, check_choice, check_int

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # tokens per cache page
HEAD_DIMS = (64, 128, 256)
MAX_QUERY_LENGTH = 16
MAX_ROWS = 64  # query_length * qg: the widest matrix-unit tile that the kernels build
DTYPES = ("bf16", "fp16", "fp8_e4m3fn", "fp8_e4m3fnuz")
KV_QUANTS = ("none", "per_tensor", "per_token")
KV_LAYOUTS = ("aiter", "aiter_5d", "nhd", "hnd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Record):
    """One paged-attention decode problem, independent of its size.

    ``(block_size, head_dim, qg)`` is the core of the key; the rest says which variant of it.

    Attributes:
        block_size: tokens per cache page.
        head_dim: elements per head of query, key, value and output.
        qg: query heads per KV head.
        query_length: query tokens per sequence, 1 to 16 (more than 1: speculative decoding).
        query_dtype: element type of the query.
        kv_dtype: element type of the cache.
        kv_quant: kind of the cache's scales.
        kv_layout: ``aiter`` key [pages, kv_heads, head_dim/x, block_size, x], value [pages, kv_heads, head_dim, block_size];
            ``aiter_5d`` the same key, value [pages, kv_heads, block_size/x, head_dim, x];
            ``nhd`` [pages, block_size, kv_heads, head_dim]; ``hnd`` [pages, kv_heads, block_size, head_dim].
        windowed: a sliding window limits what a query token sees.
        sinks: every query head has an attention-sink logit.
        softcap: scores are capped: cap * tanh(score / cap); the cap is a run-time value.
        fp8_math: the matrix products of an fp8 cache are computed in fp8 (2 to 3 % error), not in 16 bits (0.1 %). Part of what is
            computed, so the caller's choice and never the tuner's.

    Raises:
        InvalidValueError: a field is outside of what is allowed.
    """

    block_size: int
    head_dim: int
    qg: int
    query_length: int = 1
    query_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    kv_quant: str = "none"
    kv_layout: str = "aiter"
    windowed: bool = False
    sinks: bool = False
    softcap: bool = False
    fp8_math: bool = False

    def __post_init__(self) -> None:
        check_choice("block_size", self.block_size, BLOCK_SIZES)
        check_choice("head_dim", self.head_dim, HEAD_DIMS)
        check_int("qg", self.qg, low=1, high=MAX_ROWS)
        check_int("query_length", self.query_length, low=1, high=MAX_QUERY_LENGTH)
        check_choice("query_dtype", self.query_dtype, DTYPES)
        check_choice("kv_dtype", self.kv_dtype, DTYPES)
        check_choice("kv_quant", self.kv_quant, KV_QUANTS)
        check_choice("kv_layout", self.kv_layout, KV_LAYOUTS)
        check_bool("windowed", self.windowed)
        check_bool("sinks", self.sinks)
        check_bool("softcap", self.softcap)
        check_bool("fp8_math", self.fp8_math)
        if self.rows > MAX_ROWS:
            raise InvalidValueError(
                f"query_length={self.query_length} x qg={self.qg} makes {self.rows} query rows per KV head; "
                f"allowed: at most {MAX_ROWS} rows."
            )
        if self.kv_quant != "none" and not self.kv_dtype.startswith("fp8"):
            raise InvalidValueError(
                f"kv_quant={self.kv_quant!r} needs an fp8 cache, kv_dtype={self.kv_dtype!r} has no scales; "
                "allowed: kv_quant='none', or kv_dtype fp8_e4m3fn or fp8_e4m3fnuz."
            )
        if self.fp8_math and not self.kv_dtype.startswith("fp8"):
            raise InvalidValueError(
                f"fp8_math=True needs an fp8 cache, seen kv_dtype={self.kv_dtype!r}; "
                "allowed: fp8_math=False, or kv_dtype fp8_e4m3fn or fp8_e4m3fnuz."
            )

    @property
    def rows(self) -> int:
        """Query rows that share one KV head: row = query_position * qg + head_in_group."""
        return self.query_length * self.qg

    @property
    def kv_itemsize(self) -> int:
        """Bytes per cache element."""
        return 1 if self.kv_dtype.startswith("fp8") else 2

    @property
    def kv_vector(self) -> int:
        """Cache elements in 16 bytes: ``x`` of the AITER layout. It follows from the cache's dtype and nothing else."""
        return 16 // self.kv_itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(Record):
    """The size regime of a problem.

    Attributes:
        batch: sequences.
        kv_heads: KV heads on this device.
        context: tokens that a walk visits at most: the longest sequence, the query's own tokens included; a windowed problem's window.
    """

    batch: int
    kv_heads: int
    context: int

    def __post_init__(self) -> None:
        check_int("batch", self.batch, low=1)
        check_int("kv_heads", self.kv_heads, low=1)
        check_int("context", self.context, low=1)

    @property
    def walks(self) -> int:
        """Independent walks over a context: one per (sequence, KV head). A split divides one walk."""
        return self.batch * self.kv_heads

    def kv_bytes(self, problem: Problem) -> int:
        """Bytes of K and V that one decode step of full-length sequences has to read."""
        return 2 * self.walks * self.context * problem.head_dim * problem.kv_itemsize
