"""``patune why``, ``patune history`` and ``patune gc`` on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from patune import wording
from patune.terminal import (
    INDENT,
    make_grid,
    make_table,
    print_lines,
    print_parts,
    result_console,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from patune.settings import DatabasePlace

SHOWN_REASON = 160  # characters of a failure's reason
EVENT_STYLES = {"retired": "yellow", "blocked": "red", "promoted": "green", "imported": "green"}


def print_reasons(record: Mapping[str, Any], place: DatabasePlace) -> None:
    """The answer in words, then each stored configuration that it comes from."""
    console = result_console()
    answer = record["answer"]
    key = answer["key"]
    console.print(Text(wording.target_text(key["target"]), style="bold"))
    print_lines(console, wording.key_text(key["problem"], key["workload"]), style="bold")
    print_lines(console, f"{wording.knobs_text(answer['knobs'])}, source: {answer['source']}")
    console.print()
    for line in record["explanation"].splitlines():
        print_lines(console, line)
    for entry in record["behind"]:
        console.print()
        _print_entry(console, entry, key)
    console.print()
    for evidence in dict.fromkeys(entry["winner"]["evidence"] for entry in record["behind"]):
        print_parts(console, wording.KNOBS_LEGEND[evidence].split(", "), style="dim")
    if record["note"]:
        print_lines(console, record["note"], style="yellow")
    console.print(f"database: {place}", soft_wrap=True)


def _print_entry(console: Console, entry: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    winner = entry["winner"]
    sizes = wording.sizes_text(winner["workload"])
    head = f"what is stored for {sizes} ({entry['where']})"
    print_lines(console, head, style="bold")
    if winner["target"] != key["target"]:
        print_lines(console, f"of another device: {wording.target_text(winner['target'])}")
    rows = {
        "winner": wording.knobs_text(winner["knobs"]),
        "score": wording.full_score(winner),
        **wording.spread_rows(winner),
        "interval": wording.interval_text(winner["timing"]),
        "default": wording.default_text(winner),
        "speedup": wording.speedup_text(winner, winner["speedup"]) if winner["speedup"] else None,
        "chosen from": f"{winner['trials']} configurations, {winner['created']}",
        "environment": wording.environment_text(winner["environment"]),
        "holds": wording.holds_text(entry["staleness"], entry["changes"]),
        "imported from": winner["imported_from"],
        "took the place of": _beaten_text(entry["beat"]),
    }
    grid = make_grid(2)
    for name, value in rows.items():
        if value is not None:
            grid.add_row(name, Text(value))
    console.print(grid)
    _print_candidates(console, entry)
    if entry["failures"]:
        print_lines(console, f"{entry['failed']} trials did not pass; most often:")
        for failure in entry["failures"]:
            reason = wording.shorten(failure["reason"], SHOWN_REASON)
            text = f"{failure['count']} x {failure['status']}" + (f": {reason}" if reason else "")
            print_lines(console, text, indent=INDENT)


def _beaten_text(beat: Mapping[str, Any] | None) -> str | None:
    if beat is None:
        return None
    score = beat["previous_score"]
    measured = beat["previous_evidence"] == "measured"
    scored = "" if score is None else f", {wording.bare_score(score, measured)} then"
    return f"{wording.knobs_text(beat['previous_knobs'])}{scored}, on {beat['created'][:10]}"


def _print_candidates(console: Console, entry: Mapping[str, Any]) -> None:
    """The best that are stored for the key, scored alike."""
    measured = entry["winner"]["timing"] is not None
    if len(entry["candidates"]) < 2:
        console.print("no other configuration has a score of the same environment and kind")
        return
    table = make_table({"candidates": "left", "score": "right", "against the winner": "right"})
    for number, one in enumerate(entry["candidates"]):
        times = one["times_the_best"]
        gap = "-" if times is None else f"{100 * (times - 1):+.1f} %"
        table.add_row(
            wording.knobs_text(one["knobs"]),
            wording.bare_score(one["score"], measured),
            "winner" if number == 0 else gap,
        )
    console.print(table)


def print_history(record: Mapping[str, Any], place: DatabasePlace) -> None:
    """Events as a table, the oldest first."""
    console = result_console()
    console.print(Text(wording.target_text(record["target"]), style="bold"))
    print_lines(console, wording.key_text(record["problem"], record["workload"]), style="bold")
    table = make_table(
        {
            "when (UTC)": "left",
            "event": "left",
            "knobs": "left",
            "score": "right",
            "before, and why": "left",
        }
    )
    for event in record["events"]:
        table.add_row(
            event["created"].replace("T", " ").rstrip("Z"),
            Text(event["event"], style=EVENT_STYLES.get(event["event"], "")),
            "" if event["knobs"] is None else wording.knobs_text(event["knobs"]),
            _score(event["score"], event["evidence"]),
            "\n".join(filter(None, (_previous_text(event), event["reason"]))),
        )
    console.print(table)
    for evidence in dict.fromkeys(e["evidence"] for e in record["events"]):
        if evidence in wording.KNOBS_LEGEND:
            print_parts(console, wording.KNOBS_LEGEND[evidence].split(", "), style="dim")
    console.print(f"database: {place}", soft_wrap=True)


def _score(score: float | None, evidence: str | None) -> str:
    return "" if score is None else wording.bare_score(score, evidence == "measured")


def _previous_text(event: Mapping[str, Any]) -> str:
    """What was served before, unless it was the same knobs with the same score."""
    if event["previous_knobs"] is None:
        return ""
    score = _score(event["previous_score"], event["previous_evidence"])
    if event["previous_knobs"] == event["knobs"]:
        return f"before {score}" if event["previous_score"] != event["score"] else ""
    return f"before {wording.knobs_text(event['previous_knobs'])} {score}".rstrip()


def print_pruned(record: Mapping[str, Any], place: DatabasePlace) -> None:
    """What went, or would go, and the room that it gave back."""
    console = result_console()
    older = "" if record["before"] is None else f" older than {record['before'][:10]}"
    print_lines(
        console,
        f"trials of losers{older}; the best {record['keep']} of each key and environment stay",
    )
    grid = make_grid(2)
    names = {
        "trials": "trials",
        "messages": "messages of failures",
        "runs": "runs without trials",
        "environments": "environments without runs",
        "misses": "misses of keys that have a winner now",
    }
    for name, text in names.items():
        grid.add_row(Text(str(record[name]), justify="right"), text)
    console.print(grid)
    if record["dry_run"]:
        console.print("dry run: nothing was deleted")
    else:
        console.print(f"{wording.bytes_text(record['bytes'])} given back")
    console.print(f"database: {place}", soft_wrap=True)
