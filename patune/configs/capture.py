"""What a serving process asked for in vain, written down for ``patune sweep --misses``.

The dispatcher counts; this writes, at the end of the process or when asked to. A miss counts for the power of two that its sizes lie under, so a
context that grows token by token is a few keys, and what is tuned for one serves every size in it (a neighbour may be twice as large).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

from patune import settings
from patune.errors import PatuneError
from patune.problem import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from patune.problem import Problem
    from patune.target import Target

    MissKey = tuple[Target, Problem, Workload, str]  # the last one is the layer that answered

__all__ = ["arm", "bucket", "flush_misses"]

LOGGER = logging.getLogger("patune")
SCHEMA = 2
SUFFIX = ".json"
MOST_KEYS = 10_000  # of a file, the most called ones: 4 MB
MOST_FILES = 1_000  # of a folder that nobody sweeps from

_lock = threading.Lock()
_written: Counter[MissKey] = Counter()  # of the process, by all files so far
_armed = False


def arm() -> None:
    """Write the misses when this process ends; for the first of them. A forked child writes its own, and none of its parent's."""
    global _armed
    if _armed:
        return
    with _lock:
        if not _armed:
            _armed = True
            atexit.register(_at_exit)
            os.register_at_fork(after_in_child=_begin_child)


def bucket(workload: Workload) -> Workload:
    """The workload that a miss counts for: walks and context up to the next power of two, with the same KV heads."""
    walks, context = (1 << (n - 1).bit_length() for n in (workload.walks, workload.context))
    # rounding down keeps a bucket its own bucket; it holds the batch that was asked for since walks >= batch * kv_heads
    return Workload(batch=walks // workload.kv_heads, kv_heads=workload.kv_heads, context=context)


def flush_misses() -> Path | None:
    """Write what was asked for in vain since the last time; returns the file, or None when there was nothing to write.

    A process does it when it ends, too, unless it is killed or ends by ``os._exit``, as forked worker processes do: call it there.

    Raises:
        PatuneError: the folder cannot be written to.
    """
    with _lock:
        counts = _counted()
        new = Counter({key: n - _written[key] for key, n in counts.items() if n > _written[key]})
        folder = settings.capture_folder(settings.database_place())
        if not new or folder is None:
            return None
        try:
            path = _write(folder, new)
        except OSError as error:
            raise PatuneError(
                f"Misses cannot be written to {folder}: {error.strerror or error}. "
                "PATUNE_CAPTURE names another folder; PATUNE_CAPTURE=0 writes none."
            ) from error
        if path is not None:
            _written.update(new)
        return path


def _counted() -> Counter[MissKey]:
    """What the dispatcher counted since the process began, by bucket."""
    from patune.configs import dispatcher

    counts: Counter[MissKey] = Counter()
    for (target, problem, workload, source), calls in dispatcher.missed().items():
        counts[target, problem, bucket(workload), source] += calls
    return counts


def _write(folder: Path, counts: Counter[MissKey]) -> Path | None:
    """One file with these counts, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    if sum(1 for entry in folder.iterdir() if entry.suffix == SUFFIX) >= MOST_FILES:
        LOGGER.warning(
            "%s holds %d files of misses, so no more are written. Run: patune sweep --misses",
            folder, MOST_FILES,
        )  # fmt: skip
        return None
    capture = str(uuid.uuid4())
    path = folder / f"{capture}{SUFFIX}"
    whole = folder / f"{capture}.tmp"
    try:
        whole.write_text(json.dumps(document(capture, counts)), encoding="utf-8")
        whole.replace(path)
    except OSError:
        whole.unlink(missing_ok=True)
        raise
    return path


def document(capture: str, counts: Mapping[MissKey, int]) -> dict[str, Any]:
    """The document of a capture, its most called keys first."""
    return {
        "schema": SCHEMA,
        "capture": capture,
        "misses": [
            {
                "target": target.to_dict(),
                "problem": problem.to_dict(),
                "workload": workload.to_dict(),
                "source": source,
                "calls": calls,
            }
            for (target, problem, workload, source), calls in Counter(counts).most_common(MOST_KEYS)
        ],
    }


def _at_exit() -> None:
    """A process that ends is never kept from it."""
    try:
        flush_misses()
    except Exception as error:  # whatever it is, nobody is left to handle it
        LOGGER.warning("Misses were not written: %s", error)


def _begin_child() -> None:
    """The parent writes what it counted before the fork."""
    global _lock, _written
    _lock = threading.Lock()  # another thread may have held it
    try:
        _written = _counted()
    except Exception as error:  # in the middle of a fork
        LOGGER.warning("Misses of this process are counted with those before its fork: %s", error)
