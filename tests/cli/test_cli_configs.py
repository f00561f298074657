"""`patune list`, `why`, `history`, `gc`, and the two ways to name a key."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING

import pytest
from verify_samples import COUNTED, GFX942, H200, PROBLEM, older, pack, tune, winner

from patune import config_view, why_view
from patune.cli_keys import parse_key
from patune.configs import dispatcher
from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.environment import current_environment
from patune.errors import InvalidValueError
from patune.trial import TrialResult

if TYPE_CHECKING:
    from pathlib import Path

    from cli_fakes import Run

KEY = "16/64/4/128x8/512"
WORDS = ("16/64/4", "128", "x", "8", "512")
OPTIONS = (
    *("--block-size", "16", "--head-dim", "64", "--qg", "4"),
    *("--batch", "128", "--kv-heads", "8", "--context", "512"),
)
ON = ("--target", "gfx942")
SWEEP = "patune sweep --block-size 16 --head-dim 64 --qg 4 --batch 7 --kv-heads 8 --context 512"


@pytest.fixture
def tuned(database: Path) -> Path:
    """Two fresh winners, and one of an older Triton that beat another and has seen failures."""
    database.parent.mkdir(parents=True)
    old = winner(num_splits=4, batch=128, environment=older(current_environment(GFX942)))
    tune(database, winner(), winner(batch=16), old)
    with Store.open(database) as store:
        run = store.begin_run(
            target=GFX942, environment=old.environment, sampler="local", seed=0, command="x"
        )
        for splits, slots in ((8, 800.0), (16, 1000.0), (2, None), (1, None)):
            result = TrialResult(status="spills", reason="decode spills 12 registers")
            if slots is not None:
                counted = dataclasses.replace(COUNTED, busiest_simd_slots=slots)
                result = TrialResult(status="ok", gate_cases=7, error_rms=0.001, counted=counted)
            trial = store.record_trial(
                run,
                problem=old.problem,
                workload=old.workload,
                knobs=dataclasses.replace(old.knobs, num_splits=splits),
                result=result,
                source="local",
            )
            if splits == 8:
                store.promote(trial, default_trial_id=None)
        store.end_run(run)
    dispatcher.reload()
    return database


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["1024/128/8"], (1024, 128, 8)),
        (["1024/128/8/16x4"], (1024, 128, 8, 16, 4)),
        (["1024/128/8/16x4/512"], (1024, 128, 8, 16, 4, 512)),
        (["1024/128/8", "16x4x512"], (1024, 128, 8, 16, 4, 512)),
        (["1024/128/8", "16", "x", "4", "512"], (1024, 128, 8, 16, 4, 512)),
    ],
)
def test_a_key_is_read_as_tables_print_it(words: list[str], values: tuple[int, ...]) -> None:
    assert tuple(parse_key(words).values()) == values
    assert list(parse_key(words))[:3] == ["block_size", "head_dim", "qg"]


@pytest.mark.parametrize(
    "text",
    ["1024", "1024/128", "1024/128/x", "1024/128/8/", "1024/128/8/16", "a/b/c", "1/2/3/4x5/"],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(text)):
        parse_key([text])


@pytest.mark.parametrize("command", ["show", "lookup", "why", "history"])
def test_options_and_short_form_say_the_same(run: Run, tuned: Path, command: str) -> None:
    said = [
        run(command, *how, *ON, "--json").stdout
        for how in ((KEY,), WORDS, OPTIONS, (KEY, *OPTIONS))
    ]
    assert len(set(said)) == 1
    key = json.loads(said[0])
    key = key.get("answer", key).get("key", key)
    assert key["workload"] == {"batch": 128, "kv_heads": 8, "context": 512}
    assert key["problem"]["qg"] == 4


@pytest.mark.parametrize("command", ["show", "lookup", "why", "history"])
@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ((KEY, "--qg", "8"), "--qg 8 contradict each other: qg is 4 in one and 8 in the other"),
        ((KEY, "--context", "4096"), "--context 4096 contradict"),
        (("16/64",), "KEY='16/64'"),
        (("--block-size", "16", "--qg", "4"), "--head-dim"),
        ((), "--block-size, --head-dim, --qg"),
        (("16/64/0",), "qg=0"),
        ((KEY, "--kv-dtype", "int4"), "kv_dtype='int4'"),
        ((KEY, "--target", "gfx90a"), "target='gfx90a'"),
    ],
)
def test_bad_keys_exit_2(
    run: Run, tuned: Path, command: str, words: tuple[str, ...], seen: str
) -> None:
    result = run(command, *words)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert result.stdout == ""


def test_list_says_state_origin_and_date(run: Run, tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "box.json"
    pack(file, winner(batch=4))
    assert run("import", str(file)).exit_code == 0
    lines = run("list").stdout.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("16/64/4/")}
    assert {key: row.split()[-1] for key, row in rows.items()} == {
        "16/64/4/1x8/512": "fresh",
        "16/64/4/4x8/512": "fresh",
        "16/64/4/16x8/512": "fresh",
        "16/64/4/128x8/512": "re-verify",
    }
    assert "2026-11-22  fresh" in rows["16/64/4/4x8/512"]
    titles = [line for line in lines if line.startswith("gfx942 (")]
    assert titles == [
        "gfx942 (AMD Instinct MI300X, 304 CUs), emulated, tuned here",
        "gfx942 (AMD Instinct MI300X, 304 CUs), emulated, from pack box.json",
    ]
    now = current_environment(GFX942)
    text = f"source ce69e675 -> {now.kernel_source_hash[:8]}, triton 3.5.0 -> {now.triton}"
    assert f"re-verify: 1 of 4, gfx942: {text}" in lines
    assert "they are served; to gate and time them again, run: patune verify --adopt" in lines


def test_list_stale_has_only_those(run: Run, tuned: Path) -> None:
    result = run("list", "--stale")
    assert next(x for x in result.stdout.splitlines() if x.startswith("16/")).startswith(KEY)
    document = json.loads(run("list", "--stale", "--json").stdout)
    (found,) = (Winner.from_dict(entry) for entry in document["winners"])
    assert found.workload.batch == 128
    (state,) = document["staleness"]
    assert state["state"] == "reverify"
    assert list(state["changes"]) == ["kernel_source_hash", "triton", "compiler"]
    everything = json.loads(run("list", "--json").stdout)
    assert [s["state"] for s in everything["staleness"]] == ["fresh", "fresh", "reverify"]
    none = run("list", "--stale", "--target", "gfx950")
    assert "no such winners are stored" in none.stdout
    assert none.exit_code == 0
    with Store.open(tuned) as store:
        store.retire(
            target=found.target, problem=found.problem, workload=found.workload, reason="test"
        )
    assert "none of 2 stored winners needs a second look here" in run("list", "--stale").stdout


@pytest.mark.parametrize("width", [50, 66, 80, 100, 160])
def test_a_narrow_terminal_loses_columns_and_never_a_key(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from rich.console import Console

    monkeypatch.setattr(
        config_view, "result_console", lambda: Console(width=width, force_terminal=True)
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("list").stdout)
    rows = [line for line in text.splitlines() if line.startswith("16/64/4/")]
    assert [row.split()[0] for row in rows][-1] == KEY
    assert all(len(row.rstrip()) <= width for row in rows)
    assert all(row.split()[-1] in ("fresh", "re-verify") for row in rows)
    assert ("2026-" in rows[0]) == (width >= 80)


def test_show_says_whether_the_winner_holds(run: Run, tuned: Path) -> None:
    assert "re-verify: source ce69e675 -> " in run("show", KEY, *ON).stdout
    assert "fresh: nothing has changed since" in run("show", "16/64/4/1x8/512", *ON).stdout
    assert json.loads(run("show", KEY, *ON, "--json").stdout)["staleness"] == "reverify"


def test_why_shows_what_stands_behind_the_winner(run: Run, tuned: Path) -> None:
    document = json.loads(run("why", KEY, *ON, "--json").stdout)
    assert set(document) == {"schema", "answer", "explanation", "behind", "note"}
    assert document["explanation"]
    (entry,) = document["behind"]
    assert (entry["where"], entry["staleness"], entry["failed"]) == ("database", "reverify", 2)
    assert [one["knobs"]["num_splits"] for one in entry["candidates"]] == [8, 4, 16]
    assert [one["times_the_best"] for one in entry["candidates"]] == [1.0, 1.125, 1.25]
    assert entry["failures"] == [
        {"status": "spills", "reason": "decode spills 12 registers", "count": 2}
    ]
    assert entry["beat"]["previous_knobs"]["num_splits"] == 4
    text = run("why", KEY, *ON).stdout
    for part in (
        r"score +emulated-correct, counted 800 slots",
        r"holds +re-verify: source ce69e675 -> ",
        r"took the place of +p128 s4 st1 w4 r16x4, 900 slots then, on 20",
        r"p128 s16 st1 w4 r16x4 +1000 slots +\+25\.0 %",
        r"p128 s8 st1 w4 r16x4 +800 slots +winner",
        r"2 trials did not pass; most often:\n    2 x spills: decode spills 12 registers",
    ):
        assert re.search(part, text), part
    assert " us" not in text


def test_why_explains_what_is_not_stored_too(run: Run, database: Path) -> None:
    result = run("why", "16/64/4", *ON)
    assert result.exit_code == 0
    assert not database.parent.exists()
    document = json.loads(run("why", "16/64/4", *ON, "--json").stdout)
    assert document["behind"] == []
    assert str(database) in document["note"]


def test_why_knows_the_shipped_packs(run: Run, database: Path) -> None:
    document = json.loads(run("why", "1024/128/8/16x8/4096", "--target", "sm_90", "--json").stdout)
    (entry,) = document["behind"]
    assert document["answer"]["source"] == "pack"
    assert entry["where"].startswith("pack ")
    assert entry["winner"]["target"] == H200.to_dict()
    assert entry["candidates"][0]["knobs"] == document["answer"]["knobs"]


def test_history_is_told_oldest_first(run: Run, tuned: Path) -> None:
    with Store.open(tuned) as store:
        old = store.winners()[-1]
        store.retire(
            target=old.target, problem=old.problem, workload=old.workload, reason="wrong: row 3"
        )
    document = json.loads(run("history", KEY, *ON, "--json").stdout)
    events = document["events"]
    assert [event["event"] for event in events] == ["promoted", "promoted", "retired"]
    assert [event["score"] for event in events[:2]] == [900.0, 800.0]
    assert events[1]["previous_score"] == 900.0
    lines = run("history", KEY, *ON).stdout.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("20")] == [
        "promoted", "promoted", "retired",
    ]  # fmt: skip
    assert any("before p128 s8 st1 w4 r16x4" in line for line in lines)
    assert "wrong: row 3" in "\n".join(lines)


@pytest.mark.parametrize("command", ["history", "show"])
def test_a_key_that_is_not_stored_names_the_sizes_that_are(
    run: Run, tuned: Path, command: str
) -> None:
    result = run(command, "16/64/4/7x8/512", *ON)
    assert result.exit_code == 1
    assert "batch=1 kv_heads=8 context=512; batch=16" in result.stderr
    assert f"Run: {SWEEP} --target gfx942" in result.stderr


def test_gc_says_what_goes_and_a_dry_run_keeps_it(run: Run, tuned: Path) -> None:
    before = tuned.read_bytes()
    dry = run("gc", "--keep", "1", "--dry-run")
    assert dry.exit_code == 0
    assert "dry run: nothing was deleted" in dry.stdout
    assert tuned.read_bytes() == before
    document = json.loads(run("gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert (document["trials"], document["bytes"], document["dry_run"]) == (4, 0, True)
    old = json.loads(run("gc", "--older-than", "90d", "--json").stdout)
    assert old["trials"] == 0
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", old["before"])
    real = run("gc", "--keep", "1")
    assert re.search(r"^4 +trials *$", real.stdout, re.MULTILINE)
    assert re.search(r"^[\d.]+ k?B given back$", real.stdout, re.MULTILINE)
    with Store.open(tuned) as store:
        assert [w.score for w in store.winners()] == [900.0, 900.0, 800.0]
    assert json.loads(run("gc", "--keep", "1", "--json").stdout)["trials"] == 0


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--older-than", "90"], "--older-than='90'"),
        (["--older-than", "soon"], "'soon'"),
        (["--older-than", "-1d"], "'-1d'"),
        (["--keep", "-1"], "-1"),
        (["--keep", "some"], "'some'"),
    ],
)
def test_bad_values_of_gc_exit_2(run: Run, tuned: Path, words: list[str], seen: str) -> None:
    result = run("gc", *words)
    assert result.exit_code == 2
    assert seen in result.stderr


@pytest.mark.parametrize("command", [["history", KEY, *ON], ["gc"], ["gc", "--dry-run"], ["list"]])
def test_no_database_is_made_by_asking(run: Run, database: Path, command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert str(database) in result.stderr
    assert not database.parent.exists()


def test_lookup_strict_exits_1_where_nothing_was_tuned(run: Run, tuned: Path) -> None:
    assert run("lookup", KEY, *ON, "--strict").exit_code == 0
    missed = run("lookup", "16/64/5/7x8/512", *ON, "--strict")
    assert missed.exit_code == 1
    command = SWEEP.replace("--qg 4", "--qg 5") + " --target gfx942"
    assert f"nothing was tuned for this key on this device; run: {command}" in missed.stderr
    assert command in missed.stdout
    lenient = run("lookup", "16/64/5/7x8/512", *ON)
    assert lenient.exit_code == 0
    assert lenient.stdout == missed.stdout


def test_an_answer_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    key = {
        "target": GFX942.to_dict(),
        "problem": PROBLEM.to_dict(),
        "workload": {"batch": 12, "kv_heads": 8, "context": 512},
    }
    near = [{"batch": b, "kv_heads": 8, "context": 512} for b in (16, 8)]
    answer = {
        "source": "nearest", "evidence": "measured", "knobs": {"num_splits": 4}, "key": key, "stored_workload": None,
        "stored_target": H200.to_dict(), "neighbours": near, "staleness": "reverify",
        "distance": {"walks": -0.415, "context": 0.0, "total": 0.415},
        "changes": [{"field": "triton", "kind": "reverify", "stored": "3.5.0", "present": "3.9.0"},
                    {"field": "torch", "kind": "note", "stored": "1", "present": "2"}],
    }  # fmt: skip
    config_view.print_answer(answer, "patune sweep --qg 4")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "source: nearest, evidence: measured",
        "tuned for: batch=16 kv_heads=8 context=512; batch=8 kv_heads=8 context=512",
        "distance: 0.75x the walks (batch x KV heads), 1x the context",
        "tuned on another device: sm_90 (NVIDIA H200, 132 SMs)",
        "re-verify: triton 3.5.0 -> 3.9.0",
        "nothing was tuned for this key on this device; to do so, run: patune sweep --qg 4",
    ]


@pytest.mark.parametrize("width", [40, 60, 100])
def test_narrow_histories_and_reasons_stay_inside(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from rich.console import Console

    monkeypatch.setattr(
        why_view, "result_console", lambda: Console(width=width, force_terminal=True)
    )
    for command in ("why", "history"):
        text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, KEY, *ON).stdout)
        wide = [x for x in text.splitlines() if len(x) > width]
        assert [x for x in wide if not x.startswith("database: ")] == []


@pytest.mark.parametrize("command", [["lookup", "16/64/5"], ["why", "16/64/5"], ["doctor"]])
def test_questions_are_no_misses(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    suspended: list[bool] = []
    monkeypatch.setattr(dispatcher, "suspend_capture", lambda: suspended.append(True))
    run(*command)
    assert suspended


def test_a_key_is_shown_where_lookups_are_strict(
    run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATUNE_STRICT", "1")
    dispatcher.reload()
    assert run("show", KEY, *ON).exit_code == 0
    assert run("history", KEY, *ON).exit_code == 0
    assert run("history", "16/64/5", *ON).exit_code == 1
    assert run("space", *OPTIONS, *ON).exit_code == 0
