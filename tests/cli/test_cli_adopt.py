"""`patune verify --adopt` and `patune sweep --stale` over a database of winners of two environments; what sweeps is made up."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING

import pytest
from verify_samples import COUNTED, GFX942, H200, PROBLEM, older, tune, winner

from patune import adopt_view
from patune.configs import dispatcher
from patune.configs.store import Store
from patune.environment import current_environment
from patune.second_look import Present
from patune.trial import TrialResult
from patune.tuner.progress import Key, KeyReport, SweepReport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli_fakes import FakeSweep, Run

    from patune.tuner.progress import SweepEvent
    from patune.tuner.sweep import SweepOptions

WRONG = TrialResult(status="wrong", reason="row 3 is off", gate_cases=2)
GFX942_KEY = "gfx942 block_size=16 head_dim=64 qg=4"


def counted(slots: float) -> TrialResult:
    return TrialResult(
        status="ok",
        gate_cases=7,
        error_rms=0.001,
        counted=dataclasses.replace(COUNTED, busiest_simd_slots=slots),
    )


class FakeAdoption:
    """Stands in for ``run_sweep``: by the key's batch its winner holds (16), is beaten (32), fails (64), fails with a replacement (128),
    or is not reached (256).

    Attributes:
        options: of the calls.
    """

    def __init__(self) -> None:
        self.options: list[SweepOptions] = []
        self.interrupted = False

    def __call__(
        self, options: SweepOptions, store: Store, notify: Callable[[SweepEvent], None]
    ) -> SweepReport:
        self.options.append(options)
        environment = current_environment(options.target)
        run = store.begin_run(
            target=options.target, environment=environment, sampler="x", seed=0, command="adopt"
        )
        return SweepReport(
            target=options.target,
            evidence="emulated",
            environment=environment,
            read_ceiling_gb_s=None,
            interrupted=self.interrupted,
            seconds=1.0,
            trials=1,
            keys=tuple(self._key(store, options, run, key) for key in options.keys),
        )

    def _key(self, store: Store, options: SweepOptions, run: int, key: Key) -> KeyReport:
        at = {"problem": key.problem, "workload": key.workload}
        standing = store.winner(target=options.target, **at)
        assert standing is not None
        other = dataclasses.replace(standing.knobs, num_splits=2)
        batch = key.workload.batch
        again = {256: None, 64: WRONG, 128: WRONG}.get(batch, counted(950.0))
        tried = {standing.knobs: again} | ({other: counted(700.0)} if batch in (32, 128) else {})
        ids = {
            knobs: store.record_trial(run, **at, knobs=knobs, result=result, source="x")
            for knobs, result in tried.items()
            if result is not None
        }
        if again == WRONG:
            store.retire(target=options.target, **at, reason="wrong: row 3 is off")
        best = min((k for k in ids if tried[k].ok), key=lambda k: tried[k].score, default=None)
        return KeyReport(
            key=key,
            winner=None if best is None else store.promote(ids[best], default_trial_id=None),
            default_knobs=standing.knobs,
            default=None,
            trials=len(ids),
            failures={},
            incumbent=again,
        )


@pytest.fixture
def adoption(monkeypatch: pytest.MonkeyPatch) -> FakeAdoption:
    fake = FakeAdoption()
    monkeypatch.setattr("patune.tuner.sweep.run_sweep", fake)
    return fake


@pytest.fixture
def tuned(database: Path, no_gpu: None) -> Path:
    """A fresh winner of batch 1, stale ones of 16, 32, 64 and 128, and one of a GPU that is not here."""
    database.parent.mkdir(parents=True)
    old = older(current_environment(GFX942))
    stale = [winner(batch=batch, environment=old) for batch in (16, 32, 64, 128)]
    far = winner(H200, environment=older(current_environment(H200)))
    tune(database, winner(), *stale, far)
    dispatcher.reload()
    return database


def stale_in(path: Path) -> list[int]:
    with Store.open(path) as store:
        return [look.winner.workload.batch for look in Present().stale(store.winners())]


def test_each_winner_is_adopted_replaced_or_failed(
    run: Run, tuned: Path, adoption: FakeAdoption
) -> None:
    result = run("verify", "--adopt", "--target", "gfx942")
    assert result.exit_code == 1
    (options,) = adoption.options
    assert [key.workload.batch for key in options.keys] == [16, 32, 64, 128]
    assert (options.effort, options.fresh, options.target) == ("adopt", True, GFX942)
    assert options.command == "patune verify --adopt --target gfx942"
    lines = result.stdout.splitlines()
    rows = {line.split("/")[3][:-2]: line for line in lines if line.startswith("16/64/4/")}
    assert re.search(r"900 slots +950 slots +adopted$", rows["16"].rstrip())
    assert re.search(r"900 slots +950 slots +replaced +p128 s2 st1 w4 r16x4, 700 slots", rows["32"])
    assert re.search(r"900 slots +- +failed$", rows["64"].rstrip())
    assert re.search(r"900 slots +- +failed +p128 s2 st1 w4 r16x4, 700 slots", rows["128"])
    at = lines.index(f"no longer passes: {GFX942_KEY} batch=64 kv_heads=8 context=512")
    assert lines[at + 1] == "    p128 s4 st1 w4 r16x4: wrong: row 3 is off"
    assert lines[at + 2].startswith("    answers now: p128 s")
    assert "evidence: " in lines[at + 2]
    assert lines[at + 3].startswith("    next: patune sweep --block-size 16 --head-dim 64 --qg 4")
    at = lines.index(f"no longer passes: {GFX942_KEY} batch=128 kv_heads=8 context=512")
    assert lines[at + 2] == "    answers now: p128 s2 st1 w4 r16x4, 700 slots"
    last = "4 winners: 1 adopted, 1 replaced, 2 failed, 0 undecided, 0 no_device; "
    assert re.fullmatch(re.escape(last) + r"\d+ s", lines[-1])
    assert stale_in(tuned) == [1]  # of the H200
    assert "wrong: row 3 is off" in run("history", "16/64/4/64x8/512", "--target", "gfx942").stdout


def test_json_is_one_document(run: Run, tuned: Path, adoption: FakeAdoption) -> None:
    document = json.loads(run("verify", "--adopt", "--json").stdout)
    assert set(document) == {"schema", "database", "seconds", "exit_code", "fates", "winners"}
    assert (document["schema"], document["database"]) == (1, str(tuned))
    assert document["fates"] == {
        "adopted": 1, "replaced": 1, "failed": 2, "undecided": 0, "no_device": 1,
    }  # fmt: skip
    fates = {found["workload"]["batch"]: found for found in document["winners"]}
    assert [found["fate"] for found in document["winners"]] == [
        "adopted", "replaced", "failed", "failed", "no_device",
    ]  # fmt: skip
    assert fates[16]["before"]["score"] == 900.0
    assert fates[16]["after"]["score"] == 950.0
    assert fates[16]["after"]["environment"]["triton"] == current_environment(GFX942).triton
    assert fates[64]["after"] is None
    assert fates[64]["answer"]["evidence"] in ("default", "emulated")
    assert fates[64]["run_next"].startswith("patune sweep --block-size 16")
    assert fates[1]["reason"] == "there is no sm_90 GPU here"


def test_without_the_gpu_it_exits_4_and_leaves_the_winner(
    run: Run, tuned: Path, adoption: FakeAdoption
) -> None:
    result = run("verify", "--adopt", "--target", "sm_90")
    assert result.exit_code == 4
    assert adoption.options == []
    text = "no_device: 1 of sm_90: there is no sm_90 GPU here; served as before"
    assert text in result.stdout
    assert stale_in(tuned) == [16, 32, 64, 128, 1]


def test_a_second_time_there_is_nothing_to_do(
    run: Run, tuned: Path, adoption: FakeAdoption
) -> None:
    run("verify", "--adopt", "--target", "gfx942")
    again = run("verify", "--adopt", "--target", "gfx942")
    assert again.exit_code == 0
    assert "nothing is stale: none of 4 stored winners needs a second look" in again.stdout
    assert len(adoption.options) == 1


def test_all_is_for_every_winner(run: Run, tuned: Path, adoption: FakeAdoption) -> None:
    assert run("verify", "--adopt", "--all", "--target", "gfx942").exit_code == 1
    assert [key.workload.batch for key in adoption.options[0].keys] == [1, 16, 32, 64, 128]


def test_who_is_not_reached_is_served_as_before(
    run: Run, tuned: Path, adoption: FakeAdoption
) -> None:
    tune(tuned, winner(batch=256, environment=older(current_environment(GFX942))))
    adoption.interrupted = True
    result = run("verify", "--adopt", "--target", "gfx942")
    assert result.exit_code == 130
    assert "undecided: 1 of gfx942: not reached; served as before" in result.stdout
    assert 256 in stale_in(tuned)


def test_a_dry_run_lists_them_and_writes_nothing(
    run: Run, tuned: Path, adoption: FakeAdoption
) -> None:
    before = tuned.read_bytes()
    result = run("verify", "--adopt", "--dry-run")
    assert result.exit_code == 0
    assert "5 of 6 stored winners need a second look; 4 can have it here" in result.stdout
    assert f"dry run: nothing was written; database: {tuned}" in result.stdout
    document = json.loads(run("verify", "--adopt", "--dry-run", "--json").stdout)
    assert {found["staleness"] for found in document["winners"]} == {"reverify"}
    assert adoption.options == []
    assert tuned.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--all"], "--all goes with --adopt"),
        (["--dry-run"], "--dry-run goes with --adopt"),
        (["--adopt", "--pack", "p.json"], "--pack p.json and --adopt contradict each other"),
        (["--adopt", "--block-size", "7"], "block_size=7"),
        (["--adopt", "--jobs", "0"], "x>=1"),
        (["--adopt", "--db", "missing.db"], "There is no config database at "),
    ],
)
def test_what_makes_no_sense_exits_2(
    run: Run,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    seen: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("verify", *words)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_narrow_terminals_break_no_fate(
    run: Run, tuned: Path, adoption: FakeAdoption, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from rich.console import Console

    monkeypatch.setattr(
        adopt_view, "result_console", lambda *_: Console(width=width, force_terminal=True)
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("verify", "--adopt").stdout)
    wide = [x for x in text.splitlines() if len(x) > width]
    assert [x for x in wide if not x.startswith(("    next: ", "database: "))] == []
    assert {"adopted", "replaced", "failed", "no_device"} <= set(text.split())
    assert "p128 s2 st1 w4 r16x4, 700 slots" in " ".join(text.split())


def test_stale_keys_are_swept_and_no_others(run: Run, tuned: Path, fake_sweep: FakeSweep) -> None:
    result = run("sweep", "--stale", "--target", "gfx942", "--effort", "quick", "--trials", "5")
    assert result.exit_code == 0, result.output
    assert fake_sweep.options is not None
    keys = fake_sweep.options.keys
    assert [key.workload.batch for key in keys] == [16, 32, 64, 128]
    assert {key.problem for key in keys} == {PROBLEM}
    assert (fake_sweep.options.effort, fake_sweep.options.trials) == ("quick", 5)
    assert fake_sweep.options.fresh is False
    again = run("sweep", "--stale", "--target", "gfx942")
    assert again.exit_code == 0
    assert (
        "nothing is stale: none of 6 stored winners needs a second look on gfx942" in again.stdout
    )
    assert "1 others do that cannot have it on this target" in again.stdout


@pytest.mark.parametrize(
    ("words", "batches"),
    [
        (["--batch", "16,64"], [16, 64]),
        (["--qg", "4", "--block-size", "16"], [16, 32, 64, 128]),
        (["--head-dim", "128"], None),
        (["--kv-heads", "8", "--batch", "32"], [32]),
        (["--sinks"], None),
        (["--no-sinks", "--kv-dtype", "bf16", "--context", "512"], [16, 32, 64, 128]),
    ],
)
def test_key_options_narrow_the_stale_keys(
    run: Run, tuned: Path, fake_sweep: FakeSweep, words: list[str], batches: list[int] | None
) -> None:
    assert run("sweep", "--stale", "--target", "gfx942", *words).exit_code == 0
    found = fake_sweep.options
    assert (found and [key.workload.batch for key in found.keys]) == batches


def test_a_stale_dry_run_lists_and_plans(run: Run, tuned: Path, fake_sweep: FakeSweep) -> None:
    before = tuned.read_bytes()
    result = run("sweep", "--stale", "--dry-run", "--target", "gfx942")
    assert result.exit_code == 0
    assert "4 of 6 stored winners need a second look on gfx942" in result.stdout
    assert "4 keys, up to 32 trials" in result.stdout
    assert "environment: source ce69e675 -> " in result.stdout
    document = json.loads(
        run("sweep", "--stale", "--dry-run", "--target", "gfx942", "--json").stdout
    )
    assert [found["workload"]["batch"] for found in document["stale"]] == [16, 32, 64, 128]
    assert len(document["keys"]) == 4
    none = json.loads(run("sweep", "--stale", "--qg", "1", "--target", "gfx942", "--json").stdout)
    assert (none["stale"], none["stored"]) == ([], 0)
    assert fake_sweep.options is None
    assert tuned.read_bytes() == before


def test_a_stale_sweep_is_of_the_target_here(
    run: Run, tuned: Path, fake_sweep: FakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("sweep", "--stale", "--target", "sm_90").exit_code == 4
    for module in ("patune.target", "patune.stale_sweep"):
        monkeypatch.setattr(f"{module}.detect_target", lambda: H200)
    assert run("sweep", "--stale").exit_code == 0
    assert fake_sweep.options is not None
    assert fake_sweep.options.target == H200
    assert [key.workload.batch for key in fake_sweep.options.keys] == [1]


def test_measured_winners_are_not_counted_again(
    run: Run, database: Path, no_gpu: None, fake_sweep: FakeSweep
) -> None:
    database.parent.mkdir(parents=True)
    old = older(current_environment(GFX942))
    timed = winner(H200).timing
    tune(
        database,
        dataclasses.replace(
            winner(environment=old), evidence="measured", timing=timed, counted=None
        ),
    )
    result = run("sweep", "--stale", "--target", "gfx942")
    assert "nothing is stale" in result.stdout
    assert fake_sweep.options is None
    adopted = run("verify", "--adopt")
    assert adopted.exit_code == 4
    assert "it was measured on AMD Instinct MI300X; here gfx942 is only emulated" in adopted.stdout


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--models", "llama-3-70b"], "--models and --stale contradict each other"),
        (["--from", "misses.json"], "--from and --stale contradict each other"),
        (["--block-size", "1000"], "block_size=1000"),
        (["--kv-dtype", "int4"], "kv_dtype='int4'"),
        (["--effort", "adopt", "--sampler", "tpe"], "--sampler tpe and --effort adopt"),
        (["--db", "missing.db"], "There is no config database at "),
    ],
)
def test_stale_with_what_contradicts_it_exits_2(
    run: Run,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    seen: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("sweep", "--stale", "--target", "gfx942", *words)
    assert result.exit_code == 2
    assert seen in result.stderr
    assert list(tmp_path.glob("missing*")) == []
