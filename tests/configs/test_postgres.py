"""A database on a PostgreSQL server: made, brought forward, refused with advice, and never a password in a message."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner
from config_samples import (
    H200,
    KEY,
    LOCKED,
    PASSWORD,
    add_trial,
    dump,
    measured,
    on_server,
    raw,
    run_on_server,
)

from patune import __version__
from patune.cli import Commands, main
from patune.cli_options import COMMAND_LINE
from patune.configs import postgres, postgres_engine, rows
from patune.configs.models import TargetRow
from patune.configs.readonly import SCHEMA, found_schema
from patune.configs.store import Store
from patune.doctor import diagnose
from patune.errors import DatabaseError, InvalidValueError
from patune.settings import ServerUrl

if TYPE_CHECKING:
    from collections.abc import Callable


def run_sql(place: ServerUrl, *statements: str) -> list[tuple[Any, ...]]:
    return run_on_server(place.url, *statements)


def refused(place: ServerUrl, message: str, **how: bool) -> None:
    """Opening is refused with the place and the reason, and changes nothing."""
    before = dump(place)
    for opening in (Store.open, Store.read):
        with pytest.raises(DatabaseError, match=message) as error:
            opening(place, **how)
        assert str(place) in str(error.value)
        assert (
            "t was left as it was" in str(error.value)
            or "t was left as it is" in str(error.value)
            or how
        )
    assert dump(place) == before


def test_a_new_database_says_what_it_is(server_place: ServerUrl) -> None:
    assert found_schema(server_place) == 0
    with pytest.raises(DatabaseError, match="There is no config database at postgresql://"):
        Store.open(server_place, create=False)
    with pytest.raises(DatabaseError, match="There is no config database at postgresql://"):
        Store.read(server_place)
    assert run_sql(server_place, postgres.TABLES) == []
    with Store.open(server_place) as store:
        assert store.place == server_place
        assert add_trial(store, measured()) == 1
    assert found_schema(server_place) == SCHEMA
    ((schema, uuid, made_by, created),) = run_sql(server_place, "SELECT * FROM patune_meta")
    assert (schema, len(uuid), made_by, created[-1]) == (SCHEMA, 36, f"patune {__version__}", "Z")
    version = run_sql(server_place, "SELECT version_num FROM patune_alembic_version")
    assert version == [(f"schema_{SCHEMA}",)]
    with Store.open(server_place, create=False) as store:
        assert [trial.result for trial in store.trials(**KEY)] == [measured()]


def test_a_url_is_a_place_wherever_one_is_named(
    server_database: ServerUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PATUNE_DB", server_database.url.replace("postgresql://", "postgresql+psycopg://")
    )
    for place in (
        None,
        server_database.url,
        server_database,
        server_database.url.replace("sql", "s"),
    ):
        with Store.open(place, create=False) as store:
            assert store.winners() == []
    with pytest.raises(
        InvalidValueError, match="database='mysql://' is not allowed; allowed: a file, or a"
    ):
        Store.open("mysql://host/name")


def test_a_database_of_another_program_is_left_alone(server_place: ServerUrl) -> None:
    run_sql(server_place, "CREATE VIEW pg_stat AS SELECT 1", "CREATE SEQUENCE s")
    assert found_schema(server_place) == 0
    run_sql(server_place, "CREATE TABLE books (title text)")
    refused(
        server_place,
        r"another program's: it has tables .such as 'books'. and no 'patune_meta'.*createdb",
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("DELETE FROM patune_meta", r"is damaged: patune_meta says schema \[\]"),
        ("INSERT INTO patune_meta VALUES (99, '', '', '')", "not one number"),
        ("UPDATE patune_meta SET schema = 0", "not one number"),
        (
            "UPDATE patune_meta SET schema = 99",
            r"newer patune: it has schema 99.*pip install --upgrade",
        ),
        ("DROP TABLE patune_miss", "is damaged: it has no table 'patune_miss'"),
        ("DROP TABLE patune_alembic_version", "it has no table 'patune_alembic_version'"),
    ],
)
def test_damaged_and_newer_databases_are_left_alone(
    server_database: ServerUrl, spoil: str, message: str
) -> None:
    run_sql(server_database, spoil)
    refused(server_database, message)


def test_a_number_that_no_migration_explains_is_damage(server_database: ServerUrl) -> None:
    run_sql(server_database, "UPDATE patune_meta SET schema = 3")
    before = dump(server_database)
    with pytest.raises(
        DatabaseError, match=r"says schema 3, and nothing brings that to 4. It was left"
    ):
        Store.open(server_database)
    assert dump(server_database) == before
    assert run_sql(server_database, "SELECT 1 FROM pg_namespace WHERE nspname LIKE '%_bak'") == []


def test_a_lost_column_is_explained_when_it_is_missed(server_database: ServerUrl) -> None:
    with Store.open(server_database) as store:
        run_sql(server_database, "ALTER TABLE patune_winner DROP COLUMN top")
        with pytest.raises(
            DatabaseError, match=r"It is damaged: .*top does not exist.*Restore a copy"
        ):
            store.winners()


def as_locked(place: ServerUrl, password: str) -> ServerUrl:
    return ServerUrl(place.url.replace("//postgres:@", f"//{LOCKED}:{password}@"))


REFUSALS: dict[str, tuple[Callable[[ServerUrl], ServerUrl], str]] = {
    "a wrong password": (
        lambda place: as_locked(place, "wr0ng"),
        r"//locked:\*\*\*@.*The user or the password is refused .*password authentication failed.*pgpass",
    ),
    "no password": (lambda place: as_locked(place, ""), "The user or the password is refused "),
    "a missing database": (
        lambda place: ServerUrl(place.url.replace("/patune_test", "/nowhere")),
        r"There is no such database on the server .*createdb NAME",
    ),
    "a port where nothing listens": (
        lambda _: ServerUrl("postgresql://me:wr0ng@127.0.0.1:1/patune"),
        r"//me:\*\*\*@127.0.0.1:1/patune cannot be reached: .*refused.*Check the address.*--db or PATUNE_DB",
    ),
    "a host that is not there": (
        lambda _: ServerUrl("postgresql://me:wr0ng@nowhere.invalid/patune"),
        "cannot be reached: ",
    ),
    "an option that is not one": (
        lambda place: ServerUrl(place.url + "&colour=wr0ng"),
        "cannot be reached: .*colour",
    ),
    "no schema to look in": (
        lambda place: ServerUrl(place.url + "&options=-csearch_path%3Dnowhere"),
        "no schema of its search_path exists",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_refuses_is_explained(server_place: ServerUrl, name: str) -> None:
    change, message = REFUSALS[name]
    place = change(server_place)
    for opening in (Store.open, Store.read, found_schema):
        with pytest.raises(DatabaseError, match=message) as error:
            opening(place)  # type: ignore[operator]
        if name != "an option that is not one":
            assert "wr0ng" not in str(error.value)


def test_what_a_driver_says_of_a_password_is_not_repeated() -> None:
    place = ServerUrl("postgresql://me:wr0ng@host/name")
    for said in (f'invalid URI "{place.url}"', 'could not translate host name "wr0ng"'):
        told = postgres.explain(place, psycopg.OperationalError(said))
        assert told.startswith("postgresql://me:***@host/name cannot be reached: ")
        assert "***" in told.partition(": ")[2]
        assert "wr0ng" not in told


def test_who_may_not_create_is_told(server_place: ServerUrl) -> None:
    place = as_locked(server_place, PASSWORD)
    with pytest.raises(
        DatabaseError, match=r"may not do this .*permission denied for schema public"
    ) as error:
        Store.open(place)
    assert PASSWORD not in str(error.value)
    assert found_schema(place) == 0


def test_another_encoding_is_refused(postgres_server: str) -> None:
    how = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    run_on_server(postgres_server, f"CREATE DATABASE patune_latin {how}")
    with pytest.raises(
        DatabaseError, match=r"has encoding LATIN1; allowed: UTF8.*createdb -E UTF8"
    ):
        Store.open(on_server(postgres_server, "patune_latin"))


def test_without_the_driver_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    place = ServerUrl("postgresql://me:wr0ng@127.0.0.1/patune")
    for opening in (Store.open, Store.read, found_schema):
        with pytest.raises(
            DatabaseError, match=r"needs psycopg .*Run: pip install 'patune\[postgresql\]'"
        ):
            opening(place)  # type: ignore[operator]


def test_tables_are_in_the_schema_that_the_url_names(server_database: ServerUrl) -> None:
    with Store.open(server_database) as store:
        add_trial(store, measured())
    run_sql(server_database, "CREATE SCHEMA team")
    place = ServerUrl(server_database.url + "&options=-csearch_path%3Dteam")
    assert found_schema(place) == 0
    with Store.open(place) as store:
        assert store.trials(**KEY) == []
        add_trial(store, measured(1.0))
    assert run_sql(server_database, "SELECT median_us FROM patune_trial") == [(50.0,)]
    assert run_sql(server_database, "SELECT median_us FROM team.patune_trial") == [(1.0,)]


def test_who_reads_cannot_write(server_database: ServerUrl) -> None:
    with Store.open(server_database) as store:
        store.promote(add_trial(store, measured()), default_trial_id=None)
        before = dump(server_database)
        with Store.read(server_database) as reader:
            assert reader.winners() == store.winners()
            with pytest.raises(DatabaseError, match=r"It can be read and not written: .*readonly"):
                add_trial(reader, measured())
        with (
            store.transaction(writes=False) as session,
            pytest.raises(Exception, match="read-only"),
        ):
            session.connection().exec_driver_sql("DELETE FROM patune_winner")
    with closing(postgres.connect_readonly(server_database, 1.0)) as connection:
        assert connection.execute("SELECT count(*) FROM patune_winner").fetchall() == [(1,)]
        with pytest.raises(Exception, match="read-only"):
            connection.execute("DELETE FROM patune_winner")
    assert dump(server_database) == before


def test_a_reader_sees_one_state_throughout(server_database: ServerUrl) -> None:
    count = "SELECT count(*) FROM patune_trial"
    connection = postgres.connect_readonly(server_database)
    with Store.open(server_database) as store, closing(connection) as reader:
        assert reader.execute(count).fetchall() == [(0,)]
        add_trial(store, measured())
        assert reader.execute(count).fetchall() == [(0,)]
        reader.commit()
        assert reader.execute(count).fetchall() == [(1,)]


def test_a_lock_that_stays_is_explained(
    server_database: ServerUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_engine, "LOCK_WAIT_S", 0.05)
    with Store.open(server_database) as store, closing(postgres.connect(server_database)) as other:
        other.execute(postgres_engine.WRITES)
        with pytest.raises(DatabaseError, match=r"It stays locked by another process. Try again"):
            add_trial(store, measured())
        assert store.winners() == []  # readers do not wait
        other.rollback()
        assert add_trial(store, measured()) == 1


def test_a_server_that_restarted_meanwhile_costs_nothing(server_database: ServerUrl) -> None:
    with Store.open(server_database) as store:
        add_trial(store, measured())
        others = (
            "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        ended = run_sql(server_database, f"SELECT pg_terminate_backend(pid, 5000) {others}")
        assert (True,) in ended
        assert add_trial(store, measured()) == 2
        assert raw(
            store,
            "SELECT DISTINCT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()",
        ) == [("patune",)]


def test_a_row_is_added_once_even_without_the_lock(
    server_database: ServerUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two transactions add the same target at once: the second waits for the first, and finds its row."""
    monkeypatch.setattr(postgres_engine, "WRITES", "SELECT 1")
    found: list[int] = []

    def add(store: Store) -> None:
        with store.transaction(writes=True) as session:
            found.append(rows.find_or_add(session, TargetRow, H200).id)
            found.append(rows.message_of(session, "the same") or 0)

    with Store.open(server_database) as store, Store.open(server_database) as other:
        second = threading.Thread(target=add, args=(other,))
        with store.transaction(writes=True) as session:
            first = (
                rows.find_or_add(session, TargetRow, H200).id,
                rows.message_of(session, "the same"),
            )
            second.start()
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            while run_sql(server_database, waiting) == [(0,)]:
                pass
        second.join()
        assert tuple(found) == first
        assert raw(store, "SELECT count(*) FROM patune_target") == [(1,)]


def test_commands_take_a_url(server_database: ServerUrl) -> None:
    with Store.open(server_database) as store:
        store.promote(add_trial(store, measured()), default_trial_id=None)
    url = server_database.url.replace("//postgres:@", f"//postgres:{PASSWORD}@")  # any will do
    shown = str(ServerUrl(url))
    run = CliRunner()
    listed = run.invoke(main, ["list", "--db", url])
    assert listed.exit_code == 0
    assert f"database: {shown}" in listed.output
    found = json.loads(run.invoke(main, ["list", "--db", url, "--json"]).output)["winners"]
    assert [w["timing"]["median_us"] for w in found] == [50.0]
    where = json.loads(run.invoke(main, ["where", "--db", url, "--json"]).output)
    assert where["database"] == shown
    finding = {f.name: f for f in diagnose(ServerUrl(url)).findings}["database"]
    assert (finding.state, finding.detail) == ("ok", f"{shown} (1 winners)")
    bad = run.invoke(main, ["list", "--db", "mysql://me:wr0ng@host/name"])
    assert bad.exit_code == 2
    assert "allowed: a file, or a postgresql:// URL" in bad.output
    assert "wr0ng" not in bad.output


def test_doctor_says_what_a_server_answers(server_place: ServerUrl) -> None:
    def finding(place: ServerUrl) -> tuple[str, str]:
        found = {f.name: f for f in diagnose(place).findings}["database"]
        return found.state, found.detail

    empty = f"{server_place} (none yet; a sweep creates it)"
    assert finding(server_place) == ("note", empty)
    state, detail = finding(ServerUrl("postgresql://me:wr0ng@127.0.0.1:1/patune"))
    assert state == "broken"
    assert detail.startswith("postgresql://me:***@127.0.0.1:1/patune cannot be reached: ")


@pytest.mark.parametrize("equals", [False, True])
def test_the_command_that_is_stored_has_no_password(equals: bool) -> None:
    url = "postgresql://me:wr0ng@127.0.0.1:1/patune"
    command = ["list", f"--db={url}"] if equals else ["list", "--db", url]
    kept = Commands("patune").make_context("patune", command).meta[COMMAND_LINE]
    assert "wr0ng" not in kept
    assert "postgresql://me:***@127.0.0.1:1/patune" in kept
