"""The dispatcher against a walk over everything stored, and what a lookup imports."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from config_samples import H200, KNOBS, PROBLEM, winner
from config_strategies import crowded_problems, crowded_targets, crowded_winners, crowded_workloads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.configs import dispatcher, layers, state
from patune.configs.dispatcher import lookup_problem
from patune.configs.packs import pack_document, pack_text
from patune.configs.store import Store
from patune.configs.table import Robust, Table, problem_fields, target_fields
from patune.kernels.defaults import default_knobs, safe_knobs
from patune.kernels.knobs import knobs_to_dict
from patune.record import canonical_json
from patune.trial import EVIDENCE_RANK

if TYPE_CHECKING:
    from patune.configs.winner import Winner
    from patune.kernels.knobs import Knobs
    from patune.problem import Problem, Workload
    from patune.target import Target


def spelled(knobs: Knobs) -> str:
    return canonical_json(knobs_to_dict(knobs))


def refused(knobs: Knobs) -> bool:
    return knobs.num_splits % 3 == 0


def place(w: Winner, workload: Workload) -> tuple[float, float]:
    """Log distances of walks and context."""
    walks = math.log2(workload.walks / w.workload.walks)
    return walks, math.log2(workload.context / w.workload.context)


def order(w: Winner) -> tuple[Any, ...]:
    sizes = w.workload.batch, w.workload.kv_heads, w.workload.context
    return w.created, spelled(w.knobs), w.target.device_name, w.target.compute_units, *sizes


Stored = tuple["Winner", bool, dict["Knobs", float]]  # winner, packed, others with their scores


def same_sizes(found: list[Stored], workload: Workload) -> Stored | None:
    """The best usable one of the very sizes, by looking at every one."""
    best: Stored | None = None
    best_rank: tuple[Any, ...] = ()
    for one in found:
        w, packed, _ = one
        if (w.workload.walks, w.workload.context) != (workload.walks, workload.context):
            continue
        if refused(w.knobs):
            continue
        batch = w.workload.batch == workload.batch
        rank = (EVIDENCE_RANK[w.evidence], not packed, batch, order(w))
        if best is None or rank > best_rank:
            best, best_rank = one, rank
    return best


def near_sizes(found: list[Stored], workload: Workload) -> tuple[Knobs, list[Winner]] | None:
    """The usable configuration of the best weighted mean, over the tables of the kind of evidence that has one."""
    near = [s for s in found if max(map(abs, place(s[0], workload))) <= 1]
    own = {(*w.key, w.evidence) for w, packed, _ in near if not packed}
    near = [s for s in near if not s[1] or (*s[0].key, s[0].evidence) not in own]
    for evidence in ("measured", "emulated"):
        kind = [s for s in near if s[0].evidence == evidence]
        kind.sort(key=lambda s: order(s[0]), reverse=True)
        kind.sort(key=lambda s: (math.hypot(*place(s[0], workload)), s[1]))
        kind = kind[:8]
        every = list(
            dict.fromkeys(
                k
                for w, _, others in kind
                for k in (w.knobs, *sorted(others, key=others.__getitem__))
            )
        )
        usable = [knobs for knobs in every if not refused(knobs)]
        if usable:
            means = {knobs: mean_of(knobs, kind, workload) for knobs in usable}
            least = min(means.values())
            # what differs by rounding only is a tie, and ties go to the nearest table's
            best = next(k for k in usable if math.isclose(means[k], least, rel_tol=1e-12))
            return best, [w for w, _, _ in kind]
    return None


def mean_of(knobs: Knobs, kind: list[Stored], workload: Workload) -> float:
    product, total = 1.0, 0.0
    for w, _, others in kind:
        weight = 1 / max(math.hypot(*place(w, workload)), 1 / 16)
        regrets = {k: max(1.0, score / w.score) for k, score in others.items()} | {w.knobs: 1.0}
        product *= regrets.get(knobs, max(regrets.values())) ** weight
        total += weight
    return product ** (1 / total)


def expected(
    stored: list[Stored],
    robust: dict[str, Knobs],
    target: Target,
    problem: Problem,
    workload: Workload,
) -> tuple[Any, ...]:
    own = [s for s in stored if (s[0].target, s[0].problem) == (target, problem)]
    others = [s for s in stored if s[0].target != target and s[0].problem == problem]
    for found, source in ((own, ""), (others, "other_device")):
        if source == "other_device":
            for objective in ("worst", "mean"):
                if objective in robust and not refused(robust[objective]):
                    return "robust", "measured", spelled(robust[objective]), ()
        if one := same_sizes(found, workload):
            w, packed, _ = one
            return source or ("pack" if packed else "exact"), w.evidence, spelled(w.knobs), ()
        if choice := near_sizes(found, workload):
            knobs, neighbours = choice
            sizes = tuple(w.workload for w in neighbours)
            return source or "nearest", neighbours[0].evidence, spelled(knobs), sizes
    default = default_knobs(problem, workload, target)
    if not refused(default):
        return "heuristic", "default", spelled(default), ()
    return "safe", "default", spelled(safe_knobs(problem, target)), ()


def seen(target: Target, problem: Problem, workload: Workload) -> tuple[Any, ...]:
    answer = lookup_problem(problem, workload, target)
    return answer.source, answer.evidence, spelled(answer.knobs), answer.neighbours


def unique(found: list[Winner]) -> list[Winner]:
    return list({w.key: w for w in found}.values())


requests = st.tuples(crowded_targets, crowded_problems, crowded_workloads)
winners_of_a_layer = st.lists(crowded_winners(), max_size=12).map(unique)
tops = st.dictionaries(st.integers(1, 9), st.sampled_from([10.0, 15.0, 25.0, 60.0]), max_size=5)


@st.composite
def stored_tables(draw: st.DrawFn) -> list[Stored]:
    return [
        (
            w,
            packed,
            {
                replace(w.knobs, num_splits=n): score
                for n, score in draw(tops).items()
                if n != w.knobs.num_splits
            },
        )
        for packed in (False, True)
        for w in draw(winners_of_a_layer)
    ]


def table_of(found: list[Stored], arch: str, packed: bool) -> Table:
    """As a database gives it (text) or a pack (documents)."""
    table = Table("test", packed=packed)
    for w, of_pack, others in found:
        if w.target.arch != arch or of_pack != packed:
            continue
        ranked = sorted(others.items(), key=lambda pair: pair[1])
        devices = table.winners.setdefault(problem_fields(w.problem), {})
        device = target_fields(w.target)
        if packed:
            beside = [
                {"knobs": knobs_to_dict(k), "timing": {"median_us": score}} for k, score in ranked
            ]
            devices.setdefault(device, []).append(w.to_dict() | {"candidates": beside})  # type: ignore[union-attr]
        else:
            top = json.dumps([[score, knobs_to_dict(k)] for k, score in ranked])
            size = f"{w.workload.batch} {w.workload.kv_heads} {w.workload.context}"
            line = f"{size} 1 {w.evidence} {w.created} {w.score} {spelled(w.knobs)}\t{top}"
            devices[device] = f"{devices[device]}\n{line}" if device in devices else line
    return table


robusts = st.dictionaries(
    st.sampled_from(["worst", "mean"]),
    st.integers(1, 9).map(lambda n: replace(KNOBS, num_splits=n)),
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stored_tables(), robusts, st.lists(requests, min_size=1, max_size=10))
def test_layers_and_ranking_agree_with_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
    stored: list[Stored],
    robust: dict[str, Knobs],
    asked: list[tuple[Target, Problem, Workload]],
) -> None:
    def database(place: object, arch: str) -> Table:
        table = table_of(stored, arch, packed=False)
        table.robust[problem_fields(PROBLEM)] = {
            target_fields(H200): [
                Robust(name, spelled(knobs), {"driver": "580.1"}, packed=False)
                for name, knobs in robust.items()
            ]
        }
        return table

    monkeypatch.setattr(layers, "is_feasible", lambda k, p, t: "no" if refused(k) else None)
    monkeypatch.setattr(state, "read_database", database)
    monkeypatch.setattr(
        state, "read_packs", lambda folder, arch: table_of(stored, arch, packed=True)
    )
    monkeypatch.setattr(dispatcher, "_state", dispatcher._State())
    for target, problem, workload in [*asked, *(w.key for w, _, _ in stored)]:
        here = robust if (target, problem) == (H200, PROBLEM) else {}
        for _ in ("cold", "warm"):
            assert seen(target, problem, workload) == expected(
                stored, here, target, problem, workload
            )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    own=winners_of_a_layer,
    packed=winners_of_a_layer,
    asked=st.lists(requests, min_size=1, max_size=10),
)
def test_files_agree_with_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
    fresh_dispatcher: Path,
    database: Path,
    own: list[Winner],
    packed: list[Winner],
    asked: list[tuple[Target, Problem, Workload]],
) -> None:
    monkeypatch.setattr(layers, "is_feasible", lambda k, p, t: "no" if refused(k) else None)
    with Store.open(database) as store:
        with store.transaction(writes=True) as session:
            for table in ("winner", "history", "trial"):
                session.connection().exec_driver_sql(f"DELETE FROM patune_{table}")
        store.merge(own, imported_from="x")
    (fresh_dispatcher / "pack.json").write_text(pack_text(pack_document(packed)))
    dispatcher.reload()
    stored: list[Stored] = [(w, False, {}) for w in own] + [(w, True, {}) for w in packed]
    for request in asked:
        assert seen(*request) == expected(stored, {}, *request)


IMPORTS = """
import json, sys
before = set(sys.modules)
import patune.configs.dispatcher
at_import = set(sys.modules)
answer = patune.configs.dispatcher.lookup(block_size=1024, head_dim=128, qg=8, {target})
heavy = {"torch", "triton", "numpy", "sqlalchemy", "optuna", "alembic"}
print(json.dumps([sorted(heavy & at_import), sorted(heavy & set(sys.modules)), answer.source]))
"""


@pytest.mark.parametrize("source", ["exact", "pack", "heuristic"])
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
        env={
            **os.environ,
            "PATUNE_DB": str(database),
            "PATUNE_TARGET": "sm_90",
            "PATUNE_CAPTURE": "0",
        },
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
        env={**environment, "PATUNE_DB": str(database), "PATUNE_CAPTURE": "0"},
    )
    assert json.loads(done.stdout) == [[], [], "heuristic"]
