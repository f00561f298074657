"""One request that nothing warm answers: the override over the layers, what is logged of a fallback, what strict refuses."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from patune import settings
from patune.configs.answer import MISSES, Answer
from patune.configs.wording import core_text, sizes_text, sweep_command, taken_text
from patune.errors import InvalidValueError, MissError

if TYPE_CHECKING:
    from patune.configs.layers import Search
    from patune.configs.overrides import Override
    from patune.configs.state import Process, State

LOGGER = logging.getLogger("patune")
TUNED = ("override", "pinned", "exact", "pack")  # or wanted: nothing is to be said


def held_override(process: Process) -> Override | None:
    """What holds for this thread or task; a PATUNE_KNOBS that cannot be read costs a log line."""
    if process.overrides == 0 and settings.knobs_text() is None:
        return None
    from patune.configs import overrides

    try:
        return overrides.current()
    except InvalidValueError as error:
        if process.first_time("knobs", str(error)):
            LOGGER.warning("Answering without the override: %s", error)
        return None


def resolved(search: Search, override: Override | None) -> Answer:
    """The answer of the layers, with the override on top of it where it fits."""
    below = search.answer()
    if override is None:
        return below
    problem, workload, target = search.problem, search.workload, search.target
    try:
        knobs = override.apply(problem, workload, target, below.knobs)
    except InvalidValueError as error:
        knobs = str(error)
    if not isinstance(knobs, str):
        if knobs not in search.view.failed.get((target, problem), {}):
            return Answer(
                knobs=knobs,
                source="override",
                evidence="default",
                target=target,
                problem=problem,
                workload=workload,
            )
        knobs = "its knobs failed in this process"
    if search.view.first_time("override", target, problem, knobs):
        LOGGER.warning("An override is left out for %s: %s", core_text(below), knobs)
    return below


def check_strict(state: State, answer: Answer) -> None:
    """Refuse what was not tuned, where the settings say so.

    Raises:
        MissError: it was not.
    """
    if state.strict and answer.source in MISSES:
        raise MissError(
            f"PATUNE_STRICT=1: no tuned config for {core_text(answer)} ({answer.target.device_name}) {sizes_text(answer.workload)}. "
            f"Run: {sweep_command(answer.problem, answer.workload, answer.target)}"
        )


def tell(process: Process, answer: Answer) -> None:
    """Log a fallback, once per target, problem and kind: a growing context would repeat it for every token."""
    if answer.source in TUNED or not LOGGER.isEnabledFor(logging.INFO):
        return
    if process.first_time(answer.source, answer.target, answer.problem):
        LOGGER.info(
            "No tuned config for %s (%s) %s: taking %s. Run: %s",
            core_text(answer),
            answer.target.device_name,
            sizes_text(answer.workload),
            taken_text(answer),
            sweep_command(answer.problem, answer.workload, answer.target),
        )
