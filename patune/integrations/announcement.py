"""The one line that says, per process and engine, where launch configurations come from. It opens nothing and touches no device."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import patune
from patune import settings
from patune.errors import PatuneError

LOGGER = logging.getLogger("patune")


@functools.cache
def announce(engine: str) -> None:
    """Log, once per process, that patune serves ``engine`` and where it will look configurations up.

    Args:
        engine: what was registered, as its users write it: ``transformers 5.23.0, attn_implementation='paged|patune'``.
    """
    LOGGER.info(
        "patune %s is registered with %s. Launch configurations: %s, then the packs that came with patune (%s), else computed.",
        patune.__version__,
        engine,
        _database(),
        ", ".join(shipped_archs()),
    )


def shipped_archs() -> tuple[str, ...]:
    """Architectures that packs came with."""
    folder = Path(patune.__file__).parent / "configs" / "packs"
    return tuple(sorted({path.parent.name for path in folder.glob("*/*.json")}))


def _database() -> str:
    """The database's place; a lookup, not this line, reads it."""
    try:
        place = settings.absolute_place()
    except PatuneError as error:
        return f"no database ({error})"
    missing = isinstance(place, Path) and not place.exists()
    return f"database {place}" + (" (not there; `patune sweep` makes one)" if missing else "")
