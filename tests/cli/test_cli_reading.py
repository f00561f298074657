"""`patune list`, `show`, `lookup`, `doctor` and `where` over a database with four winners."""

from __future__ import annotations

import json
import platform
import sqlite3
from typing import TYPE_CHECKING

import pytest

from patune.configs import dispatcher
from patune.configs.dispatcher import lookup
from patune.configs.packs import pack_document
from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.target import Target

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import FakeSweep, Run

KEY = ("--block-size", "1024", "--head-dim", "128", "--qg", "8", "--batch", "128")
ON_GFX942 = (*KEY, "--target", "gfx942")


def test_list_prints_all_winners_and_the_path(run: Run, swept: Path) -> None:
    result = run("list")
    assert result.exit_code == 0
    rows = [line for line in result.stdout.splitlines() if line.startswith("1024/128/")]
    assert len(rows) == 4
    assert all("100 slots" in row and "50 %" in row for row in rows)
    assert f"database: {swept}" in result.stdout


def test_list_json_gives_the_winners_back(run: Run, swept: Path) -> None:
    document = json.loads(run("list", "--json").stdout)
    assert document["schema"] == 1
    with Store.open(swept) as store:
        assert [Winner.from_dict(entry) for entry in document["winners"]] == store.winners()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--qg", "8"], 2),
        (["--target", "gfx942"], 4),
        (["--target", "gfx950"], 0),
        (["--head-dim", "64"], 0),
        (["--block-size", "1024", "--qg", "1"], 2),
    ],
)
def test_list_filters(run: Run, swept: Path, options: list[str], count: int) -> None:
    assert len(json.loads(run("list", "--json", *options).stdout)["winners"]) == count
    assert ("no such winners" in run("list", *options).stdout) == (count == 0)


@pytest.mark.parametrize("command", [["list"], ["export", "-"], ["verify"]])
@pytest.mark.parametrize(
    ("option", "value", "seen"),
    [
        ("--block-size", "1000", "block_size=1000"),
        ("--head-dim", "100", "head_dim=100"),
        ("--qg", "0", "qg=0"),
        ("--target", "gfx90a", "target='gfx90a'"),
    ],
)
def test_a_filter_that_nothing_can_match_exits_2(
    run: Run, swept: Path, command: list[str], option: str, value: str, seen: str
) -> None:
    result = run(*command, option, value)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", [["list"], ["show", *ON_GFX942], ["export", "-"], ["verify"]])
def test_a_missing_database_is_not_made_by_reading(
    run: Run, database: Path, command: list[str]
) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert str(database) in result.stderr
    assert "patune sweep" in result.stderr
    assert result.stdout == ""
    assert not database.parent.exists()


def test_show_prints_the_winner_and_every_trial(run: Run, swept: Path) -> None:
    result = run("show", *ON_GFX942)
    assert result.exit_code == 0
    assert "emulated-correct, counted 100 slots" in result.stdout
    assert "200 slots; the winner saves 50 %" in result.stdout
    assert "1000 wave instructions, 100 of them matrix" in result.stdout
    assert "decode spills 12 registers" in result.stdout
    assert "not ok: 1 spills" in result.stdout
    assert "patune 0.1.0, triton" in result.stdout


def test_show_json_has_the_trials_in_order(run: Run, swept: Path) -> None:
    document = json.loads(run("show", *ON_GFX942, "--json").stdout)
    assert document["schema"] == 1
    assert [trial["status"] for trial in document["trials"]] == ["ok", "spills", "ok"]
    assert [trial["source"] for trial in document["trials"]] == ["default", "search", "search"]
    assert document["winner"]["knobs"] == document["trials"][2]["knobs"]
    assert document["failures"] == {"spills": 1}


def test_show_of_an_unknown_key_names_the_stored_sizes(run: Run, swept: Path) -> None:
    result = run("show", *ON_GFX942, "--batch", "7")
    assert result.exit_code == 1
    assert (
        "Nothing is stored for block_size=1024 head_dim=128 qg=8 batch=7 kv_heads=8 context=4096"
        in (result.stderr)
    )
    assert "batch=1 kv_heads=8 context=4096; batch=128" in result.stderr
    assert (
        "Run: patune sweep --block-size 1024 --head-dim 128 --qg 8 --batch 7 --kv-heads 8 --context 4096 --target gfx942"
        in result.stderr
    )


def test_lookup_says_where_the_knobs_come_from(run: Run, swept: Path) -> None:
    document = json.loads(run("lookup", *ON_GFX942, "--json").stdout)
    answer = lookup(block_size=1024, head_dim=128, qg=8, batch=128, target="gfx942")
    fingerprint = document.pop("fingerprint")
    assert fingerprint == dispatcher.fingerprint("gfx942")
    assert document == answer.to_dict()
    assert (document["source"], document["evidence"]) == ("exact", "emulated")
    text = run("lookup", *ON_GFX942).stdout
    assert "source: exact, evidence: emulated" in text
    assert f"num_warps         {answer.knobs.num_warps}" in text


def test_the_variant_of_a_key_is_asked_for_and_said(
    run: Run, fake_sweep: FakeSweep, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("patune.target", "patune.sweep_request"):
        monkeypatch.setattr(f"{module}.detect_target", lambda: Target.named("sm_90"))
    fp8 = ("--kv-dtype", "fp8_e4m3fn", "--layout", "aiter_5d", "--softcap", "--fp8-math")
    variant = "kv_dtype=fp8_e4m3fn kv_layout=aiter_5d softcap=True fp8_math=True"
    swept = run("sweep", *KEY, *fp8, "--target", "sm_90")
    assert swept.exit_code == 0, swept.output
    assert f"sm_90 (NVIDIA H200, 132 SMs), measured, {variant}" in run("list").stdout
    key = f"block_size=1024 head_dim=128 qg=8 {variant} batch=128 kv_heads=8 context=4096"
    assert key in run("show", *KEY, *fp8, "--target", "sm_90").stdout
    other = run("show", *KEY, *fp8, "--target", "sm_90", "--no-fp8-math")
    assert other.exit_code == 1
    assert f"Nothing is stored for {key.replace(' fp8_math=True', '')} on sm_90" in other.stderr
    assert "--kv-dtype fp8_e4m3fn --kv-layout aiter_5d --softcap --batch 128" in other.stderr
    dispatcher.reload()
    sources = {
        options: json.loads(
            run("lookup", *KEY, *fp8, *options, "--target", "sm_90", "--json").stdout
        )["source"]
        for options in ((), ("--no-softcap",), ("--no-fp8-math",))
    }
    assert sources == {(): "exact", ("--no-softcap",): "heuristic", ("--no-fp8-math",): "heuristic"}


def test_lookup_answers_without_a_database(run: Run, database: Path) -> None:
    result = run("lookup", *ON_GFX942, "--qg", "3")
    assert result.exit_code == 0
    assert "source: heuristic, evidence: default" in result.stdout
    assert not database.parent.exists()


@pytest.mark.parametrize("command", ["lookup", "show"])
@pytest.mark.parametrize(
    ("option", "value", "seen"),
    [
        ("--block-size", "1000", "block_size=1000"),
        ("--qg", "65", "qg=65"),
        ("--qg", "many", "'many'"),
        ("--kv-dtype", "int4", "kv_dtype='int4'"),
        ("--target", "gfx90a", "target='gfx90a'"),
        ("--batch", "0", "batch=0"),
    ],
)
def test_bad_keys_exit_2(run: Run, command: str, option: str, value: str, seen: str) -> None:
    result = run(command, *ON_GFX942, option, value)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["lookup", "show"])
def test_the_core_of_the_key_is_required(run: Run, command: str) -> None:
    result = run(command, "--block-size", "1024", "--qg", "8")
    assert result.exit_code == 2
    assert "--head-dim" in result.stderr


def test_doctor_needs_no_argument_and_no_gpu(run: Run, no_gpu: None, database: Path) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    words = "".join(result.stdout.split())  # long paths are wrapped
    for text in (platform.python_version(), "torch", "triton", str(database), "next:patunesweep"):
        assert text in words
    assert not database.parent.exists()


def test_doctor_json_tells_what_each_target_yields(run: Run, no_gpu: None, swept: Path) -> None:
    document = json.loads(run("doctor", "--json").stdout)
    assert document["healthy"] is True
    evidence = {row["arch"]: row["evidence"] for row in document["targets"]}
    assert evidence == {"sm_90": None, "gfx942": "emulated", "gfx950": "emulated"}
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert "4 winners" in findings["database"]["detail"]
    assert document["run_next"] == "patune list"


def test_doctor_is_red_and_exits_1_when_something_is_broken(
    run: Run, no_gpu: None, database: Path
) -> None:
    database.parent.mkdir()
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    result = run("doctor")
    assert result.exit_code == 1
    assert "broken" in result.stdout
    assert "songs" in result.stdout


def test_who_changes_nothing_leaves_an_older_database(
    run: Run, no_gpu: None, swept: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "pack.json"
    assert run("export", str(pack)).exit_code == 0
    with sqlite3.connect(swept) as connection:
        connection.execute("UPDATE patune_meta SET schema = 1")
    connection.close()
    before = swept.read_bytes()
    command = f"to bring it forward, run: patune list --db {swept}"
    document = json.loads(run("doctor", "--json").stdout)
    (finding,) = (found for found in document["findings"] if found["name"] == "database")
    assert (finding["state"], document["healthy"]) == ("note", True)
    assert command in finding["detail"]
    assert document["run_next"] == "patune list"
    dry = run("import", str(pack), "--dry-run")
    assert dry.exit_code == 2
    assert command in dry.stderr
    assert run("sweep", "--target", "gfx942", "--dry-run").exit_code == 0
    verified = run("verify")
    assert verified.exit_code == 2
    assert command in verified.stderr
    assert swept.read_bytes() == before
    assert list(swept.parent.glob("*.bak")) == []


def test_doctor_sees_two_tritons_in_one_folder(
    run: Run, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wheel:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    monkeypatch.setattr(
        "importlib.metadata.distributions", lambda: [Wheel("triton"), Wheel("triton-rocm")]
    )
    result = run("doctor")
    assert result.exit_code == 1
    assert "triton and triton-rocm overwrite each other" in result.stdout


def test_where_names_every_path(run: Run, database: Path, tmp_path: Path) -> None:
    places = json.loads(run("where", "--json").stdout)
    assert places["database"] == str(database)
    assert set(places) == {"database", "triton_cache", "packs"}
    other = tmp_path / "other.db"
    assert f"database: {other}" in run("where", "--db", str(other)).stdout


def test_a_pack_goes_out_and_comes_in(run: Run, swept: Path, tmp_path: Path) -> None:
    pack, other = tmp_path / "pack.json", tmp_path / "other.db"
    result = run("export", str(pack), "--qg", "8")
    assert result.exit_code == 0
    assert f"2 winners with 2 candidates written to {pack}" in result.stdout
    assert run("export", "-", "--qg", "8").stdout == pack.read_text(encoding="utf-8")

    dry = run("import", str(pack), "--db", str(other), "--dry-run")
    assert "2 added, 0 replaced, 0 kept, 0 skipped (dry run: nothing was written)" in dry.stdout
    assert not other.exists()
    document = json.loads(run("import", str(pack), "--db", str(other), "--json").stdout)
    assert (document["added"], document["dry_run"]) == (2, False)
    again = run("import", str(pack), "--db", str(other))
    assert "0 added, 0 replaced, 2 kept, 0 skipped" in again.stdout
    with Store.open(swept) as mine, Store.open(other) as theirs:
        assert pack_document(theirs.winners()) == pack_document(mine.winners(qg=8))


def test_a_bad_pack_exits_2_and_makes_nothing(run: Run, tmp_path: Path, database: Path) -> None:
    pack = tmp_path / "pack.json"
    pack.write_text('{"schema": 99, "winners": []}', encoding="utf-8")
    result = run("import", str(pack))
    assert result.exit_code == 2
    assert "schema=99" in result.stderr
    assert run("import", str(tmp_path / "missing.json")).exit_code == 2
    assert not database.exists()


def test_an_export_that_cannot_be_written_exits_2(run: Run, swept: Path, tmp_path: Path) -> None:
    result = run("export", str(tmp_path))
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr
