"""What ``patune sweep`` and ``patune check`` take when nothing is said, and the keys that their options ask for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from patune import settings
from patune.errors import UnsupportedProblemError, reject
from patune.problem import Problem, Workload
from patune.target import ARCHS, Target, detect_target, require_device, resolve_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from patune.tuner.check_cases import CheckOptions, KnobSet
    from patune.tuner.sweep import SweepOptions

DEFAULTS: dict[str, tuple[int, ...]] = {
    "block_size": (1024,),
    "head_dim": (64, 128),
    "qg": (1, 4, 8, 16),
    "query_length": (1,),
    "kv_heads": (8,),
}
BATCH_CONTEXT = ((1, 4096), (16, 4096), (128, 4096))
BATCH_CONTEXT_MEASURED = (*BATCH_CONTEXT, (1, 32768))  # emulated, 32768 tokens take minutes a trial
DEFAULT_TEXTS = {name: ",".join(map(str, values)) for name, values in DEFAULTS.items()} | {
    "batch": "1,16,128",
    "context": "4096, and 32768 for batch 1 where it is measured",
}
OTHER_AXIS = {"batch": (128,), "context": (4096,)}  # when only the other one is given
CHECK_ARCHS = ("gfx942", "gfx950", "sm_90")
TRIALS = {"measured": 32, "emulated": 8}  # per key
NO_GPU_NOTE = (
    "No usable GPU here, so {target} is compiled and emulated (evidence `emulated`: checked and ranked by counted work, "
    "not timed); choose gfx950 with --target gfx950, or run on a machine with an sm_90 GPU to measure it."
)


def evidence_of(target: Target) -> str:
    """The kind of evidence that a sweep of this target yields: NVIDIA is measured, AMD emulated."""
    return "measured" if target.vendor == "nvidia" else "emulated"


def _axis(axes: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    return axes.get(name) or DEFAULTS[name]


def problems_of(
    axes: Mapping[str, Sequence[int]], variant: Mapping[str, Any]
) -> tuple[Problem, ...]:
    """The product of the problem's axes, without repeats.

    Args:
        axes: values per axis; a missing or empty one takes its default.
        variant: the other fields of :class:`Problem`.

    Raises:
        InvalidValueError: a value is not allowed.
    """
    names = ("block_size", "head_dim", "qg", "query_length")
    product = itertools.product(*(_axis(axes, name) for name in names))
    fields = (dict(zip(names, values, strict=True)) for values in dict.fromkeys(product))
    return tuple(Problem.from_dict({**core, **variant}) for core in fields)


def workloads_of(axes: Mapping[str, Sequence[int]], evidence: str) -> tuple[Workload, ...]:
    """The product of the workload's axes; the default sizes when neither batch nor context is given.

    Raises:
        InvalidValueError: a value is not allowed.
    """
    batches, contexts = axes.get("batch"), axes.get("context")
    if batches or contexts:
        sizes = tuple(
            itertools.product(batches or OTHER_AXIS["batch"], contexts or OTHER_AXIS["context"])
        )
    else:
        sizes = BATCH_CONTEXT_MEASURED if evidence == "measured" else BATCH_CONTEXT
    product = itertools.product(sizes, _axis(axes, "kv_heads"))
    return tuple(
        Workload(batch=batch, kv_heads=kv_heads, context=context)
        for (batch, context), kv_heads in dict.fromkeys(product)
    )


def _arch_of_environment() -> str | None:
    arch = settings.target_arch()
    if arch is not None and arch not in ARCHS:
        raise reject("PATUNE_TARGET", arch, tuple(ARCHS))
    return arch


def check_supported(problems: Sequence[Problem], target: Target) -> None:
    """Refuse problems that no kernel of the target computes.

    Raises:
        UnsupportedProblemError: says which and why.
    """
    from patune.kernels.feasibility import unsupported

    for problem in problems:
        if reason := unsupported(problem, target):
            raise UnsupportedProblemError(
                f"{reason}. Choose other values, or another --target ({', '.join(ARCHS)})."
            )


def request_sweep(
    axes: Mapping[str, Sequence[int]],
    variant: Mapping[str, Any],
    *,
    arch: str | None,
    trials: int | None,
    budget_s: float | None,
    seed: int,
    sampler: str,
    command: str,
) -> tuple[SweepOptions, str]:
    """The tuner's options, and one sentence about the target when nobody chose it and no GPU did (else empty).

    Raises:
        InvalidValueError: a value is not allowed.
        UnsupportedProblemError: no kernel of the target computes one of the problems.
        NoUsableGpuError: the target has to be measured and its device is not here.
    """
    problems = problems_of(axes, variant)
    workloads_of(axes, "emulated")  # refuses bad values before anything slow is imported
    arch = arch or _arch_of_environment()
    if arch is not None:
        check_supported(problems, Target.named(arch))  # before torch is imported
    target = resolve_target(arch)
    require_device(target)
    check_supported(problems, target)
    note = ""
    if arch is None and detect_target() is None:
        note = NO_GPU_NOTE.format(target=f"{target.arch} ({target.device_name})")
    from patune.tuner.sweep import SweepOptions

    evidence = evidence_of(target)
    options = SweepOptions(
        target=target,
        problems=problems,
        workloads=workloads_of(axes, evidence),
        trials=trials or TRIALS[evidence],
        budget_s=budget_s,
        seed=seed,
        sampler=sampler,
        command=command,
    )
    return options, note


def request_check(
    axes: Mapping[str, Sequence[int]],
    variant: Mapping[str, Any],
    *,
    archs: Sequence[str],
    knobs: KnobSet,
) -> CheckOptions:
    """What a check looks at: the sweep's default problems and, for default knobs, its workloads; no device is looked for.

    Raises:
        InvalidValueError: a value is not allowed.
    """
    from patune.tuner.check_cases import CheckOptions

    return CheckOptions(
        targets=tuple(Target.named(arch) for arch in archs or CHECK_ARCHS),
        problems=problems_of(axes, variant),
        workloads=workloads_of({}, "emulated"),
        knobs=knobs,
    )


def read_back(report: Mapping[str, Any], path: Path) -> str | None:
    """The shell line that reads the last winner of a sweep's report back; None when there is no winner."""
    from patune import wording

    keys = [key["key"] for key in report["keys"] if key["winner"] is not None]
    if not keys:
        return None
    arch = report["target"]["arch"]
    return wording.lookup_command(
        keys[-1],
        keys[-1]["workload"],
        target=None if resolve_target(settings.target_arch()).arch == arch else arch,
        db=None if path == settings.database_path() else path,
    )
