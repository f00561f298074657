"""What this machine has, what it lacks, and what to run next: ``patune doctor`` and ``patune where``."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patune.errors import DatabaseError
from patune.settings import database_place
from patune.target import ARCHS, Target, detect_target

if TYPE_CHECKING:
    from patune.settings import DatabasePlace, ServerUrl

DOCTOR_SCHEMA = 1
TRITON_WHEELS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu")  # all own `triton/`
C_COMPILERS = ("cc", "gcc", "clang")  # Triton builds its kernel launchers with one of them
State = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at.
        state: ``broken`` stops patune from working; ``note`` is worth knowing.
        detail: what was found.
        advice: what to do about it; empty when there is nothing to do.
    """

    name: str
    state: State
    detail: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """JSON types only."""
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "advice": self.advice,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that ``patune doctor`` prints.

    Attributes:
        findings: in reading order.
        targets: per architecture: ``arch``, ``device_name``, ``evidence`` of a sweep here (None: not possible), ``meaning``.
        run_next: the command that makes sense now.
    """

    findings: tuple[Finding, ...]
    targets: tuple[dict[str, str | None], ...]
    run_next: str

    @property
    def healthy(self) -> bool:
        """Nothing is broken."""
        return all(finding.state != "broken" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema": DOCTOR_SCHEMA,
            "healthy": self.healthy,
            "findings": [finding.to_dict() for finding in self.findings],
            "targets": list(self.targets),
            "run_next": self.run_next,
        }


def _check_torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            name="torch",
            state="broken",
            detail=f"cannot be imported: {error}",
            advice="pip install torch",
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    return Finding(name="torch", state="ok", detail=f"{torch.__version__} ({build})")


def _check_triton() -> Finding:
    try:
        import triton
        from triton.experimental import gluon as _gluon  # noqa: F401  # what the kernels are written in
    except (ImportError, OSError) as error:
        return Finding(
            name="triton",
            state="broken",
            detail=f"cannot be imported: {error}",
            advice="pip install 'triton>=3.6'",
        )
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    wheels = [name for name in TRITON_WHEELS if name in installed]
    if len(wheels) > 1:
        return Finding(
            name="triton",
            state="broken",
            detail=f"{triton.__version__}, but {' and '.join(wheels)} overwrite each other's files",
            advice=f"pip uninstall {' '.join(wheels)}, then install the one that your torch asks for",
        )
    return Finding(name="triton", state="ok", detail=triton.__version__)


def _check_gpu(here: Target | None) -> Finding:
    if here is not None:
        units = "SMs" if here.vendor == "nvidia" else "CUs"
        if not any(shutil.which(name) for name in C_COMPILERS):
            return Finding(
                name="GPU",
                state="broken",
                detail=f"{here.device_name}, but no C compiler: Triton builds its launchers with one",
                advice="install gcc or clang",
            )
        return Finding(
            name="GPU",
            state="ok",
            detail=f"{here.device_name} ({here.arch}, {here.compute_units} {units})",
        )
    return Finding(
        name="GPU",
        state="note",
        detail="none of " + ", ".join(ARCHS) + " that torch can use",
        advice="sweeps compile for AMD targets and emulate them; timing needs the device",
    )


def _exists(place: DatabasePlace) -> bool:
    return place.exists() if isinstance(place, Path) else True


def _check_database(path: DatabasePlace) -> Finding:
    if not _exists(path):
        return Finding(
            name="database", state="note", detail=f"{path} (none yet; a sweep creates it)"
        )
    from patune.configs.readonly import SCHEMA, found_schema, older
    from patune.configs.store import Store

    try:
        schema = found_schema(path)
        if schema == 0 and not isinstance(path, Path):
            detail = f"{path} answers (no tables yet; a sweep creates them)"
            return Finding(name="database", state="note", detail=detail)
        if 0 < schema < SCHEMA:
            return Finding(
                name="database",
                state="note",
                detail=older(path, schema),
                advice="lookups answer without it until then; a copy of how it was stays beside it",
            )
        with Store.open(path, create=False) as store:
            winners = store.winners()
    except DatabaseError as error:
        return Finding(
            name="database",
            state="broken",
            detail=str(error),
            advice="choose another file with PATUNE_DB or --db",
        )
    answers = "" if isinstance(path, Path) else "answers; "
    return Finding(name="database", state="ok", detail=f"{path} ({answers}{len(winners)} winners)")


def _target_rows(here: Target | None) -> tuple[dict[str, str | None], ...]:
    rows: list[dict[str, str | None]] = []
    for arch in ARCHS:
        target = here if here is not None and here.arch == arch else Target.named(arch)
        evidence, meaning = None, f"needs an {arch} GPU here; kernels compile for it anywhere"
        if target.vendor == "amd":
            evidence = "emulated"
            meaning = "compiled, run in the ISA emulator, ranked by counted work; never a latency"
        elif target == here:
            evidence, meaning = "measured", "timed on this device after the correctness gate"
        rows.append(
            {
                "arch": arch,
                "device_name": target.device_name,
                "evidence": evidence,
                "meaning": meaning,
            }
        )
    return tuple(rows)


def diagnose(db: str | Path | ServerUrl | None = None) -> Diagnosis:
    """Look at Python, torch, Triton, the GPU, the targets and the database; change nothing."""
    findings = [
        Finding(name="Python", state="ok", detail=platform.python_version()),
        _check_torch(),
        _check_triton(),
    ]
    usable = all(finding.state != "broken" for finding in findings)
    here = detect_target() if usable else None
    path = database_place(db)
    database = _check_database(path)
    findings += [_check_gpu(here), database]
    broken = next((finding for finding in findings if finding.state == "broken"), None)
    if broken is not None:
        run_next = broken.advice
    else:
        run_next = "patune list" if _exists(path) else "patune sweep"
    return Diagnosis(findings=tuple(findings), targets=_target_rows(here), run_next=run_next)


def places(db: str | Path | ServerUrl | None = None) -> dict[str, str]:
    """Every path that patune reads or writes: the database, Triton's cache, the packs shipped with the package."""
    from triton import knobs

    packs = importlib.resources.files("patune.configs") / "packs"
    return {
        "database": str(database_place(db)),
        "triton_cache": str(knobs.cache.dir),
        "packs": str(packs),
    }
