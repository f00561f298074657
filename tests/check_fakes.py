"""Worker tasks of a check that do as they are told, and the real ones with a planted bug: both are imported by name in worker processes."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

TASKS = {name: f"check_fakes:fake_{name}" for name in ("build", "gate")}
MUTANT_TASKS = {name: f"check_fakes:mutant_{name}" for name in ("build", "gate")}
RULES, MUTANT = "CHECK_FAKE_RULES", "CHECK_FAKE_MUTANT"
AMD_FACTS = {
    "vgpr": 100,
    "agpr": 8,
    "spills": 0,
    "shared_b": 4096,
    "waves_per_simd": 4.0,
    "limiter": "vgpr",
    "mix": {"mfma": 32, "all": 900},
}
NVIDIA_FACTS = {"registers": 103, "spills": 0, "shared_b": 101760}
SPILLS = {"status": "spills", "reason": "decode spills 12 registers"}
WRONG = {"status": "wrong", "reason": "row 3 is off", "gate_cases": 2, "error_rms": 0.5}


def rule(at: str, do: dict[str, Any] | str, **knobs: Any) -> dict[str, Any]:
    """In the task ``at``, payloads with these knobs get the answer ``do``, or ``abort``, ``hang``, ``raise``, ``dawdle``."""
    return {"at": at, "do": do, "knobs": knobs}


def obey(monkeypatch: pytest.MonkeyPatch, *rules: dict[str, Any]) -> None:
    """Tell the fakes; workers take the environment of the moment when they start."""
    monkeypatch.setenv(RULES, json.dumps(rules))


def fake_build(payload: dict[str, Any]) -> dict[str, Any]:
    """Passes, and by default every case is of its own identity."""
    nvidia = payload["target"]["arch"].startswith("sm_")
    answer = {
        "status": "ok",
        "reason": "",
        "facts": {"decode": NVIDIA_FACTS if nvidia else AMD_FACTS},
        "identity": json.dumps(payload, sort_keys=True),
    }
    return _answer("build", payload, answer)


def fake_gate(payload: dict[str, Any]) -> dict[str, Any]:
    """Passes five cases."""
    answer = {"status": "ok", "reason": "", "gate_cases": 5, "error_rms": 0.001}
    return _answer("gate", payload, answer)


def _answer(task: str, payload: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    for told in json.loads(os.environ.get(RULES, "[]")):
        if told["at"] == task and told["knobs"].items() <= payload["knobs"].items():
            match told["do"]:
                case "abort":
                    os.abort()
                case "hang":
                    time.sleep(1000)
                case "raise":
                    raise KeyError("no such thing")
                case "dawdle":
                    time.sleep(0.5)
                case changes:
                    answer = answer | changes
    return answer


def mutant_build(payload: dict[str, Any]) -> dict[str, Any]:
    """The real task on kernels that carry the bug that CHECK_FAKE_MUTANT names."""
    from patune.tuner.check_tasks import build_case

    return build_case(payload, plan=_planted(os.environ[MUTANT]))


def mutant_gate(payload: dict[str, Any]) -> dict[str, Any]:
    """The real task, likewise."""
    from patune.tuner.check_tasks import gate_case

    return gate_case(payload, plan=_planted(os.environ[MUTANT]))


@functools.cache
def _planted(name: str) -> Callable[..., Any]:
    from mutants import mutants_of, plant

    mutant = next(m for m in mutants_of("cdna_mfma") if m.name == name)
    return plant(mutant, Path(tempfile.mkdtemp(dir=os.environ["CHECK_FAKE_FOLDER"])))
