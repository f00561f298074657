"""What a verification's rows come to, what is to be run about them, and where winners are read from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from verify_samples import GFX942, H200, PROBLEM, pack, tune, winner

from patune.errors import DatabaseError, DocumentError, InvalidValueError
from patune.tuner.check_rows import STATUSES
from patune.tuner.verify import read_winners
from patune.tuner.verify_rows import (
    WINNER_STATUSES,
    Source,
    VerifiedWinner,
    VerifyReport,
    outcome_of,
)

DATABASE = Source(path=Path("/tuned/here.db"), kind="database")
ADOPT = "patune verify --adopt --block-size 16 --head-dim 64 --qg 4 --target gfx942"
SWEEP = "patune sweep --block-size 16 --head-dim 64 --qg 4 --batch 1 --kv-heads 8 --context 512 --target gfx942"


@pytest.mark.parametrize("status", STATUSES)
def test_nothing_but_ok_passes(status: str) -> None:
    if status in ("static_ok", "identical"):
        assert status not in WINNER_STATUSES
        with pytest.raises(InvalidValueError, match="status"):
            VerifiedWinner(winner=winner(), place=GFX942, status=status)
        return
    unknown = {"ok": "passed", "no_device": "not_verified", "not_verified": "not_verified"}
    assert outcome_of(status) == unknown.get(status, "failed")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok", "ok"], 0),
        ([], 0),
        (["ok", "wrong", "no_device"], 1),
        (["ok", "spills"], 1),
        (["ok", "no_device"], 4),
        (["not_verified"], 4),
    ],
)
def test_the_exit_code_is_of_the_worst(statuses: list[str], code: int) -> None:
    found = tuple(VerifiedWinner(winner=winner(), place=GFX942, status=s) for s in statuses)
    report = VerifyReport(source=DATABASE, environments={}, winners=found, seconds=1.0)
    assert report.exit_code == code


def test_the_next_command_decides_who_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = VerifiedWinner(winner=winner(), place=GFX942, status="wrong", stale=True)
    assert failed.next_command(DATABASE) == f"{ADOPT} --db /tuned/here.db"
    spaced = Source(path=Path("/tuned here/my.db"), kind="database")
    assert failed.next_command(spaced) == f"{ADOPT} --db '/tuned here/my.db'"
    monkeypatch.setenv("PATUNE_DB", "/tuned/here.db")
    assert failed.next_command(DATABASE) == ADOPT
    every = ADOPT.replace("--adopt", "--adopt --all")  # nothing has changed but the gate
    assert replace(failed, stale=False).next_command(DATABASE) == every
    assert failed.next_command(Source(path=tmp_path / "p.json", kind="pack")) == SWEEP
    assert replace(failed, status="ok").next_command(DATABASE) is None
    assert replace(failed, status="no_device").next_command(DATABASE) is None


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({}, 4),
        ({"arch": "gfx942"}, 3),
        ({"arch": "gfx950"}, 0),
        ({"qg": 4}, 3),
        ({"arch": "gfx942", "qg": 4, "block_size": 16, "head_dim": 64}, 2),
        ({"head_dim": 128}, 0),
    ],
)
def test_a_pack_and_a_database_are_filtered_alike(
    tmp_path: Path, filters: dict[str, Any], count: int
) -> None:
    found = [winner(), winner(batch=2), winner(problem=replace(PROBLEM, qg=8)), winner(H200)]
    database, file = tmp_path / "a.db", tmp_path / "a.json"
    tune(database, *found)
    pack(file, *found)
    source, stored = read_winners(database, None, **filters)
    assert source == Source(path=database, kind="database")
    packed_source, packed = read_winners(None, file, **filters)
    assert packed_source == Source(path=file, kind="pack")
    assert len(stored) == len(packed) == count
    assert {w.key for w in stored} == {w.key for w in packed}
    assert [w for w in packed if w.key == found[0].key] == [w for w in packed if w == found[0]]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(InvalidValueError, match=r"--db .* and --pack .* name two sources"):
        read_winners(missing, missing)
    with pytest.raises(
        DatabaseError, match=r"no config database at .*missing\. Run `patune sweep`"
    ):
        read_winners(missing, None)
    with pytest.raises(DocumentError, match="no such pack file"):
        read_winners(None, missing)
    assert list(tmp_path.iterdir()) == []
