"""``patune check`` on the terminal: rows as they come, then the counts of each target, and what failed at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from patune import wording
from patune.terminal import result_console
from patune.tuner.check_cases import select_cases
from patune.tuner.check_rows import count_rows

if TYPE_CHECKING:
    from patune.target import Target
    from patune.tuner.check_cases import CheckOptions
    from patune.tuner.check_rows import CheckReport, CheckRow

OUTCOME_STYLES = {"passed": "green", "skipped": "dim", "rejected": "yellow", "failed": "bold red"}
STATUS_WIDTH = len("out_of_resources")
# heading and width of what the static facts say
AMD_COLUMNS = {"vgpr+agpr": 9, "spills": 6, "LDS B": 6, "waves/SIMD": 10, "MFMA": 4, "cases": 5}
NVIDIA_COLUMNS = {"registers": 9, "spilled B": 9, "shared B": 8}
NARROW = 100  # columns; below it the table saves what it can
NARROW_HEADINGS = {"vgpr+agpr": "vgpr+a", "waves/SIMD": "waves"}
NARROW_WIDTHS = {"vgpr+agpr": 7, "waves/SIMD": 8}
FEWEST_KNOB_COLUMNS = 20
STAGES = {
    "amd": "compiled, and run in the ISA emulator",
    "nvidia": "compiled; values need a GPU and are not checked",
}
LEGEND = {
    "amd": "waves/SIMD: how many fit, and what limits them; MFMA: matrix instructions in the code; cases: of the gate, passed",
    "nvidia": "static_ok: compiles without spills and fits; `patune sweep` on the GPU checks values",
}


def progress_line(row: CheckRow) -> None:
    """A row in one line on stderr, for ``--json``."""
    reason = f": {row.reason}" if row.reason else ""
    text = f"{row.target} {wording.problem_text(row.problem)} {row.label}: {row.status}{reason}"
    click.echo(text, err=True)


class CheckTable:
    """Prints a check while it runs. Column widths are known beforehand, so that every row can be printed at once."""

    def __init__(self, options: CheckOptions) -> None:
        self._console = result_console()
        self._targets = {target.arch: target for target in options.targets}
        self._knob_columns = max(len(case.label) for case in select_cases(options))
        self._target = ""
        self._problem: dict[str, Any] = {}

    def show(self, row: CheckRow) -> None:
        """Print one row, under headings of its target and its problem where these are new."""
        if row.target != self._target:
            self._open_target(self._targets[row.target])
        if row.problem != self._problem:
            self._problem = row.problem
            self._console.print(Text(wording.problem_text(row.problem), style="bold"))
        known = row.facts is not None and row.status != "identical"
        cells = _cells(row) if known else [row.reason]
        status = Text(row.status, style=OUTCOME_STYLES[row.outcome])
        self._line([status, Text(row.label), *map(Text, cells)], facts=known)
        if known and row.reason:
            style = OUTCOME_STYLES[row.outcome]
            self._console.print(_indented(Text(row.reason, style=style), 2))

    def end(self, report: CheckReport) -> None:
        """Print the environment, the counts of each target, and at the very end what failed."""
        self._console.print()
        texts: dict[str, list[str]] = {}
        for arch, environment in report.environments.items():
            texts.setdefault(wording.environment_text(environment.to_dict()), []).append(arch)
        for text, archs in texts.items():
            self._say(Text(f"{', '.join(archs)}: {text}", style="dim"))
        for vendor in dict.fromkeys(target.vendor for target in self._targets.values()):
            self._say(Text(LEGEND[vendor], style="dim"))
        self._console.print()
        for row in report.failed:
            name = f"{row.target} {wording.problem_text(row.problem)} {row.label}"
            self._say(Text(f"{row.status}: {name}: {row.reason}", style="red"))
        for target in report.options.targets:
            self._say(summary_text(target, report.rows_of(target)))
        self._say(_verdict(report))

    def _say(self, text: Text) -> None:
        """One line, however long: a log is searched by lines."""
        self._console.print(text, soft_wrap=True)

    def _open_target(self, target: Target) -> None:
        if self._target:
            self._console.print()
        self._target, self._problem = target.arch, {}
        name = wording.target_text(target.to_dict())
        self._console.print(Text.assemble((name, "bold"), f": {STAGES[target.vendor]}"))
        narrow = self._console.width < NARROW
        headings = [NARROW_HEADINGS.get(h, h) if narrow else h for h in self._columns()]
        self._line([Text(h, style="bold") for h in ("status", "knobs", *headings)], facts=True)

    def _columns(self) -> dict[str, int]:
        vendor = self._targets[self._target].vendor
        columns = AMD_COLUMNS if vendor == "amd" else NVIDIA_COLUMNS
        narrow = self._console.width < NARROW
        return columns | {n: w for n, w in NARROW_WIDTHS.items() if narrow and n in columns}

    def _line(self, cells: list[Text], *, facts: bool) -> None:
        """Status, knobs, then the facts, or one text in their place."""
        columns = self._columns()
        gap = 1 if self._console.width < NARROW else 2
        rest = self._console.width - STATUS_WIDTH - sum(columns.values()) - gap * (1 + len(columns))
        knobs = min(self._knob_columns, max(FEWEST_KNOB_COLUMNS, rest))
        table = Table(
            box=None,
            pad_edge=False,
            padding=(0, gap, 0, 0),
            show_header=False,
            collapse_padding=True,
        )
        table.add_column(width=STATUS_WIDTH)
        table.add_column(width=knobs, overflow="fold")
        for width in columns.values() if facts else ():
            table.add_column(width=width, justify="right")
        table.add_row(*cells)
        self._console.print(table)


def _indented(text: Text, columns: int) -> Table:
    grid = Table.grid(padding=0)
    grid.add_column(width=columns)
    grid.add_column(overflow="fold")
    grid.add_row("", text)
    return grid


def _cells(row: CheckRow) -> list[str]:
    """Registers, waves and matrix instructions are the decode kernel's; spills are summed, and shared memory is the most of a kernel."""
    assert row.facts is not None
    kernels = list(row.facts.values())
    decode = kernels[0]
    spills = str(sum(fact["spills"] for fact in kernels))
    shared = str(max(fact["shared_b"] for fact in kernels))
    if "vgpr" not in decode:
        return [str(decode["registers"]), spills, shared]
    waves = f"{decode['waves_per_simd']:g} {decode['limiter']}"
    mfma = str(decode["mix"].get("mfma", 0))
    return [f"{decode['vgpr']}+{decode['agpr']}", spills, shared, waves, mfma, str(row.gate_cases)]


def summary_text(target: Target, rows: list[CheckRow]) -> Text:
    """``gfx942: 14 passed (12 ok, 2 identical), 3 skipped (3 infeasible)``, the outcomes in their colours."""
    text = Text(f"{target.arch}: ", style="bold")
    shown = {name: n for name, n in count_rows(rows)["outcomes"].items() if n}
    for position, (outcome, count) in enumerate(shown.items()):
        statuses = count_rows([row for row in rows if row.outcome == outcome])["statuses"]
        words = wording.failures_text(statuses)
        text.append(", " if position else "")
        text.append(f"{count} {outcome} ({words})", style=OUTCOME_STYLES[outcome])
    return text


def _verdict(report: CheckReport) -> Text:
    """The last line: a log's tail shows it."""
    took = wording.duration_text(report.seconds)
    failed = report.failed
    if failed:
        words = wording.failures_text(count_rows(failed)["statuses"])
        text = f"{len(failed)} of {len(report.rows)} failed: {words}; {took}"
        return Text(text, style="bold red")
    if not any(row.outcome == "passed" for row in report.rows):
        return Text(f"nothing was checked: no row is feasible; {took}", style="yellow")
    return Text(f"nothing failed; {took}", style="green")
