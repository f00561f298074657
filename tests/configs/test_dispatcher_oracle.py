"""The dispatcher against a walk over everything stored, and what a lookup imports."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import WORKLOAD, winner
from config_strategies import crowded_problems, crowded_targets, crowded_winners, crowded_workloads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs import dispatcher, table
from patune.configs.dispatcher import lookup_problem
from patune.configs.packs import pack_document, pack_text
from patune.configs.store import Store
from patune.configs.table import Entry, candidates, key_of
from patune.kernels.defaults import default_knobs
from patune.kernels.knobs import knobs_to_dict
from patune.problem import Problem, Workload
from patune.record import canonical_json
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs
    from patune.target import Target


def spelled(knobs: Knobs) -> str:
    return canonical_json(knobs_to_dict(knobs))


def refused(knobs: Knobs) -> bool:
    return knobs.num_splits % 3 == 0


def best_of(
    stored: list[Winner], target: Target, problem: Problem, workload: Workload
) -> tuple[Winner, float] | None:
    """The best usable winner and its distance, by looking at every one."""
    best: tuple[Winner, float] | None = None
    best_rank: tuple[Any, ...] = ()
    for w in stored:
        if (w.target, w.problem) != (target, problem) or refused(w.knobs):
            continue
        walks = workload.walks / w.workload.walks
        context = workload.context / w.workload.context
        if not (0.5 <= walks <= 2 and 0.5 <= context <= 2):
            continue
        distance = math.hypot(math.log2(walks), math.log2(context))
        same_batch = w.workload.batch == workload.batch and distance == 0
        rank = (-distance, EVIDENCE_RANK[w.evidence], same_batch, w.created, spelled(w.knobs))
        if best is None or rank > best_rank:
            best, best_rank = (w, distance), rank
    return best


def expected(
    stored: list[Winner], packed: list[Winner], target: Target, problem: Problem, workload: Workload
) -> tuple[str, str, str, float | None]:
    for source, layer in (("db", stored), ("pack", packed)):
        if found := best_of(layer, target, problem, workload):
            w, distance = found
            if source == "db":
                source = "exact" if distance == 0 else "nearest"
            return source, w.evidence, spelled(w.knobs), distance
    return "default", "default", spelled(default_knobs(problem, workload, target)), None


def seen(
    target: Target, problem: Problem, workload: Workload
) -> tuple[str, str, str, float | None]:
    answer = lookup_problem(problem, workload, target)
    distance = answer.distance["total"] if answer.distance else None
    return answer.source, answer.evidence, spelled(answer.knobs), distance


def unique(found: list[Winner]) -> list[Winner]:
    return list({w.key: w for w in found}.values())


requests = st.tuples(crowded_targets, crowded_problems, crowded_workloads)
layers = st.lists(crowded_winners(), max_size=12).map(unique)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layers, layers, st.lists(requests, min_size=1, max_size=10))
def test_layers_and_ranking_agree_with_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
    stored: list[Winner],
    packed: list[Winner],
    asked: list[tuple[Target, Problem, Workload]],
) -> None:
    def grouped(found: list[Winner], arch: str) -> table.Table:
        result: table.Table = {}
        for w in found:
            if w.target.arch == arch:
                entry = Entry(w.workload, spelled(w.knobs), w.evidence, w.created)
                result.setdefault(key_of(w.target, w.problem), []).append(entry)
        return result

    monkeypatch.setattr(dispatcher, "is_feasible", lambda k, p, t: "no" if refused(k) else None)
    monkeypatch.setattr(dispatcher, "read_database", lambda path, arch: grouped(stored, arch))
    monkeypatch.setattr(dispatcher, "read_packs", lambda folder, arch: grouped(packed, arch))
    monkeypatch.setattr(dispatcher, "_state", dispatcher._State())
    for request in asked:
        for _ in ("cold", "warm"):
            assert seen(*request) == expected(stored, packed, *request)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stored=layers, packed=layers, asked=st.lists(requests, min_size=1, max_size=10))
def test_files_agree_with_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
    fresh_dispatcher: Path,
    database: Path,
    stored: list[Winner],
    packed: list[Winner],
    asked: list[tuple[Target, Problem, Workload]],
) -> None:
    monkeypatch.setattr(dispatcher, "is_feasible", lambda k, p, t: "no" if refused(k) else None)
    with Store.open(database) as store:
        with store.transaction(writes=True) as session:
            session.connection().exec_driver_sql("DELETE FROM patune_winner")
        store.merge(stored, imported_from="x")
    (fresh_dispatcher / "pack.json").write_text(pack_text(pack_document(packed)))
    dispatcher.reload()
    for request in asked:
        assert seen(*request) == expected(stored, packed, *request)


def test_candidates_do_not_depend_on_the_order_of_rows() -> None:
    entries = [
        Entry(Workload(batch=b, kv_heads=8, context=c), f'{{"n":{n}}}', evidence, created)
        for n, (b, c, evidence, created) in enumerate(
            (b, c, evidence, created)
            for b in (64, 128, 256)
            for c in (4096, 5000)
            for evidence in ("measured", "emulated")
            for created in ("2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z")
        )
    ]
    forward = list(candidates(entries, WORKLOAD))
    assert list(candidates(entries[::-1], WORKLOAD)) == forward
    assert len(forward) == len(entries)
    assert [same for _, same in forward].count(True) == 4
    assert forward[0][0].created == "2026-11-22T00:00:00Z"


IMPORTS = """
import json, sys
before = set(sys.modules)
import patune.configs.dispatcher
at_import = set(sys.modules)
answer = patune.configs.dispatcher.lookup(block_size=1024, head_dim=128, qg=8, {target})
heavy = {"torch", "triton", "numpy", "sqlalchemy", "optuna", "alembic"}
print(json.dumps([sorted(heavy & at_import), sorted(heavy & set(sys.modules)), answer.source]))
"""


@pytest.mark.parametrize("source", ["exact", "pack", "default"])
@pytest.mark.parametrize("target", ["target='sm_90'", ""])
def test_a_lookup_imports_nothing_heavy(
    tmp_path: Path, database: Path, source: str, target: str
) -> None:
    if source == "exact":
        with Store.open(database) as store:
            store.merge([winner()], imported_from="x")
    packs = tmp_path / "packs"
    packs.mkdir()
    if source == "pack":
        (packs / "pack.json").write_text(pack_text(pack_document([winner()])))
    change = f"dispatcher.PACKS = __import__('pathlib').Path({str(packs)!r})\nat_import"
    script = IMPORTS.replace("{target}", target)
    script = script.replace("at_import", f"patune.configs.{change}", 1)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATUNE_DB": str(database), "PATUNE_TARGET": "sm_90"},
    )
    at_import, at_lookup, answered = json.loads(done.stdout)
    assert at_import == []
    assert set(at_lookup).isdisjoint({"sqlalchemy", "optuna", "alembic"})
    if not any(Path(node).exists() for node in dispatcher.GPU_NODES):
        assert at_lookup == []
        assert answered == source
    assert done.stderr == ""


def test_the_default_target_needs_no_torch_without_a_gpu(database: Path) -> None:
    script = IMPORTS.replace("{target}", "")
    script = script.replace("answer =", "patune.configs.dispatcher.GPU_NODES = ()\nanswer =")
    environment = {k: v for k, v in os.environ.items() if k != "PATUNE_TARGET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PATUNE_DB": str(database)},
    )
    assert json.loads(done.stdout) == [[], [], "default"]
