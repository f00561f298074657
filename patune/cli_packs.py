"""The commands about packs: out of a database and into one, compared, checked, merged, signed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from patune.cli_options import db_option, filters, json_option, print_json
from patune.errors import EXIT_ERROR, EXIT_OK, InvalidValueError
from patune.settings import DB_FILE, database_place, parse_place

if TYPE_CHECKING:
    from patune.configs.pack import Pack
    from patune.settings import DatabasePlace

SCHEMA_FILE = Path(__file__).parent / "configs" / "pack.schema.json"
SQLITE_MAGIC = b"SQLite format 3\0"

file_argument = click.Path(path_type=Path)
public_key_option = click.option(
    "--public-key",
    type=file_argument,
    metavar="KEY",
    help="Refuse a pack that this key's holder has not signed: PACK.sig beside it.",
)


@click.command("export")
@click.argument("destination", type=click.Path(path_type=Path, allow_dash=True))
@filters()
@click.option(
    "--sign", "key", type=file_argument, metavar="KEY", help="Sign it: DESTINATION.sig beside it."
)
@db_option
@json_option
def export_winners(
    destination: Path,
    target: str | None,
    key: Path | None,
    db: DatabasePlace | None,
    as_json: bool,
    **core: int | None,
) -> None:
    """Write what is stored to a pack file for other machines.

    Winners with the next best knobs, robust winners, and the blocklist. DESTINATION is the file to write; - writes the pack to stdout.
    """
    from patune import pack_view
    from patune.configs import signing
    from patune.configs.packs import document_of, stored_pack, write_pack
    from patune.configs.store import Store

    to_stdout = str(destination) == "-"
    if to_stdout and key is not None:
        raise InvalidValueError("--sign needs a file to stand beside; DESTINATION is stdout.")
    signer = None if key is None else signing.load_signer(key)
    with Store.open(database_place(db), create=False) as store:
        pack = stored_pack(store, arch=target, **core)
    data = write_pack(document_of(pack), None if to_stdout else destination)
    if to_stdout:
        click.echo(data.decode(), nl=False)
        return
    signature = None if signer is None else signing.write_signature(destination, data, signer)
    if as_json:
        print_json(pack_view.export_document(pack, destination, signature))
    else:
        pack_view.print_export(pack, destination, signature)
        if signature is None and signing.signature_path(destination).exists():
            click.echo(
                f"{signing.signature_path(destination)} was made for another content: sign the pack again",
                err=True,
            )


@click.command("import")
@click.argument("source", type=file_argument)
@click.option("--dry-run", is_flag=True, help="Print what would change; write nothing.")
@public_key_option
@db_option
@json_option
def import_winners(
    source: Path, dry_run: bool, public_key: Path | None, db: DatabasePlace | None, as_json: bool
) -> None:
    """Take a pack file in.

    Where a key has a winner already, the better kind of evidence stays, then the newer, then the faster. Of robust winners the newer
    stays; what the pack's blocklist names is never tried again here.
    """
    import tempfile

    from patune import pack_view
    from patune.configs.packs import checked_pack, import_parsed
    from patune.configs.readonly import found_schema
    from patune.configs.store import Store

    pack = checked_pack(source, public_key=public_key)  # refused before a database is made
    place = home = database_place(db)
    with contextlib.ExitStack() as stack:
        if dry_run and isinstance(place, Path) and not found_schema(place):
            # an empty one elsewhere stands for the missing one
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()), DB_FILE)
        store = stack.enter_context(Store.open(home, create=True, forward=not dry_run))
        report = import_parsed(store, pack, source, dry_run=dry_run, public_key=public_key)
    if as_json:
        print_json(report.to_dict())
    else:
        pack_view.print_import(report.to_dict(), str(place))


@click.command("diff")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@json_option
@click.pass_context
def diff(ctx: click.Context, before: str, after: str, as_json: bool) -> None:
    """Print what differs from pack A to pack B.

    A and B are pack files, database files, or the URL of a database. Exits 0 when they say the same, 1 when not.
    """
    from patune import pack_view
    from patune.configs.pack_diff import diff_packs

    found = diff_packs(_contents(before), _contents(after))
    if as_json:
        print_json(found.to_dict())
    else:
        pack_view.print_diff(found, before, after)
    ctx.exit(EXIT_OK if found.equal else EXIT_ERROR)


def _contents(text: str) -> Pack:
    from patune.configs.pack_files import starts_with
    from patune.configs.packs import load_pack, stored_pack
    from patune.configs.store import Store

    place = parse_place(text)
    if isinstance(place, Path) and not starts_with(place, SQLITE_MAGIC):
        return load_pack(place)
    with Store.read(place) as store:
        return stored_pack(store)


@click.command("validate")
@click.argument("files", nargs=-1, type=file_argument)
@click.option("--schema", "print_schema", is_flag=True, help="Print the JSON Schema of packs.")
@public_key_option
@json_option
@click.pass_context
def validate(
    ctx: click.Context,
    files: tuple[Path, ...],
    print_schema: bool,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Say of pack files whether an import would take them.

    No database is touched. Exits 1 when a file is not valid.
    """
    from patune import pack_view
    from patune.configs.pack_check import check_file, validation_document

    if print_schema:
        click.echo(SCHEMA_FILE.read_text(encoding="utf-8"), nl=False)
        return
    if not files:
        raise InvalidValueError("No FILE is given; name pack files, or --schema.")
    found = [check_file(path, public_key=public_key) for path in files]
    document = validation_document(found)
    if as_json:
        print_json(document)
    else:
        pack_view.print_validation(document)
    ctx.exit(EXIT_OK if document["valid"] else EXIT_ERROR)


@click.command("merge")
@click.argument("files", nargs=-1, required=True, type=file_argument)
@click.option("-o", "--output", required=True, type=file_argument, help="The pack file to write.")
@click.option("--dry-run", is_flag=True, help="Print the conflicts; write nothing.")
@json_option
def merge(files: tuple[Path, ...], output: Path, dry_run: bool, as_json: bool) -> None:
    """Make one pack of several.

    Where more than one has a key, the better kind of evidence stays, then the newer, then the faster, as in an import.
    """
    from patune import pack_view
    from patune.configs.pack_merge import merge_packs
    from patune.configs.packs import checked_pack, document_of, write_pack

    merged = merge_packs((path, checked_pack(path)) for path in files)
    write_pack(document_of(merged.pack), None if dry_run else output)
    document = pack_view.merge_document(merged, output, dry_run=dry_run)
    if as_json:
        print_json(document)
    else:
        pack_view.print_merge(document)


@click.command("sign")
@click.argument("pack", type=file_argument)
@click.option("--key", required=True, type=file_argument, help="The private key: patune keygen.")
def sign(pack: Path, key: Path) -> None:
    """Sign a pack file: PACK.sig beside it.

    The pack is checked first, as an import would check it.
    """
    from patune.configs import signing
    from patune.configs.pack_files import read_bounded
    from patune.configs.packs import parse_pack

    signer = signing.load_signer(key)
    data = read_bounded(pack)
    parse_pack(pack, data)
    click.echo(f"signature written to {signing.write_signature(pack, data, signer)}")


@click.command("keygen")
@click.argument("key", type=file_argument)
def keygen(key: Path) -> None:
    """Make a key to sign packs with: KEY, for you alone, and KEY.pub, for whom your packs go to."""
    from patune.configs.signing import make_keys

    public = make_keys(key)
    click.echo(f"private key written to {key}: keep it to yourself")
    click.echo(f"public key written to {public}: patune import PACK --public-key {public}")


PACK_COMMANDS = (export_winners, import_winners, diff, validate, merge, sign, keygen)
