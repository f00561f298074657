"""A small run of the pack fuzzer, and what it finds when the code has a bug."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fuzz_packs
import pytest
from fuzz_packs_mutations import BYTES, STRUCTURE, base_texts, mutant

from patune import problem, record
from patune.configs import merging, pack_parser
from patune.configs.packs import document_of, pack_text, parse_pack
from patune.errors import DocumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from patune.configs.winner import Winner

SCRIPT = Path(fuzz_packs.__file__)


def test_300_damaged_packs_keep_every_promise() -> None:
    document = fuzz_packs.run(300, seed=3, processes=1)
    assert document["findings"] == []
    assert set(document["outcomes"]) == {"accepted", "refused"}
    assert sum(document["outcomes"].values()) == document["mutants"] == 300
    assert document["outcomes"]["accepted"] >= 20


def test_the_packs_to_damage_are_good_ones() -> None:
    schemas = []
    for text in base_texts():
        pack = parse_pack("base", text.encode())
        schemas.append(pack.schema)
        if pack.schema == 4:
            assert pack_text(document_of(pack)) == text
    assert sorted(set(schemas)) == [1, 2, 3, 4]
    assert parse_pack("base", base_texts()[0].encode()).blocklist


def test_a_mutant_is_the_same_every_time_and_all_kinds_come() -> None:
    bases = base_texts()
    once = [mutant(bases, random.Random(f"0:{n}")) for n in range(200)]
    assert once == [mutant(bases, random.Random(f"0:{n}")) for n in range(200)]
    assert len({data for _, data in once}) > 150
    assert {name for name, _ in once} == {change.__name__ for change in (*BYTES, *STRUCTURE)}


def accept_bool_as_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or value < low or (high is not None and value > high):
        raise record.reject(name, value, "an integer")


def allow_anything(*_: Any) -> None:
    pass


def crash_on_a_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if "evil" in fields:
        raise KeyError("evil")
    return fields


def forget_the_blocklist(self: merging.Merger, incoming: Any) -> tuple[str, str]:
    return "added", "said, and not done"


def keep_no_candidates(self: merging.Merger, incoming: Winner, _: Any) -> tuple[str, str]:
    return TAKE_WINNER(self, incoming, ())


TAKE_WINNER = merging.Merger.winner


def write_before_the_check(store: Any, source: Path, **_: Any) -> Any:
    """An import that writes the winners before it looks at the rest."""
    document = json.loads(source.read_bytes())
    try:
        only = {"schema": 4, "winners": document["winners"], "robust": [], "blocklist": []}
        winners = parse_pack(source, json.dumps(only).encode()).winners
    except (DocumentError, TypeError, KeyError, AttributeError):
        raise DocumentError("refused") from None
    store.merge(winners, imported_from=source.name)
    return IMPORT(store, source)


IMPORT = fuzz_packs.import_pack
PLANTED: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "a bool is an int": (problem, "check_int", accept_bool_as_int, "the JSON Schema refuses the pack"),
    "texts are not looked at": (pack_parser, "_check_text", allow_anything, "the JSON Schema refuses"),
    "a crash of the parser": (pack_parser, "_unique", crash_on_a_name, "KeyError"),
    "the blocklist is forgotten": (merging.Merger, "block", forget_the_blocklist, "blocklist is not in"),
    "candidates are forgotten": (merging.Merger, "winner", keep_no_candidates, "candidates are not in"),
    "winners before the check": (fuzz_packs, "import_pack", write_before_the_check, "was written to"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, attribute, bug, what = PLANTED[name]
    monkeypatch.setattr(holder, attribute, bug)
    document = fuzz_packs.run(400, seed=1, processes=1)
    assert document["findings_in_all"] > 0
    assert any(what in finding["what"] for finding in document["findings"]), document["findings"]


def test_the_script_prints_one_document(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    command = [sys.executable, str(SCRIPT), "--mutants", "40", "--seed", "5", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert (document["mutants"], document["processes"]) == (40, 2)
    one = subprocess.run([*command[:2], "--only", "3"], capture_output=True, text=True, check=True)
    assert one.stdout.splitlines()[-1].startswith("('")
