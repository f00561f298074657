"""Packs that are not what they should be are refused with the place, and change nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import (
    CDNA_KNOBS,
    H100,
    KNOBS,
    OTHER_KNOBS,
    block,
    candidate,
    counted,
    dump,
    robust_winner,
    winner,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs import pack_files, pack_parser
from patune.configs.packs import (
    document_of,
    export_pack,
    import_pack,
    load_pack,
    pack_document,
    pack_text,
    read_pack,
)
from patune.configs.winner import Speedup
from patune.errors import DocumentError, InvalidValueError
from patune.kernels import feasibility
from patune.kernels.knobs import knobs_to_dict

if TYPE_CHECKING:
    from patune.configs.store import Store
    from patune.configs.winner import Winner

NAMES = (f"{i}.json" for i in range(10**9))


@pytest.fixture(autouse=True)
def everything_is_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "is_feasible", lambda knobs, problem, target: None)


def write_pack(folder: Path, *entries: Winner) -> Path:
    path = folder / next(NAMES)
    path.write_text(pack_text(pack_document(list(entries))))
    return path


BEST = Speedup(ratio=1.2, low=1.1, high=1.3)
BESIDE = (candidate(), candidate(52.0, knobs=dataclasses.replace(KNOBS, num_splits=8)))
GOOD = pack_document(
    [winner(target=H100), winner(speedup=BEST)],
    {winner().key: BESIDE},
    [robust_winner()],
    [block(), block(knobs=OTHER_KNOBS)],
)
LAST = ("winners", 1)
HOSTILE: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "another schema": (("schema",), 5, "schema=5 is not allowed; allowed: 1 to 4. Run `pip install --upgrade patune`"),
    "a schema that is true": (("schema",), True, "schema=True is not allowed"),
    "a schema in words": (("schema",), "1", "schema='1' is not allowed"),
    "an unknown top field": (("evil",), 1, "unknown field 'evil'; known fields: schema, winners"),
    "winners that are no list": (("winners",), {}, "winners={} is not allowed"),
    "a winner that is no object": (LAST, 5, "winners[1] is not a JSON object"),
    "an unknown field": ((*LAST, "evil"), 1, "winners[1]: Winner: unknown field 'evil'"),
    "an importer": ((*LAST, "imported_from"), "x", "winners[1]: unknown field 'imported_from'"),
    "an unknown problem field": ((*LAST, "problem", "evil"), 1, "Problem: unknown field 'evil'"),
    "an unknown knob": ((*LAST, "knobs", "evil"), 1, "HopperKnobs: unknown field 'evil'"),
    "knobs of another family": ((*LAST, "knobs", "family"), "cdna_mfma", "CdnaKnobs: unknown field"),
    "knobs of no family": ((*LAST, "knobs", "family"), [], "family=[]"),
    "no knobs": ((*LAST, "knobs"), None, "knobs=None"),
    "a page size in words": ((*LAST, "problem", "block_size"), "1024", "block_size='1024'"),
    "a page size that does not exist": ((*LAST, "problem", "block_size"), 1000, "block_size=1000"),
    "a bool for an integer": ((*LAST, "problem", "qg"), True, "qg=True"),
    "an integer for a bool": ((*LAST, "problem", "sinks"), 1, "sinks=1"),
    "a zero for a bool": ((*LAST, "problem", "sinks"), 0, "sinks=0"),
    "a float for an integer": ((*LAST, "workload", "batch"), 128.0, "batch=128.0"),
    "a negative time": ((*LAST, "timing", "median_us"), -1, "median_us=-1"),
    "a bool for a time": ((*LAST, "timing", "median_us"), True, "median_us=True"),
    "not a number": ((*LAST, "timing", "median_us"), float("nan"), "NaN is not JSON"),
    "infinity": ((*LAST, "timing", "median_us"), float("inf"), "Infinity is not JSON"),
    "an integer too large for SQLite": ((*LAST, "workload", "context"), 2**63, "integer 9223372036854775808"),
    "an integer too large for a float": ((*LAST, "timing", "median_us"), 10**400, "allowed: up to 2**63 - 1"),
    "an unknown target": ((*LAST, "target", "arch"), "sm_80", "arch='sm_80'"),
    "a device that garbles the terminal": ((*LAST, "target", "device_name"), "\x1b[2J", "printable"),
    "half a character": ((*LAST, "target", "device_name"), "\ud800", "printable"),
    "a novel": ((*LAST, "environment", "driver"), "x" * 301, "up to 300"),
    "evidence out of nothing": ((*LAST, "evidence"), "default", "evidence='default'"),
    "evidence that is not there": (("winners", 0, "timing"), None, "does not agree"),
    "no gate": ((*LAST, "gate_cases"), 0, "gate_cases=0"),
    "a date in the future": ((*LAST, "created"), "9999-01-01T00:00:00Z", "is in the future"),
    "a negative interval": ((*LAST, "timing", "low_us"), -1.0, "low_us=-1.0"),
    "a protocol without a name": ((*LAST, "timing", "protocol"), "", "protocol=''"),
    "a speedup outside of its interval": ((*LAST, "speedup", "low"), 1.25, "outside of its interval"),
    "a speedup over nothing": ((*LAST, "default_knobs"), None, "is set and default_knobs is not"),
    "a speedup in words": ((*LAST, "speedup"), "1.2", "speedup is '1.2'"),
    "an unknown field of a speedup": ((*LAST, "speedup", "evil"), 1, "Speedup: unknown field 'evil'"),
    "candidates that are no list": ((*LAST, "candidates"), {}, "candidates={} is not allowed"),
    "candidates that are null": ((*LAST, "candidates"), None, "candidates=None is not allowed"),
    "a candidate that is no object": ((*LAST, "candidates", 0), 5, "allowed: a list of objects"),
    "an unknown field of a candidate": ((*LAST, "candidates", 1, "evil"), 1, "Candidate: unknown field 'evil'"),
    "a candidate that skipped the gate": ((*LAST, "candidates", 1, "gate_cases"), 0, "gate_cases=0"),
    "a candidate without a score": ((*LAST, "candidates", 1, "timing"), None, "are both null"),
    "a candidate without knobs": ((*LAST, "candidates", 1, "knobs"), None, "knobs=None"),
    "a candidate of another family": (
        (*LAST, "candidates", 1, "knobs"), knobs_to_dict(CDNA_KNOBS), "candidates[1].knobs: family='cdna_mfma' does not run"),
    "a candidate that is the winner": (
        (*LAST, "candidates", 1, "knobs"), knobs_to_dict(KNOBS), "candidates[1]: its knobs are the winner's"),
    "a candidate that is there twice": (
        (*LAST, "candidates", 1, "knobs"), knobs_to_dict(BESIDE[0].knobs), "candidates[1]: its knobs are the winner's"),
    "a candidate with another kind of evidence": (
        (*LAST, "candidates", 1), {**BESIDE[1].to_dict(), "timing": None, "counted": counted().to_dict()},
        "candidates[1]: evidence='measured' does not agree"),
    "a candidate of another protocol": (
        (*LAST, "candidates", 1, "timing", "protocol"), "graph-cold-2", "candidates[1]: protocol='graph-cold-2' is not the winner's"),
    "too many candidates": (
        (*LAST, "candidates"), [candidate(knobs=dataclasses.replace(KNOBS, num_splits=n)).to_dict() for n in range(5, 11)],
        "candidates: 6 are too many; allowed: up to 5"),
    "no date": ((*LAST, "created"), None, "created=None"),
    "an infinite number": (("robust", 0, "score"), float("inf"), "Infinity is not JSON"),
    "no robust winners": (("robust",), None, "robust=None is not allowed; allowed: a list"),
    "a robust winner that is no object": (("robust", 0), [], "robust[0] is not a JSON object"),
    "an unknown field of a robust winner": (("robust", 0, "evil"), 1, "robust[0]: RobustWinner: unknown field 'evil'"),
    "an unknown objective": (("robust", 0, "objective"), "best", "robust[0]: objective='best'"),
    "regrets of other workloads": (("robust", 0, "regrets"), [1.0], "regrets: 1 for 2 workloads"),
    "regrets that are no list": (("robust", 0, "regrets"), {"0": 1}, "regrets is {'0': 1}"),
    "a regret that is true": (("robust", 0, "regrets", 0), True, "regrets=True"),
    "a workload that is no object": (("robust", 0, "workloads", 0), 1, "workload is 1"),
    "robust knobs of another family": (("robust", 0, "knobs"), knobs_to_dict(CDNA_KNOBS), "family='cdna_mfma'"),
    "a robust winner of the future": (("robust", 0, "created"), "9999-01-01T00:00:00Z", "robust[0]: created='9999"),
    "the same robust winner twice": (("robust",), [robust_winner().to_dict()] * 2, "robust[1] has the key of robust[0]"),
    "a blocklist that is no list": (("blocklist",), "all", "blocklist='all' is not allowed"),
    "a block that is no object": (("blocklist", 1), None, "blocklist[1] is not a JSON object"),
    "an unknown field of a block": (("blocklist", 1, "evil"), 1, "blocklist[1]: Block: unknown field 'evil'"),
    "a block without a reason": (("blocklist", 1, "reason"), None, "blocklist[1]: reason=None"),
    "a reason that garbles the terminal": (("blocklist", 1, "reason"), "\x1b[2J", "blocklist[1]: text '\\x1b[2J'"),
    "a reason in two lines": (("blocklist", 1, "reason"), "a\nb", "printable"),
    "a reason from the right": (("blocklist", 1, "reason"), "\u202ea", "printable"),
    "a block that passed": (("blocklist", 1, "status"), "ok", "status='ok'"),
    "a block of no kernel": (("blocklist", 1, "kernel_source_hash"), "", "kernel_source_hash=''"),
    "a block of an unknown target": (("blocklist", 1, "arch"), "sm_80", "arch='sm_80'"),
    "a block of another family": (("blocklist", 1, "arch"), "gfx942", "does not run on gfx942"),
    "the same block twice": (("blocklist", 1, "knobs"), knobs_to_dict(KNOBS), "blocklist[1] has the key of blocklist[0]"),
    "a name that looks like another": ((*LAST, "problem", "q\u0261"), 1, "Problem: unknown field 'q\u0261'"),
    "a name with nothing in it": ((*LAST, "problem", "qg\u200b"), 1, "text 'qg\\u200b' is not allowed"),
    "a huge name": (("x" * 400,), 1, "up to 300"),
    "a nest of lists": ((*LAST, "candidates", 1, "timing", "p20_us"), [[1]], "nested deeper than 6"),
    "a nest at the top": (("schema",), [[[[[[[1]]]]]]], "nested deeper than 6"),
    "the same key twice": ((*LAST, "target"), H100.to_dict(), "winners[1] has the key of winners[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_packs_change_nothing(store: Store, tmp_path: Path, name: str) -> None:
    at, value, message = HOSTILE[name]
    document: Any = copy.deepcopy(GOOD)
    place = document
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = value
    path = tmp_path / "pack.json"
    path.write_text(json.dumps(document))
    before = dump(store.place)
    with pytest.raises(DocumentError) as error:
        import_pack(store, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert dump(store.place) == before


RAW = {
    "nothing": (b"", "is not a pack: Expecting value"),
    "not text": (b"\xff\xfe\x00", "is not a pack: 'utf-8' codec"),
    "not JSON": (b"schema: 1\n", "is not a pack: Expecting value"),
    "a list": (b"[]", "its top level is not a JSON object"),
    "a number that overflows": (
        b'{"schema": 4, "winners": [], "robust": [{"score": 1e400}], "blocklist": []}',
        ": robust[0]: a number is infinite",
    ),
    "a byte order mark": (b'\xef\xbb\xbf{"schema": 4}', "is not a pack: "),
    "a field twice": (
        b'{"schema": 1, "schema": 1, "winners": []}',
        "field 'schema' is there twice",
    ),
    "too deep": (b"[" * 100_000, "is not a pack"),
    "nearly too deep to read": (
        b'{"schema": ' + b"[" * 400 + b"]" * 400 + b"}",
        "nested deeper than 6",
    ),
    "too many values": (
        b"[" + b"[]," * 2_000_000 + b"[]]",
        "values; allowed: up to 2000000 in a pack",
    ),
    "a very long number": (b'{"schema": ' + b"1" * 5000 + b"}", "is not a pack"),
    "no winners": (b'{"schema": 1}', "winners=None is not allowed"),
    "no schema": (b'{"winners": []}', "schema=None is not allowed"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_pack_is_refused(tmp_path: Path, name: str) -> None:
    content, message = RAW[name]
    path = tmp_path / "pack.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError) as error:
        read_pack(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_pack_has_so_many_entries_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pack(tmp_path, winner(), winner(target=H100))
    monkeypatch.setattr(pack_parser, "MAX_ENTRIES", 2)
    assert len(read_pack(path)) == 2
    monkeypatch.setattr(pack_parser, "MAX_ENTRIES", 1)
    with pytest.raises(DocumentError, match="winners has 2 entries; allowed: up to 1"):
        read_pack(path)


def test_a_million_names_are_not_compared_with_each_other(tmp_path: Path) -> None:
    """Looking for the second one took the square of their number: hours."""
    names = ",".join(f'"{n}":0' for n in range(500_000))
    path = tmp_path / "pack.json"
    path.write_text("{" + names + ',"499999":0}')
    with pytest.raises(DocumentError, match="field '499999' is there twice"):
        read_pack(path)


def test_a_message_does_not_repeat_a_novel(tmp_path: Path) -> None:
    document: Any = copy.deepcopy(GOOD)
    document["winners"][1]["candidates"] = {str(n): n for n in range(100_000)}
    path = tmp_path / "pack.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DocumentError, match=r"candidates=.* allowed: a list of objects") as error:
        read_pack(path)
    assert len(str(error.value)) < 1200


def test_what_would_not_end_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    link = tmp_path / "link.json"
    link.symlink_to("/dev/zero")
    circle = tmp_path / "circle.json"
    circle.symlink_to(circle)
    for path in (pipe, link, Path("/dev/zero"), Path("/dev/tty")):
        with pytest.raises(DocumentError, match="there is no such pack file"):
            read_pack(path)
    for path in (circle, Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(DocumentError, match="cannot be read"):
            read_pack(path)


def test_a_pack_that_became_a_pipe_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pipe = write_pack(tmp_path, winner()), tmp_path / "pipe"
    os.mkfifo(pipe)
    opened = os.open

    def race(name: Any, *args: Any) -> int:
        return opened(pipe if name == path else name, *args)

    monkeypatch.setattr(pack_files.os, "open", race)
    with pytest.raises(DocumentError, match="is no plain file any more"):
        read_pack(path)


def test_a_link_to_a_pack_is_read(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(write_pack(tmp_path, winner()))
    assert read_pack(link) == [winner()]


def test_nothing_is_written_through_a_link(store: Store, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link, broken, pipe = tmp_path / "link.json", tmp_path / "broken.json", tmp_path / "pipe.json"
    link.symlink_to(victim)
    broken.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    for path, kind in ((link, "a symbolic link"), (broken, "a symbolic link"), (pipe, "a pipe")):
        with pytest.raises(InvalidValueError, match=f"cannot be written to {path}: it is .*{kind}"):
            export_pack(store, path)
    with pytest.raises(InvalidValueError, match="/dev/null: it is a device"):
        export_pack(store, Path("/dev/null"))
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert link.is_symlink()


def test_a_prepared_link_at_the_name_of_the_part_is_not_followed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(pack_files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".pack.json.guessed.part").symlink_to(victim)
    with pytest.raises(InvalidValueError, match="cannot be written"):
        export_pack(store, tmp_path / "pack.json")
    assert victim.read_text() == "mine"


def test_truncated_packs_are_refused(tmp_path: Path) -> None:
    text = pack_text(GOOD).rstrip()
    path = tmp_path / "pack.json"
    for length in range(0, len(text), 37):
        path.write_text(text[:length])
        with pytest.raises(DocumentError, match="is not a pack"):
            read_pack(path)
    path.write_text(text)
    assert load_pack(path).blocklist == [block(), block(knobs=OTHER_KNOBS)]
    assert read_pack(path) == [winner(target=H100), winner(speedup=BEST)]


def test_huge_packs_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pack(tmp_path, winner())
    size = path.stat().st_size
    monkeypatch.setattr(pack_files, "MAX_PACK_B", size)
    assert read_pack(path) == [winner()]
    monkeypatch.setattr(pack_files, "MAX_PACK_B", size - 1)
    with pytest.raises(
        DocumentError, match=f"larger than a pack can be; allowed: {size - 1} bytes"
    ):
        read_pack(path)


def test_missing_packs_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "none" / "deeper.json"):
        with pytest.raises(DocumentError, match=f"{path}: there is no such pack file"):
            read_pack(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: list[Any] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [at] * bool(at) + [p for name, child in children for p in places(child, (*at, name))]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(places(GOOD)), json_values)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path: Path, at: tuple[Any, ...], value: Any
) -> None:
    document: Any = copy.deepcopy(GOOD)
    place = document
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = value
    path = tmp_path / "fuzzed.json"
    path.write_text(json.dumps(document))
    try:
        found = load_pack(path)
    except DocumentError:
        return
    path.write_text(pack_text(document_of(found)))
    again = load_pack(path)
    assert document_of(again) == document_of(found)
