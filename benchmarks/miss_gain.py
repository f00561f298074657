"""What tuning a missed key saves, by the layer that answered it: where the constants of patune.misses come from.

    python benchmarks/miss_gain.py [--data benchmarks/data]

For each recorded pool (an H200, every feasible configuration of a key), the time of what an untuned lookup answers over that of the best:

- ``heuristic``: the default knobs;
- ``safe``: the safe knobs, or what differs from them in ``overlap_launch`` only, which pools do not vary;
- ``other_device``: no second device was recorded. A device of the architecture with half or twice the compute units would have chosen half or twice
  the splits, so it is the mean over those two of the best configuration with its splits changed so, or with one split where it has one.

A gain is the mean of that ratio, less 1: what a call could save, in times of the best.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patune.kernels.defaults import default_knobs, safe_knobs
from patune.tuner.recorded import read_pools

if TYPE_CHECKING:
    from patune.kernels.knobs import Knobs
    from patune.tuner.recorded import RecordedPool

DATA = Path(__file__).parent / "data"


def _plain(knobs: Knobs) -> tuple[object, ...]:
    """What tells knobs apart in a pool: no overlap, and nothing of a reduce kernel that there is not."""
    fields = knobs.to_dict()
    fields.pop("overlap_launch", None)
    if knobs.one_shot:
        del fields["reduce_chunk"], fields["reduce_warps"]
    return tuple(fields.items())


def ratios_of(pool: RecordedPool) -> dict[str, float | None]:
    """Times over the best, by layer; None where nothing comparable was timed."""
    times = {_plain(p.knobs): p.median_us for p in pool.points if p.median_us is not None}
    best = pool.optimum.knobs
    best_us = times[_plain(best)]
    others = [
        times.get(_plain(replace(best, num_splits=splits)))
        for splits in {max(1, best.num_splits // 2), best.num_splits * 2}
        if splits != best.num_splits
    ]
    known = [us / best_us for us in others if us is not None]
    key = pool.key
    asked = {
        "heuristic": times.get(_plain(default_knobs(key.problem, key.workload, pool.target))),
        "safe": times.get(_plain(safe_knobs(key.problem, pool.target))),
    }
    found = {name: None if us is None else us / best_us for name, us in asked.items()}
    return {"other_device": sum(known) / len(known) if known else None, **found}


def main() -> int:
    """Print the table, and the gains."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, default=DATA)
    pools = read_pools(arguments.parse_args().data)
    rows = [(pool, ratios_of(pool)) for pool in pools]
    names = list(rows[0][1])
    print(f"{'key':44}" + "".join(f"{name:>14}" for name in names))
    for pool, ratios in rows:
        p, w = pool.key.problem, pool.key.workload
        key = f"{p.block_size} {p.head_dim} {p.qg} {p.kv_layout} {p.kv_dtype} batch {w.batch} context {w.context}"
        cells = (f"{r:14.3f}" if r is not None else f"{'-':>14}" for r in ratios.values())
        print(f"{key:44}" + "".join(cells))
    means = {}
    for name in names:
        known = [ratio for _, ratios in rows if (ratio := ratios[name]) is not None]
        means[name] = sum(known) / len(known) - 1
    print(f"{'gain':44}" + "".join(f"{means[name]:14.3f}" for name in names))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
