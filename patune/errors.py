"""Every error a user can cause, with the exit code that the command line gives it.

A message says what happened, where, which value was seen, which values are allowed, and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOTHING_PASSED = 3
EXIT_NO_GPU = 4
EXIT_INTERRUPTED = 130


class PatuneError(Exception):
    """Base class of everything that patune raises on purpose."""

    exit_code: ClassVar[int] = EXIT_ERROR


class InvalidValueError(PatuneError, ValueError):
    """A value outside of what is allowed: an option, a tensor shape, a field of a document."""

    exit_code: ClassVar[int] = EXIT_USAGE


class UnsupportedProblemError(InvalidValueError):
    """A valid problem that no kernel of the chosen target computes; the message names the alternative."""


class DocumentError(InvalidValueError):
    """A JSON document (config pack, stored record) that does not say what its schema requires."""


class DatabaseError(PatuneError):
    """The config database cannot be used as it is; the file was left untouched."""

    exit_code: ClassVar[int] = EXIT_USAGE


class EmulatorError(PatuneError):
    """The emulated program did something that the hardware would not forgive, or that the emulator does not know."""


class MissError(PatuneError):
    """A strict lookup found nothing tuned; the message names the command that tunes the key."""


class NothingPassedError(PatuneError):
    """A sweep ended and no configuration of a key passed the correctness gate."""

    exit_code: ClassVar[int] = EXIT_NOTHING_PASSED


class NoUsableGpuError(PatuneError):
    """The chosen target has to be measured on a device that this machine does not have."""

    exit_code: ClassVar[int] = EXIT_NO_GPU


def reject(
    name: str, seen: object, allowed: Iterable[object] | str, hint: str = ""
) -> InvalidValueError:
    """Build the error for one bad value, to be raised by the caller."""
    text = allowed if isinstance(allowed, str) else ", ".join(str(a) for a in allowed)
    return InvalidValueError(
        f"{name}={seen!r} is not allowed; allowed: {text}." + (f" {hint}" if hint else "")
    )
