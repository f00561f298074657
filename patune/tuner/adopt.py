"""Gives stored winners new evidence in the present environment: their stored best are gated and timed (emulated targets: counted) again.

A winner that still passes and is still the best becomes current as it is; a better one of those that are stored takes its place; one that
no longer passes is retired. Nothing is searched: that is what a sweep is for.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from patune.configs.dispatcher import sweep_command
from patune.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_NO_GPU, EXIT_OK
from patune.record import check_choice
from patune.second_look import why_not_here
from patune.tuner.key_state import fails
from patune.tuner.options import SweepOptions
from patune.tuner.progress import EXIT_TERMINATED, Key
from patune.tuner.search import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from patune.configs.dispatcher import Answer
    from patune.configs.store import Store
    from patune.configs.winner import Winner
    from patune.second_look import SecondLook
    from patune.settings import DatabasePlace
    from patune.target import Target
    from patune.trial import TrialResult
    from patune.tuner.progress import KeyReport, SweepEvent, SweepReport

ADOPT_SCHEMA = 1
EFFORT = "adopt"

Fate = Literal["adopted", "replaced", "failed", "undecided", "no_device"]
FATES: tuple[str, ...] = get_args(Fate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """What became of one stored winner.

    Attributes:
        look: the winner as it was stored, and what has changed since.
        fate: ``adopted``: the same knobs are the best of what is stored; ``replaced``: others are; ``failed``: they no longer pass;
            ``undecided``: nobody could tell, and what was served is served; ``no_device``: nobody was asked.
        reason: one line; empty for ``adopted`` where nothing else was compared.
        again: what the knobs got now; None when they were not tried.
        after: what is stored for the key now; None when nothing is.
        answer: what lookups say where nothing is stored any more.
    """

    look: SecondLook
    fate: Fate
    reason: str = ""
    again: TrialResult | None = None
    after: Winner | None = None
    answer: Answer | None = None

    def __post_init__(self) -> None:
        check_choice("fate", self.fate, FATES)

    @property
    def next_command(self) -> str | None:
        """What searches for a better one; None where the winner is current."""
        if self.fate in ("adopted", "replaced", "no_device"):
            return None
        winner = self.look.winner
        return sweep_command(winner.problem, winner.workload, winner.target)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            **self.look.to_dict(),
            "fate": self.fate,
            "reason": self.reason,
            "before": _evidence(self.look.winner),
            "again": self.again.to_dict() if self.again else None,
            "after": _evidence(self.after) if self.after else None,
            "answer": self.answer.to_dict() if self.answer else None,
            "run_next": self.next_command,
        }


def _evidence(winner: Winner) -> dict[str, Any]:
    document = winner.to_dict()
    names = ("knobs", "evidence", "timing", "counted", "speedup", "environment", "created")
    return {name: document[name] for name in names} | {"score": winner.score}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptReport:
    """What became of all of them.

    Attributes:
        database: where they are stored.
        adoptions: in the order of the database.
        seconds: wall time.
        interrupted: by Ctrl-C or SIGTERM.
        terminated: by SIGTERM.
    """

    database: str
    adoptions: tuple[Adoption, ...]
    seconds: float
    interrupted: bool = False
    terminated: bool = False

    def of(self, fate: str) -> list[Adoption]:
        """Those with this fate."""
        return [adoption for adoption in self.adoptions if adoption.fate == fate]

    @property
    def exit_code(self) -> int:
        """143 or 130 when interrupted, 1 when a winner no longer passes, 4 when one could not be judged here, else 0."""
        if self.terminated:
            return EXIT_TERMINATED
        if self.interrupted:
            return EXIT_INTERRUPTED
        if self.of("failed"):
            return EXIT_ERROR
        return EXIT_NO_GPU if self.of("no_device") or self.of("undecided") else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        counts = Counter(adoption.fate for adoption in self.adoptions)
        return {
            "schema": ADOPT_SCHEMA,
            "database": self.database,
            "seconds": self.seconds,
            "exit_code": self.exit_code,
            "fates": {fate: counts[fate] for fate in get_args(Fate)},
            "winners": [adoption.to_dict() for adoption in self.adoptions],
        }


def adopt(
    looks: Sequence[SecondLook],
    *,
    database: str,
    device: Target | None,
    command: str,
    sweep: Callable[[SweepOptions], SweepReport],
    answer: Callable[[Winner], Answer],
) -> AdoptReport:
    """Sweep the keys of winners with what is stored and packed for them, target by target. What was decided is stored at once.

    Args:
        looks: at the winners, each of its own key.
        database: where they are stored, for the report.
        device: the GPU that is here, if any.
        command: recorded with the runs.
        sweep: runs one sweep into the database.
        answer: what lookups say for a winner's key by now.

    Raises:
        NoUsableGpuError: the device stopped working.
    """
    began = time.monotonic()
    found: dict[int, Adoption] = {}
    groups: dict[Target, list[int]] = {}
    interrupted = terminated = False
    for number, look in enumerate(looks):
        if reason := why_not_here(look.winner, device):
            found[number] = Adoption(look=look, fate="no_device", reason=reason, after=look.winner)
        else:
            groups.setdefault(look.winner.target, []).append(number)
    for target, numbers in groups.items():
        keys = tuple(_key(looks[number].winner) for number in numbers)
        reports: dict[Key, KeyReport] = {}
        if not interrupted:
            # What is stored does not count: a stricter gate says something else in the same environment.
            options = SweepOptions(
                target=target, keys=keys, effort=EFFORT, fresh=True, command=command
            )
            report = sweep(options)
            reports = {ended.key: ended for ended in report.keys}
            interrupted, terminated = report.interrupted, report.terminated
        for number, key in zip(numbers, keys, strict=True):
            found[number] = _adoption(looks[number], reports.get(key), answer)
    return AdoptReport(
        database=database,
        adoptions=tuple(found[number] for number in range(len(looks))),
        seconds=time.monotonic() - began,
        interrupted=interrupted,
        terminated=terminated,
    )


def sweep_into(
    store: Store,
    watch: Callable[[], AbstractContextManager[Callable[[SweepEvent], None]]],
    jobs: int | None,
) -> Callable[[SweepOptions], SweepReport]:
    """Sweeps of a target's own kernels into a store.

    Args:
        store: takes the trials and winners.
        watch: what shows one sweep's events.
        jobs: worker processes that compile, and emulate; None is as many as a sweep has.
    """
    from patune.tuner.sweep import run_sweep
    from patune.tuner.workbench import standard_workbench

    def sweep(options: SweepOptions) -> SweepReport:
        benches = []
        if jobs is not None:
            benches = [dataclasses.replace(standard_workbench(options.target), builders=jobs)]
        with watch() as notify:
            return run_sweep(options, store, notify, *benches)

    return sweep


def stored_answer(place: DatabasePlace) -> Callable[[Winner], Answer]:
    """What lookups say for a winner's key, with the database as it is at that moment."""
    from patune.configs import dispatcher

    def answer(winner: Winner) -> Answer:
        dispatcher.suspend_capture()
        dispatcher.reload(place)
        return dispatcher.lookup_problem(winner.problem, winner.workload, winner.target)

    return answer


def _key(winner: Winner) -> Key:
    return Key(problem=winner.problem, workload=winner.workload)


def _adoption(
    look: SecondLook, report: KeyReport | None, answer: Callable[[Winner], Answer]
) -> Adoption:
    """What a key's end means for its winner."""
    before = look.winner
    again = report.incumbent if report is not None else None
    if report is None or again is None:
        return Adoption(look=look, fate="undecided", reason="not reached", after=before)
    verdict = f"{again.status}: {again.reason}" if again.reason else again.status
    after = report.winner
    if fails(again):
        said = answer(before) if after is None else None
        return Adoption(
            look=look, fate="failed", reason=verdict, again=again, after=after, answer=said
        )
    if after is None:
        return Adoption(look=look, fate="undecided", reason=verdict, again=again, after=before)
    same = canonical(after.knobs) == canonical(before.knobs)
    reason = report.decision if again.ok else verdict
    return Adoption(
        look=look,
        fate="adopted" if same else "replaced",
        reason=reason,
        again=again,
        after=after,
    )
