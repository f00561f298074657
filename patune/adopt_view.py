"""What the terminal shows of winners that need a second look: which they are, and what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from patune import wording
from patune.second_look import why_not_here
from patune.terminal import (
    INDENT,
    fits,
    make_table,
    print_lines,
    print_parts,
    result_console,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from patune.configs.winner import Winner
    from patune.second_look import SecondLook
    from patune.settings import DatabasePlace
    from patune.stale_sweep import StaleSweep
    from patune.target import Target
    from patune.tuner.adopt import Adoption, AdoptReport

FATE_STYLES = {
    "adopted": "green",
    "replaced": "green",
    "failed": "bold red",
    "undecided": "yellow",
    "no_device": "yellow",
}
NEED = "{} of {} stored winners need a second look"
REPORT_COLUMNS = 120  # in pipes: scores and two spellings of knobs beside each other


def print_looks(console: Console, looks: Sequence[SecondLook]) -> None:
    """One table per target, kind of evidence, variant and change of the environment."""
    groups: dict[tuple[str, ...], list[SecondLook]] = {}
    for look in looks:
        groups.setdefault(_group(look), []).append(look)
    for (target, title, *changes), members in groups.items():
        console.print(Text.assemble((target, "bold"), f", {title}"))
        first, *rest = changes or ["same as stored"]
        print_parts(console, [f"environment: {first}", *rest])
        columns = {"key": "left", "knobs": "left", "stored\nscore": "right", "of": "left"}
        table = make_table(columns, whole=[name for name in columns if name != "knobs"])
        for look in members:
            winner = look.winner
            key = wording.short_key(winner.problem.to_dict(), winner.workload.to_dict())
            table.add_row(key, _knobs(winner), _score(winner), winner.created[:10])
        console.print(table)
        console.print()


def _group(look: SecondLook) -> tuple[str, ...]:
    winner = look.winner
    variant = wording.variant_text(winner.problem.to_dict())
    title = ", ".join(filter(None, (winner.evidence, variant)))
    return (wording.target_text(winner.target.to_dict()), title, *look.texts)


def _knobs(winner: Winner) -> str:
    return wording.knobs_text(winner.knobs.to_dict())


def _score(winner: Winner) -> str:
    return wording.bare_score(winner.score, winner.timing is not None)


def print_plan(
    looks: Sequence[SecondLook],
    device: Target | None,
    stored: int,
    place: DatabasePlace,
    *,
    every: bool,
) -> None:
    """``patune verify --adopt --dry-run``: the winners, and how many of them this machine can give new evidence."""
    console = result_console()
    print_looks(console, looks)
    what = f"{stored} stored winners" if every else NEED.format(len(looks), stored)
    able = sum(not why_not_here(look.winner, device) for look in looks)
    console.print(f"{what}; {able} can have it here" if looks else what)
    console.print(f"dry run: nothing was written; database: {place}", soft_wrap=True)


def print_stale(found: StaleSweep, place: DatabasePlace) -> None:
    """``patune sweep --stale``: what it is about, before the plan or where there is nothing to do."""
    console = result_console()
    print_looks(console, found.looks)
    where = wording.target_text(found.target.to_dict())
    count = len(found.looks)
    if count:
        console.print(f"{NEED.format(count, found.stored)} on {where}")
    else:
        console.print(
            f"nothing is stale: none of {found.stored} stored winners needs a second look on {where}"
        )
    if found.elsewhere:
        console.print(
            Text(
                f"{found.elsewhere} others do that cannot have it on this target: patune verify --adopt --dry-run lists them",
                style="yellow",
            )
        )
    if not count:
        console.print(f"database: {place}", soft_wrap=True)


def print_adoption(report: AdoptReport, stored: int) -> None:
    """What became of each winner, what has to be done about those that failed, and the counts as the last line."""
    console = result_console(REPORT_COLUMNS)
    groups: dict[tuple[str, ...], list[Adoption]] = {}
    for adoption in report.adoptions:
        groups.setdefault(_group(adoption.look), []).append(adoption)
    for (target, title, *changes), members in groups.items():
        console.print(Text.assemble((target, "bold"), f", {title}"))
        first, *rest = changes or ["same as stored"]
        print_parts(console, [f"environment: {first}", *rest])
        _print_fates(console, members)
        console.print()
    for evidence in dict.fromkeys(a.look.winner.evidence for a in report.adoptions):
        print_parts(console, wording.KNOBS_LEGEND[evidence].split(", "), style="dim")
    _print_failed(console, report)
    _print_open(console, report)
    console.print(f"database: {report.database}", soft_wrap=True)
    if not report.adoptions:
        console.print(f"nothing is stale: none of {stored} stored winners needs a second look")
    console.print(_totals(report))


def _print_fates(console: Console, members: Sequence[Adoption]) -> None:
    """The knobs as stored, their score then and now; what took their place beside them, or below where there is no room."""
    others = [a for a in members if a.fate in ("replaced", "failed") and a.after is not None]
    table = _fates_table(members, beside=bool(others))
    if others and not fits(console, table):
        table = _fates_table(members, beside=False)
        console.print(table)
        for adoption in others:
            text = f"{_key(adoption)}: served now: {_answer_text(adoption)}"
            print_lines(console, text)
    else:
        console.print(table)


def _fates_table(members: Sequence[Adoption], *, beside: bool) -> Table:
    columns = {
        "key": "left",
        "knobs": "left",
        "stored\nscore": "right",
        "score\nnow": "right",
        "fate": "left",
    }
    whole = [heading for heading in columns if heading != "knobs"]
    table = make_table(columns | ({"served now": "left"} if beside else {}), whole=whole)
    for adoption in members:
        winner = adoption.look.winner
        cells: list[str | Text] = [
            _key(adoption),
            _knobs(winner),
            _score(winner),
            _score_now(adoption),
            Text(adoption.fate, style=FATE_STYLES[adoption.fate]),
        ]
        if beside:
            other = adoption.fate in ("replaced", "failed") and adoption.after is not None
            cells.append(_answer_text(adoption) if other else "")
        table.add_row(*cells)
    return table


def _key(adoption: Adoption) -> str:
    winner = adoption.look.winner
    return wording.short_key(winner.problem.to_dict(), winner.workload.to_dict())


def _score_now(adoption: Adoption) -> str:
    """Of the stored knobs: as the winner has it where they won again, else that of their trial."""
    if adoption.fate == "adopted" and adoption.after is not None:
        return _score(adoption.after)
    again = adoption.again
    if again is None or again.score is None:
        return "-"
    return wording.bare_score(again.score, again.timing is not None)


def _name(adoption: Adoption) -> str:
    winner = adoption.look.winner
    key = wording.key_text(winner.problem.to_dict(), winner.workload.to_dict())
    return f"{winner.target.arch} {key}"


def _print_failed(console: Console, report: AdoptReport) -> None:
    """Key, knobs with the reason, what answers now, and the command that tunes the key anew: one copied line, however long."""
    for adoption in report.of("failed"):
        print_lines(console, f"no longer passes: {_name(adoption)}", style="bold red")
        text = f"{_knobs(adoption.look.winner)}: {adoption.reason}"
        print_lines(console, text, style="red", indent=INDENT)
        print_lines(console, f"answers now: {_answer_text(adoption)}", indent=INDENT)
        console.print(Text(f"{' ' * INDENT}next: {adoption.next_command}"), soft_wrap=True)


def _answer_text(adoption: Adoption) -> str:
    if adoption.after is not None:
        return f"{_knobs(adoption.after)}, {_score(adoption.after)}"
    if adoption.answer is None:
        return "nothing stored"
    knobs = wording.knobs_text(adoption.answer.knobs.to_dict())
    return f"{knobs} ({adoption.answer.source}, evidence: {adoption.answer.evidence})"


def _print_open(console: Console, report: AdoptReport) -> None:
    """Winners about which nothing is known, by reason."""
    counts: dict[tuple[str, str], int] = {}
    for adoption in [*report.of("undecided"), *report.of("no_device")]:
        about = (adoption.fate, f"{adoption.look.winner.target.arch}: {adoption.reason}")
        counts[about] = counts.get(about, 0) + 1
    for (fate, reason), count in counts.items():
        print_lines(console, f"{fate}: {count} of {reason}; served as before", style="yellow")


def _totals(report: AdoptReport) -> Text:
    """The last line: a log's tail shows it."""
    counts = {fate: len(report.of(fate)) for fate in FATE_STYLES}
    worst = next((f for f in ("failed", "undecided", "no_device") if counts[f]), "adopted")
    text = ", ".join(f"{count} {fate}" for fate, count in counts.items())
    took = wording.duration_text(report.seconds)
    return Text(f"{len(report.adoptions)} winners: {text}; {took}", style=FATE_STYLES[worst])
