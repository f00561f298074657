"""Lookups from a PostgreSQL server: the answers of a file with the same content."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from config_samples import H200, OTHER_KNOBS, PROBLEM, WORKLOAD, winner

from patune.configs import dispatcher
from patune.configs.reading import generation_of
from patune.configs.store import Store
from patune.problem import Workload

if TYPE_CHECKING:
    from pathlib import Path

    from patune.settings import DatabasePlace, ServerUrl

NEAR = Workload(batch=WORKLOAD.batch, kv_heads=WORKLOAD.kv_heads, context=WORKLOAD.context + 1)


@pytest.mark.usefixtures("fresh_dispatcher")
def test_a_server_answers_as_a_file_does(server_database: ServerUrl, database: Path) -> None:
    seen = []
    places: tuple[DatabasePlace, ...] = (server_database, database)
    for place in places:
        with Store.open(place) as store:
            store.merge([winner()], imported_from="x")
        dispatcher.reload(place)
        asked = (WORKLOAD, NEAR)
        answers = [dispatcher.lookup_problem(PROBLEM, workload, H200) for workload in asked]
        assert [answer.source for answer in answers] == ["exact", "nearest"]
        first = generation_of(place, 1.0)
        with Store.open(place) as store:
            newer = winner(knobs=OTHER_KNOBS, created="2027-01-01T00:00:00Z")
            store.merge([newer], imported_from="y")
        assert generation_of(place, 1.0) != first
        dispatcher.refresh()
        after = dispatcher.lookup_problem(PROBLEM, WORKLOAD, H200)
        assert after.knobs == OTHER_KNOBS
        seen.append(
            ([answer.to_dict() for answer in (*answers, after)], dispatcher.fingerprint(H200))
        )
    assert seen[0] == seen[1]
