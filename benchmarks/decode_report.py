"""The document of benchmarks/decode.py as a table for people.

python benchmarks/decode_report.py --json FILE                                  print it
python benchmarks/decode_report.py --json FILE --markdown docs/performance.md   put it between the file's table markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patune.wording import knobs_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
HEADINGS = (
    "class", "layout", "page", "KV MB", "floor us", "best us (p20 to p80)", "TB/s", "x floor", "goal", "met",
    "default us", "median, worst us of candidates", "error", "best knobs",
)  # fmt: skip
PEER_HEADINGS = (
    "class",
    "layout",
    "page",
    "peer",
    "us",
    "TB/s",
    "x floor",
    "best here us",
    "error",
)
MAX_REASON = 120


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row's line."""
    head = [row["class"], row["layout"], str(row["page"])]
    head += [f"{row['kv_bytes'] / 1e6:.1f}" if "kv_bytes" in row else ""]
    head += [f"{row['floor_us']:.2f}" if "floor_us" in row else ""]
    best = row.get("best")
    if best is None:
        why = f"{row['status']}: {row['reason']}"[:MAX_REASON]
        return [*head, why, "", "", f"{row['goal']:.2f}", "no", "", "", "", ""]
    default, spread, counts = row["default"], row["spread"], row["counts"]
    wrong = f", {counts['wrong']} WRONG" if counts["wrong"] else ""
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return [
        *head,
        f"{best['median_us']:.2f} ({best['p20_us']:.2f} to {best['p80_us']:.2f})",
        f"{best['tb_s']:.2f}",
        f"{best['floor_ratio']:.3f}",
        f"{row['goal']:.2f}",
        "yes" if row["met"] else "NO",
        f"{default['median_us']:.2f}" if default else "none",
        f"{spread['median_us']:.2f}, {spread['worst_us']:.2f} of {counts['timed']}{wrong}{failed}",
        f"{best['error_rms']:.4f}",
        knobs_text(best["knobs"]),
    ]


def peer_cells(row: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line per peer that was timed on a row."""
    for peer in row.get("peers", ()):
        if peer["status"] != "skipped":
            best = row.get("best")
            own = f"{best['median_us']:.2f}" if best else ""
            head = [
                row["class"],
                row["layout"],
                str(row["page"]),
                f"{peer['peer']} {peer['version']}",
            ]
            if peer["status"] != "ok" or "tb_s" not in peer:
                yield [*head, f"{peer['status']}: {peer['reason']}"[:MAX_REASON], "", "", own, ""]
            else:
                times = [f"{peer['median_us']:.2f}", f"{peer['tb_s']:.2f}"]
                ratio = f"{peer['floor_ratio']:.3f}"
                yield [*head, *times, ratio, own, f"{peer['error_rms']:.4f}"]


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Where and how the document was measured, one fact per line."""
    device = document["device"]
    environment = device["environment"]
    smi = device.get("smi", {})
    rows = document["rows"]
    timed = [row for row in rows if "best" in row]
    lines = [
        f"{document['date']}, {device['target']['device_name']}, driver "
        f"{smi.get('driver_version') or environment['driver']}, CUDA {device['cuda']}, torch {environment['torch']}, "
        f"Triton {environment['triton']}; kernel source {environment['kernel_source_hash'][:12]}, "
        f"revision {document['revision'] or 'not given'}; clocks {clocks_text(document)}.",
        f"{len(timed)} of {len(rows)} rows timed, {sum(row['met'] for row in timed)} meet their goal; "
        f"{document['seconds']:.0f} s.",
    ]
    if (ladder := document.get("ladder")) is not None:
        lines.append(
            f"Read ceiling of the run {document['read_ceiling_gb_s']:.0f} GB/s; cold reads (MB: us) "
        )
        lines[-1] += ", ".join(
            f"{read['nbytes'] / 1e6:.4g}: {read['median_us']:.2f}" for read in ladder["reads"]
        )
        lines[-1] += "."
    return lines


def clocks_text(document: Mapping[str, Any]) -> str:
    """The SM clocks that were seen right after timings."""
    states = [row["state"] for row in document["rows"] if row.get("state")]
    clocks = sorted({state["clocks.sm"] for state in states if "clocks.sm" in state})
    return ", ".join(clocks) or "not read"


def skipped_lines(document: Mapping[str, Any]) -> list[str]:
    """Peers that were skipped everywhere, with the reason."""
    reasons = {
        (peer["peer"], peer["reason"])
        for row in document["rows"]
        for peer in row.get("peers", ())
        if peer["status"] == "skipped"
    }
    return [f"{peer}: {reason}" for peer, reason in sorted(reasons)]


def markdown(document: Mapping[str, Any]) -> str:
    """The tables, for docs."""
    parts = ["\n\n".join(summary_lines(document))]
    parts.append(_markdown_table(HEADINGS, [cells_of(row) for row in document["rows"]]))
    peers = [cells for row in document["rows"] for cells in peer_cells(row)]
    if peers:
        parts.append(_markdown_table(PEER_HEADINGS, peers))
    if skipped := skipped_lines(document):
        parts.append("Peers left out: " + "; ".join(skipped) + ".")
    return "\n\n".join(parts)


def _markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in cells) + " |" for cells in rows)


def plain(document: Mapping[str, Any]) -> str:
    """The tables, for a terminal."""
    parts = ["\n".join(summary_lines(document))]
    parts.append(_plain_table(HEADINGS, [cells_of(row) for row in document["rows"]]))
    peers = [cells for row in document["rows"] for cells in peer_cells(row)]
    if peers:
        parts.append(_plain_table(PEER_HEADINGS, peers))
    parts += [f"left out: {line}" for line in skipped_lines(document)]
    seconds: dict[str, float] = {}
    for row in document["rows"]:
        seconds[row["class"]] = seconds.get(row["class"], 0.0) + row.get("seconds", 0.0)
    parts.append("seconds by class: " + ", ".join(f"{n} {s:.1f}" for n, s in seconds.items()))
    return "\n\n".join(parts)


def _plain_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(headings), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def fill(path: Path, text: str) -> None:
    """Replace what is between the markers of a file.

    Raises:
        ValueError: the file has no markers.
    """
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path} needs one {BEGIN} before one {END}")
    head, tail = old.split(BEGIN)[0], old.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Print a document's table, or put it into a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="document to read")
    parser.add_argument("--markdown", type=Path, help="file whose table is replaced")
    options = parser.parse_args()
    document = json.loads(options.json.read_text(encoding="utf-8"))
    if options.markdown is None:
        print(plain(document))
        return
    try:
        fill(options.markdown, markdown(document))
    except ValueError as error:
        parser.error(str(error))
    print(options.markdown)


if __name__ == "__main__":
    main()
