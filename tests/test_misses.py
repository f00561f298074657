"""The document of misses: strict, and in the order of the time at stake."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from patune import misses
from patune.errors import DocumentError
from patune.misses import by_saving, pending, read_capture, wanted
from patune.problem import Problem, Workload
from patune.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

H200 = Target.named("sm_90")
H100 = Target(arch="sm_90", device_name="NVIDIA H100 80GB HBM3", compute_units=132)
PROBLEM = {"block_size": 1024, "head_dim": 128, "qg": 8}


def miss(batch: int, calls: int, **problem: Any) -> dict[str, Any]:
    workload = {"batch": batch, "kv_heads": 8, "context": 4096}
    return {"problem": {**PROBLEM, **problem}, "workload": workload, "calls": calls}


def document(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "misses": list(entries)}


def test_the_most_time_comes_first_and_each_key_once(tmp_path: Path) -> None:
    path = tmp_path / "misses.json"
    rows = [
        miss(1, 100),
        miss(128, 1),
        miss(1, 27),
        miss(16, 7),
        miss(16, 7, kv_dtype="fp8_e4m3fn"),
    ]
    path.write_text(json.dumps(document(*rows)), encoding="utf-8")
    read = misses.read_misses(path)
    seen = [(m.key.workload.batch, m.calls, m.key.problem.kv_itemsize) for m in read]
    # 128 x 1, 127 x 1, 16 x 7 in two bytes, 16 x 7 in one: none says which layer answered
    assert seen == [(128, 1, 2), (1, 127, 2), (16, 7, 2), (16, 7, 1)]
    assert [m.weight for m in read] == sorted((m.weight for m in read), reverse=True)


def told(batch: int, calls: int, source: str = "heuristic", **problem: Any) -> dict[str, Any]:
    """A miss that names the device and the layer."""
    fields = miss(batch, calls, **problem)
    return {**fields, "target": H200.to_dict(), "source": source}


def capture(*entries: dict[str, Any], name: str = "a") -> dict[str, Any]:
    return {"schema": 2, "capture": name, "misses": list(entries)}


BAD = [
    ([], "has to be an object with schema, misses"),
    ({"schema": 3, "misses": [miss(1, 1)]}, "schema=3 is not allowed; allowed: 1, 2"),
    ({"schema": 2, "misses": [miss(1, 1)]}, "field 'capture' is missing"),
    ({"schema": 2, "capture": 7, "misses": [told(1, 1)]}, "capture=7 is not allowed"),
    (capture(miss(1, 1)), "misses[0]: field 'target' is missing"),
    (
        capture(told(1, 1, source="exact")),
        "misses[0]: source='exact' is not allowed; allowed: other_device, heuristic, safe",
    ),
    (
        capture({**told(1, 1), "target": "sm_90"}),
        "misses[0]: target has to be an object, seen 'sm_90'",
    ),
    (
        capture({**told(1, 1), "target": {"arch": "sm_91"}}),
        "misses[0]: Target: field 'device_name' is missing",
    ),
    (capture(told(2**31, 1)), "misses[0]: batch=2147483648 is not allowed"),
    (capture(told(1, 2**63)), "misses[0]: calls=9223372036854775808 is not allowed"),
    ({"schema": True, "misses": [miss(1, 1)]}, "schema=True"),
    ({"schema": 1}, "field 'misses' is missing"),
    ({**document(miss(1, 1)), "host": "a"}, "unknown field 'host'"),
    (document(), "at least one miss"),
    (document({**miss(1, 1), "when": 3}), "misses[0]: unknown field 'when'"),
    (
        document(miss(1, 1), {"problem": PROBLEM, "calls": 1}),
        "misses[1]: field 'workload' is missing",
    ),
    (document(miss(1, 0)), "misses[0]: calls=0"),
    (document(miss(1, True)), "misses[0]: calls=True"),
    (document(miss(0, 1)), "misses[0]: batch=0"),
    (document(miss(1, 1, head_dims=64)), "misses[0]: Problem: unknown field 'head_dims'"),
    (document(miss(1, 1, head_dim=96)), "misses[0]: head_dim=96"),
    (document({**miss(1, 1), "problem": 3}), "misses[0]: problem has to be an object"),
    (document(3), "misses[0] has to be an object"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_bad_documents_are_refused_by_place_and_field(value: object, message: str) -> None:
    with pytest.raises(DocumentError) as error:
        misses.parse_misses(value, "m.json")
    assert message in str(error.value)
    assert str(error.value).startswith("m.json")


def test_files_that_are_no_document(tmp_path: Path) -> None:
    for name, data, message in (
        ("text", b"dear diary", "is no JSON"),
        ("bytes", b"\xff\xfe\x00{", "is no JSON"),
        ("deep", b"[" * 100_000, "is no JSON"),
        ("large", b" " * (misses.MOST_BYTES + 1), "larger than 16 MB"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DocumentError) as error:
            misses.read_misses(path)
        assert message in str(error.value)
        assert str(path) in str(error.value)
    with pytest.raises(DocumentError, match="No such file"):
        misses.read_misses(tmp_path / "none.json")
    with pytest.raises(DocumentError, match="directory"):
        misses.read_misses(tmp_path)


def test_a_document_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    text = json.dumps(document(miss(1, 1)))
    path.write_text(text + " " * (misses.MOST_BYTES - len(text)), encoding="utf-8")
    assert len(misses.read_misses(path)) == 1


def test_what_saves_most_is_tuned_first() -> None:
    """Calls x bytes x gain of the layer: 16 calls that the safe knobs answered weigh as much as 750 of four times the bytes by the heuristic."""
    rows = [
        told(128, 1), told(1, 1000), told(4, 700), told(1, 16, "safe", qg=4), told(1, 100, "other_device", head_dim=64),
        told(4, 50), told(128, 1, "other_device"),
    ]  # fmt: skip
    read = misses.parse_misses(capture(*rows), "m.json")
    assert len(read) == 6, "equal keys of one layer are one miss"
    order = [(key.workload.batch, key.problem.qg, key.problem.head_dim) for key in by_saving(read)]
    savings = {
        (128, 8, 128): 128 * (0.039 + 0.146),
        (1, 8, 128): 1000 * 0.039,
        (4, 8, 128): 4 * 750 * 0.039,
        (1, 4, 128): 16 * 7.283,
        (1, 8, 64): 100 * 0.146 / 2,
    }
    assert order == sorted(savings, key=lambda key: -savings[key])
    assert order[:2] == [(4, 8, 128), (1, 4, 128)]


class FakeStore:
    """The part of a store that takes captures."""

    def __init__(self) -> None:
        self.captures: dict[str, list[tuple[Any, ...]]] = {}
        self.tuned: list[Any] = []

    def add_capture(self, capture: str, rows: Iterable[tuple[Any, ...]]) -> int:
        self.captures.setdefault(capture, list(rows))
        return 1

    def misses(self) -> list[tuple[Any, ...]]:
        return [row for rows in self.captures.values() for row in rows]

    def winners(self, *, arch: str | None = None) -> list[Any]:
        return self.tuned


def write(folder: Path, name: str, *entries: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(capture(*entries, name=name)), encoding="utf-8")
    return path


def batches(found: misses.Wanted) -> list[int]:
    return [key.workload.batch for key in found.keys]


@pytest.mark.parametrize("take", [True, False], ids=["taken", "dry_run"])
def test_captures_become_keys_of_the_target(tmp_path: Path, take: bool) -> None:
    folder = tmp_path / "misses"
    fnuz = {"kv_dtype": "fp8_e4m3fnuz", "query_dtype": "fp8_e4m3fnuz"}
    write(folder, "b", told(4, 10), told(1, 1000), told(2, 10, **fnuz))
    write(folder, "a", told(4, 500), {**told(64, 10), "target": H100.to_dict()}, told(8, 9000))
    broken = folder / "c.json"
    broken.write_text('{"schema": 2', encoding="utf-8")
    old = folder / "d.json"
    old.write_text(json.dumps(document(miss(1, 1))), encoding="utf-8")
    (folder / "e.tmp").write_text("half", encoding="utf-8")
    store: Any = FakeStore()
    store.tuned = [
        SimpleNamespace(key=(H200, Problem(**PROBLEM), Workload(batch=8, kv_heads=8, context=4096)))
    ]
    for _ in range(2):  # the second time there is nothing to take, or it is all still there
        found = wanted(store, folder, H200, take=take)
        assert batches(found) == [4, 1]
        assert (found.elsewhere, found.unsupported) == (1, 1)
        assert [path for path, _ in found.refused] == [broken, old]
        assert "c.json is no JSON" in found.note
        assert "schema=1 names no capture; give such a file to --from" in found.note
        assert "Keys that other devices asked for: 1. Sweep there." in found.note
        assert "Keys that no kernel of the target computes: 1. They are left out." in found.note
    assert sorted(store.captures) == (["a", "b"] if take else [])
    left = ["c.json", "d.json"] if take else ["a.json", "b.json", "c.json", "d.json"]
    assert [path.name for path in pending(folder)] == left


def test_a_capture_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    store: Any = FakeStore()
    for _ in range(2):
        write(tmp_path, "a", told(4, 10))
        assert batches(wanted(store, tmp_path, H200, take=True)) == [4]
    assert len(store.captures["a"]) == 1


def test_nothing_to_tune(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "none", tmp_path):
        found = wanted(None, folder, H200, take=False)
        assert (found.keys, found.files, found.note) == ((), 0, "")


def test_a_capture_names_its_target(tmp_path: Path) -> None:
    path = write(tmp_path, "a", told(4, 10, "safe"))
    read = read_capture(path)
    assert read.name == "a"
    (only,) = read.misses
    assert (only.target, only.source, only.calls) == (H200, "safe", 10)
