"""What a running sweep shows on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from patune import wording
from patune.tuner.progress import KeyEnded, Note, SweepStarted, TrialEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from patune.tuner.progress import Key, SweepEvent

LINE_EVERY_S = 15.0  # plain lines: often enough to see life, seldom enough for a log
REFRESHES_PER_S = 4
PACE_TRIALS = 16  # before that the workers' start is most of the time: 1 of 970 trials after 16 s said 4 hours
BAR_COLUMNS = 40


class SweepWatch:
    """Follows the events of a sweep and keeps what a display needs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._began = time.monotonic()
        self._inherited: int | None = None  # trials of earlier runs that count
        self.done = self.total = 0
        self.keys = self.ended = 0  # keys end after the search of all of them
        self.key: Key | None = None
        self.best: float | None = None
        self.measured = False
        self.failures: Counter[str] = Counter()

    def __call__(self, event: SweepEvent) -> None:
        """Take one event in."""
        match event:
            case SweepStarted():
                self.measured = event.evidence == "measured"
                self.keys = len(event.keys)
                self.total = self.keys * event.trials_per_key
                target = wording.target_text(event.target.to_dict())
                self._say(
                    f"{target}, {event.evidence}: {len(event.keys)} keys, {event.trials_per_key} trials each"
                )
            case TrialEnded():
                if self._inherited is None:
                    self._inherited = event.done - 1
                self.done, self.total = event.done, event.total
                self.key, self.best = event.key, event.best
                if not event.result.ok:
                    self.failures[event.result.status] += 1
            case KeyEnded():
                self.ended += 1
            case Note():
                self._say(event.text)

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace so far; None while too few trials ended to know one."""
        here = self.done - (self._inherited or 0)
        if here < max(1, min(PACE_TRIALS, self.total // 50)):
            return None
        return (time.monotonic() - self._began) / here * (self.total - self.done)

    def counts_text(self) -> str:
        """``45/192 trials, 3 min 20 s so far, about 7 min 05 s left``."""
        text = f"{self.done}/{self.total} trials, {wording.duration_text(time.monotonic() - self._began)} so far"
        if self.ended:
            return f"{text}, winners of {self.ended}/{self.keys} keys settled"
        left_s = self.left_s
        return text if left_s is None else f"{text}, about {wording.duration_text(left_s)} left"

    def key_lines(self) -> list[str]:
        """The key of the latest trial and its best score; the failures so far."""
        lines = []
        if self.key is not None:
            key = wording.key_text(self.key.problem.to_dict(), self.key.workload.to_dict())
            best = "none passed yet"
            if self.best is not None:
                best = f"best so far {wording.bare_score(self.best, self.measured)}"
            lines.append(f"{key}: {best}")
        if self.failures:
            lines.append(f"not ok so far: {wording.failures_text(self.failures)}")
        return lines

    def line(self) -> str:
        """All of it on one line."""
        return "; ".join([self.counts_text(), *self.key_lines()])


@contextlib.contextmanager
def watch(console: Console | None = None) -> Iterator[Callable[[SweepEvent], None]]:
    """Show a sweep's progress on stderr while the block runs; yields what ``run_sweep`` notifies."""
    console = console or Console(stderr=True, highlight=False)
    shown = _live(console) if console.is_terminal else _plain(console)
    with shown as notify:
        yield notify


@contextlib.contextmanager
def _live(console: Console) -> Iterator[Callable[[SweepEvent], None]]:
    follower = SweepWatch(lambda text: console.print(text, style="dim", soft_wrap=True))

    def picture() -> Group:
        bar = Table.grid(padding=(0, 1, 0, 0))
        bar.add_row(
            ProgressBar(total=max(1, follower.total), completed=follower.done, width=BAR_COLUMNS),
            Text(follower.counts_text()),
        )
        return Group(bar, *(Text(line) for line in follower.key_lines()))

    with Live(
        get_renderable=picture, console=console, refresh_per_second=REFRESHES_PER_S, transient=True
    ):
        yield follower


@contextlib.contextmanager
def _plain(console: Console) -> Iterator[Callable[[SweepEvent], None]]:
    follower = SweepWatch(lambda text: console.print(text, soft_wrap=True))
    next_line = time.monotonic() + LINE_EVERY_S

    def notify(event: SweepEvent) -> None:
        nonlocal next_line
        follower(event)
        if isinstance(event, TrialEnded) and time.monotonic() >= next_line:
            console.print(follower.line(), soft_wrap=True)
            next_line = time.monotonic() + LINE_EVERY_S

    yield notify
