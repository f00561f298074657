"""The coordinating side of benchmarks/decode.py: builds in worker processes, one worker on the GPU, one row after the other.

Candidates compile ahead of the timing in a crew of builders, which leaves Triton's disk cache warm. Each check and each timing is a task of
its own in the one worker that has the GPU: what kills it, or its device context, costs one candidate.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patune.kernels.knobs import knobs_to_dict
from patune.tuner.crew import Crew, Outcome, first_done
from patune.tuner.tasks import BUILD_LIMIT_S, TrialRequest, result_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from decode_candidates import Candidate
    from decode_classes import Row

    from patune.kernels.knobs import Knobs
    from patune.problem import Problem
    from patune.target import Target
    from patune.tuner.crew import Ticket
    from patune.tuner.read_ceiling import ReadLadder

TASKS = {
    "build": "patune.tuner.tasks:build_trial",
    "device": "decode_tasks:describe_device",
    "ladder": "decode_tasks:measure_ladder",
    "open": "decode_tasks:open_row",
    "try": "decode_tasks:try_knobs",
    "finals": "decode_tasks:time_finalists",
    "peer": "decode_tasks:time_peer",
}
LIMITS_S = {
    "device": 180.0,  # imports torch, starts the CUDA context
    "ladder": 240.0,
    "open": 60.0,
    "try": 30.0,  # a second; 15 s in a new worker
    "finals": 60.0,
    "peer": 300.0,  # FlashInfer compiles its kernels on first use
}
FINALISTS = 3  # besides the default
MAX_CRASHES = 3  # of a row: a new worker and its data take seconds
POLL_S = 1.0
GRACE_S = 5.0  # a task that is killed at the deadline gets this long to be reported
FINALS_RESERVE_S = 6.0  # of the budget, to time what was found
BUILT_STATUSES = ("ok", "duplicate")


class BudgetSpent(Exception):
    """There is no time left for another task."""


@dataclass(slots=True)
class Clockwork:
    """The crews of a run and the time that it has.

    Attributes:
        timer: one worker, on the GPU.
        deadline: monotonic time at which the run has to end.
    """

    timer: Crew
    builders: Crew
    deadline: float
    _builds: dict[Any, Ticket] = field(default_factory=dict)
    _built: dict[Ticket, Outcome] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def run(self, task: str, payload: Any) -> Outcome:
        """Run a task on the GPU, and collect finished builds meanwhile.

        Raises:
            BudgetSpent: no time is left, or it ran out during the task.
        """
        if self.left_s <= 0:
            raise BudgetSpent
        limit_s = min(LIMITS_S[task], max(1.0, self.left_s))
        ticket = self.timer.submit(task, payload, limit_s)
        outcome = self._until(ticket, -GRACE_S)
        if outcome.kind == "timeout" and self.left_s <= 0:
            raise BudgetSpent
        return outcome

    def submit_build(self, row: Row, target: Target, knobs: Knobs) -> None:
        """Queue a build, unless one of the same kernels is queued already."""
        key = _build_key(row.problem, knobs)
        if key not in self._builds:
            request = TrialRequest(
                target=target, problem=row.problem, workload=row.workload, knobs=knobs
            )
            ticket = self.builders.submit("build", request.to_dict(), BUILD_LIMIT_S)
            self._builds[key] = ticket

    def build_of(self, row: Row, knobs: Knobs) -> tuple[str, str]:
        """Status and reason of a queued build, waiting for it.

        Raises:
            BudgetSpent: it was not built in time.
        """
        ticket = self._builds[_build_key(row.problem, knobs)]
        outcome = self._until(ticket, FINALS_RESERVE_S)
        if outcome.kind != "ok":
            result = result_of(outcome, "build")
            return result.status, result.reason
        return outcome.result["status"], outcome.result["reason"]

    def _until(self, ticket: Ticket, least_left_s: float) -> Outcome:
        while ticket not in self._built:
            if self.left_s <= least_left_s:
                raise BudgetSpent
            done = first_done([self.timer, self.builders], POLL_S)
            if done is not None:
                self._built[done[0]] = done[1]
        return self._built[ticket]


def _build_key(problem: Problem, knobs: Knobs) -> tuple[Problem, Knobs]:
    """Builds differ by one split or several, not by how many: num_splits is a run-time argument."""
    return problem, knobs if knobs.one_shot else replace(knobs, num_splits=2)


def race_row(
    clockwork: Clockwork,
    row: Row,
    candidates: Sequence[Candidate],
    target: Target,
    ladder: ReadLadder,
    *,
    wants_state: bool = False,
) -> dict[str, Any]:
    """Check and time the candidates of a row: its record in the document. Never raises for what happens on the GPU."""
    started = time.monotonic()
    record: dict[str, Any] = {**describe_row(row), "status": "ok", "reason": ""}
    payload = {
        **row.payload(),
        "target": target.to_dict(),
        "ceiling_gb_s": ladder.ceiling_gb_s,
    }
    trials: list[dict[str, Any]] = []
    try:
        opened = clockwork.run("open", payload)
        if opened.kind != "ok":
            record |= {"status": "failed", "reason": result_of(opened, "open").reason}
        else:
            record |= opened.result
            record["floor_us"] = ladder.cold_read_us(record["kv_bytes"])
            record["reason"] = try_all(clockwork, row, candidates, payload, trials)
    except BudgetSpent:
        record["reason"] = f"budget: {len(trials)} of {len(candidates)} candidates tried"
    record["candidates"] = trials
    if record["status"] == "ok":
        record |= _finals(clockwork, payload, trials, record, wants_state)
    return record | {"seconds": round(time.monotonic() - started, 2)}


def describe_row(row: Row) -> dict[str, Any]:
    """What a row is about, before anything was measured."""
    kind = row.decode_class
    return {
        "row": row.name,
        "class": kind.name,
        "layout": row.layout,
        "page": row.page,
        "goal": row.goal,
        "problem": row.problem.to_dict(),
        "workload": row.workload.to_dict(),
        "lengths": {"least": min(row.lengths), "most": max(row.lengths), "sum": sum(row.lengths)},
    }


def try_all(
    clockwork: Clockwork,
    row: Row,
    candidates: Sequence[Candidate],
    payload: Mapping[str, Any],
    trials: list[dict[str, Any]],
) -> str:
    """Try the candidates in order, the default first; ``trials`` grows by one record each. Why not all of them were tried, if so.

    Raises:
        BudgetSpent: only what the finals need is left of it.
    """
    crashes = 0
    for candidate in candidates:
        if crashes >= MAX_CRASHES:
            return f"given up after {crashes} crashes"
        if clockwork.left_s < FINALS_RESERVE_S:
            raise BudgetSpent
        knobs = knobs_to_dict(candidate.knobs)
        trial: dict[str, Any] = {"knobs": knobs, "source": candidate.source}
        status, reason = clockwork.build_of(row, candidate.knobs)
        if status in BUILT_STATUSES:
            outcome = clockwork.run("try", {**payload, "knobs": knobs})
            if outcome.kind == "ok":
                trial |= outcome.result
            else:
                result = result_of(outcome, "try")
                trial |= {"status": result.status, "reason": result.reason}
                crashes += 1
        else:
            trial |= {"status": status, "reason": reason}
        trials.append(trial)
    return ""


def choose_finalists(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The best few that passed, and the default if it did."""
    passed = sorted((t for t in trials if t["status"] == "ok"), key=lambda t: t["median_us"])
    finalists = passed[:FINALISTS]
    return finalists + [t for t in passed[FINALISTS:] if t["source"] == "default"]


def _finals(
    clockwork: Clockwork,
    payload: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    wants_state: bool,
) -> dict[str, Any]:
    """Time the finalists in turns and sum the row up."""
    counts = {"wrong": sum(t["status"] in ("wrong", "nonfinite") for t in trials)}
    counts["failed"] = sum(t["status"] != "ok" for t in trials) - counts["wrong"]
    finalists = choose_finalists(trials)
    if not finalists:
        spent = not trials and record["reason"].startswith("budget")
        seen = f": {trials[0]['status']}: {trials[0]['reason']}" if trials else ""
        status = "not run" if spent else "wrong" if counts["wrong"] else "failed"
        reason = record["reason"] if spent else f"no candidate passed, the first one{seen}"
        return {"status": status, "reason": reason, "counts": counts}
    short = [t["median_us"] for t in trials if t["status"] == "ok"]
    counts["timed"] = len(short)
    spread = {"median_us": statistics.median(short), "worst_us": max(short)}
    fields: dict[str, Any] = {"counts": counts, "spread": spread}
    try:
        finals = clockwork.run(
            "finals",
            {**payload, "finalists": [t["knobs"] for t in finalists], "wants_state": wants_state},
        )
    except BudgetSpent:
        return fields | {"status": "not run", "reason": "budget: no time for the finals"}
    if finals.kind != "ok" or finals.result["status"] != "ok":
        why = finals.result["reason"] if finals.kind == "ok" else result_of(finals, "finals").reason
        return fields | {"status": "failed", "reason": f"finals: {why}"}
    timed = [
        _timed(trial, timing, record)
        for trial, timing in zip(finalists, finals.result["timings"], strict=True)
    ]
    best = min(timed, key=lambda t: t["median_us"])
    default = next((t for t in timed if t["source"] == "default"), None)
    return fields | {
        "finals": timed,
        "best": best,
        "default": default,
        "met": best["floor_ratio"] <= record["goal"],
        "state": finals.result["state"],
    }


def _timed(
    trial: Mapping[str, Any], timing: Mapping[str, Any], record: Mapping[str, Any]
) -> dict[str, Any]:
    """A finalist with what follows from its time."""
    return {
        "knobs": trial["knobs"],
        "source": trial["source"],
        "error_rms": trial["error_rms"],
        **timing,
        **rates(timing["median_us"], record),
    }


def rates(median_us: float, record: Mapping[str, Any]) -> dict[str, float]:
    """Bandwidth of K and V, and the ratio to the floor."""
    return {
        "tb_s": record["kv_bytes"] / median_us * 1e-6,
        "floor_ratio": median_us / record["floor_us"],
    }


def race_peers(
    clockwork: Clockwork,
    row: Row,
    record: Mapping[str, Any],
    target: Target,
    ladder: ReadLadder,
    peers: Sequence[str],
) -> list[dict[str, Any]]:
    """Time the peers on a row; those that are not installed, or cannot do it, with the reason."""
    from decode_peers import refusal, version_of

    found = []
    for peer in peers:
        entry: dict[str, Any] = {"peer": peer, "version": version_of(peer)}
        payload = {
            **row.payload(),
            "target": target.to_dict(),
            "ceiling_gb_s": ladder.ceiling_gb_s,
            "peer": peer,
        }
        if why := refusal(peer, row.problem, row.lengths):
            entry |= {"status": "skipped", "reason": why}
        else:
            try:
                outcome = clockwork.run("peer", payload)
            except BudgetSpent:
                entry |= {"status": "skipped", "reason": "budget"}
            else:
                entry |= _peer_result(outcome, record)
        found.append(entry)
    return found


def _peer_result(outcome: Outcome, record: Mapping[str, Any]) -> dict[str, Any]:
    if outcome.kind != "ok":
        result = result_of(outcome, "peer")
        return {"status": result.status, "reason": result.reason}
    fields = dict(outcome.result)
    timing = fields.pop("timing", None)
    if timing is not None and "floor_us" in record:
        fields |= {**timing, **rates(timing["median_us"], record)}
    return fields
