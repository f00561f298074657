"""What ``serving_loop.py`` serves: an attention layer with random weights, random requests, and a check of what was decoded. Nothing to copy."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from patune.target import detect_target

HEAD_DIM, KV_HEADS, QG = 128, 2, 4  # QG query heads per KV head
HIDDEN, VOCABULARY, DTYPE = 256, 512, torch.bfloat16
# of the largest logit: bf16 rounds q, k, v, probabilities, output and logits by 0.4 % each
TOLERANCE = 0.02


@dataclass(slots=True, eq=False)
class Sequence:
    """A request.

    Attributes:
        tokens: so far.
        prompt_tokens: how many of them it came with.
        length: how many of them the cache holds when it ends.
        pages: in the order of the tokens.
        slots: of every place in the pages.
    """

    tokens: list[int]
    prompt_tokens: int
    length: int
    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class ToyLayer:
    """A language model of one attention layer, on the GPU where patune has a kernel for it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu" if detect_target() is None else "cuda")
        torch.manual_seed(0)
        width = KV_HEADS * HEAD_DIM
        self.embedding = self._weights(VOCABULARY, HIDDEN, std=1.0)
        # scores of this spread let single tokens dominate: a wrong one in the cache changes what is decoded
        self.to_query = self._weights(HIDDEN, QG * width, std=3 * HIDDEN**-0.5)
        self.to_keys_values = self._weights(2, HIDDEN, width, std=HIDDEN**-0.5)
        self.to_logits = self._weights(QG * width, VOCABULARY, std=1.0)

    def _weights(self, *shape: int, std: float) -> torch.Tensor:
        return (torch.randn(shape) * std).to(self.device, DTYPE)

    def zeros(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """On the layer's device, and of its type unless told otherwise."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def queries(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """[tokens, q_heads, head_dim]."""
        return (self.embedding[tokens] @ self.to_query).view(-1, KV_HEADS * QG, HEAD_DIM)

    def keys_values(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """[2, tokens, kv_heads, head_dim]."""
        return (self.embedding[tokens] @ self.to_keys_values).view(2, -1, KV_HEADS, HEAD_DIM)

    def next_tokens(self, out: torch.Tensor) -> torch.Tensor:
        """The likeliest token after each output [tokens, q_heads, head_dim]."""
        return (out.flatten(1) @ self.to_logits).argmax(-1)

    def exact_logits(self, tokens: list[int]) -> torch.Tensor:
        """Dense attention of these tokens without a cache: [tokens, vocabulary], float32."""
        heads = (self.queries(tokens), *self.keys_values(tokens))
        query, key, value = (head.float().transpose(0, 1)[None] for head in heads)
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1) @ self.to_logits.float()


def random_requests(count: int, longest: int) -> list[Sequence]:
    """Random prompts, and random numbers of tokens to decode after them: ``longest`` together, at most."""
    chance = random.Random(0)
    requests = []
    for _ in range(count):
        length = chance.randint(2, longest)
        prompt = chance.randint(max(1, length - 60), length)
        tokens = chance.choices(range(VOCABULARY), k=prompt)
        requests.append(Sequence(tokens, prompt, length))
    return requests


def error_of(layer: ToyLayer, sequence: Sequence) -> float:
    """How much less likely a decoded token was than the likeliest, at worst: a part of the largest logit, 0 when dense attention decodes the same."""
    steps = slice(sequence.prompt_tokens - 1, -1)  # the last token was not decoded yet
    logits = layer.exact_logits(sequence.tokens)[steps]
    decoded = torch.tensor(sequence.tokens[sequence.prompt_tokens :], device=layer.device)
    short = logits.amax(1) - logits.gather(1, decoded[:, None])[:, 0]
    return float((short / logits.abs().amax(1)).max())


def report(layer: ToyLayer, requests: list[Sequence], lost_pages: int) -> int:
    """Print what was served and how well; returns the exit code."""
    decoded = sum(len(s.tokens) - s.prompt_tokens for s in requests)
    error = max(error_of(layer, s) for s in requests)
    how = "oracle, no GPU" if layer.device.type == "cpu" else "CUDA graphs"
    print(f"{len(requests)} sequences, {decoded} tokens decoded ({how})")
    print(f"largest error {error:.4f} (tolerance {TOLERANCE}), pages lost: {lost_pages}")
    return 0 if error <= TOLERANCE and not lost_pages else 1
