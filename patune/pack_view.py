"""What the commands about packs print, drawn with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from patune import wording
from patune.configs.pack_merge import MERGE_SCHEMA
from patune.kernels.knobs import knobs_to_dict
from patune.terminal import KEY_HEADINGS, key_cells, make_table, result_console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from patune.configs.pack import Pack
    from patune.configs.pack_diff import Difference, PackDiff
    from patune.configs.pack_merge import MergedPack

FATE_STYLES = {"added": "green", "replaced": "green", "kept": "", "skipped": "yellow"}
CHANGE_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}
SAME_PERCENT = 0.05  # what rounds to 0.0 %
OTHER_FIELDS = ("knobs", "timing", "counted", "evidence")  # shown in columns of their own


def _counts(pack: Pack) -> dict[str, int]:
    return {
        "winners": len(pack.winners),
        "candidates": sum(len(beside) for beside in pack.candidates.values()),
        "robust": len(pack.robust),
        "blocklist": len(pack.blocklist),
    }


def _counts_text(counts: Mapping[str, Any]) -> str:
    """``32 winners with 160 candidates, 2 robust winners, 1 blocked``: what there is none of goes unsaid, but winners."""
    texts = [_plural(counts["winners"], "winner")]
    if counts["candidates"]:
        texts[0] += f" with {_plural(counts['candidates'], 'candidate')}"
    if counts["robust"]:
        texts.append(_plural(counts["robust"], "robust winner"))
    if counts["blocklist"]:
        texts.append(f"{counts['blocklist']} blocked")
    return ", ".join(texts)


def _plural(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")


def export_document(pack: Pack, path: Path, signature: Path | None) -> dict[str, Any]:
    """``patune export --json``."""
    signed = None if signature is None else str(signature)
    return {"path": str(path), **_counts(pack), "signature": signed}


def print_export(pack: Pack, path: Path, signature: Path | None) -> None:
    """``patune export``."""
    console = result_console()
    console.print(f"{_counts_text(_counts(pack))} written to {path}", soft_wrap=True)
    if signature is not None:
        console.print(f"signature written to {signature}", soft_wrap=True)


def print_import(report: Mapping[str, Any], place: str) -> None:
    """``patune import``: what became of each entry, and the totals."""
    console = result_console()
    _print_fates(console, report["entries"], "winner")
    robust = make_table(
        {
            "target": "left",
            "block_size/\nhead_dim/qg": "left",
            "objective": "left",
            "robust": "left",
            "because": "left",
        }
    )
    for entry in report["robust"]:
        cells = entry["target"]["arch"], _core(entry["problem"]), entry["objective"]
        robust.add_row(*cells, _fate(entry["fate"]), _because(entry))
    blocks = make_table(
        {
            "target": "left",
            "block_size/\nhead_dim/qg": "left",
            "knobs": "left",
            "blocklist": "left",
            "because": "left",
        }
    )
    for entry in report["blocklist"]:
        cells = entry["arch"], _core(entry["problem"]), wording.knobs_text(entry["knobs"])
        blocks.add_row(*cells, _fate(entry["fate"]), _because(entry))
    for table in (robust, blocks):
        if table.row_count:
            console.print()
            console.print(table)
    if report["entries"] or report["robust"] or report["blocklist"]:
        console.print()
    counts = ", ".join(f"{report[fate]} {fate}" for fate in FATE_STYLES)
    note = " (dry run: nothing was written)" if report["dry_run"] else ""
    console.print(f"{counts}{note}")
    for name, title in (("robust", "robust winners"), ("blocklist", "blocklist")):
        fates = [entry["fate"] for entry in report[name]]
        if fates:
            totals = {fate: fates.count(fate) for fate in FATE_STYLES}
            console.print(f"{title}: {', '.join(f'{n} {fate}' for fate, n in totals.items() if n)}")
    if report["public_key"] is not None:
        console.print(f"signed by the holder of {report['public_key']}", soft_wrap=True)
    console.print(f"database: {place}", soft_wrap=True)


def _print_fates(console: Console, entries: Sequence[Mapping[str, Any]], title: str) -> None:
    table = make_table({"target": "left", **KEY_HEADINGS, title: "left", "because": "left"})
    for entry in entries:
        key = key_cells(entry["problem"], entry["workload"])
        table.add_row(entry["target"]["arch"], *key, _fate(entry["fate"]), _because(entry))
    if entries:
        console.print(table)


def _fate(fate: str) -> Text:
    return Text(fate, style=FATE_STYLES[fate])


def _because(entry: Mapping[str, Any]) -> Text:
    return Text(", ".join(filter(None, (wording.variant_text(entry["problem"]), entry["reason"]))))


def _core(problem: Mapping[str, Any]) -> str:
    return f"{problem['block_size']}/{problem['head_dim']}/{problem['qg']}"


def print_diff(diff: PackDiff, before: str, after: str) -> None:
    """``patune diff``: a line per key that is not the same, then the totals."""
    console = result_console()
    table = make_table(
        {
            "target": "left",
            **KEY_HEADINGS,
            "change": "left",
            "knobs and score": "left",
            "by": "right",
        }
    )
    for one in diff.winners:
        known = one.after or one.before
        assert known is not None, "one of them is there"
        key = key_cells(known.problem.to_dict(), known.workload.to_dict())
        percent = _percent_text(one.percent)
        table.add_row(known.target.arch, *key, _change(one.change), _configurations(one), percent)
    if diff.winners:
        console.print(table)
        console.print()
        kinds = {one.evidence for d in diff.winners for one in (d.before, d.after) if one}
        for kind in sorted(kinds, reverse=True):
            console.print(Text(wording.KNOBS_LEGEND[kind], style="dim"), soft_wrap=True)
    for change, robust in diff.robust:
        problem = wording.problem_text(robust.problem.to_dict())
        line = f" robust winner ({robust.objective}) of {problem} on {robust.target.arch}"
        console.print(Text.assemble(_change(change), line), soft_wrap=True)
    for change, block in diff.blocklist:
        problem = wording.problem_text(block.problem.to_dict())
        knobs = wording.knobs_text(knobs_to_dict(block.knobs))
        line = f" on the blocklist: {knobs} for {problem} on {block.arch} ({block.status})"
        console.print(Text.assemble(_change(change), line), soft_wrap=True)
    counts = diff.to_dict()
    totals = ", ".join(f"{counts[name]} {name}" for name in (*CHANGE_STYLES, "unchanged"))
    console.print(f"winners: {totals}")
    verdict = ": no difference" if diff.equal else ""
    console.print(f"from {before} to {after}{verdict}", soft_wrap=True)


def _change(change: str) -> Text:
    return Text(change, style=CHANGE_STYLES[change])


def _configurations(one: Difference) -> Text:
    """One line per side: its knobs and its score, and last what else differs."""
    lines = []
    for sign, winner in (("-", one.before), ("+", one.after)):
        if winner is not None:
            score = wording.bare_score(winner.score, winner.timing is not None)
            knobs = wording.knobs_text(knobs_to_dict(winner.knobs))
            lines.append(f"{sign} {knobs}: {score}")
    if len(lines) == 2 and lines[0][2:] == lines[1][2:]:  # the difference lies elsewhere
        lines = [f"  {lines[0][2:]}"]
    rest = [name.replace("_", " ") for name in one.changed if name not in OTHER_FIELDS]
    if rest:
        lines.append(f"  also: {', '.join(rest)}")
    known = one.after or one.before
    variant = wording.variant_text(known.problem.to_dict()) if known is not None else ""
    if variant:
        lines.insert(0, variant)
    return Text("\n".join(lines))


def _percent_text(percent: float | None) -> Text:
    """``-3.1 %``, green when the time fell."""
    if percent is None:
        return Text("-")
    if abs(percent) < SAME_PERCENT:
        return Text("0.0 %")
    return Text(f"{percent:+.1f} %", style="green" if percent < 0 else "red")


def print_validation(document: Mapping[str, Any]) -> None:
    """``patune validate``: a line per file."""
    console = result_console()
    for one in document["files"]:
        if not one["valid"]:
            console.print(Text.assemble(("refused ", "bold red"), one["error"]), soft_wrap=True)
            continue
        notes = [f"schema {one['schema']}", _counts_text(one)]
        if one["skipped"]:
            notes.append(f"{one['skipped']} of them for other kernels than these")
        notes.append("canonical" if one["canonical"] else "not in its canonical spelling")
        if one["signed"]:
            notes.append("signed")
        line = Text.assemble(("valid   ", "green"), f"{one['path']}: {'; '.join(notes)}")
        console.print(line, soft_wrap=True)


def merge_document(merged: MergedPack, path: Path, *, dry_run: bool) -> dict[str, Any]:
    """``patune merge --json``."""
    return {
        "schema": MERGE_SCHEMA,
        "path": str(path),
        "dry_run": dry_run,
        **_counts(merged.pack),
        "conflicts": [conflict.to_dict() for conflict in merged.conflicts],
    }


def print_merge(document: Mapping[str, Any]) -> None:
    """``patune merge``: the conflicts, and what was written."""
    console = result_console()
    conflicts = document["conflicts"]
    for source in dict.fromkeys(conflict["source"] for conflict in conflicts):
        console.print(Text(source, style="bold"), soft_wrap=True)
        _print_fates(console, [one for one in conflicts if one["source"] == source], "winner")
        console.print()
    verb = "would be written to" if document["dry_run"] else "written to"
    console.print(f"{_counts_text(document)} {verb} {document['path']}", soft_wrap=True)
    console.print(f"{_plural(len(conflicts), 'conflict')}")
