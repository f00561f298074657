"""Robust winners and the blocklist in packs: they go out and come in with the winners, in one transaction."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CDNA_KNOBS,
    ENVIRONMENT,
    H100,
    H200,
    KNOBS,
    OTHER_KNOBS,
    PROBLEM,
    add_trial,
    at,
    block,
    dump,
    measured,
    robust_winner,
    timing,
    winner,
)
from config_strategies import whole_packs
from hypothesis import HealthCheck, given, settings

from patune.configs import models, rows
from patune.configs.block import FAULTS, Block
from patune.configs.pack import Pack, plain_line
from patune.configs.packs import (
    document_of,
    export_pack,
    import_pack,
    load_pack,
    pack_document,
    pack_text,
)
from patune.configs.store import Store
from patune.errors import DocumentError, InvalidValueError
from patune.kernels import feasibility
from patune.problem import Problem
from patune.trial import TrialResult

if TYPE_CHECKING:
    from pathlib import Path

NAMES = (f"{i}.json" for i in range(10**9))
SMALL = Problem(block_size=16, head_dim=64, qg=8)
OLD, NEW = "2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z"


@pytest.fixture(autouse=True)
def everything_is_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "is_feasible", lambda knobs, problem, target: None)


def written(folder: Path, pack: Pack) -> Path:
    path = folder / next(NAMES)
    path.write_text(pack_text(document_of(pack)))
    return path


def only(**lists: Any) -> Pack:
    return Pack(**({"winners": []} | lists))


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(whole_packs())
def test_a_whole_pack_comes_in_and_goes_out_the_same(
    tmp_path: Path, empty_database: Path, pack: Pack
) -> None:
    path, database = written(tmp_path, pack), tmp_path / f"{next(NAMES)}.db"
    assert load_pack(path) == pack
    shutil.copy(empty_database, database)
    with Store.open(database) as store:
        import_pack(store, path)
        out = tmp_path / next(NAMES)
        export_pack(store, out)
        assert out.read_bytes() == path.read_bytes()
        before = dump(database)
        again = import_pack(store, path)
        fates = {e.fate for e in (*again.entries, *again.robust, *again.blocklist)}
        assert fates <= {"kept"}
        assert dump(database) == before


def test_the_same_content_gives_the_same_bytes() -> None:
    lists: dict[str, list[Any]] = {
        "winners": [winner(workload=at(batch=n)) for n in (1, 2, 4)],
        "robust": [robust_winner(objective=o, target=t) for o in ("mean", "worst") for t in (H100, H200)],
        "blocklist": [block(knobs=k, problem=p) for k in (KNOBS, OTHER_KNOBS) for p in (PROBLEM, SMALL)],
    }  # fmt: skip
    texts = set()
    for seed in range(5):
        for entries in lists.values():
            random.Random(seed).shuffle(entries)
        texts.add(pack_text(document_of(Pack(**lists))))
    assert len(texts) == 1
    whole = winner(timing=timing(50.0), default_score=60.0)
    short = winner(timing=dataclasses.replace(timing(50.0), median_us=50), default_score=60)
    assert pack_text(pack_document([whole])) == pack_text(pack_document([short]))
    zero = dataclasses.replace(timing(50.0), read_fraction=-0.0)
    assert "-0.0" not in pack_text(pack_document([winner(timing=zero)]))


def test_an_export_takes_what_belongs_to_its_problems(store: Store) -> None:
    robust = [robust_winner(), robust_winner(problem=SMALL)]
    blocks = [block(), block(problem=SMALL), block(arch="gfx942", knobs=CDNA_KNOBS)]
    store.merge([winner()], robust=robust, blocks=blocks, imported_from="x")

    def counts(**wanted: Any) -> tuple[int, int, int]:
        document = export_pack(store, None, **wanted)
        return tuple(len(document[name]) for name in ("winners", "robust", "blocklist"))

    assert counts() == (1, 2, 3)
    assert counts(arch="sm_90") == (1, 2, 2)
    assert counts(arch="gfx942") == (0, 0, 1)
    assert counts(block_size=16) == counts(head_dim=64) == (0, 1, 1)
    assert counts(block_size=1024) == (1, 1, 2)
    assert counts(qg=1) == (0, 0, 0)


def test_of_robust_winners_the_newer_stays(store: Store, tmp_path: Path) -> None:
    old = robust_winner(created=OLD, score=1.0)
    new = robust_winner(created=NEW, score=2.0, knobs=OTHER_KNOBS)
    paths = [written(tmp_path, only(robust=[one])) for one in (old, new, old)]
    told = [import_pack(store, path).robust[0] for path in paths]
    assert [(one.fate, one.reason) for one in told] == [
        ("added", "no robust winner for this problem yet"),
        ("replaced", f"of {NEW}, the one here of {OLD}"),
        ("kept", f"of {OLD}, the one here of {NEW}"),
    ]
    assert store.robust() == [new]
    same_age = written(tmp_path, only(robust=[dataclasses.replace(new, score=1.0)]))
    assert import_pack(store, same_age).robust[0].reason == "the one here is as new"
    assert store.robust() == [new]


def test_robust_winners_that_these_kernels_cannot_run_stay_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        feasibility, "is_feasible", lambda k, p, t: "no H100 today" if t == H100 else None
    )
    path = written(tmp_path, only(robust=[robust_winner(target=H100), robust_winner()]))
    report = import_pack(store, path)
    assert [(e.fate, e.reason) for e in report.robust] == [
        ("skipped", "no H100 today"),
        ("added", "no robust winner for this problem yet"),
    ]
    assert store.robust() == [robust_winner()]


def test_an_imported_block_keeps_the_knobs_from_being_tried(store: Store, tmp_path: Path) -> None:
    mine = block(knobs=OTHER_KNOBS, status="crash", reason="signal 6", created=NEW)
    path = written(tmp_path, only(blocklist=[block(), mine]))
    dry = import_pack(store, path, dry_run=True)
    assert store.blocks() == []
    report = import_pack(store, path)
    assert report.blocklist == dry.blocklist
    assert sorted(e.reason for e in report.blocklist) == [
        "crash, confirmed on another machine",
        "hang, confirmed on another machine",
    ]
    assert store.blocks() == [block(), mine]
    assert store.blocks(arch="gfx942") == []
    found = store.blocked(
        arch="sm_90", kernel_source_hash=ENVIRONMENT.kernel_source_hash, problem=PROBLEM
    )
    assert found == {
        KNOBS: TrialResult(status="hang", reason="killed after 30 s"),
        OTHER_KNOBS: TrialResult(status="crash", reason="signal 6"),
    }
    again = import_pack(store, path)
    assert {(e.fate, e.reason) for e in again.blocklist} == {
        ("kept", "on the blocklist here already")
    }


def test_a_block_of_what_is_served_says_so(store: Store, tmp_path: Path) -> None:
    store.promote(add_trial(store, measured()), default_trial_id=None)
    path = written(tmp_path, only(blocklist=[block(), block(kernel_source_hash="6" * 64)]))
    reasons = {e.block.kernel_source_hash[0]: e.reason for e in import_pack(store, path).blocklist}
    assert reasons["5"].endswith("; served here for 1 key, which other knobs answer from now on")


def test_messages_of_drivers_are_made_plain_on_their_way_out(store: Store, tmp_path: Path) -> None:
    fault = TrialResult(status="hang", reason="CUDA error:\n\x1b[31mno\tdevice " + "x" * 400)
    store.block(add_trial(store, fault))
    path = tmp_path / "pack.json"
    export_pack(store, path)
    (found,) = load_pack(path).blocklist
    assert found.reason.startswith("CUDA error: [31mno device xxx")
    assert found.reason.endswith("...")
    assert len(found.reason) == 300
    assert plain_line("") == ""


def test_a_database_error_in_the_middle_undoes_all_of_it(
    store: Store, tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(
        tmp_path,
        Pack(winners=[winner()], robust=[robust_winner()], blocklist=[block(), block(problem=SMALL)]),
    )  # fmt: skip
    before = dump(database)

    add, calls = rows.add_trial, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # one per entry of the blocklist, then the winner's
            raise KeyboardInterrupt
        return add(*args, **kwargs)

    monkeypatch.setattr(rows, "add_trial", failing)
    with pytest.raises(KeyboardInterrupt):
        import_pack(store, path)
    assert len(calls) == 3
    assert dump(database) == before


def test_the_report_tells_of_every_entry(store: Store, tmp_path: Path) -> None:
    path = written(
        tmp_path, Pack(winners=[winner()], robust=[robust_winner()], blocklist=[block()])
    )
    document = json.loads(json.dumps(import_pack(store, path).to_dict()))
    assert (document["schema"], document["added"], document["public_key"]) == (2, 1, None)
    (robust,), (blocked,) = document["robust"], document["blocklist"]
    assert (robust["fate"], robust["objective"]) == ("added", "worst")
    assert robust["problem"] == PROBLEM.to_dict()
    assert (blocked["fate"], blocked["arch"], blocked["status"]) == ("added", "sm_90", "hang")
    assert blocked["knobs"]["num_splits"] == KNOBS.num_splits


def test_dates_in_the_future_are_refused_everywhere(
    store: Store, tmp_path: Path, database: Path
) -> None:
    later = "9999-01-01T00:00:00Z"
    before = dump(database)
    for name, entry in (
        ("robust", robust_winner(created=later)),
        ("blocklist", block(created=later)),
        ("winners", winner(created=later)),
    ):
        with pytest.raises(
            DocumentError, match=rf"{name}\[0\]: created='{later}' is in the future"
        ):
            import_pack(store, written(tmp_path, only(**{name: [entry]})))
    assert dump(database) == before


def test_what_nobody_could_read_is_not_written(store: Store, tmp_path: Path) -> None:
    odd = dataclasses.replace(ENVIRONMENT, driver="580\x07")
    store.merge([winner(environment=odd)], imported_from="x")
    with pytest.raises(DocumentError, match=r"would be refused wherever it is read: winners\[0\]"):
        export_pack(store, tmp_path / "pack.json")
    assert not (tmp_path / "pack.json").exists()


def test_an_entry_of_the_blocklist_says_what_it_is() -> None:
    assert Block.from_dict(json.loads(json.dumps(block().to_dict()))) == block()
    assert FAULTS == models.FAULTS
    for changes, message in (
        ({"arch": "sm_80"}, "arch='sm_80'"),
        ({"kernel_source_hash": ""}, "kernel_source_hash=''"),
        ({"status": "wrong"}, "status='wrong'"),
        ({"reason": None}, "reason=None"),
        ({"created": "today"}, "created='today'"),
        ({"knobs": CDNA_KNOBS}, "family='cdna_mfma' does not run on sm_90"),
        ({"problem": None}, "problem=None"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            block(**changes)
