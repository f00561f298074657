"""What differs between packs, and one pack made of several."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from config_samples import (
    H100,
    KNOBS,
    LATER_ENVIRONMENT,
    OTHER_KNOBS,
    at,
    block,
    candidate,
    robust_winner,
    timing,
    winner,
)
from config_strategies import whole_packs
from hypothesis import given, settings

from patune.configs.pack import Pack
from patune.configs.pack_diff import diff_packs
from patune.configs.pack_merge import merge_packs
from patune.configs.packs import document_of, import_pack, pack_text, stored_pack
from patune.configs.store import Store
from patune.kernels import feasibility

OLD, NEW = "2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z"


def pack(*winners: Any, **lists: Any) -> Pack:
    return Pack(winners=list(winners), **lists)


@settings(max_examples=20, deadline=None)
@given(whole_packs())
def test_a_pack_does_not_differ_from_itself(one: Pack) -> None:
    found = diff_packs(one, one)
    assert found.equal
    assert found.unchanged == len(one.winners)
    everything = diff_packs(pack(), one)
    assert everything.equal == (one == pack())
    assert [d.after for d in everything.winners] == one.winners
    assert {d.change for d in everything.winners} <= {"added"}
    assert [w for _, w in everything.robust] == one.robust
    assert [b for _, b in everything.blocklist] == one.blocklist
    nothing = diff_packs(one, pack())
    assert [d.before for d in nothing.winners] == one.winners
    assert {change for change, _ in nothing.blocklist} <= {"removed"}


def test_a_change_says_what_and_by_how_much() -> None:
    before = pack(winner(median_us=50.0), winner(target=H100), winner(workload=at(batch=1)))
    faster = winner(median_us=45.0, knobs=OTHER_KNOBS, default_knobs=None, default_score=None)
    found = diff_packs(before, pack(faster, winner(target=H100), winner(workload=at(batch=2))))
    assert found.unchanged == 1
    assert [(d.change, (d.after or d.before).workload.batch) for d in found.winners] == [
        ("removed", 1),
        ("added", 2),
        ("changed", 128),
    ]
    changed = found.winners[2]
    assert changed.changed == ("knobs", "timing", "default_score", "default_knobs")
    assert changed.percent == pytest.approx(-10.0)
    document = found.to_dict()
    assert (document["equal"], document["added"], document["removed"]) == (False, 1, 1)
    assert (document["changed"], document["unchanged"]) == (1, 1)
    entry = document["winners"][2]
    assert (entry["before"]["score"], entry["after"]["score"]) == (50.0, 45.0)
    assert entry["after"]["knobs"]["num_splits"] == OTHER_KNOBS.num_splits
    assert document["winners"][0]["after"] is None


@pytest.mark.parametrize(
    "after",
    [
        winner(slots=1.0),
        winner(timing=dataclasses.replace(timing(40.0), protocol="graph-cold-2")),
    ],
    ids=["another kind of evidence", "another protocol"],
)
def test_scores_that_cannot_be_compared_have_no_percent(after: Any) -> None:
    (found,) = diff_packs(pack(winner()), pack(after)).winners
    assert (found.change, found.percent) == ("changed", None)


def test_a_score_of_nothing_has_no_percent() -> None:
    zero = winner(timing=dataclasses.replace(timing(1.0), median_us=0.0))
    (found,) = diff_packs(pack(zero), pack(winner())).winners
    assert found.percent is None


def test_candidates_environment_and_importer() -> None:
    beside = {winner().key: (candidate(),)}
    (found,) = diff_packs(pack(winner()), pack(winner(), candidates=beside)).winners
    assert (found.changed, found.percent) == (("candidates",), 0.0)
    (found,) = diff_packs(pack(winner()), pack(winner(environment=LATER_ENVIRONMENT))).winners
    assert found.changed == ("environment",)
    assert diff_packs(pack(winner()), pack(winner(imported_from="x.json"))).equal


def test_robust_winners_and_the_blocklist_are_compared() -> None:
    before = pack(robust=[robust_winner(), robust_winner(objective="mean")], blocklist=[block()])
    after = pack(robust=[robust_winner(score=2.0)], blocklist=[block(), block(knobs=OTHER_KNOBS)])
    found = diff_packs(before, after)
    assert [(change, w.objective) for change, w in found.robust] == [
        ("removed", "mean"),
        ("changed", "worst"),
    ]
    assert [(change, b.knobs) for change, b in found.blocklist] == [("added", OTHER_KNOBS)]
    assert not found.equal


def test_a_merged_pack_has_the_best_of_each_and_says_why() -> None:
    one = pack(
        winner(created=OLD, median_us=40.0),
        winner(target=H100),
        candidates={winner().key: (candidate(),)},
        robust=[robust_winner(created=OLD)],
        blocklist=[block(reason="first")],
    )
    two = pack(
        winner(created=NEW, median_us=50.0),
        winner(workload=at(batch=1)),
        robust=[robust_winner(created=NEW, knobs=OTHER_KNOBS)],
        blocklist=[block(reason="second"), block(knobs=OTHER_KNOBS)],
    )
    merged = merge_packs([(Path("one.json"), one), (Path("two.json"), two)])
    assert {(w.target, w.workload, w.created) for w in merged.pack.winners} == {
        (w.target, w.workload, w.created) for w in (*two.winners, one.winners[1])
    }
    assert merged.pack.candidates == {}  # those of the winner that lost stay with it
    assert merged.pack.robust == two.robust
    assert [b.reason for b in merged.pack.blocklist] == ["first", "killed after 30 s"]
    (conflict,) = merged.conflicts
    assert (conflict.source, conflict.fate) == ("two.json", "replaced")
    assert conflict.reason == f"of {NEW}, the one here of {OLD}"
    assert conflict.to_dict()["workload"] == winner().workload.to_dict()
    back = merge_packs([(Path("two.json"), two), (Path("one.json"), one)])
    assert [c.fate for c in back.conflicts] == ["kept"]
    assert {w.created for w in back.pack.winners} == {w.created for w in merged.pack.winners}


def test_the_same_entry_twice_is_no_conflict() -> None:
    same = pack(winner(), robust=[robust_winner()], blocklist=[block()])
    merged = merge_packs([(Path("a"), same), (Path("b"), same)])
    assert merged.conflicts == []
    assert merged.pack == same


@settings(max_examples=10, deadline=None)
@given(whole_packs(), whole_packs())
def test_a_merged_pack_is_what_imports_one_after_the_other_leave(
    tmp_path_factory: pytest.TempPathFactory, one: Pack, two: Pack
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch, Store.open(folder / "patune.db") as store:
        patch.setattr(feasibility, "is_feasible", lambda knobs, problem, target: None)
        for number, each in enumerate((one, two)):
            path = folder / f"{number}.json"
            path.write_text(pack_text(document_of(each)))
            import_pack(store, path)
        stored = stored_pack(store)
    merged = merge_packs([(Path("a"), one), (Path("b"), two)]).pack
    winners = [dataclasses.replace(w, imported_from=None) for w in stored.winners]
    order = sorted(merged.winners, key=lambda w: [w.key == o.key for o in winners].index(True))
    assert winners == order
    assert stored.robust == sorted(merged.robust, key=stored.robust.index)
    assert stored.blocklist == sorted(merged.blocklist, key=stored.blocklist.index)
    for key, beside in merged.candidates.items():
        assert set(itertools.chain(beside)) & set(stored.candidates[key])
    assert KNOBS != OTHER_KNOBS
