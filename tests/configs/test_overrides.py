"""Overrides: what is refused when one is entered, how they lie on each other, and who sees them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import CDNA_KNOBS, H200, KNOBS, MI300X, OTHER_KNOBS, PROBLEM, WORKLOAD

import patune
from patune.configs import dispatcher, overrides
from patune.configs.overrides import Override, current, override
from patune.errors import InvalidValueError
from patune.kernels.forced import forced
from patune.kernels.knobs import knobs_to_dict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patune.kernels.knobs import Knobs
    from patune.target import Target


class Bypass:
    """How many overrides the dispatcher knows of."""

    def __init__(self) -> None:
        self.depth = 0
        self.entered = 0

    def bypass(self) -> None:
        self.depth += 1
        self.entered += 1

    def unbypass(self) -> None:
        self.depth -= 1


@pytest.fixture(autouse=True)
def bypassed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bypass]:
    seen = Bypass()
    monkeypatch.setattr(dispatcher, "bypass", seen.bypass, raising=False)
    monkeypatch.setattr(dispatcher, "unbypass", seen.unbypass, raising=False)
    monkeypatch.delenv("PATUNE_KNOBS", raising=False)
    overrides._warn.cache_clear()
    yield seen
    assert seen.depth == 0


def applied(below: Knobs = KNOBS, target: Target = H200) -> Any:
    holds = current()
    return below if holds is None else holds.apply(PROBLEM, WORKLOAD, target, below)


def test_an_override_holds_inside_only(bypassed: Bypass) -> None:
    assert current() is None
    with patune.override(num_splits=8):
        assert applied() == replace(KNOBS, num_splits=8)
        assert bypassed.depth == 1
    assert current() is None
    with override(OTHER_KNOBS):
        assert applied() == OTHER_KNOBS
    with pytest.raises(KeyError), override(OTHER_KNOBS):
        raise KeyError
    assert current() is None
    assert bypassed.entered == 3


def test_inner_ones_lie_on_top_and_the_environment_below_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATUNE_KNOBS", "num_stages=2, reduce_warps=1")
    assert applied() == replace(KNOBS, num_stages=2, reduce_warps=1)
    with override(num_splits=8, reduce_warps=2):
        assert applied() == replace(KNOBS, num_stages=2, num_splits=8, reduce_warps=2)
        with override(num_splits=16):
            assert applied() == replace(KNOBS, num_stages=2, num_splits=16, reduce_warps=2)
        with override(OTHER_KNOBS, num_splits=3):
            assert applied() == replace(OTHER_KNOBS, num_splits=3)
            with override(num_stages=1):
                assert applied() == replace(OTHER_KNOBS, num_splits=3, num_stages=1)
        assert applied() == replace(KNOBS, num_stages=2, num_splits=8, reduce_warps=2)


def test_threads_and_tasks_have_their_own() -> None:
    seen: list[Any] = []
    with override(num_splits=8):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]

    async def work(splits: int, gate: asyncio.Event) -> Any:
        with override(num_splits=splits):
            gate.set() if splits == 5 else await gate.wait()
            await asyncio.sleep(0)
            return applied().num_splits

    async def both() -> list[Any]:
        gate = asyncio.Event()
        return list(await asyncio.gather(work(3, gate), work(5, gate)))

    assert asyncio.run(both()) == [3, 5]
    assert current() is None


def test_equal_overrides_are_equal_to_the_launch_path() -> None:
    values = []
    for changes in ({"num_splits": 8, "num_stages": 2}, {"num_stages": 2, "num_splits": 8}, {"num_splits": 9}):  # fmt: skip
        with override(**changes):
            values.append(forced.get())
    assert values[0] == values[1] != values[2]
    assert hash(values[0]) == hash(values[1])


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        (None, {}, "patune.override sets nothing; allowed: a Knobs value, or any of partition_tokens, num_splits"),
        (None, {"splits": 8}, "patune.override: knob='splits' is not allowed; allowed: partition_tokens, num_splits"),
        (None, {"num_splits": 0}, "patune.override: num_splits=0 is not allowed; allowed: an integer from 1 to 128"),
        (None, {"num_splits": True}, "num_splits=True is not allowed"),
        (None, {"partition_tokens": 96}, "partition_tokens=96 is not allowed; allowed: 64, 128, 256"),
        (None, {"maxnreg": 5}, "maxnreg=5 is not allowed; allowed: 0, 96, 128, 168"),
        (None, {"lds_ring": 1}, "lds_ring=1 is not allowed; allowed: true, false"),
        (None, {"maxnreg": 96, "mfma_rows": 16}, "no kernel family has all of maxnreg, mfma_rows"),
        ({"num_splits": 8}, {}, "patune.override={'num_splits': 8} is not allowed; allowed: a HopperKnobs, a CdnaKnobs"),
        (KNOBS, {"mfma_rows": 16}, "patune.override: knob='mfma_rows' is not allowed; allowed: partition_tokens"),
        (KNOBS, {"num_splits": 999}, "num_splits=999 is not allowed"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused_when_entered(
    given: Any, changes: dict[str, Any], message: str, bypassed: Bypass
) -> None:
    with pytest.raises(InvalidValueError) as caught, override(given, **changes):
        pass
    assert message in str(caught.value)
    assert (current(), bypassed.entered) == (None, 0)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("num_splits=8,num_stages=2", {"num_splits": 8, "num_stages": 2}),
        (" num_splits = 8 ", {"num_splits": 8}),
        ("overlap_launch=False,maxnreg=128", {"overlap_launch": False, "maxnreg": 128}),
        ("", {}),
    ],
)
def test_the_environment_sets_single_knobs(
    text: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATUNE_KNOBS", text)
    assert applied() == replace(KNOBS, **changes)


def test_the_environment_sets_all_knobs_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATUNE_KNOBS", json.dumps(knobs_to_dict(OTHER_KNOBS)))
    assert applied() == OTHER_KNOBS
    monkeypatch.setenv("PATUNE_KNOBS", json.dumps(knobs_to_dict(replace(CDNA_KNOBS, cache_modifier=".cg"))))  # fmt: skip
    assert applied(CDNA_KNOBS, MI300X) == replace(CDNA_KNOBS, cache_modifier=".cg")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_splits", "PATUNE_KNOBS='num_splits' is not allowed; allowed: each knob once"),
        ("num_splits=8,num_splits=9", "each knob once"),
        ("num_splits=8x", "PATUNE_KNOBS: num_splits='8x' is not allowed; allowed: an integer from 1 to 128"),
        ("overlap_launch=1", "overlap_launch='1' is not allowed; allowed: true, false"),
        ("splits=8", "PATUNE_KNOBS: knob='splits' is not allowed"),
        ("{", "PATUNE_KNOBS: "),
        ("{}", "family=None is unknown; known families: hopper_wgmma, cdna_mfma"),
        ('{"family": "cdna_mfma", "num_splits": 8}', "field 'partition_tokens' is missing"),
        ('{"family": "cdna_mfma", "a": ' + "[" * 100_000, "PATUNE_KNOBS: "),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be_read_is_refused(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATUNE_KNOBS", text)
    with pytest.raises(InvalidValueError) as caught:
        current()
    assert message in str(caught.value)


def test_what_does_not_fit_the_problem_is_told_to_the_dispatcher() -> None:
    with override(OTHER_KNOBS):
        assert applied(CDNA_KNOBS, MI300X) == (
            "patune.override: knobs of family hopper_wgmma do not drive gfx942, which takes cdna_mfma"
        )
    with override(maxnreg=96):
        assert applied(CDNA_KNOBS, MI300X) == (
            "patune.override: knobs of family cdna_mfma have no maxnreg"
        )
    with override(partition_tokens=256, num_stages=4):
        assert "needs" in applied()
        assert "232448 B" in applied()


def test_a_layer_that_does_not_fit_is_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="patune")
    with ExitStack() as stack:
        for changes in ({"num_splits": 8}, {"num_stages": 4, "partition_tokens": 256}, {"reduce_warps": 1}):  # fmt: skip
            stack.enter_context(override(**changes))
        for _ in range(3):
            assert applied() == replace(KNOBS, num_splits=8, reduce_warps=1)
    (record,) = caplog.records
    assert record.message.startswith(
        "patune.override does not fit block_size=1024 head_dim=128 qg=8 on sm_90 and is left out: num_stages=4 needs"
    )


def test_the_order_of_layers_is_kept() -> None:
    layers = tuple(overrides._layer("x", None, {"num_splits": n}) for n in (3, 5))
    assert Override(layers).apply(PROBLEM, WORKLOAD, H200, KNOBS) == replace(KNOBS, num_splits=5)
