"""The launch path with the real dispatcher and the real compiler, without a GPU: planted winners, overrides, strict lookups."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from test_decode import H200, KNOBS, arguments
from test_decode_warm import Bound

import patune
from patune.configs import dispatcher
from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.environment import current_environment
from patune.errors import MissError
from patune.kernels import decode, feasibility
from patune.kernels.decode import forget_steps
from patune.kernels.defaults import default_knobs
from patune.kernels.knobs import HopperKnobs
from patune.problem import Problem, Workload
from patune.settings import database_place
from patune.trial import Timing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.knobs import Knobs

PROBLEM = Problem(block_size=16, head_dim=64, qg=4)
SIZES = Workload(batch=2, kv_heads=2, context=48)
USUAL = default_knobs(PROBLEM, SIZES, H200)
BROKEN = HopperKnobs(partition_tokens=64, num_splits=2, num_stages=1, num_warps=2)
_looked_up = decode._looked_up


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bound]:
    """Decoding on CPU tensors up to the driver, by what the dispatcher answers for an H200; it has no history."""
    for name in ("PATUNE_KNOBS", "PATUNE_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATUNE_WATCH", "0")
    monkeypatch.setenv("PATUNE_CAPTURE", "0")
    monkeypatch.setattr(dispatcher, "_state", type(dispatcher._state)())
    machine = Bound(monkeypatch)
    monkeypatch.setattr(decode, "_looked_up", _looked_up)
    yield machine
    forget_steps()


def plant(knobs: Knobs) -> None:
    """Make these knobs the stored winner."""
    winner = Winner(
        target=H200,
        environment=current_environment(H200),
        problem=PROBLEM,
        workload=SIZES,
        knobs=knobs,
        evidence="measured",
        timing=Timing(median_us=8.0, p20_us=7.9, p80_us=8.1, replays=24, read_fraction=0.5),
        counted=None,
        default_score=None,
        default_knobs=None,
        trials=8,
        gate_cases=7,
        error_rms=0.0025,
        created="2026-11-22T10:42:00Z",
    )
    with Store.open(database_place()) as store:
        store.merge([winner], imported_from="a test")
    dispatcher.reload()


def launched() -> list[Knobs]:
    return [step.knobs for step in decode._steps.values()]


def answer() -> Any:
    return dispatcher.lookup_problem(PROBLEM, SIZES, H200)


def test_a_winner_that_does_not_compile_is_replaced_with_one_warning(
    bound: Bound, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a warpgroup cannot issue wgmma: the compiler says so, feasibility is made to say otherwise."""
    monkeypatch.setattr(feasibility, "WARPGROUP", 2)
    plant(BROKEN)
    assert (answer().knobs, answer().source) == (BROKEN, "exact")
    caplog.clear()
    for _ in range(3):
        bound.run(arguments())
    assert launched() == [USUAL]
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert "RuntimeError: error encountered during parsing" in record.getMessage()
    assert "patune sweep --block-size 16 --head-dim 64 --qg 4 --batch 2 --kv-heads 2 --context 48 --target sm_90" in record.getMessage()  # fmt: skip
    assert (answer().knobs, answer().source) == (USUAL, "heuristic")
    dispatcher.reload()
    bound.run(arguments())
    assert launched() == [USUAL]
    assert len(bound.machine.launches) == 2 * len(bound.by_triton[-1]), "two of the four calls were bound"  # fmt: skip


def test_overrides_and_stored_winners_have_steps_of_their_own(bound: Bound) -> None:
    plant(KNOBS)
    bound.run(arguments())
    for _ in range(2):
        with patune.override(num_splits=3):
            bound.run(arguments())
            with patune.override(USUAL):
                bound.run(arguments())
        bound.run(arguments())
    assert launched() == [KNOBS, replace(KNOBS, num_splits=3), USUAL]
    assert len(bound.by_triton) == 3, "an override that is entered again is warm"


def test_the_environment_sets_knobs_until_it_is_read_again(
    bound: Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(KNOBS)
    monkeypatch.setenv("PATUNE_KNOBS", "num_splits=3")
    dispatcher.reload()
    bound.run(arguments())
    with patune.override(num_stages=1):
        bound.run(arguments())
    assert launched() == [replace(KNOBS, num_splits=3), replace(KNOBS, num_splits=3, num_stages=1)]
    assert answer().source == "override"


def test_an_override_of_another_family_is_left_out_with_one_warning(
    bound: Bound, caplog: pytest.LogCaptureFixture
) -> None:
    plant(KNOBS)
    caplog.clear()
    with patune.override(waves_per_eu=2):
        for length in (1, 1):
            bound.run(arguments(length=length))
    assert launched() == [KNOBS]
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert "knobs of family hopper_wgmma have no waves_per_eu" in record.getMessage()


def test_a_strict_miss_is_raised_and_nothing_is_launched(
    bound: Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATUNE_STRICT", "1")
    dispatcher.reload()
    with pytest.raises(MissError, match="patune sweep"):
        bound.run(arguments())
    assert bound.by_triton == []
