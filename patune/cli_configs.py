"""The commands that read the configurations: what is stored, what serving answers, why, and since when; and the one that prunes losers."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from patune.cli_keys import answer_for, asked_key, key_argument
from patune.cli_options import (
    LISTING_SCHEMA,
    db_option,
    filters,
    json_option,
    one_key,
    print_json,
)
from patune.errors import EXIT_ERROR, EXIT_OK, reject
from patune.settings import database_place

if TYPE_CHECKING:
    from patune.settings import DatabasePlace

DAYS_PER_UNIT = {"d": 1, "w": 7}
HISTORY_SCHEMA = 1
GC_SCHEMA = 1
DEFAULT_KEEP = 10


def parse_age(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """``90d`` or ``12w``, as the UTC time that long ago.

    Raises:
        InvalidValueError: anything else.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,5})([dw])", value)
    if match is None:
        raise reject(param.opts[0], value, "days or weeks, such as 90d or 12w")
    age = timedelta(days=int(match[1]) * DAYS_PER_UNIT[match[2]])
    return (datetime.now(UTC) - age).strftime("%Y-%m-%dT%H:%M:%SZ")


@click.command("list")
@filters()
@click.option("--stale", is_flag=True, help="Only those that need a second look here.")
@db_option
@json_option
def list_winners(
    target: str | None, stale: bool, db: DatabasePlace | None, as_json: bool, **core: int | None
) -> None:
    """Print the stored winners, and whether they still hold in this environment."""
    from patune import config_view
    from patune.configs.store import Store
    from patune.second_look import Present

    with Store.open(database_place(db), create=False) as store:
        winners = store.winners(arch=target, **core)
        place = store.place
    present = Present(quick=True)
    looks = [present.look(winner) for winner in winners]
    shown = [look for look in looks if look.state == "reverify"] if stale else looks
    if as_json:
        print_json(
            {
                "schema": LISTING_SCHEMA,
                "winners": [look.winner.to_dict() for look in shown],
                "staleness": [
                    {"state": look.state, "changes": look.to_dict()["changes"]} for look in shown
                ],
            }
        )
    else:
        config_view.print_winners(shown, len(looks), place, stale=stale)


@click.command()
@key_argument
@one_key(short=True)
@db_option
@json_option
def show(key_words: tuple[str, ...], db: DatabasePlace | None, as_json: bool, **key: Any) -> None:
    """Print one key: winner, spread, default, all trials, failures.

    KEY is the short form 1024/128/8[/BATCHxKV_HEADS[/CONTEXT]]; options say the same, and the rest.
    """
    from patune import terminal
    from patune.configs.store import Store
    from patune.inspection import inspect_key

    asked = asked_key(key, key_words)
    with Store.open(database_place(db), create=False) as store:
        record = inspect_key(
            store, target=asked.target, problem=asked.problem, workload=asked.workload
        )
        place = store.place
    if as_json:
        print_json(record)
    else:
        terminal.print_key(record, place)


@click.command()
@key_argument
@one_key(short=True)
@click.option("--strict", is_flag=True, help="Exit 1 where nothing was tuned for the key here.")
@db_option
@json_option
@click.pass_context
def lookup(
    ctx: click.Context,
    /,
    key_words: tuple[str, ...],
    strict: bool,
    db: DatabasePlace | None,
    as_json: bool,
    **key: Any,
) -> None:
    """Print the knobs that serving uses for one key.

    Reads what a serving process would read: --db, else PATUNE_DB, else the user's database, and the shipped packs. KEY is the short form
    1024/128/8[/BATCHxKV_HEADS[/CONTEXT]]; options say the same, and the rest.
    """
    from patune import config_view
    from patune.configs import dispatcher
    from patune.configs.answer import MISSES

    dispatcher.reload(database_place(db))
    answer = answer_for(key, key_words)
    missed = answer.source in MISSES
    command = dispatcher.sweep_command(answer.problem, answer.workload, answer.target)
    if as_json:
        print_json({**answer.to_dict(), "fingerprint": dispatcher.fingerprint(answer.target.arch)})
    else:
        config_view.print_answer(answer.to_dict(), command if missed else None)
    if strict and missed:
        click.secho(
            f"error: nothing was tuned for this key on this device; run: {command}",
            fg="red",
            err=True,
        )
        ctx.exit(EXIT_ERROR)
    ctx.exit(EXIT_OK)


@click.command()
@key_argument
@one_key(short=True)
@db_option
@json_option
def why(key_words: tuple[str, ...], db: DatabasePlace | None, as_json: bool, **key: Any) -> None:
    """Say why serving uses these knobs for one key, and what stands behind them.

    KEY is the short form 1024/128/8[/BATCHxKV_HEADS[/CONTEXT]]; options say the same, and the rest.
    """
    from patune import why_view
    from patune.configs import dispatcher
    from patune.reasons import reasons_for

    place = database_place(db)
    dispatcher.reload(place)
    record = reasons_for(answer_for(key, key_words), place)
    if as_json:
        print_json(record)
    else:
        why_view.print_reasons(record, place)


@click.command()
@key_argument
@one_key(short=True)
@db_option
@json_option
def history(
    key_words: tuple[str, ...], db: DatabasePlace | None, as_json: bool, **key: Any
) -> None:
    """Print what was served for one key and since when: promotions, imports, retirements, the oldest first.

    KEY is the short form 1024/128/8[/BATCHxKV_HEADS[/CONTEXT]]; options say the same, and the rest.
    """
    from patune import why_view
    from patune.configs.store import Store
    from patune.inspection import nothing_stored

    asked = asked_key(key, key_words)
    target, problem, workload = asked.target, asked.problem, asked.workload
    with Store.open(database_place(db), create=False) as store:
        events = store.history(target=target, problem=problem, workload=workload)
        if not events:
            raise nothing_stored(store, target=target, problem=problem, workload=workload)
        place = store.place
    record = {
        "schema": HISTORY_SCHEMA,
        **asked.to_dict(),
        "events": [event.to_dict() for event in events],
    }
    if as_json:
        print_json(record)
    else:
        why_view.print_history(record, place)


@click.command()
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=DEFAULT_KEEP,
    show_default=True,
    help="Configurations of each key and environment that stay, the best first.",
)
@click.option(
    "--older-than",
    "before",
    metavar="AGE",
    callback=parse_age,
    help="Only trials that were recorded longer ago: 90d, 12w. Default: any.",
)
@click.option("--dry-run", is_flag=True, help="Print what would go; write nothing.")
@db_option
@json_option
def gc(
    keep: int, before: str | None, dry_run: bool, db: DatabasePlace | None, as_json: bool
) -> None:
    """Delete the trials of losers, and give their room back.

    What stays: winners, the defaults that they were compared with, the best of each key and environment, the blocklist, the history.
    """
    from patune import why_view
    from patune.configs.store import Store

    place = database_place(db)
    with Store.read(place) if dry_run else Store.open(place, create=False) as store:
        pruned = store.prune(keep=keep, before=before, dry_run=dry_run).to_dict()
        place = store.place
    record = {"schema": GC_SCHEMA, "dry_run": dry_run, "before": before, "keep": keep, **pruned}
    if as_json:
        print_json({**record, "database": str(place)})
    else:
        why_view.print_pruned(record, place)
