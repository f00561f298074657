"""Tables and messages of the command line, drawn with rich: results on stdout, the rest on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from patune import wording

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patune.doctor import Diagnosis
    from patune.settings import DatabasePlace

STATE_STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}
KEY_HEADINGS = {
    "block_size/\nhead_dim/qg": "left",
    "batch x\nkv heads": "right",
    "context": "right",
}
PIPE_COLUMNS = 100  # pipes and files have no width: tables are laid out for this one
SHOWN_REASON = 100  # characters of a failure's reason
UNLIMITED_COLUMNS = 10_000
INDENT = 4  # of what goes on in the next line


def result_console(pipe_columns: int = PIPE_COLUMNS) -> Console:
    """Where results go: stdout, plain when it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=pipe_columns)


def make_table(headings: Mapping[str, str], *, whole: Sequence[str] = ()) -> Table:
    """A table without lines; ``headings`` maps each to its alignment. Columns in ``whole`` never break a cell."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, alignment in headings.items():
        table.add_column(
            heading,
            justify="right" if alignment == "right" else "left",
            overflow="fold",
            no_wrap=heading in whole,
        )
    return table


def fits(console: Console, table: Table) -> bool:
    """Whether no cell of a table has to break."""
    options = console.options.update(max_width=UNLIMITED_COLUMNS)
    return Measurement.get(console, options, table).maximum <= console.width


def make_grid(columns: int) -> Table:
    """Names and values side by side; what is too long goes on in the next line."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns):
        grid.add_column(overflow="fold")
    return grid


def print_lines(console: Console, text: str, *, style: str = "", indent: int = 0) -> None:
    """Text in lines that break between words, without blanks at their ends."""
    for line in Text(text).wrap(console, console.width - indent):
        console.print(Text(" " * indent + line.plain.rstrip(), style=style))


def print_parts(console: Console, parts: Sequence[str], *, style: str = "") -> None:
    """Parts with commas between them; a line ends between two parts, never inside one that fits."""
    first, *rest = [*(f"{part}," for part in parts[:-1]), parts[-1]]
    lines = [first]
    for piece in rest:
        if len(lines[-1]) + 1 + len(piece) > console.width:
            lines.append(" " * INDENT + piece)
        else:
            lines[-1] += f" {piece}"
    for line in lines:
        console.print(Text(line, style=style))


def key_cells(problem: Mapping[str, Any], workload: Mapping[str, Any]) -> tuple[str, str, str]:
    """Cells under ``KEY_HEADINGS``."""
    core = f"{problem['block_size']}/{problem['head_dim']}/{problem['qg']}"
    return core, f"{workload['batch']} x {workload['kv_heads']}", str(workload["context"])


def _winner_table(winners: Sequence[Mapping[str, Any]], evidence: str) -> Table:
    """Rows of one target and one kind of evidence; of a sweep they bring ``failed``, a count of trials, ``gain`` and ``stopped``, texts."""
    measured = evidence == "measured"
    swept = any(winner.get("stopped") for winner in winners)
    trials = "trials\n(failed)" if any("failed" in winner for winner in winners) else "trials"
    table = make_table(
        {
            **KEY_HEADINGS,
            "knobs": "left",
            "median (of\nread ceiling)" if measured else "emulated-\ncorrect,\ncounted": "right",
            "default": "right",
            "speedup" if measured else "slots\nsaved": "right",
            trials: "right",
            **({"stopped\nby": "left"} if swept else {}),
        }
    )
    for winner in winners:
        default_score, failed = winner["default_score"], winner.get("failed")
        table.add_row(
            *key_cells(winner["problem"], winner["workload"]),
            wording.knobs_text(winner["knobs"]),
            wording.short_score(winner),
            "-" if default_score is None else f"{default_score:.{1 if measured else 0}f}",
            winner.get("gain") or wording.gain_text(winner),
            str(winner["trials"]) + ("" if failed is None else f" ({failed})"),
            *([winner["stopped"]] if swept else []),
        )
    return table


def print_tables(console: Console, winners: Sequence[Mapping[str, Any]]) -> None:
    """One table per target, kind of evidence and variant, then what their shorthand means."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for winner in winners:
        variant = wording.variant_text(winner["problem"])
        group = (wording.target_text(winner["target"]), winner["evidence"], variant)
        groups.setdefault(group, []).append(winner)
    for (target, evidence, variant), members in groups.items():
        rest = ", ".join(filter(None, (evidence, variant)))
        console.print(Text.assemble((target, "bold"), f", {rest}"), soft_wrap=True)
        console.print(_winner_table(members, evidence))
        console.print()
    for evidence in sorted({evidence for _, evidence, _ in groups}, reverse=True):
        for legend in (wording.SCORE_LEGEND, wording.KNOBS_LEGEND):
            console.print(Text(legend[evidence], style="dim"), soft_wrap=True)


def print_key(record: Mapping[str, Any], path: DatabasePlace) -> None:
    """``patune show``: all that is stored about one key."""
    console = result_console()
    console.print(Text(wording.target_text(record["target"]), style="bold"))
    console.print(
        Text(wording.key_text(record["problem"], record["workload"]), style="bold"), soft_wrap=True
    )
    console.print()
    winner = record["winner"]
    if winner is None:
        console.print(Text("no winner: nothing passed the gate", style="yellow"))
    else:
        _print_winner(console, record)
    trials = make_table(
        {"#": "right", "knobs": "left", "from": "left", "status": "left", "score or reason": "left"}
    )
    for trial in record["trials"]:
        status = trial["status"]
        outcome = wording.short_score(trial) if status == "ok" else trial["reason"]
        trials.add_row(
            str(trial["id"]),
            wording.knobs_text(trial["knobs"]),
            trial["source"],
            Text(status, style="green" if status == "ok" else "yellow"),
            Text(wording.shorten(outcome, SHOWN_REASON)),
        )
    console.print()
    console.print(trials)
    console.print()
    if record["failures"]:
        console.print(f"not ok: {wording.failures_text(record['failures'])}")
    legend = wording.KNOBS_LEGEND[
        "measured" if record["target"]["arch"].startswith("sm_") else "emulated"
    ]
    console.print(Text(legend, style="dim"), soft_wrap=True)
    console.print(f"database: {path}", soft_wrap=True)


def _print_winner(console: Console, record: Mapping[str, Any]) -> None:
    winner = record["winner"]
    rows = {
        "winner": wording.knobs_text(winner["knobs"]),
        "score": wording.full_score(winner),
        **wording.spread_rows(winner),
        "default": wording.default_text(winner),
        "gate": f"{winner['gate_cases']} cases passed, worst relative RMS error {winner['error_rms']:.2g}",
        "chosen from": f"{winner['trials']} trials, {winner['created']}",
        "environment": wording.environment_text(winner["environment"]),
        "holds": wording.holds_text(record["staleness"], record["changes"]),
        "imported from": winner["imported_from"],
    }
    grid = make_grid(2)
    for name, value in rows.items():
        if value is not None:
            grid.add_row(name, Text(value))
    console.print(grid)


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """``patune doctor``: findings, targets, and the next command."""
    console = result_console()
    grid = make_grid(3)
    for finding in diagnosis.findings:
        detail = Text(finding.detail)
        if finding.advice:
            detail.append(f"\n{finding.advice}", style="dim")
        grid.add_row(Text(finding.state, style=STATE_STYLES[finding.state]), finding.name, detail)
    console.print(grid)
    console.print()
    targets = make_table(
        dict.fromkeys(("target", "device", "a sweep here is", "which means"), "left")
    )
    for row in diagnosis.targets:
        evidence = row["evidence"]
        verdict = Text(evidence or "not possible", style="green" if evidence else "yellow")
        targets.add_row(row["arch"], row["device_name"], verdict, row["meaning"])
    console.print(targets)
    console.print()
    console.print(Text.assemble("next: ", (diagnosis.run_next, "bold")))
