"""Ends a process at a moment that was drawn, and says where in its work that was.

Five sorts of moments: after a time (SIGKILL from outside), after so many steps of SQLite's machine, after so many calls in Python, after
so many events (statements, files opened and renamed), and in the middle of the write that makes a file longer than so many bytes.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import signal
import sqlite3
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

STEPS_AT_ONCE = 50  # of SQLite's machine, between two looks
SORTS = ("time", "steps", "calls", "events", "bytes")
BOARD_B = 4096
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
LATE = 1.1  # of what was measured: some moments come after the end
AT_THE_END = 0.3  # of the moments: commits and renames are the last thing of a command
LAST = 0.9


@dataclass(frozen=True, slots=True)
class Stop:
    """When a process ends: ``at`` is in seconds, steps, calls, events or bytes."""

    sort: str
    at: float


NO_STOP = Stop("events", math.inf)


@dataclass(frozen=True, slots=True)
class Span:
    """How much of everything a piece of work takes when nobody ends it."""

    seconds: float
    steps: int
    calls: int
    events: int
    bytes: int

    def draw(self, source: random.Random, sort: str) -> Stop:
        """A moment of it."""
        whole = self.seconds if sort == "time" else getattr(self, sort)
        low = LAST if source.random() < AT_THE_END else 0.0
        return Stop(sort, source.uniform(low, LATE) * whole)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a process.

    Attributes:
        code: as of subprocess: negative is a signal.
        stage: where in its work it was.
        error: a traceback, where it ended with one.
    """

    code: int
    stage: str
    error: str

    @property
    def killed(self) -> bool:
        return self.code in KILLED


class Board:
    """A page that both processes see, whatever becomes of one of them."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, BOARD_B)

    def put(self, words: str) -> None:
        data = words.encode()[: BOARD_B - 2]
        self._page[: len(data) + 1] = data + b"\0"

    def get(self) -> str:
        return self._page[:].split(b"\0", 1)[0].decode(errors="replace")


class Watch:
    """Inside of the process: counts, puts the stage on the board, and ends the process at its moment."""

    def __init__(self, board: Board, stop: Stop | None, folder: Path) -> None:
        self.board, self.stop, self.folder = board, stop, folder
        self.steps = self.calls = self.events = self.bytes = 0
        self.commits = 0
        self.writing = False

    def arm(self) -> None:
        """Begin."""
        if self.stop is not None and self.stop.sort == "bytes":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            limit = max(1, int(self.stop.at))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        real = sqlite3.connect
        counts_steps = self.stop is None or self.stop.sort == "steps"

        def connect(*args: Any, **how: Any) -> sqlite3.Connection:
            connection = real(*args, **how)
            connection.set_trace_callback(self._statement)
            if counts_steps:
                connection.set_progress_handler(self._progress, STEPS_AT_ONCE)
            return connection

        sqlite3.connect = connect  # type: ignore[assignment]
        sqlite3.dbapi2.connect = connect  # type: ignore[attr-defined]
        sys.addaudithook(self._audit)
        if self.stop is None or self.stop.sort == "calls":
            sys.setprofile(self._profile)

    def _end_at(self, sort: str, count: int) -> None:
        if self.stop is not None and self.stop.sort == sort and count >= self.stop.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _progress(self) -> int:
        self.steps += STEPS_AT_ONCE
        self._end_at("steps", self.steps)
        return 0

    def _profile(self, _frame: object, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            self.calls += 1
            self._end_at("calls", self.calls)

    def _event(self, stage: str) -> None:
        self.board.put(stage)
        self.events += 1
        self._end_at("events", self.events)

    def _statement(self, statement: str) -> None:
        if statement.startswith("--"):
            return
        self._measure()
        verb = statement.split(None, 1)[0].upper()
        if statement.startswith("BEGIN IMMEDIATE"):
            self.writing = True
        if verb in ("COMMIT", "ROLLBACK") and self.writing:
            self.writing, self.commits = False, self.commits + 1
            self._event("from the commit on")
        elif self.writing:
            self._event(f"in a writing transaction: {verb}")
        else:
            self._event("after a commit" if self.commits else "before the writing transaction")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "sqlite3.connect") and str(arguments[0]).endswith(".part"):
            self._event("writing beside")
        elif event == "os.rename" and str(arguments[0]).endswith(".part"):
            self._event("swapping")

    def _measure(self) -> None:
        if self.stop is None:
            sizes = (p.stat().st_size for p in self.folder.glob("patune.db*"))
            self.bytes = max(self.bytes, *sizes, 0)


def run(work: Callable[[], None], folder: Path, stop: Stop | None) -> tuple[Ended, list[int]]:
    """Run work in a process of its own that ends at its moment, or is measured; also its counts, without a stop."""
    board, counts, errors = Board(), Board(), Board()
    pid = os.fork()
    if pid == 0:
        code = 1
        watch = Watch(board, stop, folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            watch.arm()
            work()
            code = 0
        except BaseException:
            errors.put(traceback.format_exc()[-BOARD_B + 2 :])
        finally:
            sys.setprofile(None)
            largest = max((p.stat().st_size for p in folder.iterdir()), default=0)
            counts.put(f"{watch.steps} {watch.calls} {watch.events} {max(watch.bytes, largest)}")
            os._exit(code)
    if stop is not None and stop.sort == "time":
        time.sleep(stop.at)
        os.kill(pid, signal.SIGKILL)  # a process that has ended stays until it is waited for
    _, status = os.waitpid(pid, 0)
    ended = Ended(
        os.waitstatus_to_exitcode(status), board.get() or "before everything", errors.get()
    )
    return ended, [int(n) for n in counts.get().split()]


def measure(work: Callable[[], None], prepare: Callable[[], Path]) -> Span:
    """How long work is, in everything that it can be ended after; each time on what was prepared for it."""
    ended, counts = run(work, prepare(), None)
    assert ended.code == 0, ended.error
    folder = prepare()
    began = time.monotonic()
    ended, _ = run(work, folder, NO_STOP)  # counting steps and calls takes longer
    assert ended.code == 0, ended.error
    return Span(time.monotonic() - began, *counts)
