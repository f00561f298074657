"""``patune sweep --stale``: the keys whose stored winners need a second look on the target that is here, as a sweep's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.errors import InvalidValueError
from patune.second_look import Present, SecondLook, why_not_here
from patune.sweep_request import (
    NO_GPU_NOTE,
    KeyRequest,
    arch_of_environment,
)
from patune.target import Target, detect_target, require_device, resolve_target
from patune.tuner.progress import Key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patune.configs.winner import Winner
    from patune.settings import DatabasePlace
    from patune.sweep_request import SearchRequest
    from patune.tuner.sweep import SweepOptions

STALE_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleSweep:
    """What a sweep of the stale keys would do.

    Attributes:
        looks: at the winners that are swept, in the order of the keys.
        elsewhere: how many others need a second look that cannot be had by this sweep: other devices', or better evidence.
        stored: how many winners the filters leave.
        options: of the sweep; None when nothing is stale.
        note: one sentence about the target when nobody chose it and no GPU did; else empty.
    """

    target: Target
    looks: tuple[SecondLook, ...]
    elsewhere: int
    stored: int
    options: SweepOptions | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": STALE_SCHEMA,
            "target": self.target.to_dict(),
            "stored": self.stored,
            "stale": [look.to_dict() for look in self.looks],
            "elsewhere": self.elsewhere,
        }


def check_options(wanted: KeyRequest) -> None:
    """Refuse what names keys of its own, and filters that nothing can match.

    Raises:
        InvalidValueError: says which.
    """
    for name, value in (("--models", wanted.models), ("--from", wanted.misses)):
        if value:
            raise InvalidValueError(
                f"{name} and --stale contradict each other: --stale takes its keys from the database. Leave one of them out."
            )
    wanted.keys("emulated")


def matches(winner: Winner, axes: Mapping[str, Sequence[int]], variant: Mapping[str, Any]) -> bool:
    """Whether the given key options name a winner's key."""
    have = {**winner.problem.to_dict(), **winner.workload.to_dict()}
    return all(have[name] in values for name, values in axes.items() if values) and all(
        have[name] == value for name, value in variant.items()
    )


def request_stale(
    wanted: KeyRequest,
    search: SearchRequest,
    *,
    arch: str | None,
    place: DatabasePlace,
    dry_run: bool,
) -> StaleSweep:
    """The keys to tune again. A dry run brings no older database forward.

    Raises:
        InvalidValueError: a value is not allowed, or options contradict each other.
        NoUsableGpuError: the target has to be measured and its device is not here.
        DatabaseError: there is no database.
    """
    from patune.configs.store import Store

    check_options(wanted)
    chosen = arch or arch_of_environment()
    target = resolve_target(chosen)
    require_device(target)
    with Store.read(place) if dry_run else Store.open(place, create=False) as store:
        winners = [w for w in store.winners() if matches(w, wanted.axes, wanted.variant)]
    looks = Present().stale(winners)
    mine = [
        look
        for look in looks
        if look.winner.target == target and not why_not_here(look.winner, target)
    ]
    keys = tuple(Key(problem=k.winner.problem, workload=k.winner.workload) for k in mine)
    search.check(keys)
    note = ""
    if chosen is None and detect_target() is None:
        note = NO_GPU_NOTE.format(target=f"{target.arch} ({target.device_name})")
    return StaleSweep(
        target=target,
        looks=tuple(mine),
        elsewhere=len(looks) - len(mine),
        stored=len(winners),
        options=search.options(target, keys) if keys else None,
        note=note,
    )
