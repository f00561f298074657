"""examples/replace_constants.py: what it prints against lookups of our own, the command that it names, and the comparison that a GPU runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from example_programs import is_readable, load, run

import patune
from patune.configs.store import Store
from patune.configs.winner import Winner
from patune.environment import current_environment
from patune.kernels.feasibility import is_feasible
from patune.kernels.knobs import CdnaKnobs, HopperKnobs
from patune.problem import Problem, Workload
from patune.settings import database_place
from patune.target import Target
from patune.trial import CountedWork

if TYPE_CHECKING:
    from pathlib import Path

example = load("replace_constants")
MI300X, H200 = Target.named("gfx942"), Target.named("sm_90")
PROBLEM = Problem(block_size=64, head_dim=128, qg=8, kv_layout="aiter_5d")
# min(8, ceil(608 workgroups / (batch * 8 KV heads))), whatever the context
SPLITS = {1: 8, 16: 5, 128: 1}
ROW = re.compile(
    r"^ *(\d+) +(\d+)  (\d+) x (\d+) +(\d+) x (\d+) +(\w+) +(measured|emulated|default)$",
    re.MULTILINE,
)


def rows(output: str) -> list[tuple[int, int, tuple[int, int], tuple[int, int], str, str]]:
    """(batch, context, constants, looked up, source, evidence) of the table for gfx942."""
    found = [match.groups() for match in ROW.finditer(output)]
    return [
        (int(b), int(c), (int(p), int(s)), (int(q), int(t)), source, evidence)
        for b, c, p, s, q, t, source, evidence in found
    ]


def store(knobs: CdnaKnobs, **sizes: int) -> None:
    """An emulated winner of the example's problem."""
    work = CountedWork(
        busiest_simd_slots=9.0, wave_instructions=8, mfma=4, global_bytes=64, lds_bytes=0, spill_bytes=0
    )  # fmt: skip
    winner = Winner(
        target=MI300X, environment=current_environment(MI300X), problem=PROBLEM, workload=Workload(**sizes), knobs=knobs,
        evidence="emulated", timing=None, counted=work, default_score=None, default_knobs=None, trials=8, gate_cases=7,
        error_rms=0.002, created="2026-11-22T10:42:00Z",
    )  # fmt: skip
    with Store.open(database_place()) as opened:
        opened.merge([winner], imported_from="a test")


def test_without_winners_everything_is_heuristic(tmp_path: Path) -> None:
    done = run("replace_constants", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_readable(done.stdout)
    assert done.stdout.endswith("no sm_90 GPU here: nothing was decoded\n")
    found = rows(done.stdout)
    assert [row[:2] for row in found] == [
        (batch, context) for batch in (1, 16, 128) for context in (1024, 8192, 65536)
    ]
    for batch, context, constants, looked_up, source, evidence in found:
        answer = patune.lookup(
            **PROBLEM.to_dict(), batch=batch, kv_heads=8, context=context, target="gfx942"
        )
        assert constants == (256, SPLITS[batch])
        assert looked_up == (answer.knobs.partition_tokens, answer.knobs.num_splits)
        assert (source, evidence) == ("heuristic", "default")
    assert found[2][3] == (128, 38), "304 compute units over 8 walks"


def test_winners_take_the_place_of_the_heuristic(tmp_path: Path) -> None:
    store(CdnaKnobs(partition_tokens=256, num_splits=12, num_stages=1, num_warps=4), batch=1, kv_heads=8, context=8192)  # fmt: skip
    store(CdnaKnobs(partition_tokens=64, num_splits=3, num_stages=1, num_warps=2), batch=16, kv_heads=8, context=1024)  # fmt: skip
    found = {row[:2]: row[3:] for row in rows(run("replace_constants", folder=tmp_path).stdout)}
    assert found[1, 8192] == ((256, 12), "exact", "emulated")
    # tiles of 64 have no layout in AITER
    assert found[16, 1024] == ((128, 3), "exact", "emulated")
    assert found[128, 65536] == ((128, 1), "heuristic", "default")


@pytest.mark.slow
def test_the_command_that_it_prints_tunes_the_keys_of_the_table(tmp_path: Path) -> None:
    output = run("replace_constants", folder=tmp_path).stdout
    (command,) = re.findall(r"^  patune (sweep (?:.*\\\n)?.*)$", output, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "patune", *shlex.split(command.replace("\\\n", "")), "--dry-run", "--json"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    document = json.loads(done.stdout)
    keys = [one["key"] for one in document["keys"]]
    expected = [
        PROBLEM.to_dict() | {"workload": {"batch": batch, "kv_heads": 8, "context": context}}
        for batch, context, *_ in rows(output)
    ]
    assert len(keys) == len(expected) == 9
    assert all(key in expected for key in keys)
    assert document["target"] == MI300X.to_dict()


def answer_of(knobs: HopperKnobs, problem: Problem = PROBLEM) -> Any:
    found = patune.lookup(**problem.to_dict(), batch=1, kv_heads=8, context=8192, target="sm_90")
    return replace(found, knobs=knobs)


def test_constants_become_knobs_with_the_deepest_ring_that_fits() -> None:
    arguments = {"context_partition_size": 256, "max_context_partition_num": 5}
    looked_up = HopperKnobs(partition_tokens=64, num_splits=16, num_stages=3, num_warps=4)
    made = example.constants_as_hopper_knobs(answer_of(looked_up), arguments)
    # a stage is 2 x 256 tokens x 128 channels x 2 B = 128 KiB, of 227
    assert made == replace(looked_up, partition_tokens=256, num_splits=5, num_stages=1)
    fp8 = replace(PROBLEM, kv_dtype="fp8_e4m3fn")
    made = example.constants_as_hopper_knobs(answer_of(looked_up, fp8), arguments)
    assert made.num_stages == 3
    assert is_feasible(made, fp8, H200) is None
    with pytest.raises(ValueError, match=r"num_stages=1 needs \d+ B shared memory"):
        example.constants_as_hopper_knobs(answer_of(looked_up, replace(PROBLEM, head_dim=256)), arguments)  # fmt: skip


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The comparison on small tensors of the CPU; gives the calls of the operation."""
    calls: list[Any] = []
    decode = patune.paged_attention_decode

    def recorded(*tensors: torch.Tensor, **rest: Any) -> torch.Tensor:
        calls.append((tensors, rest["knobs"]))
        out: torch.Tensor = decode(*tensors, **rest)
        return out

    monkeypatch.setattr(example.patune, "paged_attention_decode", recorded)
    monkeypatch.setattr(example, "COMPARED", ((1, 256), (2, 128)))
    return calls


def test_both_decode_the_same_inputs(
    decoded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.compare(H200, torch.device("cpu")) == 0.0
    assert is_readable(capsys.readouterr().out)
    assert len(decoded) == 4
    for number, (batch, context) in enumerate(((1, 256), (2, 128))):
        (before, constants), (after, looked_up) = decoded[2 * number : 2 * number + 2]
        assert all(one is other for one, other in zip(before, after, strict=True))
        query, key, value, tables, lengths = before
        assert query.shape == (batch, 64, 128)
        assert key.shape == value.shape == (batch * context // 64, 8, 64, 128)
        assert sorted(tables.flatten().tolist()) == list(range(key.shape[0]))
        assert lengths.tolist() == [context] * batch
        assert not torch.equal(key, value)
        problem = replace(PROBLEM, kv_layout="hnd")
        assert (constants.partition_tokens, constants.num_splits) == (256, min(8, -(-264 // (8 * batch))))  # fmt: skip
        assert is_feasible(constants, problem, H200) is None
        answer = patune.lookup(
            **problem.to_dict(), batch=batch, kv_heads=8, context=context, target="sm_90"
        )
        assert looked_up == answer.knobs


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.015, 0), (1.04, 1)])
def test_outputs_that_differ_are_exit_code_1(
    factor: float,
    code: int,
    decoded: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decode = example.patune.paged_attention_decode

    def off(*tensors: torch.Tensor, **rest: Any) -> torch.Tensor:
        out: torch.Tensor = decode(*tensors, **rest)
        return out * (factor if rest["knobs"].partition_tokens == 256 else 1.0)

    monkeypatch.setattr(example.patune, "paged_attention_decode", off)
    monkeypatch.setattr(example, "detect_target", lambda: H200)
    compare = example.compare
    monkeypatch.setattr(example, "compare", lambda target, _: compare(target, torch.device("cpu")))
    assert example.main() == code
    assert "the same, and by how much the outputs differ" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu_the_outputs_agree(tmp_path: Path) -> None:
    done = run("replace_constants", folder=tmp_path, gpu=True)
    assert done.returncode == 0, done.stderr
    assert is_readable(done.stdout)
    _, compared = done.stdout.split("the outputs differ")
    found = re.findall(
        r"^ *(\d+) +8192  256 x (\d+) +\d+ x \d+ +\w+ +\w+ +([\d.]+)$", compared, re.MULTILINE
    )
    assert [batch for batch, _, _ in found] == ["1", "16"]
    assert all(0 < float(difference) <= example.TOLERANCE for *_, difference in found)
