"""The commands around tuning: sweep, its replay on recorded pools, the table of models, the pool of a key, and a key's trials as an Optuna study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patune import missed_keys, sweep_request
from patune.cli_keys import asked_key
from patune.cli_options import (
    COMMAND_LINE,
    DEFAULT_EFFORT,
    EFFORT_HELP,
    EFFORTS,
    LISTING_SCHEMA,
    REPLAYED,
    ROBUST,
    SAMPLERS,
    db_option,
    json_option,
    many_keys,
    one_key,
    parse_duration,
    parse_samplers,
    print_json,
    split_variant,
    target_option,
)
from patune.errors import EXIT_OK, InvalidValueError
from patune.settings import database_place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patune.settings import DatabasePlace
    from patune.tuner.sweep import SweepOptions

RECORDED = Path(__file__).parents[1] / "benchmarks" / "data"  # of a checkout; a wheel has none


@click.command()
@many_keys(sweep_request.DEFAULT_TEXTS)
@click.option(
    "--models",
    multiple=True,
    metavar="NAME[:TP],...",
    help="Keys of these models (patune models); :8 picks one tensor-parallel degree.",
)
@click.option(
    "--from",
    "misses",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys of a JSON document of misses (docs/cli.md).",
)
@click.option(
    "--misses",
    "missed",
    is_flag=True,
    help="Keys that serving processes here asked for in vain (docs/cli.md).",
)
@click.option(
    "--stale",
    is_flag=True,
    help="Keys of stored winners that need a second look in this environment; key options narrow them.",
)
@target_option
@click.option(
    "--effort",
    type=click.Choice(EFFORTS),
    default=DEFAULT_EFFORT,
    show_default=True,
    help=EFFORT_HELP,
)
@click.option(
    "--trials", type=click.IntRange(min=1), help="Trials per key. Default: what the effort says."
)
@click.option(
    "--budget",
    metavar="TIME",
    callback=parse_duration,
    help="Stop after 90s, 10m, 1h. Default: no limit.",
)
@click.option("--fresh", is_flag=True, help="Do not count stored trials; try everything again.")
@click.option(
    "--robust",
    type=click.Choice(ROBUST),
    help="Also find one configuration for all workloads of a problem, by its worst or mean regret.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help=f"Default: {sweep_request.DEFAULT_SAMPLER}.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the keys and about how long they take; write nothing."
)
@click.option("--quiet", is_flag=True, help="No progress and no notes, only the result.")
@db_option
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    misses: Path | None,
    missed: bool,
    stale: bool,
    target: str | None,
    budget: float | None,
    dry_run: bool,
    quiet: bool,
    db: DatabasePlace | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tune keys, store every trial, and print the winners.

    Key options take several values, repeated or separated by commas (--qg 1,8); all their combinations are tuned.
    """
    from patune.configs.readonly import found_schema

    how = {name: options.pop(name) for name in SEARCH_OPTIONS}
    axes, variant = split_variant(options)
    path = database_place(db)
    wanted = sweep_request.KeyRequest(axes=axes, variant=variant, models=models, misses=misses)
    search = sweep_request.SearchRequest(**how, budget_s=budget, command=ctx.meta[COMMAND_LINE])
    if stale and missed:
        raise InvalidValueError(
            "--stale and --misses contradict each other: each says its own keys. Leave one of them out."
        )
    if stale:
        ctx.exit(_sweep_stale(wanted, search, target, path, (dry_run, as_json, quiet)))
    if missed:
        wanted, said = missed_keys.request_missed(wanted, path, target, take=not dry_run)
        if said and not quiet:
            click.echo(said, err=True)
        if not wanted.stored:
            ctx.exit(_nothing_missed(path, as_json))
    request, note = sweep_request.request_sweep(wanted, search, arch=target)
    found_schema(path)  # a file that is no config database is refused before any work
    if note and not quiet:
        click.echo(note, err=True)
    if dry_run:
        _plan(request, path, as_json)
    else:
        code = _run(request, path, as_json, quiet)
        if missed:
            missed_keys.forget_tuned(path, request)
        ctx.exit(code)


def _nothing_missed(path: DatabasePlace, as_json: bool) -> int:
    if as_json:
        print_json({"schema": LISTING_SCHEMA, "database": str(path), "keys": []})
    else:
        click.echo("No key was asked for in vain that is not tuned by now. Nothing to do.")
    return EXIT_OK


SEARCH_OPTIONS = ("effort", "trials", "fresh", "robust", "seed", "sampler")


def _sweep_stale(
    wanted: sweep_request.KeyRequest,
    search: sweep_request.SearchRequest,
    arch: str | None,
    path: DatabasePlace,
    shown: tuple[bool, bool, bool],
) -> int:
    """``--stale``: the keys come from the database; ``shown`` is --dry-run, --json and --quiet."""
    from patune import adopt_view
    from patune.stale_sweep import request_stale

    dry_run, as_json, quiet = shown
    found = request_stale(wanted, search, arch=arch, place=path, dry_run=dry_run)
    if found.note and not quiet:
        click.echo(found.note, err=True)
    if not as_json and (dry_run or found.options is None):
        adopt_view.print_stale(found, path)
    if found.options is None:
        if as_json:
            print_json({**found.to_dict(), "database": str(path)})
        return EXIT_OK
    if dry_run:
        _plan(found.options, path, as_json, stale=found.to_dict())
        return EXIT_OK
    return _run(found.options, path, as_json, quiet)


def _plan(
    options: SweepOptions,
    path: DatabasePlace,
    as_json: bool,
    stale: Mapping[str, Any] | None = None,
) -> None:
    from patune import sweep_view
    from patune.tuner.estimate import plan

    planned = plan(options, path).to_dict()
    if as_json:
        print_json({**(stale or {}), **planned, "database": str(path)})
    else:
        sweep_view.print_plan(planned, path)


def _run(options: SweepOptions, path: DatabasePlace, as_json: bool, quiet: bool) -> int:
    from patune import progress, sweep_view
    from patune.configs.store import Store
    from patune.tuner.sweep import run_sweep

    shown = progress.silent() if quiet else progress.watch()
    with Store.open(path, create=True) as store, shown as notify:
        report = run_sweep(options, store, notify)
    result = report.to_dict()
    if as_json:
        print_json(result)
        if not quiet:
            click.echo(f"database: {path}", err=True)
    else:
        sweep_view.print_report(result, path, sweep_request.read_back(result, path))
    return report.exit_code


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that --models knows, with the shapes of their attention."""
    from patune.model_table import MODELS

    table = [model.to_dict() for model in MODELS.values()]
    if as_json:
        print_json({"schema": LISTING_SCHEMA, "models": table})
    else:
        from patune import sweep_view

        sweep_view.print_models(table)


@click.command()
@one_key()
@click.option("--all", "whole", is_flag=True, help="List the whole pool.")
@json_option
def space(whole: bool, as_json: bool, **key: Any) -> None:
    """Print the pool of one key: what is feasible, and why the rest is not.

    Nothing is compiled. --json has the whole pool.
    """
    from patune.kernels.space_report import space_report

    asked = asked_key(key)
    report = space_report(asked.problem, asked.workload, asked.target).to_dict()
    if as_json:
        print_json(report)
    else:
        from patune import sweep_view

        sweep_view.print_space(report, whole=whole)


@click.command("export-study")
@click.argument("journal", type=click.Path(path_type=Path))
@one_key()
@click.option("--force", is_flag=True, help="Write over an existing file.")
@db_option
@json_option
def export_study(
    journal: Path, force: bool, db: DatabasePlace | None, as_json: bool, **key: Any
) -> None:
    """Write the trials of one key as an Optuna study.

    JOURNAL is the file to write, an Optuna journal: optuna-dashboard JOURNAL opens it.
    """
    from patune.configs.store import Store
    from patune.tuner import study_export

    asked = asked_key(key)
    with Store.open(database_place(db), create=False) as store:
        exported = study_export.export_study(
            store,
            journal,
            target=asked.target,
            problem=asked.problem,
            workload=asked.workload,
            force=force,
        )
    if as_json:
        print_json({"schema": LISTING_SCHEMA, **exported.to_dict()})
    else:
        click.echo(
            f"{exported.trials} trials of {exported.study} written to {journal}\n"
            f"look at them: optuna-dashboard {journal}"
        )


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of recorded pools. Default: benchmarks/data of a checkout.",
)
@click.option(
    "--sampler",
    "samplers",
    multiple=True,
    default=("model,local",),
    show_default=True,
    metavar="NAME,...",
    callback=parse_samplers,
    help=f"{', '.join(REPLAYED)}.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Per replay, at most.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Trials without a gain after which a replay stops; 0: none.",
)
@json_option
def simulate(
    data: Path | None,
    samplers: tuple[str, ...],
    seeds: int,
    trials: int,
    patience: int,
    as_json: bool,
) -> None:
    """Replay sweeps on recorded pools: how near to the optimum in how many trials.

    No GPU is used, nothing is stored. The model of a key learns from the other keys of the folder, never from its own.
    """
    from patune.tuner.recorded import read_pools
    from patune.tuner.simulate import ReplayOptions
    from patune.tuner.simulate import simulate as replay

    if data is None and not RECORDED.is_dir():
        raise InvalidValueError(
            f"--data is needed: this installation has no recorded pools ({RECORDED}); they are in the repository, benchmarks/data."
        )
    options = ReplayOptions(seeds=seeds, trials=trials, patience=patience)
    pools = read_pools(data or RECORDED)
    report = replay(pools, samplers, options, lambda name: click.echo(f"{name} ...", err=True))
    if as_json:
        print_json(report)
    else:
        from patune import simulate_view

        simulate_view.print_replays(report)
