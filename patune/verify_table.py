"""``patune verify`` on the terminal: gates as they end, then a table of the winners, and what has to be done about those that failed."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from patune import wording
from patune.terminal import (
    INDENT,
    KEY_HEADINGS,
    key_cells,
    make_table,
    print_lines,
    print_parts,
    result_console,
)
from patune.tuner.verify_rows import EMULATOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.table import Table

    from patune.tuner.check_rows import CheckRow
    from patune.tuner.verify_rows import VerifiedWinner, VerifyReport

OUTCOME_STYLES = {"passed": "green", "failed": "bold red", "not_verified": "yellow"}
LEGEND = "cases: of the gate, passed; error: worst relative RMS error of an output row that it saw"


@contextlib.contextmanager
def progress() -> Iterator[Callable[[CheckRow, int], None]]:
    """Show on stderr what the gates said: the latest on a terminal, all of them elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda row, total: console.print(_progress_text(row, total), soft_wrap=True)
        return
    with console.status(Text("building and running the correctness gate")) as status:

        def show(row: CheckRow, total: int) -> None:
            text = _progress_text(row, total)
            text.truncate(max(1, console.width - INDENT), overflow="ellipsis")
            status.update(text)

        yield show


def _progress_text(row: CheckRow, total: int) -> Text:
    name = f"{row.target} {wording.problem_text(row.problem)} {row.label}"
    reason = f": {row.reason}" if row.reason else ""
    return Text(f"{row.number}/{total} {name}: {row.status}{reason}")


def print_verification(report: VerifyReport) -> None:
    """Tables of the winners, what failed and what to run about it, what was not verified, and the counts as the last line."""
    console = result_console()
    _print_groups(console, report.winners)
    if report.winners:
        console.print(Text(LEGEND, style="dim"))
        for evidence in dict.fromkeys(w.winner.evidence for w in report.winners):
            print_parts(console, wording.KNOBS_LEGEND[evidence].split(", "), style="dim")
        for arch, environment in report.environments.items():
            parts = wording.environment_text(environment.to_dict()).split(", ")
            print_parts(console, [f"{arch} now: {parts[0]}", *parts[1:]], style="dim")
        console.print()
    _print_failed(console, report)
    _print_not_verified(console, report)
    _print_stale(console, report)
    console.print(Text(f"{report.source.kind}: {report.source.path}"), soft_wrap=True)
    if not report.winners:
        what = "are stored" if report.source.kind == "database" else "are in the pack"
        console.print(f"no such winners {what}; to tune some, run: patune sweep")
    console.print(_totals(report))


def _print_groups(console: Console, winners: Sequence[VerifiedWinner]) -> None:
    """One table per target, evidence, variant, place and change of the environment."""
    groups: dict[tuple[str, ...], list[VerifiedWinner]] = {}
    for verified in winners:
        winner = verified.winner
        variant = wording.variant_text(winner.problem.to_dict())
        title = ", ".join(filter(None, (winner.evidence, variant)))
        changes = wording.change_texts(verified.changes)
        target = wording.target_text(winner.target.to_dict())
        group = (target, title, _place_text(verified), *changes)
        groups.setdefault(group, []).append(verified)
    for (target, title, place, *changes), members in groups.items():
        console.print(Text.assemble((target, "bold"), f", {title}"))
        first, *rest = changes or ["same as stored"]
        print_parts(console, [f"{place}; environment: {first}", *rest])
        console.print(_table_of(members))
        console.print()


def _place_text(verified: VerifiedWinner) -> str:
    if verified.checked_on is None:
        return f"gate not run: no {verified.winner.target.arch} GPU here"
    if verified.checked_on == EMULATOR:
        return "gate run in the ISA emulator"
    return f"gate run on {verified.checked_on}"


def _table_of(members: Sequence[VerifiedWinner]) -> Table:
    headings = {
        "knobs": "left",
        "verdict": "left",
        "cases\n(stored)": "right",
        "error\n(stored)": "right",
    }
    table = make_table(KEY_HEADINGS | headings)
    for verified in members:
        winner = verified.winner
        cases = str(verified.gate_cases) if verified.gate_cases else "-"
        table.add_row(
            *key_cells(winner.problem.to_dict(), winner.workload.to_dict()),
            wording.knobs_text(winner.knobs.to_dict()),
            Text(verified.status, style=OUTCOME_STYLES[verified.outcome]),
            f"{cases} ({winner.gate_cases})",
            f"{_error(verified.error_rms)} ({_error(winner.error_rms)})",
        )
    return table


def _error(error_rms: float | None) -> str:
    return "-" if error_rms is None else f"{error_rms:#.2g}"


def _name(verified: VerifiedWinner) -> str:
    winner = verified.winner
    key = wording.key_text(winner.problem.to_dict(), winner.workload.to_dict())
    return f"{winner.target.arch} {key}"


def _print_failed(console: Console, report: VerifyReport) -> None:
    """Key, knobs with the reason, and the command that tunes the key anew: one copied line, however long."""
    failed = report.of("failed")
    for verified in failed:
        print_lines(console, f"no longer passes: {_name(verified)}", style="bold red")
        knobs = wording.knobs_text(verified.winner.knobs.to_dict())
        print_lines(
            console, f"{knobs}: {verified.status}: {verified.reason}", style="red", indent=INDENT
        )
        where = "" if verified.tunable_here else f", on {verified.winner.target.device_name}"
        command = verified.next_command(report.source)
        console.print(Text(f"{' ' * INDENT}next{where}: {command}"), soft_wrap=True)
    if failed:
        console.print()


def _print_not_verified(console: Console, report: VerifyReport) -> None:
    """How many wait for a GPU, and what the emulator did not know."""
    unknown = report.of("not_verified")
    waiting = [verified for verified in unknown if verified.status == "no_device"]
    for arch in dict.fromkeys(verified.winner.target.arch for verified in waiting):
        count = sum(verified.winner.target.arch == arch for verified in waiting)
        text = f"not verified: {count} winners of {arch}; run the same command on a machine with such a GPU"
        console.print(Text(text, style="yellow"))
    for verified in unknown:
        if verified.status != "no_device":
            print_lines(console, f"not verified: {_name(verified)}", style="yellow")
            print_lines(console, verified.reason, style="yellow", indent=INDENT)
    if unknown:
        console.print()


def _print_stale(console: Console, report: VerifyReport) -> None:
    """How many passed under another environment than their own: they are not timed in this one yet."""
    count = sum(verified.stale for verified in report.of("passed"))
    if count and report.source.kind == "database":
        command = shlex.join(["patune", "verify", "--adopt", *report.source.option])
        text = f"{count} of those that pass were stored in another environment; to time them in this one, run: {command}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _totals(report: VerifyReport) -> Text:
    """The last line: a log's tail shows it."""
    counts = {outcome: len(report.of(outcome)) for outcome in ("passed", "failed", "not_verified")}
    worst = next((outcome for outcome in ("failed", "not_verified") if counts[outcome]), "passed")
    text = (
        f"{len(report.winners)} winners: {counts['passed']} pass, {counts['failed']} no longer pass, "
        f"{counts['not_verified']} not verified"
    )
    took = wording.duration_text(report.seconds)
    return Text(f"{text}; {took}", style=OUTCOME_STYLES[worst] if report.winners else "yellow")
