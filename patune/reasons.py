"""Why a lookup answers what it answers: the answer in words, and the evidence that stands behind it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from patune.configs.dispatcher import explain
from patune.errors import DatabaseError, DocumentError
from patune.kernels.knobs import knobs_to_dict
from patune.second_look import Present

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patune.configs.answer import Answer
    from patune.configs.candidate import Candidate
    from patune.configs.store import Store
    from patune.configs.winner import Winner, WinnerKey
    from patune.settings import DatabasePlace

WHY_SCHEMA = 1
SHOWN_FAILURES = 5  # kinds of one key
BEATEN = ("promoted", "imported")  # events that put something in the place of another


def reasons_for(answer: Answer, place: DatabasePlace) -> dict[str, Any]:
    """The answer, in words too, and what stands behind it, as one JSON-ready record.

    Without a database that can be read, what packs know stands there, and why the database does not.
    """
    from patune.configs.store import Store

    note = ""
    try:
        store = Store.read(place)
    except DatabaseError as error:
        behind, note = [_packed(key) for key in _keys(answer)], str(error)
    else:
        with store:
            behind = [_stored(store, key) or _packed(key) for key in _keys(answer)]
    return {
        "schema": WHY_SCHEMA,
        "answer": answer.to_dict(),
        "explanation": explain(answer),
        "behind": [entry for entry in behind if entry is not None],
        "note": note,
    }


def _keys(answer: Answer) -> list[WinnerKey]:
    """What was stored, under other sizes or for another device where it is so."""
    target = answer.stored_target or answer.target
    own = [answer.stored_workload] if answer.stored_workload is not None else []
    workloads = dict.fromkeys([*own, *answer.neighbours])
    return [(target, answer.problem, workload) for workload in workloads]


def _stored(store: Store, key: WinnerKey) -> dict[str, Any] | None:
    target, problem, workload = key
    winner = store.winner(target=target, problem=problem, workload=workload)
    if winner is None:
        return None
    entry = _entry(winner, store.runners_up([winner]).get(winner.key, ()), "database")
    trials = store.trials(target=target, problem=problem, workload=workload)
    counts = Counter(
        (trial.result.status, trial.result.reason) for trial in trials if not trial.result.ok
    )
    entry["failures"] = [
        {"status": status, "reason": reason, "count": count}
        for (status, reason), count in counts.most_common(SHOWN_FAILURES)
    ]
    entry["failed"] = counts.total()
    events = store.history(target=target, problem=problem, workload=workload)
    entry["beat"] = next(
        (
            event.to_dict()
            for event in reversed(events)
            if event.event in BEATEN and event.previous_knobs not in (None, winner.knobs)
        ),
        None,
    )
    return entry


def _packed(key: WinnerKey) -> dict[str, Any] | None:
    """The same from a shipped pack; a pack that cannot be read has nothing."""
    from patune.configs.dispatcher import PACKS
    from patune.configs.packs import load_pack

    for path in sorted(PACKS.rglob("*.json")):
        try:
            pack = load_pack(path)
        except DocumentError:
            continue  # the dispatcher has logged it
        for winner in pack.winners:
            if winner.key == key:
                return _entry(winner, pack.candidates.get(key, ()), f"pack {path.name}")
    return None


def _entry(winner: Winner, others: Sequence[Candidate], where: str) -> dict[str, Any]:
    look = Present(quick=True).look(winner)
    beside: list[Winner | Candidate] = [winner, *others]
    return {
        "where": where,
        "winner": winner.to_dict(),
        "staleness": look.state,
        "changes": look.to_dict()["changes"],
        "candidates": [
            {
                "knobs": knobs_to_dict(one.knobs),
                "score": one.score,
                "times_the_best": one.score / winner.score if winner.score else None,
            }
            for one in beside
        ],
        "failures": [],
        "failed": 0,
        "beat": None,
    }
