"""How keys, knobs, scores and times read in tables and messages: plain text, no terminal."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from patune.settings import DatabasePlace

PLAIN_VARIANT: dict[str, object] = {  # fields of a key that go unsaid when they have this value
    "query_length": 1,
    "query_dtype": "bf16",
    "kv_dtype": "bf16",
    "kv_quant": "none",
    "kv_layout": "aiter",
    "windowed": False,
    "sinks": False,
    "softcap": False,
    "fp8_math": False,
}
STATE_NAMES = {"fresh": "fresh", "reverify": "re-verify"}
CHANGE_NAMES = {  # a compiler's version begins with its name
    "kernel_source_hash": "source",
    "device_name": "device",
    "compiler": "",
}
SHOWN_HASH = 8  # characters of a source hash beside another
LOOKUP_KV_HEADS = 8  # patune.lookup's own default
KNOB_LETTERS = {"partition_tokens": "p", "num_splits": "s", "num_stages": "st", "num_warps": "w"}
KNOBS_LEGEND = {
    "emulated": "knobs: p partition tokens, s splits, st stages, w warps, eu waves/EU, m MFMA rows, rows per program, ring in LDS, cg loads, r reduce chunk x warps",
    "measured": "knobs: p tokens, s splits, st stages, w warps, reg maxnreg, pk0 probs by token, pdl0 launches in turn, r reduce chunk x warps",
}
SCORE_LEGEND = {
    "emulated": "counted: issue slots of the busiest SIMD in the emulator; ranks knobs, is no latency",
    "measured": "median: GPU time of a decode step, and its share of the read bandwidth measured in that run",
}


def variant_text(problem: Mapping[str, Any]) -> str:
    """``query_length=2 kv_dtype=fp8_e4m3fn``: what differs from the plain variant; empty when nothing does."""
    return " ".join(
        f"{name}={problem[name]}"
        for name, plain in PLAIN_VARIANT.items()
        if name in problem and problem[name] != plain
    )


def problem_text(problem: Mapping[str, Any]) -> str:
    """``block_size=1024 head_dim=128 qg=8``, and what is not plain about it."""
    core = [f"{name}={problem[name]}" for name in ("block_size", "head_dim", "qg")]
    return " ".join(filter(None, [*core, variant_text(problem)]))


def sizes_text(workload: Mapping[str, Any]) -> str:
    """``batch=128 kv_heads=8 context=4096``."""
    return " ".join(f"{name}={workload[name]}" for name in ("batch", "kv_heads", "context"))


def short_key(problem: Mapping[str, Any], workload: Mapping[str, Any]) -> str:
    """``1024/128/8/128x8/4096``, as commands take it; the variant goes unsaid."""
    core = "/".join(str(problem[name]) for name in ("block_size", "head_dim", "qg"))
    return f"{core}/{workload['batch']}x{workload['kv_heads']}/{workload['context']}"


def key_text(problem: Mapping[str, Any], workload: Mapping[str, Any]) -> str:
    """One line for one key."""
    return f"{problem_text(problem)} {sizes_text(workload)}"


def target_text(target: Mapping[str, Any]) -> str:
    """``gfx942 (AMD Instinct MI300X, 304 CUs)``."""
    units = "SMs" if target["arch"].startswith("sm_") else "CUs"
    return f"{target['arch']} ({target['device_name']}, {target['compute_units']} {units})"


def environment_text(environment: Mapping[str, Any]) -> str:
    """The versions that a measurement depends on."""
    names = ("patune", "triton", "torch", "python")
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    driver = "" if environment["driver"] == "none" else f", driver {environment['driver']}"
    source = environment["kernel_source_hash"][:12]
    return f"{versions}, {environment['compiler']}{driver}, kernel source {source}"


def change_texts(changes: Mapping[str, tuple[object, object]]) -> list[str]:
    """``["triton 3.6.0 -> 3.9.0", "source ce69e675 -> 50b1c2d3"]``. An LLVM that is Triton's own changes with it and goes unsaid."""
    texts = []
    for name, pair in changes.items():
        if all(str(value).startswith("llvm of triton") for value in pair):
            continue
        width = SHOWN_HASH if name == "kernel_source_hash" else None
        stored, present = (str(value)[:width] for value in pair)
        title = CHANGE_NAMES.get(name, name.replace("_", " "))
        texts.append(f"{title} {stored} -> {present}".lstrip())
    return texts


def holds_text(state: str, changes: Mapping[str, Mapping[str, object]]) -> str:
    """``re-verify: triton 3.6.0 -> 3.9.0``, ``fresh: nothing has changed since``."""
    texts = change_texts({name: (one["stored"], one["present"]) for name, one in changes.items()})
    return f"{STATE_NAMES[state]}: {', '.join(texts) or 'nothing has changed since'}"


def knobs_text(knobs: Mapping[str, Any]) -> str:
    """``p256 s4 st2 w4 r16x4``: knobs at a value that does nothing are left out."""
    words = [f"{letters}{knobs[name]}" for name, letters in KNOB_LETTERS.items()]
    if knobs.get("waves_per_eu"):
        words.append(f"eu{knobs['waves_per_eu']}")
    if knobs.get("mfma_rows", 16) != 16:
        words.append(f"m{knobs['mfma_rows']}")
    if knobs.get("program_rows"):
        words.append(f"rows{knobs['program_rows']}")
    if knobs.get("lds_ring"):
        words.append("ring")
    if knobs.get("cache_modifier"):
        words.append(knobs["cache_modifier"].lstrip("."))
    if knobs.get("maxnreg"):
        words.append(f"reg{knobs['maxnreg']}")
    if knobs.get("probs_k_major") is False:
        words.append("pk0")
    if knobs.get("overlap_launch") is False:
        words.append("pdl0")
    if knobs["num_splits"] > 1:
        words.append(f"r{knobs['reduce_chunk']}x{knobs['reduce_warps']}")
    return " ".join(words)


def score_of(evidence: Mapping[str, Any]) -> float:
    """Microseconds of ``timing``, else the counted slots of ``counted``."""
    timing, counted = evidence["timing"], evidence["counted"]
    score = timing["median_us"] if timing is not None else counted["busiest_simd_slots"]
    return float(score)


def bare_score(score: float, measured: bool) -> str:
    """``123.4 us`` or ``12345 slots``."""
    return f"{score:.1f} us" if measured else f"{score:.0f} slots"


def short_score(evidence: Mapping[str, Any]) -> str:
    """``123.4 us (95 %)`` or ``12345 slots``, for a column whose heading says the rest."""
    timing = evidence["timing"]
    score = bare_score(score_of(evidence), timing is not None)
    return score if timing is None else f"{score} ({100 * timing['read_fraction']:.0f} %)"


def full_score(evidence: Mapping[str, Any]) -> str:
    """``123.4 us (95 % of read ceiling)``, or ``emulated-correct, counted 12345 slots``: never a latency for emulated work."""
    if evidence["timing"] is None:
        return f"emulated-correct, counted {short_score(evidence)}"
    return short_score(evidence).replace(" %)", " % of read ceiling)")


def gain_text(winner: Mapping[str, Any]) -> str:
    """Against the default: ``1.25x`` as fast where it is timed, ``20 %`` of the slots saved where it is counted; a dash without it."""
    default_score, score = winner["default_score"], score_of(winner)
    if not default_score or score <= 0:
        return "-"
    if winner["timing"] is None:
        return f"{100 * (1 - score / default_score):.0f} %"
    return f"{default_score / score:.2f}x"


def speedup_text(winner: Mapping[str, Any], speedup: Mapping[str, float] | None) -> str:
    """Over the default: ``1.03x (1.02-1.04)`` with the 95 % interval, ``tie`` when the default stays, else as :func:`gain_text`.

    Counted work has no speedup.
    """
    if winner["default_knobs"] is not None and winner["knobs"] == winner["default_knobs"]:
        return "tie"
    if speedup is None or winner["timing"] is None:
        return gain_text(winner)
    return f"{speedup['ratio']:.2f}x ({speedup['low']:.2f}-{speedup['high']:.2f})"


def busy_text(busy: Mapping[str, Any]) -> str:
    """``device busy: 83 % of 1 min 35 s, 91 % after the first minute``."""
    text = f"device busy: {100 * busy['share']:.0f} % of {duration_text(busy['wall_s'])}"
    later = busy.get("share_after_first_minute")
    return text if later is None else f"{text}, {100 * later:.0f} % after the first minute"


def range_text(low_s: float, high_s: float) -> str:
    """``2 to 5 min``: a guess in the unit that suits it, rounded so that it does not look like a measurement."""
    if high_s < 1:
        return "no time"
    for unit, seconds in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if high_s < 100 * seconds or unit == "h":
            low, high = low_s / seconds, high_s / seconds
            break
    least, most = _rough(low), _rough(high)
    return f"{most} {unit}" if least == most else f"{least} to {most} {unit}"


def _rough(value: float) -> str:
    """Two digits at most."""
    if value >= 10:
        return f"{round(value, -1 if value >= 100 else 0):.0f}"
    return f"{value:.0f}" if value >= 3 else f"{value:.1f}".removesuffix(".0")


def spread_rows(evidence: Mapping[str, Any]) -> dict[str, str]:
    """What stands behind a score, by its name."""
    timing, counted = evidence["timing"], evidence["counted"]
    if timing is not None:
        text = f"20 % of replays below {timing['p20_us']:.1f} us, 20 % above {timing['p80_us']:.1f} us, {timing['replays']} replays"
        return {"spread": text}
    text = (
        f"{counted['wave_instructions']} wave instructions, {counted['mfma']} of them matrix, "
        f"{counted['global_bytes']} B of global memory, {counted['lds_bytes']} B LDS a workgroup, {counted['spill_bytes']} B spilled"
    )
    return {"counted work": text}


def interval_text(timing: Mapping[str, Any] | None) -> str | None:
    """The 95 % interval of a median; None where there is none."""
    if timing is None or timing["low_us"] is None or timing["high_us"] is None:
        return None
    return f"median {timing['low_us']:.2f} to {timing['high_us']:.2f} us with 95 % confidence"


def default_text(winner: Mapping[str, Any]) -> str:
    """How the default knobs did beside the winner."""
    if winner["default_knobs"] is None:
        return "not compared"
    knobs = knobs_text(winner["default_knobs"])
    if winner["default_score"] is None:
        return f"{knobs}: did not pass"
    score = bare_score(winner["default_score"], winner["timing"] is not None)
    gain = gain_text(winner)
    verdict = f"saves {gain}" if winner["timing"] is None else f"is {gain} as fast"
    return f"{knobs}: {score}; the winner {verdict}"


def shorten(text: str, limit: int) -> str:
    """One line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def bytes_text(count: int) -> str:
    """``512 B``, ``3.4 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def duration_text(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 03 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def failures_text(failures: Mapping[str, int]) -> str:
    """``3 spills, 2 wrong``, most frequent first."""
    ordered = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {status}" for status, count in ordered if count)


def total(groups: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by status."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts.update(group)
    return dict(counts)


def python_command() -> str:
    """How a shell in this folder calls the Python that runs now."""
    here = Path(sys.executable)
    if found := shutil.which("python"):
        other = Path(found).absolute()
        if other.parent == here.parent and other.resolve() == here.resolve():
            return "python"
    try:
        return shlex.quote(str(here.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(here))


def lookup_command(
    problem: Mapping[str, Any],
    workload: Mapping[str, Any],
    *,
    target: str | None = None,
    db: DatabasePlace | None = None,
) -> str:
    """The shell line that reads one key's knobs back from Python.

    Args:
        problem: the key's problem as a dict; fields of the plain variant are left out.
        workload: the key's workload as a dict.
        target: architecture to name, where it is not the one that lookups answer for anyway.
        db: database to name, where it is not the default one.
    """
    fields = {name: problem[name] for name in ("block_size", "head_dim", "qg")}
    fields |= {n: problem[n] for n, plain in PLAIN_VARIANT.items() if problem[n] != plain}
    fields |= {"batch": workload["batch"], "context": workload["context"]}
    if workload["kv_heads"] != LOOKUP_KV_HEADS:
        fields["kv_heads"] = workload["kv_heads"]
    if target is not None:
        fields["target"] = target
    arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    place = db.absolute() if isinstance(db, Path) else db
    prefix = "" if place is None else f"PATUNE_DB={shlex.quote(str(place))} "
    return f'{prefix}{python_command()} -c "import patune; print(patune.lookup({arguments}))"'
