"""Says of pack files whether an import would take them, without a database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune.configs.pack import document_of, pack_text
from patune.configs.pack_files import read_bounded
from patune.configs.pack_import import checked_pack
from patune.errors import DocumentError
from patune.kernels.feasibility import is_feasible

if TYPE_CHECKING:
    from pathlib import Path

VALIDATION_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """What was found about one pack file.

    Attributes:
        error: why an import would refuse it; None when it would not.
        schema: the pack's.
        winners, candidates, robust, blocklist: how many.
        skipped: winners and robust winners that this version's kernels cannot run.
        canonical: the bytes are those that an export of the same content writes.
        signed: by the key that was asked for; None when none was.
    """

    path: str
    error: str | None = None
    schema: int | None = None
    winners: int = 0
    candidates: int = 0
    robust: int = 0
    blocklist: int = 0
    skipped: int = 0
    canonical: bool = False
    signed: bool | None = None

    @property
    def valid(self) -> bool:
        """An import would take it."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {"path": fields.pop("path"), "valid": self.valid, **fields}


def check_file(path: Path, *, public_key: Path | None = None) -> CheckedFile:
    """Read one file as an import would.

    Args:
        path: the pack file.
        public_key: also ask for a signature of this key.
    """
    try:
        pack = checked_pack(path, public_key=public_key)
        data = read_bounded(path)
    except DocumentError as error:
        return CheckedFile(path=str(path), error=str(error))
    every = [(w.knobs, w.problem, w.target) for w in pack.winners]
    every += [(w.knobs, w.problem, w.target) for w in pack.robust]
    return CheckedFile(
        path=str(path),
        schema=pack.schema,
        winners=len(pack.winners),
        candidates=sum(len(beside) for beside in pack.candidates.values()),
        robust=len(pack.robust),
        blocklist=len(pack.blocklist),
        skipped=sum(is_feasible(*one) is not None for one in every),
        canonical=data == pack_text(document_of(pack)).encode(),
        signed=None if public_key is None else True,
    )


def validation_document(files: list[CheckedFile]) -> dict[str, Any]:
    """What ``patune validate --json`` prints."""
    return {
        "schema": VALIDATION_SCHEMA,
        "valid": all(one.valid for one in files),
        "files": [one.to_dict() for one in files],
    }
