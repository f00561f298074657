"""What the torture of the config database writes: every value follows from the code of a write, so that a reader can tell a whole one.

A code is ``writer * STRIDE + n``, n counting a writer's values. Scores carry it: a float column of 4 bytes loses codes from writer 16 on.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.configs.candidate import Candidate
from patune.configs.winner import RobustWinner, Winner
from patune.environment import Environment
from patune.kernels.knobs import CdnaKnobs, HopperKnobs, Knobs
from patune.problem import Problem, Workload
from patune.target import Target
from patune.trial import CountedWork, Timing, TrialResult

if TYPE_CHECKING:
    from patune.configs.store import StoredTrial

STRIDE = 1 << 20
TARGETS = (Target.named("sm_90"), Target.named("gfx942"))
# No shipped pack has these, and no sizes are within a factor of two of each other: lookups answer from one entry.
PROBLEMS = (
    Problem(block_size=32, head_dim=64, qg=2),
    Problem(block_size=64, head_dim=64, qg=4),
    Problem(block_size=128, head_dim=64, qg=2, sinks=True),
)
WORKLOADS = tuple(Workload(batch=b, kv_heads=8, context=4096) for b in (1, 8, 64, 512))
Key = tuple[Target, Problem, Workload]
KEYS: tuple[Key, ...] = tuple(itertools.product(TARGETS, PROBLEMS, WORKLOADS))
# Coprime to the number of keys: a writer's values in a row have different keys, and writers of one age share a key.
KEY_STEP = 7
ENVIRONMENTS = tuple(
    Environment(
        patune="0.1.0",
        triton=triton,
        torch="2.11.0",
        python="3.11.7",
        compiler="none",
        driver="none",
        fp_fusion=True,
        kernel_source_hash="5" * 64,
    )
    for triton in ("3.6.0", "3.9.0")
)
OBJECTIVES = ("worst", "mean")
# Fates of trials in turn, by code: 4 in 10 measured.
FATES = ("ok", "crash", "ok", "emulated", "wrong", "ok", "hang", "slow", "ok", "compile_error")
FAULTS = ("crash", "hang")
AGES_OF_A_MESSAGE = 5  # writers of about one age end with the same new text
SPLITS, STAGES = 32, 3
CREATED = "2026-11-22T10:42:00Z"


def key_index(code: int) -> int:
    """Which of the keys a code's trial is of."""
    return code % STRIDE * KEY_STEP % len(KEYS)


@functools.lru_cache(maxsize=4096)
def knobs_of(code: int, arch: str) -> Knobs:
    """Knobs that the kernels of an architecture can run for every problem here; one of 96."""
    n = (code % STRIDE) * 5 + code // STRIDE
    family = HopperKnobs if arch == "sm_90" else CdnaKnobs
    return family(
        partition_tokens=128,
        num_splits=n % SPLITS + 1,
        num_stages=n // SPLITS % STAGES + 1,
        num_warps=4,
    )


def timing_of(code: int) -> Timing:
    """A time with the code in it."""
    us = code + 1.0
    return Timing(
        median_us=us, p20_us=us - 0.5, p80_us=us + 0.5, replays=30, read_fraction=0.5,
        low_us=us - 0.25, high_us=us + 0.25,
    )  # fmt: skip


def counted_of(code: int) -> CountedWork:
    """Counted work with the code in it, in a counter of 64 bits too."""
    return CountedWork(
        busiest_simd_slots=code + 1.0,
        wave_instructions=code,
        mfma=512,
        global_bytes=2**40 + code,
        lds_bytes=65536,
        spill_bytes=0,
    )


def error_of(code: int) -> float:
    return 1.0 / (code % 1000 + 1)


@functools.lru_cache(maxsize=65536)
def result_of(code: int) -> TrialResult:
    """What became of a code's trial."""
    fate = FATES[code % len(FATES)]
    facts: dict[str, Any] = {"code": code}
    if fate in ("ok", "slow", "emulated"):
        score: dict[str, Any] = {"timing": timing_of(code)}
        if fate == "emulated":
            score = {"counted": counted_of(code)}
        status = "slow" if fate == "slow" else "ok"
        return TrialResult(
            status=status,
            gate_cases=12,
            error_rms=error_of(code),
            facts=facts,
            seconds=1.5,
            **score,
        )
    age = code % STRIDE // AGES_OF_A_MESSAGE
    return TrialResult(status=fate, reason=f"message {age} of {fate}: λ > 0", facts=facts)


def code_of(result: TrialResult) -> int:
    """Of a trial's result: from its facts, or from its time when it came with a pack."""
    if result.facts is not None:
        return int(result.facts["code"])
    if result.timing is None:
        raise ValueError(f"a trial of a pack without a time: {result}")
    return round(result.timing.median_us) - 1


def check_trial(stored: StoredTrial, key: Key) -> int:
    """The code of a stored trial whose every value is the code's.

    Raises:
        ValueError: a value is another one, or the trial is another key's.
    """
    code = code_of(stored.result)
    if KEYS[key_index(code)] != key:
        raise ValueError(f"trial {stored.id} has code {code}, which is of another key")
    expected, from_pack = result_of(code), stored.source == "pack"
    if from_pack:
        candidate = stored.result.error_rms is None
        expected = TrialResult(
            status="ok",
            gate_cases=12,
            error_rms=None if candidate else error_of(code),
            timing=timing_of(code),
        )
    if stored.result != expected:
        raise ValueError(f"trial {stored.id} is half there: {stored.result} instead of {expected}")
    if stored.knobs != knobs_of(code, key[0].arch) or stored.source not in ("search", "pack"):
        raise ValueError(f"trial {stored.id} has {stored.knobs} and source {stored.source}")
    return code


def pack_winner(code: int, created: str) -> Winner:
    """A winner as a pack brings it."""
    target, problem, workload = KEYS[key_index(code)]
    return Winner(
        target=target,
        environment=ENVIRONMENTS[code // STRIDE % 2],
        problem=problem,
        workload=workload,
        knobs=knobs_of(code, target.arch),
        evidence="measured",
        timing=timing_of(code),
        counted=None,
        default_score=code + 1.0,
        default_knobs=knobs_of(code, target.arch),
        trials=3,
        gate_cases=12,
        error_rms=error_of(code),
        created=created,
    )


def pack_candidate(code: int) -> Candidate:
    """What stands beside a pack's winner."""
    arch = KEYS[key_index(code)][0].arch
    return Candidate(
        knobs=knobs_of(code, arch), timing=timing_of(code), counted=None, gate_cases=12
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """What serves a key: the winner's code and the rank of its evidence."""

    key: int
    code: int
    measured: bool


def check_winner(winner: Winner) -> Standing:
    """A stored winner whose every value follows from its trial's code and its default's.

    Raises:
        ValueError: a value is another one.
    """
    code = round(winner.score) - 1
    index = key_index(code)
    arch = winner.target.arch
    score = timing_of(code) if winner.timing else counted_of(code)
    wrong = []
    if KEYS[index] != winner.key:
        wrong.append("key")
    if winner.knobs != knobs_of(code, arch):
        wrong.append("knobs")
    if (winner.timing or winner.counted) != score or winner.error_rms != error_of(code):
        wrong.append("score")
    if winner.default_score is not None:
        default = round(winner.default_score) - 1
        if winner.default_knobs != knobs_of(default, arch):
            wrong.append("default")
    if winner.speedup is not None and winner.speedup.high != winner.score + 1:
        wrong.append("speedup")
    if wrong:
        raise ValueError(f"winner of code {code} is half there: {', '.join(wrong)}: {winner}")
    return Standing(index, code, winner.evidence == "measured")


def robust_of(code: int) -> RobustWinner:
    """The robust winner that a code stands for."""
    target, problem, _ = KEYS[key_index(code)]
    return RobustWinner(
        target=target,
        environment=ENVIRONMENTS[code // STRIDE % 2],
        problem=problem,
        objective=OBJECTIVES[code // len(KEYS) % 2],
        workloads=WORKLOADS[: code % 3 + 1],
        knobs=knobs_of(code, target.arch),
        regrets=tuple(code + 1.0 for _ in range(code % 3 + 1)),
        score=code + 1.0,
        created=CREATED,
    )


def robust_place(winner: RobustWinner) -> str:
    """What there is one robust winner for."""
    index = KEYS.index((winner.target, winner.problem, WORKLOADS[0])) // len(WORKLOADS)
    return f"{index} {winner.objective}"


def check_robust(winner: RobustWinner) -> int:
    """The code of a stored robust winner whose every value is the code's.

    Raises:
        ValueError: a value is another one.
    """
    code = round(winner.score) - 1
    if winner != robust_of(code):
        raise ValueError(f"robust winner of code {code} is half there: {winner}")
    return code
