"""One number for everything that decides answers, so that ranks can assert that they dispatch alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patune import settings
from patune.environment import kernel_source_hash
from patune.kernels.knobs import knobs_to_dict
from patune.record import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.configs.layers import View
    from patune.configs.table import Table
    from patune.target import Target

# Besides the stored configurations and the kernels: what turns them into an answer.
_CODE = (
    *("kernels/defaults.py", "kernels/feasibility.py", "kernels/knobs.py"),
    *("configs/layers.py", "configs/neighbours.py", "configs/overrides.py"),
)


def fingerprint_of(view: View, target: Target) -> str:
    """sha256 hex of a view and a target. Numbers of rows, and the order in which they came, do not count."""
    total = hashlib.sha256()
    for part in _parts(view, target):
        total.update(canonical_json(part).encode() + b"\n")
    return total.hexdigest()


def _parts(view: View, target: Target) -> Iterator[Any]:
    yield ["target", target.to_dict()]
    yield ["kernels", kernel_source_hash(target.limits.family)]
    yield ["code", _code()]
    yield ["PATUNE_KNOBS", settings.knobs_text()]
    for table in view.tables:
        yield from _stored(table)
    yield ["pins", sorted(canonical_json(_pin(pin)) for pin in view.pins.values())]
    failed = [
        [device.to_dict(), problem.to_dict(), knobs_to_dict(knobs)]
        for (device, problem), found in view.failed.items()
        for knobs in found
    ]
    yield ["failed", sorted(map(canonical_json, failed))]


def _code() -> list[str]:
    folder = Path(__file__).parent.parent
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _CODE]


def _pin(pin: Any) -> Any:
    return [pin.key, knobs_to_dict(pin.knobs)]


def _stored(table: Table) -> Iterator[Any]:
    kind = "packs" if table.packed else "database"
    for problem in sorted(table.winners, key=repr):
        for device in table.devices(problem):
            entries = [
                [e.workload.to_dict(), e.knobs, e.evidence, e.created, e.score, e.others]
                for e in table.group(problem, device).entries
            ]
            yield [kind, _plain(problem), _plain(device), sorted(map(canonical_json, entries))]
    for problem in sorted(table.robust, key=repr):
        for device, found in sorted(table.robust[problem].items(), key=repr):
            texts = sorted([one.objective, one.knobs] for one in found)
            yield [kind, "robust", _plain(problem), _plain(device), texts]
    for problem in sorted(table.blocks, key=repr):
        yield [kind, "blocks", _plain(problem), sorted(table.blocks[problem])]


def _plain(fields: tuple[object, ...]) -> list[object]:
    """PostgreSQL has truths where SQLite has 0 and 1."""
    return [int(value) if isinstance(value, bool) else value for value in fields]
