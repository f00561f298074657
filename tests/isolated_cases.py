"""Cases that may end their process: each mutant's run in a child, and what is left after a crash runs in a fresh one."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kill_matrix import CaseVerdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from patune.tuner.executors import Executor

PATIENCE_S = 600.0  # with one case: half a minute is long, a kernel that never ends takes all
START_S = 600.0  # with a child that has not named its cases
KILLED_AFTER_S = 10.0
REASON_LENGTH = 300  # CUDA adds a page of advice


def run_isolated(
    serve: Callable[..., None], *payload: Any, patience_s: float = PATIENCE_S
) -> list[CaseVerdict]:
    """Verdicts of all cases that ``serve(connection, start, *payload)`` knows.

    ``serve`` runs in a child: it sends the list of its cases' names, then (status, reason) of each from ``start`` on. It may return before
    the last one, and a fresh child goes on. A case during which the child ends, or stays silent for too long, is a ``crash`` or a ``hang``.
    """
    verdicts: list[CaseVerdict] = []
    while True:
        names, answers, end = _one_child(serve, len(verdicts), payload, patience_s)
        if not names:
            raise RuntimeError(f"a child {end.reason} before it named its cases: {payload}")
        for status, reason in answers:
            verdicts.append(CaseVerdict(names[len(verdicts)], status, reason))
        if len(verdicts) == len(names):
            return verdicts
        if not (end.wanted and answers):
            verdicts.append(CaseVerdict(names[len(verdicts)], end.status, end.reason))
        if len(verdicts) == len(names):
            return verdicts


@dataclass(frozen=True)
class _End:
    """How a child ended; ``wanted``: by returning."""

    status: str
    reason: str
    wanted: bool = False


def _one_child(
    serve: Callable[..., None], start: int, payload: tuple[Any, ...], patience_s: float
) -> tuple[list[str], list[tuple[str, str]], _End]:
    """Names of all cases, the answers from ``start`` on as far as they came, and how the child ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_serve_and_end, args=(serve, theirs, start, *payload))
    child.start()
    theirs.close()  # so that the child's end is the pipe's
    names: list[str] = []
    answers: list[tuple[str, str]] = []
    end = _End("hang", f"silent for {patience_s:g} s")
    try:
        while ours.poll(patience_s if names else START_S):
            if names:
                answers.append(ours.recv())
            else:
                names = ours.recv()
    except EOFError:
        child.join(KILLED_AFTER_S)
        code = child.exitcode
        end = _End("crash", f"ended with code {code}", wanted=code == 0)
    if child.is_alive():
        child.kill()
    child.join()
    ours.close()
    return names, answers, end


def _serve_and_end(serve: Callable[..., None], *arguments: Any) -> None:
    """Serve, and end without Python's tidying up: Triton's bindings print pages of leaks there."""
    serve(*arguments)
    os._exit(0)


def executor_of(on: str, arch: str) -> Executor:
    """Who runs kernels: the ISA emulator, a numpy evaluator of their source, or this machine's GPU."""
    from patune.target import Target, detect_target
    from patune.tuner.executors import EmulatedExecutor, GpuExecutor

    if on == "emulator":
        return EmulatedExecutor(Target.named(arch))
    if on == "evaluator":
        from gluon_evaluator import EvaluatedExecutor

        return EvaluatedExecutor()
    target = detect_target()
    assert target is not None, "no GPU here"
    return GpuExecutor(target)


def serve_mutant(
    connection: Connection, start: int, name: str, family: str, on: str, folder: str
) -> None:
    """Run the gate's cases on a mutant, each on its own."""
    from mutants import mutants_of, plant, posed

    from patune.tuner.gate import run_cases
    from patune.tuner.gate.cases import gate_cases

    mutant = next(m for m in mutants_of(family) if m.name == name)
    problem, knobs, arch = posed(mutant, family)
    executor = executor_of(on, arch)
    plan = plant(mutant, Path(tempfile.mkdtemp(dir=folder)))
    cases = gate_cases(problem, knobs, emulated=executor.device.type == "cpu")
    connection.send([case.name for case in cases])
    for case in cases[start:]:
        try:
            report = run_cases([case], problem, knobs, executor.target, executor, plan=plan)
            connection.send((report.status, report.reason))
        except Exception as error:
            if not _lives(executor):
                connection.send(("crash", " ".join(str(error).split())[:REASON_LENGTH]))
                return
            connection.send(("error", traceback.format_exc(limit=-3)))


def _lives(executor: Executor) -> bool:
    """Whether the process still has its device: after an illegal access every call fails."""
    if executor.device.type != "cuda":
        return True
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
