"""Answers "which knobs?" from memory.

A warm :func:`lookup` builds one tuple and reads one dict. The first lookup of a key goes through the layers: the user's
database (same sizes, then a near neighbour), the shipped packs (likewise), the default. The database is read once per
architecture and process; :func:`reload` reads it again. Nothing here writes, tunes, or waits for the GPU.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from patune import settings
from patune.configs.table import (
    candidates,
    distance_of,
    entries_in,
    key_of,
    read_database,
    read_packs,
)
from patune.errors import InvalidValueError
from patune.kernels.defaults import default_knobs
from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import Knobs, knobs_from_dict, knobs_to_dict
from patune.problem import Problem, Workload
from patune.target import NO_GPU_ARCH, Target, resolve_target

if TYPE_CHECKING:
    from patune.configs.table import Entry, Table

__all__ = ["Answer", "lookup", "lookup_problem", "reload", "stats"]

SCHEMA = 1
MAX_WARM = 65_536  # answers kept: 42 MB at 637 B each (2026-11); asking for every context length would fill any memory
PACKS = Path(__file__).parent / "packs"
GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either of them under WSL
LOGGER = logging.getLogger("patune")

Source = Literal["exact", "nearest", "pack", "default"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Knobs for one request, and where they come from.

    Attributes:
        source: ``exact`` and ``nearest`` are of the user's database, ``pack`` of a shipped pack, ``default`` a heuristic.
        evidence: ``measured``, ``emulated`` or ``default``.
        stored_workload: the sizes that the knobs were tuned for; None for the default.
    """

    knobs: Knobs
    source: Source
    evidence: str
    target: Target
    problem: Problem
    workload: Workload
    stored_workload: Workload | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What was asked: target, problem and workload, as JSON types."""
        return {
            "target": self.target.to_dict(),
            "problem": self.problem.to_dict(),
            "workload": self.workload.to_dict(),
        }

    @property
    def distance(self) -> dict[str, float] | None:
        """Powers of two from the stored sizes to those asked for, per axis and in total; None for the default."""
        if self.stored_workload is None:
            return None
        walks, context = distance_of(self.workload, self.stored_workload)
        return {"walks": walks, "context": context, "total": math.hypot(walks, context)}

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        stored = self.stored_workload
        return {
            "schema": SCHEMA,
            "source": self.source,
            "evidence": self.evidence,
            "knobs": knobs_to_dict(self.knobs),
            "key": self.key,
            "stored_workload": stored.to_dict() if stored else None,
            "distance": self.distance,
        }


class _Warm:
    """An answer and how often it was given. The count is not locked: threads may lose a few."""

    __slots__ = ("answer", "hits")

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.hits = 1


class _State:
    """Everything between two reloads, so that a reload is one assignment. Building one reads nothing."""

    def __init__(self) -> None:
        self.warm: dict[tuple[object, ...], _Warm] = {}
        self.path: Path | None = None
        self.layers: dict[str, tuple[Table, Table]] = {}  # arch -> (database, packs)
        self.load_s = 0.0
        self.targets: dict[str | None, Target] = {}
        self.told: set[tuple[object, ...]] = set()
        self.by_source: Counter[str] = Counter()  # of answers that left warm
        self.misses: Counter[str] = Counter()  # likewise

    def tables(self, arch: str) -> tuple[Table, Table]:
        """The stored configurations of an architecture, read at the first request."""
        if arch not in self.layers:
            started = time.perf_counter()
            self.path = self.path or settings.database_place()
            self.layers[arch] = read_database(self.path, arch), read_packs(PACKS, arch)
            self.load_s += time.perf_counter() - started
        return self.layers[arch]

    def target(self, arch: str | None) -> Target:
        """The target that an architecture stands for here; None is the default one."""
        if arch not in self.targets:
            self.targets[arch] = _local_target(arch)
        return self.targets[arch]

    def first_time(self, *what: object) -> bool:
        """Whether this was not logged yet."""
        new = what not in self.told
        self.told.add(what)
        return new

    def keep(self, key: tuple[object, ...], answer: Answer) -> None:
        """Make an answer warm; when there are too many, drop them all but for their counts."""
        if len(self.warm) >= MAX_WARM:
            dropped, self.warm = self.warm, {}
            _count(dropped, self.by_source, self.misses)
        self.warm[key] = _Warm(answer)


_state = _State()


def lookup(
    *,
    block_size: int,
    head_dim: int,
    qg: int,
    query_length: int = 1,
    query_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    kv_quant: str = "none",
    kv_layout: str = "aiter",
    windowed: bool = False,
    sinks: bool = False,
    softcap: bool = False,
    fp8_math: bool = False,
    batch: int = 128,
    kv_heads: int = 8,
    context: int = 4096,
    target: str | None = None,
) -> Answer:
    """The knobs to launch a problem with. Whatever the state of the database and the packs, it answers.

    The arguments are the fields of :class:`patune.problem.Problem` and :class:`patune.problem.Workload`. ``target`` is
    an architecture; None stands for what ``PATUNE_TARGET`` names, else the device here, else gfx942.

    Raises:
        InvalidValueError: an argument is outside of what is allowed.
    """
    key = (
        block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, kv_layout,
        windowed, sinks, softcap, fp8_math, batch, kv_heads, context, target,
    )  # fmt: skip
    warm = _state.warm.get(key)
    if warm is not None:
        warm.hits += 1
        return warm.answer
    problem = Problem(
        block_size=block_size,
        head_dim=head_dim,
        qg=qg,
        query_length=query_length,
        query_dtype=query_dtype,
        kv_dtype=kv_dtype,
        kv_quant=kv_quant,
        kv_layout=kv_layout,
        windowed=windowed,
        sinks=sinks,
        softcap=softcap,
        fp8_math=fp8_math,
    )
    workload = Workload(batch=batch, kv_heads=kv_heads, context=context)
    return _cold(key, problem, workload, _state.target(target))


def lookup_problem(problem: Problem, workload: Workload, target: Target | None = None) -> Answer:
    """:func:`lookup` for a launch path that has the values at hand; ``target`` is the device that will run."""
    # Field by field: hashing and comparing the three values themselves takes 1.6 us, this a third (2026-11, one core).
    key: tuple[object, ...] = (
        problem.block_size, problem.head_dim, problem.qg, problem.query_length, problem.query_dtype,
        problem.kv_dtype, problem.kv_quant, problem.kv_layout, problem.windowed, problem.sinks,
        problem.softcap, problem.fp8_math,
        workload.batch, workload.kv_heads, workload.context, None if target is None else target.arch,
    )  # fmt: skip
    if target is not None:
        key = (key, target.device_name, target.compute_units)
    warm = _state.warm.get(key)
    if warm is not None:
        warm.hits += 1
        return warm.answer
    return _cold(key, problem, workload, target or _state.target(None))


def stats() -> dict[str, Any]:
    """Since the last :func:`reload`: lookups by source, misses by key, and what was loaded from where."""
    state = _state
    by_source, misses = Counter(state.by_source), Counter(state.misses)
    layers = list(state.layers.values())
    _count(state.warm, by_source, misses)
    return {
        "schema": SCHEMA,
        "lookups": {source: by_source[source] for source in get_args(Source)},
        "misses": dict(misses.most_common()),
        "db": str(state.path or settings.database_place()),
        "entries": {
            "db": sum(entries_in(database) for database, _ in layers),
            "packs": sum(entries_in(packs) for _, packs in layers),
        },
        "load_ms": round(state.load_s * 1e3, 3),
    }


def reload(database: Path | None = None) -> None:
    """Read settings, database and packs again, then swap: a lookup meanwhile gets the old answers, whole.

    The launch path forgets what it had resolved, too.

    Args:
        database: the file to answer from, until the next reload; None is the one that the settings name.
    """
    global _state
    fresh = _State()
    fresh.path = database
    for arch in list(_state.layers):
        fresh.tables(arch)
    _state = fresh
    if decode := sys.modules.get("patune.kernels.decode"):
        decode.forget_steps()


def _count(
    warm: dict[tuple[object, ...], _Warm], by_source: Counter[str], misses: Counter[str]
) -> None:
    for entry in list(warm.values()):  # a copy: other threads may be adding
        by_source[entry.answer.source] += entry.hits
        if entry.answer.source == "default":
            misses[_core(entry.answer)] += entry.hits


def _core(answer: Answer) -> str:
    problem = answer.problem
    return f"{answer.target.arch} block_size={problem.block_size} head_dim={problem.head_dim} qg={problem.qg}"


def _local_target(arch: str | None) -> Target:
    """The target that ``patune.target.resolve_target`` gives, without the import of torch where there is no GPU driver."""
    name = arch or settings.target_arch()
    try:
        named = Target.named(name or NO_GPU_ARCH)
    except InvalidValueError as error:
        if arch is not None:
            raise
        raise InvalidValueError(f"PATUNE_TARGET: {error}") from error
    if "torch" not in sys.modules and not any(Path(node).exists() for node in GPU_NODES):
        return named
    try:
        return resolve_target(name)
    except (ImportError, OSError, RuntimeError) as error:
        LOGGER.warning("The GPU cannot be asked (%s): answering for %s.", error, named.device_name)
        return named


def _cold(key: tuple[object, ...], problem: Problem, workload: Workload, target: Target) -> Answer:
    state = _state
    answer = _resolve(state, problem, workload, target)
    _tell(state, answer)
    state.keep(key, answer)
    return answer


def _resolve(state: _State, problem: Problem, workload: Workload, target: Target) -> Answer:
    """Through the layers; the first configuration that the kernels can run."""
    key = key_of(target, problem)
    for layer, table in zip(("db", "pack"), state.tables(target.arch), strict=True):
        for entry, same in candidates(table.get(key, []), workload):
            knobs = _usable(state, entry, problem, target)
            if knobs is None:
                continue
            return Answer(
                knobs=knobs,
                source="pack" if layer == "pack" else "exact" if same else "nearest",
                evidence=entry.evidence,
                target=target,
                problem=problem,
                workload=workload,
                stored_workload=entry.workload,
            )
    return Answer(
        knobs=default_knobs(problem, workload, target),
        source="default",
        evidence="default",
        target=target,
        problem=problem,
        workload=workload,
    )


def _usable(state: _State, entry: Entry, problem: Problem, target: Target) -> Knobs | None:
    try:
        knobs = knobs_from_dict(json.loads(entry.knobs))
        refusal = is_feasible(knobs, problem, target)
    except (TypeError, ValueError) as error:  # another version's knobs, or a hand-made row
        refusal = str(error)
    if refusal is None:
        return knobs
    if state.first_time("refused", target, problem, entry.knobs):
        LOGGER.warning("Skipped stored knobs %s: %s", entry.knobs, refusal)
    return None


def _tell(state: _State, answer: Answer) -> None:
    """Log a fallback, once per target, problem and kind: a growing context would repeat it for every token."""
    distance, stored = answer.distance, answer.stored_workload
    if distance is not None and distance["total"] == 0:
        return
    if not LOGGER.isEnabledFor(logging.INFO):
        return
    if state.first_time(answer.source, answer.target, answer.problem):
        LOGGER.info(
            "No tuned config for %s (%s) %s: taking %s. Run: %s",
            _core(answer),
            answer.target.device_name,
            _sizes(answer.workload),
            f"the one of {_sizes(stored)}" if stored else "the default",
            sweep_command(answer.problem, answer.workload, answer.target),
        )


def _sizes(workload: Workload) -> str:
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
