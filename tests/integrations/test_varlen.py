"""Prefill attention: sequence by sequence against a matrix written out in float64, and on a GPU torch's varlen kernel against that."""

from __future__ import annotations

import math

import pytest
import torch

from patune.integrations.varlen import _by_sequences, varlen_attention

CASES = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window_1": {"sliding_window": 1},
    "sinks": {"sinks": True},
    "window_and_sinks": {"sliding_window": 7, "sinks": True},
    "softcap": {"softcap": 1.5},
}
QUERIES, KEYS = (7, 1, 0, 40, 1), (7, 30, 0, 61, 1)  # prefill, decode, nothing, chunk, first token


def cumulative(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def exact(query, key, value, options):
    """One sequence, one head, float64, straight from the definition."""
    rows, keys = len(query), len(key)
    out = torch.zeros(rows, value.shape[-1], dtype=torch.float64)
    for i in range(rows):
        position = keys - rows + i
        first = max(0, position - options["window"] + 1) if options["window"] else 0
        scores = (key[first : position + 1] @ query[i]) * options["scale"]
        if options["softcap"]:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        top = max(float(scores.max()), options["sink"])
        weights = torch.exp(scores - top)
        total = weights.sum() + (
            math.exp(options["sink"] - top) if options["sink"] > -math.inf else 0.0
        )
        out[i] = (weights / total) @ value[first : position + 1]
    return out


def make(
    name: str, device: str, dtype: torch.dtype, heads: tuple[int, int] = (6, 2), dim: int = 64
):
    generator = torch.Generator().manual_seed(3)
    shapes = ((sum(QUERIES), heads[0], dim), (sum(KEYS), heads[1], dim), (sum(KEYS), heads[1], dim))
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    case = dict(CASES[name])
    sinks = torch.randn(heads[0], generator=generator).to(device) if case.pop("sinks", 0) else None
    options = {"softmax_scale": dim**-0.5, "sinks": sinks, **case}
    lengths = cumulative(QUERIES, device), cumulative(KEYS, device)
    return tensors, lengths, options


def expected(tensors, options):
    query, key, value = (t.double().cpu() for t in tensors)
    out = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    q_at = k_at = 0
    for rows, keys in zip(QUERIES, KEYS, strict=True):
        for head in range(query.shape[1] if rows else 0):
            sinks = options["sinks"]
            out[q_at : q_at + rows, head] = exact(
                query[q_at : q_at + rows, head],
                key[k_at : k_at + keys, head // group],
                value[k_at : k_at + keys, head // group],
                {
                    "scale": options["softmax_scale"],
                    "window": options.get("sliding_window", 0),
                    "softcap": options.get("softcap", 0.0),
                    "sink": -math.inf if sinks is None else float(sinks[head]),
                },
            )
        q_at, k_at = q_at + rows, k_at + keys
    return out


@pytest.mark.parametrize("name", CASES)
def test_sequences_are_computed_as_defined(name: str) -> None:
    tensors, (cu_query, cu_key), options = make(name, "cpu", torch.float32)
    out = varlen_attention(*tensors, cu_query, cu_key, max(QUERIES), max(KEYS), **options)
    assert (out.double() - expected(tensors, options)).abs().max() < 1e-5


def test_pieces_of_a_long_sequence_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, (cu_query, cu_key), options = make("window_and_sinks", "cpu", torch.float32)
    whole = varlen_attention(*tensors, cu_query, cu_key, max(QUERIES), max(KEYS), **options)
    monkeypatch.setattr("patune.integrations.varlen.SCORES_AT_A_TIME", 6 * 61 * 3)
    pieces = varlen_attention(*tensors, cu_query, cu_key, max(QUERIES), max(KEYS), **options)
    assert torch.allclose(pieces, whole, atol=1e-6)


def test_keys_past_a_length_are_not_read() -> None:
    """Packed with room to spare, as pages gathered per sequence are."""
    (query, key, value), (cu_query, cu_key), options = make("plain", "cpu", torch.float32)
    room = 80
    wide = [torch.full((len(KEYS) * room, *key.shape[1:]), math.nan) for _ in range(2)]
    for b, keys in enumerate(KEYS):
        at = int(cu_key[b])
        wide[0][b * room : b * room + keys] = key[at : at + keys]
        wide[1][b * room : b * room + keys] = value[at : at + keys]
    out = varlen_attention(
        query, *wide, cu_query, torch.arange(len(KEYS) + 1, dtype=torch.int32) * room, max(QUERIES), room,
        key_lengths=torch.tensor(KEYS, dtype=torch.int32), **options,
    )  # fmt: skip
    plain = varlen_attention(
        query, key, value, cu_query, cu_key, max(QUERIES), max(KEYS), **options
    )
    assert torch.equal(out, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (61, 1)], ids=["mha", "gqa4", "mqa61"])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, heads: tuple[int, int], dim: int) -> None:
    """61 query heads for 49 query tokens: the axes of torch's log-sum-exp are not mistaken for each other."""
    for dtype, allowed in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
        tensors, (cu_query, cu_key), options = make(name, "cuda", dtype, heads, dim)
        out = varlen_attention(*tensors, cu_query, cu_key, max(QUERIES), max(KEYS), **options)
        wanted = _by_sequences(
            *(t.float() for t in tensors), cu_query, cu_key, options["softmax_scale"],
            options.get("sliding_window", 0), options["sinks"], options.get("softcap", 0.0), None,
        )  # fmt: skip
        assert (out.float() - wanted).abs().max() <= allowed


@pytest.mark.gpu
def test_as_many_heads_as_tokens() -> None:
    """A log-sum-exp that is square."""
    tensors, (cu_query, cu_key), options = make("sinks", "cuda", torch.float16, (sum(QUERIES), 1))
    out = varlen_attention(*tensors, cu_query, cu_key, max(QUERIES), max(KEYS), **options)
    assert (out.double().cpu() - expected(tensors, options)).abs().max() <= 0.003
