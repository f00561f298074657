"""Everything that the database knows about one key, as one JSON-ready record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patune import wording
from patune.configs.dispatcher import sweep_command
from patune.errors import PatuneError
from patune.kernels.knobs import knobs_to_dict
from patune.second_look import Present

if TYPE_CHECKING:
    from patune.configs.store import Store
    from patune.problem import Problem, Workload
    from patune.target import Target

INSPECTION_SCHEMA = 1


def inspect_key(
    store: Store, *, target: Target, problem: Problem, workload: Workload
) -> dict[str, Any]:
    """The winner of a key, its trials in the order of recording, and its failures by status.

    Raises:
        PatuneError: nothing is stored for the key; the message names the sizes that are.
    """
    winner = store.winner(target=target, problem=problem, workload=workload)
    trials = store.trials(target=target, problem=problem, workload=workload)
    if winner is None and not trials:
        raise nothing_stored(store, target=target, problem=problem, workload=workload)
    look = Present(quick=True).look(winner) if winner is not None else None
    return {
        "schema": INSPECTION_SCHEMA,
        "target": target.to_dict(),
        "problem": problem.to_dict(),
        "workload": workload.to_dict(),
        "winner": winner.to_dict() if winner is not None else None,
        "staleness": look.state if look is not None else "none",
        "changes": look.to_dict()["changes"] if look is not None else {},
        "trials": [
            {
                "id": trial.id,
                "knobs": knobs_to_dict(trial.knobs),
                "source": trial.source,
                "created": trial.created,
                "environment_key": trial.environment_key,
                **trial.result.to_dict(),
            }
            for trial in trials
        ],
        "failures": store.failures(target=target, problem=problem, workload=workload),
    }


def nothing_stored(
    store: Store, *, target: Target, problem: Problem, workload: Workload
) -> PatuneError:
    """What to raise for a key of which nothing is known: it names the sizes that are."""
    others = [
        wording.sizes_text(w.workload.to_dict())
        for w in store.winners(arch=target.arch)
        if w.problem == problem and w.target == target
    ]
    stored = f"stored sizes: {'; '.join(others)}" if others else "no size of this problem is stored"
    return PatuneError(
        f"Nothing is stored for {wording.key_text(problem.to_dict(), workload.to_dict())} on {target.arch}; {stored}. "
        f"Run: {sweep_command(problem, workload, target)}"
    )
