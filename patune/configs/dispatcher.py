"""Answers "which knobs?" from memory.

A warm :func:`lookup` builds a tuple and reads two dicts. The first lookup of a key goes through the layers: override, pinned, the user's database
and the shipped packs (same sizes, then near ones), the robust configuration, another device's, the heuristic, the safe default. Database and
packs are read once per architecture, off the hot path again when the database has changed, and by :func:`reload`. Nothing here writes, tunes, or
waits for the GPU.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from patune import settings
from patune.configs import requests
from patune.configs.answer import Answer, Source
from patune.configs.layers import Search
from patune.configs.state import State
from patune.configs.table import problem_fields
from patune.configs.wording import core_text, explained, sweep_command
from patune.errors import InvalidValueError, reject
from patune.kernels.forced import forced
from patune.kernels.knobs import knobs_to_dict
from patune.problem import Problem, Workload
from patune.record import canonical_json
from patune.target import ARCHS, NO_GPU_ARCH, Target, resolve_target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from patune.configs.overrides import Override
    from patune.configs.state import OuterKey
    from patune.configs.table import Tables
    from patune.kernels.knobs import Knobs
    from patune.settings import DatabasePlace

__all__ = [
    "Answer", "Source", "bypass", "explain", "fingerprint", "give_up", "lookup", "lookup_problem", "missed", "pin", "reload", "stats",
    "suspend_capture", "sweep_command", "unbypass", "unpin",
]  # fmt: skip

MAX_WARM = 131_072  # answers kept: asking for every context length would fill any memory
PACKS = Path(__file__).parent / "packs"
GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either of them under WSL
FORK_WAIT_S = 2.0  # a fork waits for a read that is under way: SQLite's mutexes would stay locked in the child
LOGGER = logging.getLogger("patune")

_State = State
_state = State()
_swapping = threading.Lock()  # held for a few assignments
_reading = (
    threading.Lock()
)  # held while files and servers are read; before _swapping where both are


# The defaults are positional ones, a tuple: keyword-only ones are a dict that CPython asks per name, 150 of 360 ns (2026-11, one core).
def lookup(
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

    The arguments are the fields of :class:`patune.problem.Problem` and :class:`patune.problem.Workload`; name them. ``target`` is
    an architecture; None stands for what ``PATUNE_TARGET`` names, else the device here, else gfx942.

    Raises:
        InvalidValueError: an argument is outside of what is allowed.
        MissError: PATUNE_STRICT is 1, and nothing was tuned for the problem on this device near these sizes.
    """
    # Two small dicts touch fewer cache lines than one of all keys: the outer one, of few keys, stays in the CPU's cache.
    try:
        answer = _state.warm[
            block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, kv_layout,
            windowed, sinks, softcap, fp8_math, kv_heads, batch, target,
        ][context]  # fmt: skip
        answer._tally.calls += 1
        return answer
    except (KeyError, TypeError):  # unhashable: what is wrong with it is said below
        pass
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
    if target is not None and not isinstance(target, str):
        raise reject("target", target, tuple(ARCHS))
    key = (
        block_size, head_dim, qg, query_length, query_dtype, kv_dtype, kv_quant, kv_layout,
        windowed, sinks, softcap, fp8_math, kv_heads, batch, target,
    )  # fmt: skip
    return _cold(key, problem, workload, target)


def lookup_problem(problem: Problem, workload: Workload, target: Target | None = None) -> Answer:
    """:func:`lookup` for a launch path that has the values at hand; ``target`` is the device that will run.

    Raises:
        MissError: as :func:`lookup`.
    """
    # Field by field: hashing and comparing the three values themselves takes 1.6 us, this a third (2026-11, one core).
    key: OuterKey = (
        problem.block_size, problem.head_dim, problem.qg, problem.query_length, problem.query_dtype,
        problem.kv_dtype, problem.kv_quant, problem.kv_layout, problem.windowed, problem.sinks,
        problem.softcap, problem.fp8_math,
        workload.kv_heads, workload.batch,
        None if target is None else (target.arch, target.device_name, target.compute_units),
    )  # fmt: skip
    try:
        answer = _state.warm[key][workload.context]
        answer._tally.calls += 1
        return answer
    except KeyError:
        return _cold(key, problem, workload, target)


def _cold(
    key: OuterKey, problem: Problem, workload: Workload, target: Target | str | None
) -> Answer:
    """Through the layers, once per key; on every call where an override holds, or where a miss is an error."""
    state = _state
    override = requests.held_override(state.process)
    if override is None or state.process.overrides == 0:
        answer = state.kept.get(key, {}).get(workload.context)
        if answer is not None:  # another thread's override made the hot path come here
            answer._tally.calls += 1
            return answer
    device = target if isinstance(target, Target) else _target(state, target)
    answer = _resolve(state, override, problem, workload, device)
    answer._tally.calls += 1
    requests.check_strict(state, answer)
    requests.tell(state.process, answer)
    if state.process.overrides == 0 or override is None:
        state.keep(key, workload.context, answer, MAX_WARM)
    return answer


def _resolve(
    state: State, override: Override | None, problem: Problem, workload: Workload, target: Target
) -> Answer:
    search = _search(state, state.known(problem), workload, target)
    answer = requests.resolved(search, override)
    return replace(answer, _tally=state.process.tally(answer))


def _search(state: State, problem: Problem, workload: Workload, target: Target) -> Search:
    return Search(state.view(_tables(state, target.arch)), problem, workload, target)


def _tables(state: State, arch: str) -> Tables:
    """The stored configurations of an architecture, read at the first request."""
    found = state.tables.get(arch)
    if found is None:
        with _reading:
            found = state.tables.get(arch) or state.read(arch, PACKS)
    from patune.configs import watch

    watch.ensure()
    return found


def _target(state: State, arch: str | None) -> Target:
    """The target that an architecture stands for here; None is the default one."""
    found = state.targets.get(arch)
    if found is None:
        found = state.targets[arch] = local_target(arch)
    return found


def local_target(arch: str | None) -> Target:
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


def stats() -> dict[str, Any]:
    """Since the process began: lookups by source, misses by problem. And what was loaded from where."""
    return _state.summary()


def missed() -> dict[tuple[Target, Problem, Workload, Source], int]:
    """Calls by key that nothing was tuned for, since the process began; sizes up to the next power of two."""
    return _state.process.calls_missed()


def suspend_capture() -> None:
    """From now on :func:`missed` has nothing: the command line's lookups are nobody's traffic."""
    _state.process.captures = False


def reload(database: DatabasePlace | None = None) -> None:
    """Read settings, database and packs again, then swap: a lookup meanwhile gets the old answers, whole.

    The launch path forgets what it had resolved, too. Pins, counts and what failed in this process stay.

    Args:
        database: the database to answer from, until the next reload; None is the one that the settings name.
    """
    with _reading:
        fresh = State(_state.process, database)
        for arch in list(_state.tables):
            fresh.read(arch, PACKS)
        _swap(fresh)


def _swap(fresh: State, *, instead_of: State | None = None) -> bool:
    """Make a state the one that answers; with ``instead_of`` only where that one still does."""
    global _state
    with _swapping:
        if instead_of is not None and _state is not instead_of:
            return False
        _state = fresh.ready()
    _forget_steps()
    return True


def _forget_steps() -> None:
    if decode := sys.modules.get("patune.kernels.decode"):
        decode.forget_steps()


def bypass() -> None:
    """An override was entered: lookups find nothing warm until :func:`unbypass` was called as often."""
    with _swapping:
        _state.process.overrides += 1
        _state.warm = {}


def unbypass() -> None:
    """An override was left."""
    with _swapping:
        _state.process.overrides -= 1
        if not _state.process.overrides:
            _state.warm = _state.kept


def pin(pinned: Iterable[Answer | dict[str, Any]]) -> None:
    """Give these answers from now on for their keys, whatever is stored: what was captured in a graph, or agreed upon between ranks.

    Args:
        pinned: answers, or their documents (:meth:`Answer.to_dict`).

    Raises:
        InvalidValueError: something is no answer.
    """
    found = [one if isinstance(one, Answer) else Answer.from_dict(one) for one in pinned]
    _change_pins({(a.target, a.problem, a.workload): replace(a, source="pinned") for a in found})


def unpin() -> None:
    """Forget all pins."""
    _change_pins(None)


def _change_pins(added: dict[tuple[Target, Problem, Workload], Answer] | None) -> None:
    global _state
    with _swapping:
        process = _state.process
        process.pins = {} if added is None else {**process.pins, **added}
        _state = _state.successor().ready()
    _forget_steps()


def give_up(
    problem: Problem, workload: Workload, target: Target, knobs: Knobs, reason: str
) -> Answer:
    """Knobs failed to compile or launch: serve them no more in this process, and answer with what comes next.

    One warning per problem and knobs names the command that tunes the key. When nothing is left, the safe knobs come again.
    """
    global _state
    fields = problem_fields(problem)
    with _swapping:
        process = _state.process
        failed = process.failed.get((target, problem), {})
        new = knobs not in failed
        process.failed = {**process.failed, (target, problem): {**failed, knobs: reason}}
        state = _state = _state.without(lambda key: key[: len(fields)] == fields).ready()
    if new:
        LOGGER.warning(
            "Knobs %s failed for %s (%s) and are not used again in this process: %s. Run: %s",
            canonical_json(knobs_to_dict(knobs)),
            core_text(target=target, problem=problem),
            target.device_name,
            reason,
            sweep_command(problem, workload, target),
        )
    return _resolve(state, requests.held_override(state.process), problem, workload, target)


def fingerprint(target: str | Target | None = None) -> str:
    """sha256 of everything that decides answers: ranks with the same one dispatch alike.

    Tables, packs, pins, PATUNE_KNOBS, what failed in this process, the target, the kernels. Overrides by context manager are not in it.

    Args:
        target: an architecture, or a device; as in :func:`lookup`.
    """
    from patune.configs.fingerprint import fingerprint_of

    state = _state
    device = target if isinstance(target, Target) else _target(state, target)
    return fingerprint_of(state.view(_tables(state, device.arch)), device)


def explain(answer: Answer) -> str:
    """An answer in words: which layer gave it and why those before did not, what it rests on, what changed since, what tunes the key."""
    state = _state
    search = _search(state, answer.problem, answer.workload, answer.target)
    search.answer()
    return explained(answer, search.notes)


def refresh() -> None:
    """For the watch: read everything again into a new table, and swap, unless something else was swapped meanwhile."""
    with _reading:
        old = _state
        fresh = State(old.process, old.named)
        fresh.targets = dict(old.targets)
        for arch in list(old.tables):
            fresh.read(arch, PACKS)
        _swap(fresh, instead_of=old)


def _before_fork() -> None:
    global _held
    _held = _reading.acquire(timeout=FORK_WAIT_S)
    _swapping.acquire()


def _after_in_parent() -> None:
    _swapping.release()
    if _held:
        _reading.release()


def _after_in_child() -> None:
    """The child has the table, its own locks and counts, and nothing warm: its first lookup starts the watch again."""
    global _reading, _swapping, _state
    _reading, _swapping = threading.Lock(), threading.Lock()
    from patune.configs import watch

    watch.forget()
    state = _state
    state.process.forget_counts()
    state.process.overrides = len(
        cast("tuple[object, ...]", forced.get() or ())
    )  # those of other threads did not come along
    _state = state.successor().ready()


_held = False
os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
