"""How the simulated kernel comes by what it multiplies: caches, scales, query and probabilities; right, or wrong in one of many ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patune.kernels.caches import from_layout

if TYPE_CHECKING:
    from patune.kernels.inputs import DecodeInputs

GAP = 64  # elements of a lone scale's memory that may be looked at


@dataclass
class Operands:
    """Reads as a kernel reads; ``bug`` breaks one thing on purpose."""

    bug: str = ""

    def read_key(self, inputs: DecodeInputs) -> torch.Tensor:
        """The logical key cache in float32, from wherever the kernel believes its elements to be."""
        key = inputs.key_cache
        if self.bug == "x of 8":
            pages, heads, vectors, block, x = key.shape
            key = key.reshape(pages, heads, vectors * x // 8, block, 8)
        return from_layout(key, inputs.kv_layout, is_value=False).float().contiguous()

    def read_value(self, inputs: DecodeInputs) -> torch.Tensor:
        value, layout, is_value = inputs.value_cache, inputs.kv_layout, True
        pages, heads, block, dim = *value.shape[:2], inputs.block_size, inputs.query.shape[2]
        if self.bug == "value by key strides":
            strides = (*inputs.key_cache.stride()[:2], *value.stride()[2:])
            value = value.as_strided(value.shape, strides)
        if self.bug == "dense pages":
            value = value.as_strided(value.shape, (value[0].numel(), *value.stride()[1:]))
        if self.bug == "x of 8" and layout == "aiter_5d":
            value = value.reshape(pages, heads, block // 8, dim, 8)
        if self.bug == "5-D value as a key":
            x = value.shape[-1]
            value, is_value = value.reshape(pages, heads, dim // x, block, x), False
        if self.bug == "5-D value as 4-D":
            value, layout = value.reshape(pages, heads, dim, block), "aiter"
        return from_layout(value, layout, is_value=is_value).float().contiguous()

    def query(self, inputs: DecodeInputs, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, Hq, D] as the products take it, and what a row's scores have to be multiplied with, [L, Hq, 1]."""
        query = inputs.query[rows].float()
        factor = torch.ones(*query.shape[:2], 1)
        if (scale := inputs.query_scale) is not None and self.bug != "query scale dropped":
            if self.bug == "query scale of row 0" or scale.numel() == 1:
                scale = scale.flatten()[:1].expand(len(inputs.query), 1, 1)
            factor = factor * scale[rows]
        if inputs.query.element_size() == inputs.key_cache.element_size():
            return query, factor
        math_dtype = inputs.key_cache.dtype if inputs.fp8_math else torch.float16
        if self.bug == "query cast":
            return query.to(math_dtype).float(), factor
        limit = torch.finfo(math_dtype).max
        if self.bug == "query saturates":  # a cast that clamps: wrong, but finite
            return query.clamp(-limit, limit).to(math_dtype).float(), factor
        if self.bug == "small query lost":  # scales large rows only
            query_unit = limit / query.abs().amax(-1, keepdim=True).clamp(min=limit)
            return (query * query_unit).to(math_dtype).float(), factor / query_unit
        largest = query.abs().amax(-1, keepdim=True)
        unit = limit / largest
        if self.bug != "zero row":
            unit = torch.where(largest > 0, unit, 1.0)
        if not inputs.fp8_math:
            unit = torch.exp2(unit.log2().floor() - 1)
        return (query * unit).to(math_dtype).float(), factor / unit

    def capped(self, inputs: DecodeInputs, scores: torch.Tensor) -> torch.Tensor:
        cap = inputs.softcap
        if self.bug == "softcap ignored":
            return scores
        if self.bug == "softcap in base 2":
            cap = cap * math.log(2)
        if self.bug == "softcap clamps":
            return scores.clamp(-cap, cap)
        if self.bug == "softcap before scale":
            unscaled = scores / inputs.softmax_scale
            return inputs.softmax_scale * cap * torch.tanh(unscaled / cap)
        return cap * torch.tanh(scores / cap)

    def scales(
        self, inputs: DecodeInputs, page: torch.Tensor, slot: torch.Tensor
    ) -> list[torch.Tensor]:
        """Key and value scales [tokens, Hkv]."""
        key, value = inputs.key_scale, inputs.value_scale
        if self.bug == "scales swapped":
            key, value = value, key
        if self.bug == "value scale by key strides" and key is not None and value is not None:
            value = value.as_strided(key.shape, key.stride())
        found = []
        for name, scale in (("key", key), ("value", value)):
            if scale is None or self.bug == f"{name} scale dropped":
                one = torch.ones(len(page), inputs.kv_heads)
            elif scale.numel() == 1 and self.bug == "per tensor as per token":
                memory = scale.as_strided((GAP,), (1,))
                one = memory[(page * inputs.kv_heads * inputs.block_size + slot) % GAP]
                one = one[:, None].expand(-1, inputs.kv_heads)
            elif scale.numel() == 1:
                one = scale.expand(len(page), inputs.kv_heads)
            elif self.bug == "per token as per tensor":
                one = scale.flatten()[0].expand(len(page), inputs.kv_heads)
            elif self.bug == "one scale per tile" and len(page):
                one = scale[page[0], :, slot[0], 0].expand(len(page), -1)
            elif self.bug == "scales of head 0":
                one = scale[page, :1, slot, 0].expand(-1, inputs.kv_heads)
            else:
                one = scale[page, :, slot, 0]
            found.append(one * one if self.bug == f"{name} scale twice" else one)
        return found

    def weigh(
        self,
        inputs: DecodeInputs,
        probs: torch.Tensor,
        values: torch.Tensor,
        value_scale: torch.Tensor,
    ) -> torch.Tensor:
        """Probabilities [L, Hkv, G, tokens] times scaled values, the former as narrow as the matrix unit takes them."""
        narrow = self.probs_dtype(inputs)
        per_token = inputs.value_scale is not None and inputs.value_scale.numel() > 1
        weights = probs * value_scale.T[:, None] if per_token else probs
        peak = weights.amax(-1, keepdim=True)
        unit = torch.where(peak > 0, peak, 1.0)
        if inputs.fp8_math:
            unit = unit / torch.finfo(narrow).max
        if self.bug == "fold not normalised":
            unit = torch.ones_like(unit)
        narrowed = (weights / unit).to(narrow).float() * unit
        acc = torch.einsum("lhgk,khd->lhgd", narrowed, values)
        return acc if per_token else acc * value_scale.amax(0)[:, None, None]

    def probs_dtype(self, inputs: DecodeInputs) -> torch.dtype:
        cache = inputs.key_cache.dtype
        if cache.itemsize == 2:
            return inputs.query.dtype
        return cache if inputs.fp8_math or self.bug == "fp8 probabilities" else torch.float16
