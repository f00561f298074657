"""The command line: a command parses its options, calls one library function and prints the result.

Results go to stdout, progress and messages to stderr; ``--json`` prints one JSON document and nothing else on stdout.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Literal

import click

from patune import __version__, sweep_request
from patune.cli_configs import gc, history, list_winners, lookup, show, why
from patune.cli_options import (
    COMMAND_LINE,
    KNOB_SETS,
    LISTING_SCHEMA,
    db_option,
    filters,
    jobs_option,
    json_option,
    many_keys,
    pack_option,
    print_json,
    split_variant,
    targets_option,
)
from patune.cli_packs import PACK_COMMANDS
from patune.cli_tune import export_study, models, simulate, space, sweep
from patune.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, InvalidValueError, PatuneError
from patune.settings import database_place, hide_password

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from patune.settings import DatabasePlace
    from patune.tuner.check_cases import CheckOptions

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """The command group: patune's errors become one red line and their exit code, Ctrl-C becomes 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of this file: the order in which a new user needs them."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the command line: the database records which command made a row."""
        ctx.meta[COMMAND_LINE] = shlex.join(["patune", *map(hide_password, args)])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; no traceback for what a user can cause."""
        try:
            return super().invoke(ctx)
        except PatuneError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            if isinstance(error, InvalidValueError):
                click.echo(f"Try 'patune {ctx.invoked_subcommand} --help' for help.", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.secho("interrupted", fg="red", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=Commands, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, prog_name="patune", message="%(prog)s %(version)s")
def main() -> None:
    """Find, prove, store and serve launch configurations of paged-attention decode kernels.

    New here? Run: patune doctor
    """


@main.command()
@db_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, db: DatabasePlace | None, as_json: bool) -> None:
    """Print what is here, what is missing, what to run next."""
    from patune import terminal
    from patune.doctor import diagnose

    diagnosis = diagnose(db)
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        terminal.print_diagnosis(diagnosis)
    ctx.exit(EXIT_OK if diagnosis.healthy else EXIT_ERROR)


for command in (sweep, models, space, simulate):
    main.add_command(command)


@main.command()
@many_keys(sweep_request.DEFAULT_TEXTS, sizes=False)
@targets_option
@click.option(
    "--knobs",
    type=click.Choice(KNOB_SETS),
    default="default",
    show_default=True,
    help="Default knobs of a small and a large batch; or these and each knob moved alone to all its values.",
)
@jobs_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    /,
    targets: tuple[str, ...],
    knobs: Literal["default", "grid"],
    jobs: int | None,
    as_json: bool,
    **key: Any,
) -> None:
    """Compile and prove the kernels without a GPU, for CI.

    Every target, problem and knobs is compiled ahead of time; spills and builds over the target's shared memory are refused. What is left
    has to pass the correctness gate in the ISA emulator on gfx942 and gfx950; sm_90 ends there. Nothing is timed, no GPU is touched, nothing
    is stored.

    Exits 1 when anything that is feasible failed. A build that spills is a failure with default knobs; with others it is rejected, as a
    sweep would do, and does not count.
    """
    options = sweep_request.request_check(*split_variant(key), archs=targets, knobs=knobs)
    ctx.exit(_check(options, jobs, as_json))


def _check(options: CheckOptions, jobs: int | None, as_json: bool) -> int:
    from patune.check_table import CheckTable, progress_line
    from patune.tuner.check_run import check

    table = None if as_json else CheckTable(options)
    report = check(options, jobs=jobs, notify=progress_line if table is None else table.show)
    if table is None:
        print_json(report.to_dict())
    else:
        table.end(report)
    return report.exit_code


@main.command()
@filters()
@pack_option
@click.option(
    "--adopt",
    is_flag=True,
    help="Gate and time again the best that is stored for winners that need a second look, and store what wins.",
)
@click.option("--all", "every", is_flag=True, help="With --adopt: for every winner.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="With --adopt: print the winners that it would be for; write nothing.",
)
@jobs_option
@db_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    target: str | None,
    pack: Path | None,
    adopt: bool,
    every: bool,
    dry_run: bool,
    jobs: int | None,
    db: DatabasePlace | None,
    as_json: bool,
    **core: int | None,
) -> None:
    """Run the correctness gate again on stored winners.

    They are built and gated with what is here now: this Triton, this compiler, these kernels. gfx942 and gfx950 run in the ISA emulator,
    sm_90 on any GPU of that architecture. Without --adopt nothing is timed and nothing is written. Exits 1 when a winner no longer passes,
    4 when none fails but some could not be verified here.

    With --adopt a winner that holds becomes current: it is fresh again. One that no longer passes is retired, and the best of the others
    that are stored for its key takes its place.
    """
    if adopt:
        if pack is not None:
            raise InvalidValueError(
                f"--pack {pack} and --adopt contradict each other: a pack is not written to. Import it first, or leave one of them out."
            )
        place = database_place(db)
        ctx.exit(
            _adopt(place, ctx.meta[COMMAND_LINE], (every, dry_run, as_json), jobs, target, core)
        )
    for name, on in (("--all", every), ("--dry-run", dry_run)):
        if on:
            raise InvalidValueError(f"{name} goes with --adopt, which is not given.")
    from patune import verify_table
    from patune.tuner.verify import read_winners, verify_winners

    source, winners = read_winners(db, pack, arch=target, **core)
    with verify_table.progress() as notify:
        report = verify_winners(source, winners, jobs=jobs, notify=notify)
    if as_json:
        print_json(report.to_dict())
    else:
        verify_table.print_verification(report)
    ctx.exit(report.exit_code)


def _adopt(
    place: DatabasePlace,
    command: str,
    how: tuple[bool, bool, bool],
    jobs: int | None,
    arch: str | None,
    core: Mapping[str, int | None],
) -> int:
    """``--adopt``; ``how`` is --all, --dry-run and --json."""
    from patune import adopt_view, progress
    from patune.configs.store import Store
    from patune.second_look import Present
    from patune.tuner.adopt import adopt, stored_answer, sweep_into
    from patune.tuner.verify import device_for

    every, dry_run, as_json = how
    with Store.read(place) if dry_run else Store.open(place, create=False) as store:
        winners = store.winners(arch=arch, **core)
        present = Present()
        looks = [present.look(w) for w in winners] if every else present.stale(winners)
        device = device_for([look.winner for look in looks])
        if dry_run:
            if as_json:
                print_json({"schema": LISTING_SCHEMA, "winners": [k.to_dict() for k in looks]})
            else:
                adopt_view.print_plan(looks, device, len(winners), place, every=every)
            return EXIT_OK
        report = adopt(
            looks,
            database=str(place),
            device=device,
            command=command,
            sweep=sweep_into(store, progress.watch, jobs),
            answer=stored_answer(place),
        )
    if as_json:
        print_json(report.to_dict())
    else:
        adopt_view.print_adoption(report, len(winners))
    return report.exit_code


for command in (list_winners, show, lookup, why, history, gc):
    main.add_command(command)


for command in PACK_COMMANDS:
    main.add_command(command)
main.add_command(export_study)


@main.command()
@db_option
@json_option
def where(db: DatabasePlace | None, as_json: bool) -> None:
    """Print the paths that patune reads and writes."""
    from patune.doctor import places

    paths = places(db)
    if as_json:
        print_json(paths)
    else:
        for name, path in paths.items():
            click.echo(f"{name}: {path}")
