"""A warm call: what its signature holds, and that it launches what was bound, with the addresses of its own tensors."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_decode import F8, H200, KNOBS, answered, arguments, elements_of
from without_gpu import Cuda, load

from patune.errors import InvalidValueError
from patune.kernels import decode
from patune.kernels.decode import forget_steps
from patune.kernels.knobs import HopperKnobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.calls import KernelCall


def signature(**changed: Any) -> Any:
    """The signature of a call on CPU tensors, fp8 so that every argument may be given."""
    one = torch.ones(1)
    call = arguments(dtype=F8) | {
        "sinks": torch.zeros(8), "query_scale": None, "key_scale": one, "value_scale": one, "sliding_window": 0,
        "softcap": 0.0, "fp8_math": False, "max_context": None, "out": torch.zeros(2, 8, 64), "workspace": torch.zeros(99),
        "return_lse": False, "knobs": KNOBS,
    } | changed  # fmt: skip
    tensors = tuple(call[name] for name in (
        "query", "key_cache", "value_cache", "block_tables", "context_lengths",
        "sinks", "query_scale", "key_scale", "value_scale",
    ))  # fmt: skip
    scalars = tuple(call[name] for name in (
        "softmax_scale", "query_length", "sliding_window", "softcap", "fp8_math", "max_context",
    ))  # fmt: skip
    return decode._signature(
        tensors, scalars, call["out"], call["workspace"], call["return_lse"], call["knobs"]
    )


@pytest.mark.parametrize(
    "name",
    [
        "query", "key_cache", "value_cache", "block_tables", "context_lengths",
        "sinks", "query_scale", "key_scale", "value_scale", "out", "workspace",
    ],
)  # fmt: skip
def test_a_tensors_metadata_is_in_the_signature(name: str) -> None:
    tensor = torch.zeros(4, 6, 8)
    same = signature(**{name: tensor})
    assert same == signature(**{name: torch.ones(4, 6, 8)}), "values and addresses are not"
    others = [
        torch.zeros(4, 6, 16), torch.zeros(4, 6), torch.zeros(4, 8, 6).transpose(1, 2), torch.zeros(4, 6, 16)[..., ::2],
        torch.zeros(4, 6, 8, dtype=torch.float16), torch.zeros(4, 6, 8, device="meta"),
    ]  # fmt: skip
    for other in others:
        assert signature(**{name: other}) != same, (other.shape, other.stride(), other.dtype)
    if name in ("sinks", "query_scale", "key_scale", "value_scale", "out", "workspace"):
        assert signature(**{name: None}) != same


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("softmax_scale", [0.125, 0.25, 1.0, 1, True]),
        ("query_length", [1, 2, 1.0, True]),
        ("sliding_window", [0, 1, 128, -1, 1.0, False]),
        ("softcap", [0.0, 50.0, 0, False]),
        ("fp8_math", [False, True, 0, 1]),
        ("max_context", [None, 1, 20, True, 1.0]),
        ("return_lse", [False, True]),
        ("knobs", [None, KNOBS, HopperKnobs(partition_tokens=64, num_splits=3, num_stages=2, num_warps=4)]),
    ],
)  # fmt: skip
def test_a_scalars_value_and_type_are_in_the_signature(name: str, values: list[Any]) -> None:
    signatures = [signature(**{name: value}) for value in values]
    assert len(set(signatures)) == len(values)
    assert signatures == [signature(**{name: value}) for value in values]


def test_a_thread_has_signatures_of_its_own() -> None:
    found: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(signature()))
        thread.start()
        thread.join()
    assert len({signature(), *found}) == 4, "a thread's identifier is given to the next one"


class Bound:
    """What calls give to :func:`patune.kernels.launch.bind`, and to what it made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.machine = Cuda()
        self.machine.install(patch)
        self.by_triton: list[list[KernelCall]] = []
        patch.setattr(decode, "_target_of", lambda index: H200)
        patch.setattr(decode, "_looked_up", lambda *asked: answered(KNOBS))
        patch.setattr(decode, "_device_index", lambda device: 0)
        patch.setattr(decode, "_launch", self.launch)
        patch.setattr(decode, "_decode_on_cpu", None)

    def launch(self, calls: list[KernelCall], device: torch.device) -> list[Any]:
        self.by_triton.append(calls)
        return load(calls)

    def run(self, call: dict[str, Any], **buffers: torch.Tensor | None) -> torch.Tensor:
        """The GPU path on CPU tensors, which have addresses."""
        names = ("query", "key_cache", "value_cache", "block_tables", "context_lengths")
        tensors = (*(call[name] for name in names), call.get("sinks"), None, None, None)
        scalars = (call["softmax_scale"], call["query_length"], 0, 0.0, False, None)
        return decode._decode_on_gpu(
            tensors, scalars, buffers.get("out"), buffers.get("workspace"), buffers.get("lse"), None
        )  # fmt: skip


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bound]:
    yield Bound(monkeypatch)
    forget_steps()


def addresses(call: dict[str, Any]) -> list[int]:
    names = ("query", "key_cache", "value_cache", "block_tables", "context_lengths")
    return [call[name].data_ptr() for name in names]


def test_a_warm_call_does_not_go_through_triton(bound: Bound) -> None:
    calls = [arguments() for _ in range(3)]
    for number, call in enumerate(calls):
        out = bound.run(call)
        assert len(bound.by_triton) == 1
        n_kernels = len(bound.by_triton[0])
        assert len(bound.machine.launches) == number * n_kernels
        if number:
            decode_launch, last = bound.machine.launches[-n_kernels], bound.machine.launches[-1]
            assert decode_launch.words[:5] == addresses(call)
            assert out.data_ptr() in last.words
    forget_steps()
    bound.run(calls[0])
    assert len(bound.by_triton) == 2


def test_one_cache_as_key_and_value_is_not_taken_for_one_argument(bound: Bound) -> None:
    both = arguments(layout="hnd")
    both["value_cache"] = both["key_cache"]
    bound.run(both)
    apart = arguments(layout="hnd")
    bound.run(apart)
    bound.run(both)
    assert len(bound.by_triton) == 1
    seen = bound.machine.launches
    assert seen[0].words[:5] == addresses(apart)
    assert seen[len(bound.by_triton[0])].words[:5] == addresses(both)


def test_a_misaligned_cache_is_refused_by_a_warm_call(bound: Bound) -> None:
    call = arguments(layout="hnd")
    bound.run(call)
    bound.run(call)
    launched = len(bound.machine.launches)
    key = call["key_cache"]
    call["key_cache"] = torch.zeros(key.numel() + 8, dtype=key.dtype)[1:].as_strided(key.shape, key.stride())  # fmt: skip
    with pytest.raises(InvalidValueError, match="allowed: addresses that are multiples of 16"):
        bound.run(call)
    assert len(bound.machine.launches) == launched
    assert len(bound.by_triton) == 1


def test_a_misaligned_query_goes_through_triton_and_the_next_does_not(bound: Bound) -> None:
    call = arguments()
    query = call["query"]
    off = torch.zeros(query.numel() + 8, dtype=query.dtype)[1:].as_strided(query.shape, query.stride())  # fmt: skip
    for misaligned, by_triton in ((True, 1), (False, 2), (False, 2), (True, 3), (False, 3)):
        bound.run(call | {"query": off} if misaligned else call)
        assert len(bound.by_triton) == by_triton


def test_a_given_workspace_is_used_and_left_alone(bound: Bound) -> None:
    call = arguments()
    for _ in range(3):
        workspace = torch.full((elements_of(KNOBS) + 8,), 7.0)
        bound.run(call, workspace=workspace)
        assert (workspace == 7).all()
        if bound.machine.launches:
            assert workspace.data_ptr() in bound.machine.launches[-1].words
    assert len(bound.machine.launches) == 2 * len(bound.by_triton[0])


def test_calls_without_a_workspace_share_one_per_stream(bound: Bound) -> None:
    call = arguments()
    for stream in (0, 0, 4, 0):
        bound.machine.stream = stream
        bound.run(call)
    first, other, again = (
        seen.words for seen in bound.machine.launches[:: len(bound.by_triton[0])]
    )
    assert first == again
    assert first != other
