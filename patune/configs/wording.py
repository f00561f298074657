"""Answers in words: log lines, the command that tunes a key, and what ``patune why`` prints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from patune.configs.answer import MISSES
from patune.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from patune.configs.answer import Answer, Source
    from patune.configs.staleness import Change
    from patune.problem import Workload
    from patune.target import Target

_LAYERS: Mapping[Source, str] = {
    "override": "an override sets them: patune.override() around the call, or PATUNE_KNOBS",
    "pinned": "they are pinned for this key by patune.pin()",
    "exact": "your database has a configuration for the same batch x KV heads and the same context",
    "pack": "a pack that came with patune has one for the same batch x KV heads and the same context",
    "nearest": "they do best over what is stored near these sizes",
    "robust": "they lose least over several sizes of the problem",
    "other_device": "they were tuned on another device of the architecture",
    "heuristic": "nothing was tuned for them: a heuristic",
    "safe": "nothing else can be run: the fewest resources that compute the problem",
}
VERIFY = "patune verify --adopt"


def core_text(
    answer: Answer | None = None, *, target: Target | None = None, problem: Problem | None = None
) -> str:
    """Architecture and core of the problem, of an answer or as given."""
    if answer is not None:
        target, problem = answer.target, answer.problem
    assert target is not None, "given with a problem"
    assert problem is not None, "given with a target"
    return (
        f"{target.arch} block_size={problem.block_size} head_dim={problem.head_dim} qg={problem.qg}"
    )


def sizes_text(workload: Workload) -> str:
    """The sizes, as options name them."""
    return f"batch={workload.batch} kv_heads={workload.kv_heads} context={workload.context}"


def sweep_command(problem: Problem, workload: Workload, target: Target) -> str:
    """The command line that tunes exactly this key."""
    words = ["patune", "sweep"]
    for field in dataclasses.fields(Problem):
        value = getattr(problem, field.name)
        if value == field.default:
            continue
        flag = {"windowed": "--window"}.get(field.name, "--" + field.name.replace("_", "-"))
        words += [flag] if value is True else [flag, str(value)]
    for name, value in workload.to_dict().items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return " ".join([*words, "--target", target.arch])


def taken_text(answer: Answer) -> str:
    """What a lookup takes in place of a tuned configuration."""
    where = f" on {answer.stored_target.device_name}" if answer.stored_target else ""
    if answer.stored_workload is not None:
        return f"the one of {sizes_text(answer.stored_workload)}{where}"
    if answer.neighbours:
        sizes = "; ".join(map(sizes_text, answer.neighbours))
        return f"the best over those of {sizes}{where}"
    return {
        "robust": "the one that loses least over several sizes",
        "heuristic": "the heuristic",
        "safe": "the safe default",
    }.get(answer.source, answer.source)


def stale_line(arch: str, total: int, stale: Iterable[tuple[int, Sequence[Change]]]) -> str | None:
    """What is said once when stored configurations need a second look; None when none does.

    Args:
        arch: their architecture.
        total: how many are stored for it.
        stale: per environment how many were tuned in it, and what has changed since.
    """
    count, changed = 0, dict[str, None]()
    for some, changes in stale:
        serious = [str(change) for change in changes if change.kind == "reverify"]
        if serious:
            count += some
            changed.update(dict.fromkeys(serious))
    if not count:
        return None
    return (
        f"{count} of {total} configurations for {arch} were tuned with {', '.join(changed)}; "
        f"they are served. Run: {VERIFY}"
    )


def explained(answer: Answer, notes: Sequence[tuple[Source, str]]) -> str:
    """An answer in words.

    Args:
        answer: what is explained.
        notes: (layer, why it did not answer), of the layers that come before, and perhaps of later ones.
    """
    knobs = ", ".join(f"{name}={value}" for name, value in answer.knobs.to_dict().items())
    lines = [
        f"{core_text(answer)} ({answer.target.device_name}), {sizes_text(answer.workload)}",
        f"knobs: {knobs}",
        f"source: {answer.source}: {_LAYERS[answer.source]}",
        *_provenance(answer),
    ]
    order = list(_LAYERS)
    before = [(s, why) for s, why in notes if order.index(s) < order.index(answer.source)]
    if before:
        lines.append("layers before it:")
        lines += [f"  {_both(s, answer)}: {why}" for s, why in before]
    if (
        answer.source not in ("exact", "pack", "override", "pinned")
        or answer.staleness == "reverify"
    ):
        lines.append(
            f"to tune the key: {sweep_command(answer.problem, answer.workload, answer.target)}"
        )
    return "\n".join(lines)


def _provenance(answer: Answer) -> list[str]:
    lines = []
    if answer.stored_target is not None:
        device = answer.stored_target
        lines.append(f"tuned on: {device.device_name} with {device.compute_units} compute units")
    if answer.stored_workload is not None:
        lines.append(f"tuned for: {sizes_text(answer.stored_workload)}")
    elif answer.neighbours:
        lines.append("chosen from: " + "; ".join(map(sizes_text, answer.neighbours)))
    if answer.distance is not None:
        lines.append(f"distance: {_distance_text(answer.distance)}")
    lines.append(f"evidence: {answer.evidence}")
    if answer.environment is None:
        if answer.source in MISSES:
            lines.append("environment: none, these knobs were not tuned")
        return lines
    fields = answer.environment
    named = ", ".join(f"{n} {fields[n]}" for n in ("patune", "triton", "torch", "compiler", "driver") if n in fields)  # fmt: skip
    lines.append(f"environment: {named}")
    if not answer.changes:
        lines.append("changed since: nothing")
    for change in answer.changes:
        lines.append(f"changed since: {change} ({_KINDS[change.kind]})")
    if answer.staleness == "reverify":
        lines.append(f"served all the same; to check them again, run: {VERIFY}")
    return lines


_KINDS = {
    "must_match": "another device's: times do not carry over",
    "reverify": "they may be slower now, or wrong",
    "note": "no effect is expected",
}


def _distance_text(distance: Mapping[str, float]) -> str:
    if distance["total"] == 0:
        return "none, the same batch x KV heads and context"
    walks, context = 2 ** distance["walks"], 2 ** distance["context"]
    return f"batch x KV heads is {walks:.2f} times, context {context:.2f} times that of the nearest stored one"


def _both(source: Source, answer: Answer) -> str:
    """Database and packs are looked through together for the same sizes."""
    return "exact, pack" if source == "exact" and answer.source != "pack" else source
