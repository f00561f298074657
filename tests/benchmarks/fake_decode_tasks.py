"""Stands for the worker tasks of benchmarks/decode.py: made-up times, and fates by the knobs' number of stages.

FAKE_FATES: JSON of {"task stages": fate}, fates ``crash``, ``poison``, ``wrong``, ``slow``, ``raise``. FAKE_LOG takes a line per task.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

TASKS = {
    name: f"fake_decode_tasks:{name}_task"
    for name in ("build", "device", "ladder", "open", "try", "finals", "peer")
}
TARGET = {"arch": "sm_90", "device_name": "NVIDIA H200", "compute_units": 132}


class AcceleratorError(RuntimeError):
    pass


def fate(task: str, stages: object = "") -> str:
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(json.dumps([task, stages, os.getpid()]) + "\n")
    found = str(json.loads(os.environ.get("FAKE_FATES", "{}")).get(f"{task} {stages}".strip(), ""))
    if found == "crash":
        os.abort()
    if found == "poison":
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")
    if found == "raise":
        raise KeyError("a bug")
    if found == "slow":
        time.sleep(1000)
    return found


def device_task(payload: None) -> dict[str, Any]:
    if fate("device") == "none":
        return {"target": None}
    environment = {"torch": "2", "triton": "3", "driver": "580", "kernel_source_hash": "0" * 64}
    return {"target": TARGET, "environment": environment, "cuda": "13.0", "cudnn": 9, "smi": {}}


def ladder_task(payload: None) -> dict[str, Any]:
    fate("ladder")
    shape = {"block": 1024, "unroll": 1, "warps": 8, "programs": 132}
    return {
        "reads": [
            {"nbytes": 1_000_000, "median_us": 1.0, **shape},
            {"nbytes": 4_000_000_000, "median_us": 1000.0, **shape},
        ]
    }


def build_task(payload: dict[str, Any]) -> dict[str, Any]:
    spills = fate("build", payload["knobs"]["num_stages"]) == "spills"
    status, reason = ("spills", "kernel spills 8 B") if spills else ("ok", "")
    return {"status": status, "reason": reason, "digest": "", "facts": None}


def open_task(payload: dict[str, Any]) -> dict[str, Any]:
    fate("open")
    kv_bytes = sum(payload["lengths"]) * 4096
    return {
        "kv_bytes": kv_bytes,
        "scale_bytes": 0,
        "sets": 2,
        "flushed": False,
        "error_limit": 0.01,
    }


def median_us(knobs: dict[str, Any]) -> float:
    """Fewer stages are faster; one warp count is."""
    return 10.0 * knobs["num_stages"] + knobs["num_warps"] + knobs["num_splits"] / 100


def try_task(payload: dict[str, Any]) -> dict[str, Any]:
    knobs = payload["knobs"]
    if fate("try", knobs["num_stages"]) == "wrong":
        return {"status": "wrong", "reason": "relative RMS error 0.5 of a row", "error_rms": 0.5}
    return {"status": "ok", "reason": "", "error_rms": 0.002, "median_us": median_us(knobs)}


def finals_task(payload: dict[str, Any]) -> dict[str, Any]:
    fate("finals")
    timings = [
        {
            "median_us": median_us(knobs) + 0.5,
            "p20_us": median_us(knobs),
            "p80_us": median_us(knobs) + 1,
            "replays": 24,
            "read_fraction": 0.5,
        }
        for knobs in payload["finalists"]
    ]
    state = {"clocks.sm": "1980 MHz"} if payload["wants_state"] else {}
    return {"status": "ok", "reason": "", "timings": timings, "state": state}


def peer_task(payload: dict[str, Any]) -> dict[str, Any]:
    fate("peer")
    timing = {"median_us": 50.0, "p20_us": 49.0, "p80_us": 51.0, "replays": 24}
    return {"status": "ok", "reason": "", "error_rms": 0.002, "timing": timing}
