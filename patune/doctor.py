"""What this machine has, what it lacks, and what to run next: ``patune doctor`` and ``patune where``."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import platform
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from patune.errors import DatabaseError
from patune.second_look import Present, why_not_here
from patune.settings import capture_folder, database_place
from patune.target import ARCHS, Target, detect_target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patune.configs.winner import Winner
    from patune.settings import DatabasePlace, ServerUrl

DOCTOR_SCHEMA = 1
TRITON_WHEELS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu")  # all own `triton/`
C_COMPILERS = ("cc", "gcc", "clang")  # Triton builds its kernel launchers with one of them
SECOND_LOOKS, MISSES = "second looks", "misses"
ADOPT_COMMAND, MISSES_COMMAND = "patune verify --adopt", "patune sweep --misses"
SHOWN_CHANGES = 3
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


def _check_database(place: DatabasePlace, here: Target | None) -> list[Finding]:
    """What is stored, what of it needs a second look, and what was asked for in vain."""
    from patune.configs.readonly import SCHEMA, found_schema, older

    try:
        schema = found_schema(place)
        if not schema:
            detail = f"{place} (none yet; a sweep creates it)"
            return [Finding(name="database", state="note", detail=detail)]
        if schema < SCHEMA:
            return [
                Finding(
                    name="database",
                    state="note",
                    detail=older(place, schema),
                    advice="lookups answer without it until then; a copy of how it was stays beside it",
                )
            ]
        return _look_into(place, here)
    except DatabaseError as error:
        return [
            Finding(
                name="database",
                state="broken",
                detail=str(error),
                advice="choose another file with PATUNE_DB or --db",
            )
        ]


def _look_into(place: DatabasePlace, here: Target | None) -> list[Finding]:
    from patune.configs.store import Store

    with Store.read(place) as store:
        winners, misses = store.winners(), store.misses()
    found = [Finding(name="database", state="ok", detail=f"{place} ({len(winners)} winners)")]
    if winners:
        found.append(_check_second_looks(winners, here))
    files = _capture_files(place)
    if misses or files:
        keys = {(miss.target, miss.problem, miss.workload) for miss in misses}
        calls = sum(miss.calls for miss in misses)
        found.append(
            Finding(
                name=MISSES,
                state="note",
                detail=f"{len(keys)} keys that nothing was tuned for ({calls} calls) are stored, {files} capture files wait to be taken in",
                advice=f"run: {MISSES_COMMAND}",
            )
        )
    return found


def _check_second_looks(winners: Sequence[Winner], here: Target | None) -> Finding:
    """How many winners were stored in another environment than the one that is here, and for how many this machine can tell."""
    looks = Present().stale(winners)
    if not looks:
        return Finding(name=SECOND_LOOKS, state="ok", detail="no stored winner needs one")
    able = sum(not why_not_here(look.winner, here) for look in looks)
    changes = Counter(f"{look.winner.target.arch}: {', '.join(look.texts)}" for look in looks)
    causes = "; ".join(f"{count} of {text}" for text, count in changes.most_common(SHOWN_CHANGES))
    detail = f"{len(looks)} of {len(winners)} stored winners need one; they are served ({causes})"
    advice = f"run: {ADOPT_COMMAND}"
    if able < len(looks):
        advice += f" ({able} of them can have it on this machine)"
    return Finding(name=SECOND_LOOKS, state="note", detail=detail, advice=advice)


def _capture_files(place: DatabasePlace) -> int:
    """Files that serving processes left, and no sweep has taken in."""
    folder = capture_folder(place)
    return len(list(folder.glob("*.json"))) if folder is not None and folder.is_dir() else 0


def _fingerprint(place: DatabasePlace) -> Finding:
    from patune.configs import dispatcher

    dispatcher.suspend_capture()
    dispatcher.reload(place)
    return Finding(
        name="fingerprint",
        state="ok",
        detail=dispatcher.fingerprint(),
        advice="processes whose fingerprints are equal answer alike",
    )


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
    place = database_place(db)
    stored = _check_database(place, here)
    findings += [_check_gpu(here), *stored]
    if all(finding.state != "broken" for finding in findings):
        findings.append(_fingerprint(place))
    return Diagnosis(
        findings=tuple(findings), targets=_target_rows(here), run_next=_run_next(findings)
    )


def _run_next(findings: Sequence[Finding]) -> str:
    """What repairs, else what makes stored winners current, else what tunes, else what shows."""
    broken = next((finding for finding in findings if finding.state == "broken"), None)
    if broken is not None:
        return broken.advice
    named = {finding.name: finding for finding in findings}
    looks = named.get(SECOND_LOOKS)
    if looks is not None and looks.state == "note" and "(0 of them" not in looks.advice:
        return ADOPT_COMMAND
    if MISSES in named:
        return MISSES_COMMAND
    return "patune sweep" if "(none yet" in named["database"].detail else "patune list"


def places(db: str | Path | ServerUrl | None = None) -> dict[str, str]:
    """Every path that patune reads or writes: the database, Triton's cache, the packs shipped with the package."""
    from triton import knobs

    packs = importlib.resources.files("patune.configs") / "packs"
    return {
        "database": str(database_place(db)),
        "triton_cache": str(knobs.cache.dir),
        "packs": str(packs),
    }
