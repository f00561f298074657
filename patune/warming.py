"""Make kernels ready before the first request: look keys up, compile what they answer, load it, launch it once on next to nothing."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import InvalidValueError, NoUsableGpuError, reject
from patune.problem import Problem, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from patune.configs.dispatcher import Answer
    from patune.kernels.inputs import DecodeInputs

    Key = tuple[Problem, Workload] | Mapping[str, Any]

LOGGER = logging.getLogger("patune")
SOFTCAP = 30.0  # any: it is a run-time value


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """One key that was made ready, or why it was not.

    Attributes:
        key: as it was given.
        answer: what its calls launch from now on; None where it could not be looked up.
        seconds: that it took, compilation included.
        error: why it is not ready; None when it is.
    """

    key: Key
    answer: Answer | None
    seconds: float
    error: str | None


def warmup(
    keys: Iterable[Key], *, device: torch.device | str | int | None = None
) -> tuple[Warmed, ...]:
    """Compile and load what the calls of these keys will launch, so that none of them compiles.

    Each key is decoded once over a cache of one page, through the public operation: knobs that do not compile or launch are given up, and the next
    layer's are made ready. Builds go to Triton's cache on disk, too. What is ready are calls without an LSE, on contiguous tensors; with sinks, those
    of the query's type and of float32; with an fp8 query, those with one scale. No key raises: see :attr:`Warmed.error`.

    Args:
        keys: pairs (Problem, Workload), or mappings with the arguments of :func:`patune.lookup` but ``target``.
        device: the GPU that will serve; None is the current one.

    Raises:
        NoUsableGpuError: no kernel runs on the device, or there is none.
    """
    place = _device(device)
    return tuple(_warm(key, place) for key in keys)


def _device(device: torch.device | str | int | None) -> torch.device:
    import torch

    from patune.kernels.decode import _target_of

    if not torch.cuda.is_available():
        raise NoUsableGpuError(
            "warmup compiles for the GPU that will serve, and this process sees none. Run it on that machine; "
            "`patune doctor` says what is here, and lookup() answers without a GPU."
        )
    try:
        # a bare number is another vendor's device where torch was built for none
        named = f"cuda:{device}" if isinstance(device, int) else device
        place = torch.device("cuda" if named is None else named)
    except (RuntimeError, TypeError) as error:
        raise reject("device", device, "a CUDA device, such as cuda:0") from error
    if place.type != "cuda":
        raise NoUsableGpuError(
            f"warmup needs a GPU, seen device={str(place)!r}; allowed: cuda (NVIDIA or ROCm)."
        )
    index = torch.cuda.current_device() if place.index is None else place.index
    if index >= torch.cuda.device_count():
        raise NoUsableGpuError(
            f"device={str(place)!r} is not here; there are {torch.cuda.device_count()}: cuda:0 and up."
        )
    try:
        _target_of(index)
    except InvalidValueError as error:
        raise NoUsableGpuError(str(error)) from error
    return torch.device("cuda", index)


def _warm(key: Key, device: torch.device) -> Warmed:
    """One key, whatever becomes of it."""
    import torch

    from patune.configs.dispatcher import lookup_problem
    from patune.kernels.decode import _target_of

    started = time.perf_counter()
    answer, error = None, None
    try:
        problem, workload = _key_of(key)
        for inputs in tiny_inputs(problem, workload, device):
            _decode(inputs, workload)
            torch.cuda.synchronize(device)
        assert device.index is not None
        answer = lookup_problem(problem, workload, _target_of(device.index))
    except Exception as failure:  # reported by key: the others are still to be made ready
        notes = getattr(failure, "__notes__", ())
        error = "\n".join([f"{type(failure).__name__}: {failure}", *notes])
        LOGGER.warning("warmup: %s is not ready: %s", key, error)
    return Warmed(key=key, answer=answer, seconds=time.perf_counter() - started, error=error)


def _decode(inputs: DecodeInputs, workload: Workload) -> None:
    """The public call; the bound makes it the workload of the key."""
    from patune.kernels.decode import paged_attention_decode

    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    paged_attention_decode(**fields, max_context=workload.context)


def _key_of(key: Key) -> tuple[Problem, Workload]:
    """Problem and workload of a key, with the defaults of ``lookup``.

    Raises:
        InvalidValueError: it is no such key.
    """
    if not isinstance(key, Mapping):
        match key:
            case (Problem() as problem, Workload() as workload):
                return problem, workload
        raise reject("key", key, "a pair (Problem, Workload), or a mapping with the arguments of lookup")  # fmt: skip
    from patune.configs.dispatcher import lookup

    sizes = {field.name for field in dataclasses.fields(Workload)}
    usual = {
        name: parameter.default
        for name, parameter in inspect.signature(lookup).parameters.items()
        if name in sizes
    }
    return (
        Problem.from_dict({name: value for name, value in key.items() if name not in sizes}),
        Workload.from_dict(usual | {name: key[name] for name in sizes if name in key}),
    )


def tiny_inputs(
    problem: Problem, workload: Workload, device: torch.device
) -> Iterator[DecodeInputs]:
    """Inputs that Triton specialises as those of the workload: one page, which every entry of block tables of the real size names, contexts of 1.

    One per type that sinks may have, else one.
    """
    import torch

    from patune.kernels.caches import to_layout
    from patune.kernels.inputs import TORCH_DTYPES, DecodeInputs

    cache = torch.zeros(
        (1, problem.block_size, workload.kv_heads, problem.head_dim), device=device
    ).to(TORCH_DTYPES[problem.kv_dtype])
    q_heads, rows = workload.kv_heads * problem.qg, workload.batch * problem.query_length
    query = torch.zeros((rows, q_heads, problem.head_dim), device=device).to(
        TORCH_DTYPES[problem.query_dtype]
    )
    per_token = (1, workload.kv_heads, problem.block_size, 1)
    scale = None
    if problem.kv_quant != "none":
        scale = torch.ones(1 if problem.kv_quant == "per_tensor" else per_token, device=device)
    fp8_query = problem.query_dtype.startswith("fp8")
    inputs = DecodeInputs(
        query=query,
        key_cache=to_layout(cache, problem.kv_layout, is_value=False),
        value_cache=to_layout(cache.clone(), problem.kv_layout, is_value=True),
        block_tables=torch.zeros(
            (workload.batch, -(-workload.context // problem.block_size)),
            dtype=torch.int32,
            device=device,
        ),
        context_lengths=torch.ones(workload.batch, dtype=torch.int32, device=device),
        softmax_scale=problem.head_dim**-0.5,
        query_length=problem.query_length,
        sliding_window=workload.context if problem.windowed else 0,
        query_scale=torch.ones(1, device=device) if fp8_query else None,
        key_scale=scale,
        value_scale=None if scale is None else scale.clone(),
        softcap=SOFTCAP if problem.softcap else 0.0,
        fp8_math=problem.fp8_math,
    )
    if not problem.sinks:
        yield inputs
        return
    for dtype in (inputs.out_dtype, torch.float32):
        yield dataclasses.replace(inputs, sinks=torch.zeros(q_heads, dtype=dtype, device=device))
