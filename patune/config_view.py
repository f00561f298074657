"""``patune list`` and ``patune lookup`` on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from patune import wording
from patune.terminal import (
    fits,
    make_grid,
    make_table,
    print_lines,
    print_parts,
    result_console,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from patune.second_look import SecondLook
    from patune.settings import DatabasePlace

STATE_STYLES = {"fresh": "green", "reverify": "yellow"}
HERE = "tuned here"
KEY_LEGEND = "key: block_size/head_dim/qg/batch x kv heads/context, as `patune why KEY` takes it"
DISPENSABLE = (
    "trials",
    "date",
    "gain",
)  # columns, in the order in which narrow terminals lose them
RIGHT = ("score", "gain", "trials")
ADOPT_COMMAND = "patune verify --adopt"


def print_winners(
    looks: Sequence[SecondLook], stored: int, place: DatabasePlace, *, stale: bool
) -> None:
    """``patune list``: a table per target, evidence, variant and origin, then what needs a second look, and why."""
    console = result_console()
    groups: dict[tuple[str, str, str], list[SecondLook]] = {}
    for look in looks:
        winner = look.winner
        variant = wording.variant_text(winner.problem.to_dict())
        origin = HERE if winner.imported_from is None else f"from pack {winner.imported_from}"
        title = ", ".join(filter(None, (winner.evidence, variant, origin)))
        group = (wording.target_text(winner.target.to_dict()), title, winner.evidence)
        groups.setdefault(group, []).append(look)
    for (target, title, evidence), members in groups.items():
        console.print(Text.assemble((target, "bold"), f", {title}"), soft_wrap=True)
        console.print(_table_of(console, members, evidence))
        console.print()
    if looks:
        print_parts(console, KEY_LEGEND.split(", "), style="dim")
    for evidence in dict.fromkeys(evidence for _, _, evidence in groups):
        for legend in (wording.SCORE_LEGEND, wording.KNOBS_LEGEND):
            print_parts(console, legend[evidence].split(", "), style="dim")
    _print_second_looks(console, looks, stored)
    if not looks:
        none = f"none of {stored} stored winners needs a second look here"
        console.print(none if stale and stored else "no such winners are stored")
    console.print(f"database: {place}", soft_wrap=True)


def _table_of(console: Console, looks: Sequence[SecondLook], evidence: str) -> Table:
    """With fewer columns where the terminal is narrow: the key, the knobs, their score and state are always there."""
    for left_out in range(len(DISPENSABLE) + 1):
        table = _table_without(DISPENSABLE[:left_out], looks, evidence)
        if fits(console, table):
            break
    return table


def _table_without(left_out: Sequence[str], looks: Sequence[SecondLook], evidence: str) -> Table:
    measured = evidence == "measured"
    headings = {
        "key": "key",
        "knobs": "knobs",
        "score": "median (of\nread ceiling)" if measured else "emulated-\ncorrect,\ncounted",
        "gain": "speedup" if measured else "slots\nsaved",
        "trials": "trials",
        "date": "date",
        "state": "state",
    }
    shown = {name: text for name, text in headings.items() if name not in left_out}
    table = make_table(
        {text: "right" if name in RIGHT else "left" for name, text in shown.items()},
        whole=[text for name, text in shown.items() if name != "knobs"],
    )
    for look in looks:
        winner = look.winner.to_dict()
        cells: dict[str, str | Text] = {
            "key": wording.short_key(winner["problem"], winner["workload"]),
            "knobs": wording.knobs_text(winner["knobs"]),
            "score": wording.short_score(winner),
            "gain": wording.gain_text(winner),
            "trials": str(winner["trials"]),
            "date": winner["created"][:10],
            "state": Text(wording.STATE_NAMES[look.state], style=STATE_STYLES[look.state]),
        }
        table.add_row(*(cells[name] for name in shown))
    return table


def _print_second_looks(console: Console, looks: Sequence[SecondLook], stored: int) -> None:
    """How many need one, by what has changed; they are served all the same."""
    counts: dict[tuple[str, ...], int] = {}
    for look in looks:
        if look.state == "reverify":
            changes = (look.winner.target.arch, *look.texts)
            counts[changes] = counts.get(changes, 0) + 1
    for (arch, *texts), count in counts.items():
        text = f"re-verify: {count} of {stored}, {arch}: {', '.join(texts)}"
        print_lines(console, text, style="yellow")
    if counts:
        text = f"they are served; to gate and time them again, run: {ADOPT_COMMAND}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def print_answer(answer: Mapping[str, Any], sweep: str | None) -> None:
    """``patune lookup``: the knobs and where they come from.

    Args:
        answer: of the dispatcher, as a document.
        sweep: the command that tunes the key, where nothing was tuned for it.
    """
    console = result_console()
    key = answer["key"]
    console.print(
        f"{wording.target_text(key['target'])}: {wording.key_text(key['problem'], key['workload'])}",
        soft_wrap=True,
    )
    grid = make_grid(2)
    for name, value in answer["knobs"].items():
        grid.add_row(name, str(value))
    console.print(grid)
    console.print(Text(f"source: {answer['source']}, evidence: {answer['evidence']}", style="bold"))
    for line in origin_lines(answer):
        print_lines(console, line)
    if answer["staleness"] == "reverify":
        print_lines(console, f"re-verify: {', '.join(changes_of(answer))}", style="yellow")
    if sweep is not None:
        text = f"nothing was tuned for this key on this device; to do so, run: {sweep}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def origin_lines(answer: Mapping[str, Any]) -> list[str]:
    """For which sizes and device the knobs were tuned, where these are others than those asked for."""
    lines = []
    key, device = answer["key"], answer["stored_target"]
    near = answer["neighbours"] or [answer["stored_workload"]]
    others = [workload for workload in near if workload not in (None, key["workload"])]
    if others:
        lines.append(f"tuned for: {'; '.join(wording.sizes_text(one) for one in others)}")
        lines.append(f"distance: {distance_text(answer['distance'])}")
    if device is not None and device != key["target"]:
        lines.append(f"tuned on another device: {wording.target_text(device)}")
    return lines


def distance_text(distance: Mapping[str, float]) -> str:
    """``2x the walks (batch x KV heads), 0.5x the context``: what is asked for, against what was tuned."""
    axes = {"walks": "the walks (batch x KV heads)", "context": "the context"}
    return ", ".join(f"{2 ** distance[axis]:.3g}x {name}" for axis, name in axes.items())


def changes_of(answer: Mapping[str, Any]) -> list[str]:
    """The changes that made a second look necessary, as tables print them."""
    pairs = {
        change["field"]: (change["stored"], change["present"])
        for change in answer["changes"]
        if change["kind"] == "reverify"
    }
    return wording.change_texts(pairs)
