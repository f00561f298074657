"""Why an evaluation stops, besides the faults at run time, which are :class:`patune.errors.EmulatorError`.

Neither is one: a kernel that does not compile, or that the evaluator does not know, must never count as a planted bug that was caught.
"""

from __future__ import annotations


class RefusedProgramError(Exception):
    """Source that Gluon would not compile: a layout or type mismatch, a static assertion."""


class UnknownToEvaluatorError(Exception):
    """A name, type or inline assembly that has no numpy version here."""


def require(holds: bool, what: str, *seen: object) -> None:
    """Refuse source that breaks a rule of Gluon; ``what`` is formatted with what was seen only then."""
    if not holds:
        raise RefusedProgramError(what.format(*seen))
