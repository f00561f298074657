"""Which tokens a wrong row missed or saw beyond its right, told from the marks that it shows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from patune.tuner.gate.verdict import Tokens

if TYPE_CHECKING:
    import torch

    from patune.tuner.gate.case import Case

SMALLEST_SCALE = 1e-3


def marker_twin(case: Case) -> Case:
    """The exact-set case of the same lengths and pages: it tells whether a wrong result saw the right tokens."""
    return replace(
        case,
        kind="markers",
        peaks=(),
        tail=False,
        offset=0.0,
        query_log2=(0, 0),
        rounded_query=False,
        extreme_scales=False,
        checks_lse=False,
        repeats=0,
        regrouped=False,
    )


def guess_tokens(
    marks: torch.Tensor, seen: torch.Tensor, exact: torch.Tensor, first: int
) -> Tokens | None:
    """Which tokens have too little or too much weight: those whose channels are all short, or all over.

    A lost token also scales up everything that is left. One token leaves most channels alone, a tile most of the upper half (which
    marks runs of tokens): their median is the scale. A token read from the wrong tile may show in the upper half only.

    ``marks`` [tokens, head_dim] are the values of the tokens from ``first`` on; ``seen`` and ``exact`` [head_dim] say how many tokens of
    each mark the row shows, and how many it has to.
    """
    every, upper = slice(None), slice(len(seen) // 2, None)
    for scaled_by, matched in ((every, every), (upper, every), (upper, upper)):
        present = exact[scaled_by] > 0.5
        scale = (seen[scaled_by] / exact[scaled_by])[present].median().clamp(min=SMALLEST_SCALE)
        counts = seen / scale - exact
        lost, extra = (
            (marks[:, matched] @ held[matched].double()) == 0
            for held in (counts > -0.5, counts < 0.5)
        )
        tokens = Tokens(missed=_ranges(lost, first), extra=_ranges(extra, first))
        if tokens:
            return tokens
    return None


def _ranges(mask: torch.Tensor, first: int) -> tuple[tuple[int, int], ...]:
    """Set positions of a mask as token ranges."""
    tokens = (mask.nonzero()[:, 0] + first).tolist()
    starts = [t for i, t in enumerate(tokens) if i == 0 or tokens[i - 1] != t - 1]
    ends = [t for i, t in enumerate(tokens) if i + 1 == len(tokens) or tokens[i + 1] != t + 1]
    return tuple(zip(starts, ends, strict=True))
