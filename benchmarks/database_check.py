"""Whether a database holds what its writers were told that it holds, and whether its readers saw nothing else on the way.

The times of the log are of one monotonic clock, so that it is known which of two operations came first, where they do not overlap.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import database_values as values
from database_readers import IMPORTS, SHOWN_IMPORTS, check_dangling
from database_values import ENVIRONMENTS, KEYS, PROBLEMS, STRIDE
from database_writers import NEVER
from sqlalchemy import select, text

from patune.configs.models import RunRow
from patune.configs.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from patune.settings import DatabasePlace

Line = dict[str, Any]
FOREVER = float("inf")
MOST_TOLD = 20  # of one sort of problem


def read_log(path: Path) -> list[Line]:
    """The lines of a process, but for one that a kill tore."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@dataclass(slots=True)
class Write:
    """One acknowledged change of what stands at a place."""

    code: int
    began: float
    ended: float


class Register:
    """A place where the last write stands: which codes may a read of it have seen?"""

    def __init__(self) -> None:
        self._by_code: dict[int, Write] = {}
        self._ended: list[float] = []
        self._latest_began: list[float] = []

    def add(self, writes: Iterable[Write]) -> None:
        for write in sorted(writes, key=lambda w: w.ended):
            self._by_code[write.code] = write
            latest = self._latest_began[-1] if self._latest_began else -FOREVER
            self._ended.append(write.ended)
            self._latest_began.append(max(latest, write.began))

    def refuse(self, code: int | None, began: float, ended: float) -> str | None:
        """Why a read in that time cannot have seen this code, or nothing; None when it can."""
        before = bisect.bisect_left(self._ended, began)  # writes that were acknowledged by then
        if code is None:
            return "nothing is there after an acknowledged write" if before else None
        write = self._by_code.get(code)
        if write is None:
            return f"code {code} was never acknowledged"
        if write.began > ended:
            return f"code {code} is from the future"
        if before and self._latest_began[before - 1] > write.ended:
            return f"code {code} is back, or a later write is lost"
        return None


@dataclass(slots=True)
class History:
    """What the logs of a run say."""

    trials: dict[int, Line] = field(default_factory=dict)  # code -> line
    orders: dict[tuple[int, int], list[tuple[int, float, float]]] = field(default_factory=dict)
    winners: dict[int, Register] = field(default_factory=dict)  # key -> register
    promoted: dict[int, Line] = field(default_factory=dict)
    robust: dict[str, Register] = field(default_factory=dict)
    blocks: list[Line] = field(default_factory=list)
    runs: dict[int, bool] = field(default_factory=dict)  # id -> ended
    imports: dict[str, int] = field(default_factory=dict)  # name -> trials
    merging: set[int] = field(default_factory=set)  # winners of merges that began
    ranks: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    open_codes: set[int] = field(default_factory=set)  # begun, and not acknowledged

    @property
    def open_pairs(self) -> set[tuple[int, int]]:
        """Winners and their candidates, of merges that were under way."""
        return {(code, code + len(KEYS)) for code in self.merging & self.open_codes}


def _imported(line: Line) -> list[int]:
    """Codes that a merge made trials of."""
    taken = [
        c for c, verdict in zip(line["codes"], line["verdicts"], strict=True) if verdict != "kept"
    ]
    return [code + more for code in taken for more in (0, len(KEYS))]


def history_of(lines: Iterable[Line]) -> History:
    """The writers' lines in the order of a question about them."""
    history = History()
    winners: dict[int, list[Write]] = defaultdict(list)
    robust: dict[str, list[Write]] = defaultdict(list)
    orders: dict[tuple[int, int], list[tuple[int, float, float]]] = defaultdict(list)
    for line in lines:
        if "begin" in line:
            history.open_codes.update(line["codes"])
            if line["begin"] == "merge":
                history.merging.update(line["codes"])
            continue
        if "op" not in line:
            continue
        span = line["began"], line["ended"]
        codes: list[int] = []
        match line["op"]:
            case "record":
                codes = line["codes"]
            case "merge":
                codes = _imported(line)
                for code in codes[::2]:
                    winners[values.key_index(code)].append(Write(code, *span))
                if codes:
                    history.imports[f"patune import {line['name']}"] = len(codes)
            case "promote":
                history.promoted[line["codes"][0]] = line
                if line["standing"] == line["codes"][0]:
                    winners[values.key_index(line["standing"])].append(
                        Write(line["standing"], *span)
                    )
            case "robust":
                place = values.robust_place(values.robust_of(line["codes"][0]))
                robust[place].append(Write(line["codes"][0], *span))
            case "block":
                history.blocks.append(line)
            case "begin_run":
                history.runs[line["run"]] = False
            case "end_run":
                history.runs[line["run"]] = True
        history.open_codes.difference_update(line["codes"])
        for code in codes:
            history.trials[code] = line
            orders[values.key_index(code), code // STRIDE].append((code % STRIDE, *span))
    for (key, writer), found in orders.items():
        history.orders[key, writer] = sorted(found)
    for place, writes in robust.items():
        history.robust.setdefault(place, Register()).add(writes)
    for key, writes in winners.items():
        history.winners.setdefault(key, Register()).add(writes)
        measured = sorted(w.ended for w in writes if _measured(w.code, history))
        history.ranks[key] = sorted(w.ended for w in writes), measured
    return history


def _measured(code: int, history: History) -> bool:
    return history.trials[code]["op"] == "merge" or values.result_of(code).evidence == "measured"


class Problems:
    """What is wrong, by sort."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []

    def add(self, sort: str, words: str) -> None:
        self.counts[sort] += 1
        if self.counts[sort] <= MOST_TOLD:
            self.told.append(f"{sort}: {words}")


def check_database(
    place: DatabasePlace, history: History, problems: Problems, *, killed: bool = False
) -> int:
    """Everything acknowledged is there once, with its values, and nothing else; returns the number of trials.

    Args:
        killed: writers were; what was under way then may be there or not, but whole.
    """
    found: Counter[int] = Counter()
    with Store.open(place) as store:
        for index, (target, problem, workload) in enumerate(KEYS):
            for trial in store.trials(target=target, problem=problem, workload=workload):
                try:
                    code = values.check_trial(trial, KEYS[index])
                except ValueError as error:
                    problems.add("half there", str(error))
                    continue
                found[code] += 1
                line = history.trials.get(code)
                if line is not None and line.get("id", trial.id) != trial.id:
                    problems.add("other id", f"code {code} is trial {trial.id}, not {line['id']}")
        for code in history.trials.keys() - found.keys():
            problems.add("lost", f"trial {code} of {history.trials[code]}")
        for code, count in found.items():
            if count != 1:
                problems.add("twice", f"trial {code} is there {count} times")
            if code in history.trials:
                continue
            if not (killed and _under_way(code, history)):
                problems.add("never acknowledged", f"trial {code} is there")
            elif any(
                len({c in found for c in pair}) == 2 for pair in history.open_pairs if code in pair
            ):
                problems.add("half an import", f"a winner or its candidate, {code}")
        _check_standing(store, history, problems, killed=killed)
        _check_rest(store, history, problems, killed=killed)
    if isinstance(place, Path):
        check_sound(place, problems)
    return found.total()


def _under_way(code: int, history: History) -> bool:
    return code in history.open_codes or any(code in pair for pair in history.open_pairs)


def _check_standing(store: Store, history: History, problems: Problems, *, killed: bool) -> None:
    standing: dict[int, int] = {}
    for winner in store.winners():
        try:
            one = values.check_winner(winner)
        except ValueError as error:
            problems.add("half there", str(error))
            continue
        standing[one.key] = one.code
        promoted = history.promoted.get(one.code)
        if (
            promoted is not None
            and winner.default_knobs is None
            and promoted["default"] is not None
        ):
            problems.add("half there", f"winner {one.code} lost its default")
    places: dict[str, int] = {}
    for robust in store.robust():
        try:
            places[values.robust_place(robust)] = values.check_robust(robust)
        except ValueError as error:
            problems.add("half there", str(error))
    pairs: list[tuple[str, Register, int | None]] = [
        (f"winner of key {key}", register, standing.get(key))
        for key, register in history.winners.items()
    ]
    pairs += [
        (f"robust {place}", register, places.get(place))
        for place, register in history.robust.items()
    ]
    for what, register, code in pairs:
        why = register.refuse(code, FOREVER, FOREVER)
        # A killed process may have made the last write without hearing of it.
        if why is not None and not (killed and code is not None and code in history.open_codes):
            problems.add("lost update", f"{what}: {why}")


def _check_rest(store: Store, history: History, problems: Problems, *, killed: bool) -> None:
    try:
        check_dangling(store)
    except ValueError as error:
        problems.add("half there", str(error))
    hashes = ENVIRONMENTS[0].kernel_source_hash
    blocked = {
        (arch, index): store.blocked(arch=arch, kernel_source_hash=hashes, problem=problem)
        for arch in ("sm_90", "gfx942")
        for index, problem in enumerate(PROBLEMS)
    }
    for line in history.blocks:
        code = line["codes"][0]
        target, problem, _ = KEYS[values.key_index(code)]
        if values.knobs_of(code, target.arch) not in blocked[target.arch, PROBLEMS.index(problem)]:
            problems.add("lost", f"block of code {code}")
    with store.transaction(writes=False) as session:
        runs = {row.id: row for row in session.scalars(select(RunRow))}
        for run, ended in history.runs.items():
            if run not in runs or (ended and runs[run].ended is None):
                problems.add("lost", f"run {run} is not there, or not at its end")
        every = IMPORTS.replace(f"LIMIT {SHOWN_IMPORTS}", "")
        imports = {row[0]: row[1] for row in session.execute(text(every))}
    for name, count in history.imports.items():
        if imports.get(name) != count:
            problems.add("half an import", f"{name}: {imports.get(name)} trials instead of {count}")
    for name, count in imports.items():
        if NEVER in name or (name not in history.imports and not killed):
            problems.add("never acknowledged", f"{name} is there with {count} trials")


def check_sound(path: Path, problems: Problems) -> None:
    """SQLite's own checks of pages, indices and references."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for check, good in (("integrity_check", [("ok",)]), ("foreign_key_check", [])):
            try:
                found = connection.execute(f"PRAGMA {check}").fetchall()
            except sqlite3.Error as error:
                found = [(str(error),)]
            if found != good:
                problems.add("unsound", f"{check}: {found[:3]}")


class ReadCheck:
    """Whether the reads in the logs were of what there was at their time."""

    def __init__(self, history: History, problems: Problems) -> None:
        self.history = history
        self.problems = problems

    def check(self, line: Line) -> None:
        span = line["began"], line["ended"]
        match line["read"]:
            case "listing":
                self._listing(line["key"], line["seen"], *span)
            case "winners":
                self._registers(
                    {str(k): r for k, r in self.history.winners.items()}, line, "winner"
                )
            case "robust":
                self._registers(self.history.robust, line, "robust winner")
            case "imports":
                for name, count in line["imports"].items():
                    if self.history.imports.get(name) != count:
                        self.problems.add("half an import was seen", f"{name} with {count} trials")
            case "lookups":
                self._lookups(line["ranks"], span[0])

    def _registers(self, registers: dict[str, Register], line: Line, what: str) -> None:
        for place, register in registers.items():
            why = register.refuse(line["codes"].get(place), line["began"], line["ended"])
            if why is not None:
                self.problems.add("stale or uncommitted read", f"{what} of {place}: {why}")

    def _listing(self, key: int, seen: dict[str, list[int]], began: float, ended: float) -> None:
        """A listing has of every writer what it was told of by then, in whole operations from the first on."""
        writers = {writer for k, writer in self.history.orders if k == key} | set(map(int, seen))
        for writer in writers:
            order = self.history.orders.get((key, writer), [])
            count, last = seen.get(str(writer), (0, -1))
            least = bisect.bisect_left(order, began, key=lambda o: o[2])
            most = bisect.bisect_right(order, ended, key=lambda o: o[1])
            words = f"{count} trials of writer {writer} up to {last} in key {key}"
            if not least <= count <= most:
                self.problems.add(
                    "stale or uncommitted read", f"{words}; {least} to {most} were there"
                )
            elif count and (order[count - 1][0] != last or _shared(order, count)):
                self.problems.add("half a write was seen", words)

    def _lookups(self, ranks: list[int], began: float) -> None:
        for key, (every, measured) in self.history.ranks.items():
            least = (
                2 if measured and measured[0] < began else 1 if every and every[0] < began else 0
            )
            if ranks[key] < least:
                self.problems.add("stale lookup", f"key {key}: {ranks[key]} instead of {least}")


def _shared(order: list[tuple[int, float, float]], count: int) -> bool:
    """Whether the operation of the last trial that was seen made the next one too."""
    return count < len(order) and order[count - 1][1:] == order[count][1:]


def check_counts(history: History, problems: Problems) -> None:
    """A promotion counts the configurations of its key and environment that were there: none is overlooked in a write."""
    groups: dict[tuple[int, int], list[tuple[str, float, float]]] = defaultdict(list)
    for code, line in history.trials.items():
        index = values.key_index(code)
        knobs = str(values.knobs_of(code, KEYS[index][0].arch))
        groups[index, code // STRIDE % 2].append((knobs, line["began"], line["ended"]))
    for code, line in history.promoted.items():
        if line["standing"] != code:
            continue
        group = groups[values.key_index(code), code // STRIDE % 2]
        least = len({knobs for knobs, _, ended in group if ended <= line["began"]})
        most = len({knobs for knobs, began, _ in group if began <= line["ended"]})
        if not least <= line["trials"] <= most:
            problems.add(
                "overlooked", f"{line['trials']} trials instead of {least} to {most}: {line}"
            )
