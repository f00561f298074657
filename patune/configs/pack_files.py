"""How packs, keys and signatures are read and written: what is not a plain file is refused, and a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING, NoReturn

from patune.errors import DocumentError, InvalidValueError

if TYPE_CHECKING:
    from pathlib import Path

MAX_PACK_B = 32 * 2**20  # 5,800 winners with five candidates each, at 5.7 kB


def read_bounded(source: Path, what: str = "pack", limit_b: int | None = None) -> bytes:
    """The bytes of a plain file, or of a link to one.

    Args:
        source: the file.
        what: what it should be, for the message.
        limit_b: most bytes that it may have; None for a pack's.

    Raises:
        DocumentError: it is missing, no plain file (a pipe or a device would not end), too large, or cannot be read.
    """
    most = MAX_PACK_B if limit_b is None else limit_b
    data = _read(source, what, most + 1)
    if len(data) > most:
        raise DocumentError(f"{source} is larger than a {what} can be; allowed: {most} bytes.")
    return data


def starts_with(source: Path, magic: bytes) -> bool:
    """Whether a plain file begins with these bytes.

    Raises:
        DocumentError: it is missing, no plain file, or cannot be read.
    """
    return _read(source, "pack or database", len(magic)) == magic


def _read(source: Path, what: str, most: int) -> bytes:
    try:
        if not stat.S_ISREG(source.stat().st_mode):
            raise DocumentError(f"{source}: there is no such {what} file; allowed: a plain file.")
        # Not blocking: it may have become a pipe since.
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DocumentError(f"{source} is no plain file any more.")
            return file.read(most)
    except (FileNotFoundError, NotADirectoryError):
        raise DocumentError(f"{source}: there is no such {what} file.") from None
    except DocumentError:
        raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DocumentError(f"{source} cannot be read: {why}.") from error


def check_destination(destination: Path, what: str = "pack") -> None:
    """Refuse a place where something else than a plain file is: a link would lead elsewhere, a device would be replaced.

    Raises:
        InvalidValueError: it is a link, a folder, a pipe or a device.
    """
    try:
        mode = destination.lstat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        _refuse(destination, what, error)
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder"}
    if not stat.S_ISREG(mode):
        kind = kinds.get(stat.S_IFMT(mode), "a device or a pipe")
        raise InvalidValueError(
            f"The {what} cannot be written to {destination}: it is {kind}. Name a file in a folder that you can write to."
        )


def write_whole(
    destination: Path, data: bytes, what: str = "pack", *, mode: int = 0o666, fresh: bool = False
) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Args:
        destination: the file; its folder is made.
        data: its content.
        what: what it is, for the message.
        mode: its permissions, before the umask.
        fresh: refuse a file that is there.

    Raises:
        InvalidValueError: it cannot be written, or is there and must not be.
    """
    check_destination(destination, what)
    # A name that nobody can have prepared a link under.
    part = destination.with_name(f".{destination.name[:200]}.{secrets.token_hex(8)}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(part, flags, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                os.link(part, destination)  # fails where the name is taken, in one step
            else:
                part.replace(destination)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
    except FileExistsError:
        raise InvalidValueError(
            f"The {what} cannot be written to {destination}: a file is there. Name another one, or move that one away."
        ) from None
    except (OSError, ValueError) as error:
        _refuse(destination, what, error)


def _refuse(destination: Path, what: str, error: OSError | ValueError) -> NoReturn:
    why = error.strerror if isinstance(error, OSError) else error
    raise InvalidValueError(
        f"The {what} cannot be written to {destination}: {why}. Name a file in a folder that you can write to."
    ) from error
