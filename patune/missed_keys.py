"""``patune sweep --misses``: from captures to the keys of a sweep, and out of the database again when they are tuned."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from patune import settings
from patune.misses import wanted
from patune.target import require_device, resolve_target

if TYPE_CHECKING:
    from patune.settings import DatabasePlace
    from patune.sweep_request import KeyRequest
    from patune.tuner.sweep import SweepOptions


def request_missed(
    request: KeyRequest, place: DatabasePlace, arch: str | None, *, take: bool
) -> tuple[KeyRequest, str]:
    """The request with the missed keys of the target, and what to say of the others (empty for nothing).

    Args:
        request: which may ask for no keys of its own.
        place: of the database, and of the captures beside it.
        arch: the target's architecture; None for the one here.
        take: put the captures into the database and delete their files.

    Raises:
        InvalidValueError: the request asks for other keys, or the target is unknown.
        NoUsableGpuError: the target has to be measured and its device is not here: nothing was taken.
    """
    from patune.configs.store import Store

    replace(request, stored=()).check()
    target = resolve_target(arch or settings.target_arch())
    if take:
        require_device(target)
    there = not hasattr(place, "exists") or place.exists()
    with contextlib.ExitStack() as stack:
        store = None
        if take:
            store = stack.enter_context(Store.open(place, create=True))
        elif there:
            store = stack.enter_context(Store.read(place))
        found = wanted(store, settings.capture_folder(place), target, take=take)
    return replace(request, stored=found.keys), found.note


def forget_tuned(place: DatabasePlace, options: SweepOptions) -> int:
    """Drop the misses of the sweep's keys that have a winner now; returns how many."""
    from patune.configs.store import Store

    asked = {(options.target, key.problem, key.workload) for key in options.keys}
    with Store.open(place, create=False) as store:
        tuned = {winner.key for winner in store.winners(arch=options.target.arch)}
        return store.drop_misses(sorted(asked & tuned, key=repr))
