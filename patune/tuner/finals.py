"""Who wins a key, and who is worth a second measurement: pure decisions over results."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patune.kernels.knobs import Knobs
    from patune.trial import Timing, TrialResult

FINALISTS = 3  # besides the default and the incumbent
TIE_SHARE = 0.01  # medians nearer than this are a tie: two runs of one kernel differ by up to 2 % (H200, 2026-11-22)


def choose_finalists(
    passed: Mapping[Knobs, TrialResult], default: Knobs, incumbent: Knobs | None
) -> list[Knobs]:
    """The best few, the default and the incumbent, of those that passed; best first."""
    ranked = sorted(passed, key=lambda knobs: _score(passed[knobs]))
    extra = [knobs for knobs in (default, incumbent) if knobs is not None and knobs in passed]
    return list(dict.fromkeys([*ranked[:FINALISTS], *extra]))


def choose_winner(
    passed: Mapping[Knobs, TrialResult], default: Knobs, incumbent: Knobs | None
) -> Knobs | None:
    """The best of those that passed, unless it ties with the incumbent or the default, in this order.

    Timings tie when their p20..p80 ranges overlap or their medians are within TIE_SHARE; counted work ties when it is equal, and then the
    default comes first: it needs no explanation.
    """
    if not passed:
        return None
    best = min(passed, key=lambda knobs: _score(passed[knobs]))
    measured = passed[best].timing is not None
    for rival in (incumbent, default) if measured else (default, incumbent):
        if rival is not None and rival in passed and ties(passed[rival], passed[best]):
            return rival
    return best


def ties(rival: TrialResult, best: TrialResult) -> bool:
    """Whether ``best`` is not better than ``rival`` beyond the noise."""
    if rival.timing is not None and best.timing is not None:
        return _timings_tie(rival.timing, best.timing)
    return _score(rival) == _score(best)


def _timings_tie(rival: Timing, best: Timing) -> bool:
    gap = rival.median_us - best.median_us
    return rival.p20_us <= best.p80_us or gap < TIE_SHARE * rival.median_us


def _score(result: TrialResult) -> float:
    assert result.score is not None, "only trials that passed have a score"
    return result.score
