"""What the tuning commands print on stdout: a sweep's plan and report, the table of models, the pool of a key."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.text import Text

from patune import wording
from patune.terminal import KEY_HEADINGS, key_cells, make_table, print_tables, result_console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from patune.settings import DatabasePlace

REPORT_COLUMNS = 120  # in pipes: intervals and reasons to stop beside each winner
SHOWN_REGRETS = 8  # of a robust configuration's workloads


def print_plan(plan: Mapping[str, Any], path: DatabasePlace) -> None:
    """``patune sweep --dry-run``: the keys that would be tuned, and about how long that takes."""
    console = result_console()
    keys = plan["keys"]
    headings = {**KEY_HEADINGS, "default knobs": "left"}
    variants = [wording.variant_text(planned["key"]) for planned in keys]
    if any(variants):
        headings["variant"] = "left"
    stored = plan["stored"] > 0
    table = make_table(
        headings
        | {"feasible\nknobs": "right", "trials": "right"}
        | ({"stored": "right"} if stored else {})
    )
    for planned, variant in zip(keys, variants, strict=True):
        key = planned["key"]
        table.add_row(
            *key_cells(key, key["workload"]),
            wording.knobs_text(planned["default"]),
            *([variant] if any(variants) else []),
            str(planned["pool"]),
            str(planned["trials"]),
            *([str(planned["stored"])] if stored else []),
        )
    console.print(table)
    for line in _plan_lines(plan):
        console.print(line, soft_wrap=True)
    console.print(f"dry run: nothing was written; database: {path}", soft_wrap=True)


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    how = f"effort {plan['effort']}, sampler {plan['sampler']}"
    if plan["robust"] is not None:
        how += f", and one configuration per problem for all its workloads ({plan['robust']})"
    lines = [
        f"{wording.target_text(plan['target'])}, {plan['evidence']}: {how}",
        f"{len(plan['keys'])} keys, up to {plan['trials']} trials",
    ]
    if plan["stored"]:
        lines[-1] += f"; {plan['stored']} are stored already, {plan['remaining']} remain"
    else:
        lines[-1] += "; trials that are stored already are not repeated"
    if plan["stored_note"]:
        lines.append(plan["stored_note"])
    seconds = plan["seconds"]
    about = wording.range_text(seconds["low"], seconds["high"])
    limit = "" if plan["budget_s"] is None else f" within --budget {plan['budget_s']:g} s"
    lines.append(f"about {about}{limit}; fewer trials when keys stop for want of gains")
    return lines


def print_report(report: Mapping[str, Any], path: DatabasePlace, read_back: str | None) -> None:
    """``patune sweep``: the winners, what did not pass, and the line that reads a winner back."""
    console = result_console(REPORT_COLUMNS)
    keys = report["keys"]
    print_tables(
        console,
        [
            {
                **key["winner"],
                "trials": key["trials"],
                "failed": sum(key["failures"].values()),
                "gain": wording.speedup_text(key["winner"], key.get("speedup")),
                "stopped": key.get("stopped", ""),
            }
            for key in keys
            if key["winner"] is not None
        ],
    )
    if report["evidence"] == "measured" and any(key.get("speedup") for key in keys):
        note = "speedup: the default's time over the winner's, measured in turns, with its 95 % interval; tie: the default stays"
        console.print(Text(note, style="dim"), soft_wrap=True)
    for robust in report.get("robust") or ():
        _print_robust(console, robust)
    if report["read_ceiling_gb_s"] is not None:
        console.print(f"read ceiling of this run: {report['read_ceiling_gb_s']:.0f} GB/s")
    if busy := report.get("device_busy"):
        console.print(wording.busy_text(busy))
    _print_keys_without_winner(console, keys)
    console.print()
    for line in _closing_lines(report):
        console.print(line, soft_wrap=True)
    console.print(f"database: {path}", soft_wrap=True)
    if read_back is not None:
        console.print(f"read one back: {read_back}", soft_wrap=True)


def _closing_lines(report: Mapping[str, Any]) -> list[str]:
    """How many trials there were, how long they took, what failed, and why keys stopped."""
    failures = wording.failures_text(wording.total(key["failures"] for key in report["keys"]))
    ended = "interrupted after" if report["interrupted"] else "done in"
    lines = [
        f"{report['trials']} trials, {ended} {wording.duration_text(report['seconds'])}"
        + (f"; not ok: {failures}" if failures else "")
    ]
    stopped = Counter(key["stopped"] for key in report["keys"] if key.get("stopped"))
    if stopped:
        lines.append(f"keys stopped by: {wording.failures_text(stopped)}")
    return lines


def _print_robust(console: Console, robust: Mapping[str, Any]) -> None:
    """One configuration for several workloads: how far behind the best of each it is."""
    winner = robust["winner"]
    head = f"{wording.problem_text(robust['problem'])}, one for all workloads ({robust['objective']} regret)"
    if winner is None:
        console.print(f"{head}: none ran under every workload", soft_wrap=True)
        return
    console.print(f"{head}: {wording.knobs_text(winner['knobs'])}", soft_wrap=True)
    pairs = sorted(zip(winner["regrets"], winner["workloads"], strict=True), key=lambda p: -p[0])
    for regret, workload in pairs[:SHOWN_REGRETS]:
        console.print(
            f"  {regret:.3f} times the best at {wording.sizes_text(workload)}", soft_wrap=True
        )
    if len(pairs) > SHOWN_REGRETS:
        console.print(f"  and {len(pairs) - SHOWN_REGRETS} workloads below that")


def _print_keys_without_winner(console: Console, keys: Sequence[Mapping[str, Any]]) -> None:
    """Each key that nothing passed, and how many were not reached."""
    for key in keys:
        if key["winner"] is None and key["trials"]:
            name = wording.key_text(key["key"], key["key"]["workload"])
            why = wording.failures_text(key["failures"])
            console.print(Text(f"no winner: {name}: {why}", style="red"), soft_wrap=True)
    if untried := sum(key["winner"] is None and not key["trials"] for key in keys):
        text = f"{untried} keys were not reached; the same command goes on with them"
        console.print(Text(text, style="yellow"))


def print_models(models: Sequence[Mapping[str, Any]]) -> None:
    """``patune models``: the table of shapes, then the models that no kernel computes, with the reason."""
    console = result_console()
    table = make_table(
        {
            "model": "left",
            "query\nheads": "right",
            "KV\nheads": "right",
            "head_dim": "right",
            "layers": "left",
            "tensor parallel": "left",
            "also": "left",
        }
    )
    for model in models:
        if model["supported"]:
            window = "" if model["window"] is None else f" {model['window']}"
            also = [name for name in ("sinks", "softcap") if model[name]]
            layers = {"window": f"window{window}", "mixed": f"window{window}, full"}
            table.add_row(
                model["name"],
                str(model["q_heads"]),
                str(model["kv_heads"]),
                str(model["head_dim"]),
                layers.get(model["layers"], "full"),
                ",".join(map(str, model["tp"])),
                ", ".join(also),
            )
    console.print(table)
    console.print()
    notes: dict[str, list[str]] = {}
    for model in models:
        if model["supported"] and model["note"]:
            notes.setdefault(model["note"], []).append(model["name"])
    for note, names in notes.items():
        console.print(f"{', '.join(names)}: {note}", soft_wrap=True)
    for model in models:
        if not model["supported"]:
            console.print(
                Text(f"not supported: {model['name']}: {model['reason']}"), soft_wrap=True
            )
    console.print(
        "patune sweep --models llama-3-70b:8,gpt-oss-120b tunes the first with 8 devices, the second with all its degrees; "
        "--json has the sources",
        soft_wrap=True,
    )


def print_space(report: Mapping[str, Any], *, whole: bool) -> None:
    """``patune space``: how large the pool of a key is, and what is not in it."""
    console = result_console()
    console.print(
        f"{wording.target_text(report['target'])}: {wording.key_text(report['problem'], report['workload'])}",
        soft_wrap=True,
    )
    choices = make_table({"knob": "left", "choices": "left"})
    for name, values in report["choices"].items():
        choices.add_row(name, ", ".join(repr(value) for value in values))
    console.print(choices)
    console.print()
    idle = report["listed"] - report["combinations"]
    console.print(
        f"{report['listed']} combinations, {report['combinations']} that differ ({idle} vary the reduce kernel of one split, which does "
        f"not run), {report['feasible']} feasible",
        soft_wrap=True,
    )
    console.print(
        f"{report['builds']} distinct builds: {report['decode_kernels']} decode kernels, {report['reduce_kernels']} reduce kernels "
        "(splits above one share theirs)",
        soft_wrap=True,
    )
    console.print()
    rejected = make_table({"left out": "right", "by the first rule that it breaks": "left"})
    for rejection in report["rejections"]:
        example = wording.knobs_text(rejection["example"])
        cell = Text(rejection["rule"])
        why = "" if rejection["reason"] == rejection["rule"] else f": {rejection['reason']}"
        cell.append(f"\nsuch as {example}{why}", style="dim")
        rejected.add_row(str(rejection["count"]), cell)
    if report["rejections"]:
        console.print(rejected)
    if whole:
        console.print()
        for knobs in report["pool"]:
            console.print(wording.knobs_text(knobs), soft_wrap=True)
    legend = "measured" if report["target"]["arch"].startswith("sm_") else "emulated"
    console.print(Text(wording.KNOBS_LEGEND[legend], style="dim"), soft_wrap=True)
