"""The commands about packs, as a user runs them: what they print, what they write, how they exit."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

import patune
from patune.configs.block import Block
from patune.configs.packs import document_of, load_pack, pack_text
from patune.configs.store import Store
from patune.configs.winner import RobustWinner

if TYPE_CHECKING:
    from cli_fakes import Run

    from patune.configs.pack import Pack

SCHEMA = Path(patune.__file__).parent / "configs" / "pack.schema.json"


@pytest.fixture
def pack(run: Run, swept: Path, tmp_path: Path) -> Path:
    """Four winners of gfx942."""
    path = tmp_path / "pack.json"
    assert run("export", str(path)).exit_code == 0
    return path


def changed(source: Path, name: str, **changes: Any) -> Path:
    """A copy of a pack whose first winner has other values."""
    document = json.loads(source.read_text(encoding="utf-8"))
    document["winners"][0] |= changes
    path = source.with_name(name)
    path.write_text(pack_text(document), encoding="utf-8")
    return path


def extended(source: Path) -> Path:
    """The pack with a robust winner and an entry of the blocklist."""
    pack: Pack = load_pack(source)
    first = pack.winners[0]
    pack.robust.append(
        RobustWinner(
            target=first.target,
            environment=first.environment,
            problem=first.problem,
            objective="worst",
            workloads=(first.workload,),
            knobs=first.knobs,
            regrets=(1.0,),
            score=1.0,
            created=first.created,
        )
    )
    pack.blocklist.append(
        Block(
            arch=first.target.arch,
            kernel_source_hash="5" * 64,
            problem=first.problem,
            knobs=first.knobs,
            status="hang",
            reason="killed after 30 s",
            created=first.created,
        )
    )
    path = source.with_name("extended.json")
    path.write_text(pack_text(document_of(pack)), encoding="utf-8")
    return path


def test_an_export_tells_what_went_out(run: Run, swept: Path, tmp_path: Path) -> None:
    path = tmp_path / "pack.json"
    result = run("export", str(path))
    pack = load_pack(path)
    candidates = sum(len(beside) for beside in pack.candidates.values())
    assert candidates > 0
    assert result.stdout == f"4 winners with {candidates} candidates written to {path}\n"
    document = json.loads(run("export", str(path), "--qg", "8", "--json").stdout)
    assert (document["path"], document["winners"], document["signature"]) == (str(path), 2, None)
    assert (document["robust"], document["blocklist"]) == (0, 0)


def test_an_import_tells_of_every_entry(run: Run, pack: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    result = run("import", str(extended(pack)), "--db", str(other))
    assert result.exit_code == 0
    assert "4 added, 0 replaced, 0 kept, 0 skipped" in result.stdout
    assert "robust winners: 1 added" in result.stdout
    assert "blocklist: 1 added" in result.stdout
    words = " ".join(result.stdout.split())
    assert "hang, confirmed on another machine" in words
    assert "gfx942 1024/128/1 worst added no robust winner for this problem yet" in words
    again = " ".join(run("import", str(extended(pack)), "--db", str(other)).stdout.split())
    assert "robust winners: 1 kept blocklist: 1 kept" in again
    with Store.open(other) as store:
        assert (len(store.robust()), len(store.blocks())) == (1, 1)


def test_a_key_signs_and_its_public_half_lets_in(run: Run, pack: Path, tmp_path: Path) -> None:
    key, public, other = tmp_path / "key", tmp_path / "key.pub", str(tmp_path / "other.db")
    made = run("keygen", str(key))
    assert made.exit_code == 0
    assert str(public) in made.stdout
    refused = run("import", str(pack), "--db", other, "--public-key", str(public))
    assert refused.exit_code == 2
    assert f"{pack} is not signed" in refused.stderr
    signature = pack.with_name("pack.json.sig")
    assert str(signature) in run("sign", str(pack), "--key", str(key)).stdout
    words = ("import", str(pack), "--db", other, "--public-key", str(public))
    assert f"signed by the holder of {public}" in run(*words, "--dry-run").stdout
    assert not Path(other).exists()
    assert json.loads(run(*words, "--json").stdout)["public_key"] == str(public)

    again = run("export", str(pack), "--qg", "8")
    assert f"{signature} was made for another content" in again.stderr
    assert "the pack was changed" in run(*words).stderr
    signed = run("export", str(pack), "--sign", str(key))
    assert f"signature written to {signature}" in signed.stdout
    assert signed.stderr == ""
    assert run("validate", str(pack), "--public-key", str(public)).exit_code == 0
    assert run(*words).exit_code == 0


def test_a_bad_key_is_found_before_anything_is_written(
    run: Run, swept: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pack.json"
    for words in ((str(path), "--sign", str(tmp_path / "none")), ("-", "--sign", str(path))):
        assert run("export", *words).exit_code == 2
    assert not path.exists()
    assert run("keygen", str(tmp_path / "key")).exit_code == 0
    assert run("keygen", str(tmp_path / "key")).exit_code == 2
    path.write_text("{}")
    assert run("sign", str(path), "--key", str(tmp_path / "key")).exit_code == 2
    assert not path.with_name("pack.json.sig").exists()


def test_a_diff_exits_like_diff(run: Run, pack: Path, swept: Path) -> None:
    same = run("diff", str(pack), str(swept))
    assert same.exit_code == 0
    assert f"from {pack} to {swept}: no difference" in same.stdout
    entry = json.loads(pack.read_text(encoding="utf-8"))["winners"][0]
    slots = entry["counted"]["busiest_simd_slots"]
    counted = entry["counted"] | {"busiest_simd_slots": slots * 1.25}
    knobs = entry["knobs"] | {"num_splits": 3}
    other = changed(pack, "other.json", counted=counted, knobs=knobs, trials=99)
    result = run("diff", str(pack), str(other))
    assert result.exit_code == 1
    assert "+25.0 %" in result.stdout
    assert "also: trials" in result.stdout
    assert "winners: 0 added, 0 removed, 1 changed, 3 unchanged" in result.stdout
    document = json.loads(run("diff", str(other), str(pack), "--json").stdout)
    assert document["winners"][0]["percent"] == pytest.approx(-20.0)
    assert document["winners"][0]["changed"] == ["knobs", "counted", "trials"]
    assert run("diff", str(pack), str(pack), "--json").exit_code == 0


def test_a_diff_tells_of_robust_winners_and_the_blocklist(run: Run, pack: Path) -> None:
    result = run("diff", str(pack), str(extended(pack)))
    assert result.exit_code == 1
    assert "added robust winner (worst) of block_size=1024" in result.stdout
    assert "added on the blocklist: " in result.stdout
    assert "(hang)" in result.stdout
    assert "winners: 0 added, 0 removed, 0 changed, 4 unchanged" in result.stdout


def test_a_diff_with_nothing_there_exits_2_and_changes_nothing(
    run: Run, pack: Path, swept: Path, tmp_path: Path
) -> None:
    for missing in (tmp_path / "none.json", tmp_path, "mysql://host/db"):
        result = run("diff", str(pack), str(missing))
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    before = foreign.read_bytes()
    assert "songs" in run("diff", str(foreign), str(pack)).stderr
    assert foreign.read_bytes() == before


def test_validate_says_of_each_file_what_is_wrong(run: Run, pack: Path, tmp_path: Path) -> None:
    good = run("validate", str(pack), str(extended(pack)))
    assert good.exit_code == 0
    assert good.stdout.count("valid ") == good.stdout.count("; canonical") == 2
    assert "1 robust winner, 1 blocked" in good.stdout
    bad = changed(pack, "bad.json", trials=True)
    loose = tmp_path / "loose.json"
    loose.write_text(json.dumps(json.loads(pack.read_text(encoding="utf-8"))), encoding="utf-8")
    result = run("validate", str(bad), str(loose))
    assert result.exit_code == 1
    assert f"refused {bad}: winners[0]: trials=True is not allowed" in result.stdout
    assert "not in its canonical spelling" in result.stdout
    document = json.loads(run("validate", str(bad), str(loose), "--json").stdout)
    assert document["valid"] is False
    assert [one["valid"] for one in document["files"]] == [False, True]
    assert [one["canonical"] for one in document["files"]] == [False, False]
    assert document["files"][1]["winners"] == 4
    assert run("validate").exit_code == 2


def test_validate_prints_the_schema(run: Run, pack: Path) -> None:
    printed = run("validate", "--schema")
    assert printed.exit_code == 0
    assert printed.stdout == SCHEMA.read_text(encoding="utf-8")
    jsonschema.validate(
        json.loads(pack.read_text(encoding="utf-8")),
        json.loads(printed.stdout),
        cls=jsonschema.Draft202012Validator,
    )


def test_merge_makes_one_pack_of_several(run: Run, pack: Path, tmp_path: Path) -> None:
    newer = changed(pack, "newer.json", created="2099-01-01T00:00:00Z")
    out = tmp_path / "out.json"
    late = run("merge", str(pack), str(newer), "-o", str(out))
    assert late.exit_code == 2
    assert "is in the future" in late.stderr
    older = changed(pack, "older.json", created="2020-01-01T00:00:00Z")
    words = ("merge", str(older), str(pack), str(extended(pack)), "-o", str(out))
    dry = run(*words, "--dry-run")
    assert "would be written to" in dry.stdout
    assert not out.exists()
    result = run(*words)
    assert result.exit_code == 0
    assert "replaced" in result.stdout
    assert "1 conflict\n" in result.stdout
    assert "4 winners" in result.stdout
    assert out.read_bytes() == extended(pack).read_bytes()
    document = json.loads(run(*words, "--json").stdout)
    (conflict,) = document["conflicts"]
    assert (conflict["source"], conflict["fate"]) == (str(pack), "replaced")
    assert (document["winners"], document["robust"], document["blocklist"]) == (4, 1, 1)
    assert run("merge", "-o", str(out)).exit_code == 2
    assert run("merge", str(out), "-o", str(tmp_path)).exit_code == 2
