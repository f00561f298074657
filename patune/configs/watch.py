"""Looks now and then whether the database has changed, and has it read again: off the hot path, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from patune import settings
from patune.configs.reading import generation_of
from patune.configs.staleness import changes_between
from patune.configs.wording import stale_line
from patune.errors import InvalidValueError
from patune.target import Target

if TYPE_CHECKING:
    from patune.configs.state import State
    from patune.configs.table import Table
    from patune.settings import DatabasePlace

LOGGER = logging.getLogger("patune")
WAIT_S = 0.2  # for a locked database: the next look comes soon

_watcher: Watcher | None = None
_starting = threading.Lock()


def ensure() -> None:
    """Start the thread of this process unless there is one, or PATUNE_WATCH is 0."""
    global _watcher
    if _watcher is not None:
        return
    with _starting:
        if _watcher is None:
            _watcher = Watcher(_seconds())
            if _watcher.seconds > 0:
                try:
                    threading.Thread(target=_watcher.run, name="patune-watch", daemon=True).start()
                except RuntimeError as error:  # no more threads, or the interpreter is ending
                    LOGGER.warning("The config database is not watched: %s", error)


def forget() -> None:
    """In a forked child: no thread of the parent came along."""
    global _watcher, _starting
    _watcher, _starting = None, threading.Lock()


def stop() -> None:
    """Let the thread end; the next cold lookup starts one with the settings of then."""
    global _watcher
    with _starting:
        if _watcher is not None:
            _watcher.ended.set()
        _watcher = None


def _seconds() -> float:
    try:
        return settings.watch_s()
    except InvalidValueError as error:
        LOGGER.warning("The config database is not watched: %s", error)
        return 0.0


class Watcher:
    """Polls one process's dispatcher."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ended = threading.Event()
        self.seen: tuple[DatabasePlace | None, object] = (None, None)

    def run(self) -> None:
        """Until the process ends. Nothing that goes wrong here may end it."""
        while True:
            try:
                self.look()
            except Exception as error:
                LOGGER.warning("The config database could not be looked at: %r", error)
            if self.ended.wait(self.seconds):
                return

    def look(self) -> None:
        """One look: read everything again when the database has changed, and say what needs a second look."""
        from patune.configs import dispatcher

        state = dispatcher._state
        if self._changed(state):
            dispatcher.refresh()
        for arch, tables in list(dispatcher._state.tables.items()):
            _tell_stale(dispatcher._state, arch, tables.database)

    def _changed(self, state: State) -> bool:
        place = state.place
        if place is None or not state.tables:
            return False
        stamp = place, _stamp(place) if isinstance(place, Path) else None
        if stamp == self.seen and isinstance(place, Path):
            return False
        present = generation_of(place, WAIT_S)
        if present is None:
            return False  # it cannot be read now: what is in memory is served on
        self.seen = stamp
        return any(tables.database.generation != present for tables in state.tables.values())


def _stamp(path: Path) -> object:
    """What changes with every commit: of the file, or of its log."""
    found: list[object] = []
    for name in (path, path.with_name(path.name + "-wal")):
        try:
            status = name.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def _tell_stale(state: State, arch: str, table: Table) -> None:
    """One line when stored winners were tuned with something else than what is here."""
    if not table.by_environment:
        return
    from patune.environment import present_fields

    present = present_fields(state.targets.get(arch) or Target.named(arch))
    stale = [
        (count, changes_between(table.environments[number], present))
        for number, count in sorted(table.by_environment.items())
        if number in table.environments
    ]
    line = stale_line(arch, table.count, stale)
    if line is not None and state.process.first_time("stale", line):
        LOGGER.warning("%s", line)
