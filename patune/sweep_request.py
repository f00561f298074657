"""What ``patune sweep`` and ``patune check`` take when nothing is said, and the keys that their options ask for."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patune import settings, wording
from patune.errors import InvalidValueError, UnsupportedProblemError, reject
from patune.misses import by_saving, read_misses
from patune.models import DECIDED, model_keys, parse_models
from patune.problem import Problem, Workload
from patune.second_look import evidence_of
from patune.target import ARCHS, Target, detect_target, require_device, resolve_target
from patune.tuner.efforts import EFFORTS
from patune.tuner.progress import Key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from patune.settings import DatabasePlace
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
DEFAULT_SAMPLER = "model"
OTHER_AXIS = {"batch": (128,), "context": (4096,)}  # when only the other one is given
ROBUST_NEEDS = (
    "--robust finds one configuration for several workloads: give it at least two of every problem"
)
CHECK_ARCHS = ("gfx942", "gfx950", "sm_90")
NO_GPU_NOTE = (
    "No usable GPU here, so {target} is compiled and emulated (evidence `emulated`: checked and ranked by counted work, "
    "not timed); choose gfx950 with --target gfx950, or run on a machine with an sm_90 GPU to measure it."
)


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


def arch_of_environment() -> str | None:
    """PATUNE_TARGET, or None.

    Raises:
        InvalidValueError: it is no known architecture.
    """
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


def model_sizes(axes: Mapping[str, Sequence[int]], evidence: str) -> tuple[tuple[int, int], ...]:
    """(batch, context) of the workloads, each once."""
    workloads = workloads_of({name: axes.get(name, ()) for name in ("batch", "context")}, evidence)
    return tuple((w.batch, w.context) for w in workloads)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """Where the keys of a sweep come from.

    Attributes:
        axes: values per axis; a missing or empty one takes its default.
        variant: the other fields of :class:`Problem`, as far as they were given.
        models: what ``--models`` was given, with its commas; empty for none.
        misses: a document of misses; None for none.
        stored: the keys of ``--misses``, in their order; None without that option.
    """

    axes: Mapping[str, Sequence[int]]
    variant: Mapping[str, Any]
    models: tuple[str, ...] = ()
    misses: Path | None = None
    stored: tuple[Key, ...] | None = None

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            InvalidValueError: says which, and what to leave out.
        """
        given = {*(name for name, values in self.axes.items() if values), *self.variant}
        if self.stored is not None and (given or self.models or self.misses):
            other = (
                "--from"
                if self.misses
                else "--models"
                if self.models
                else option_name(sorted(given)[0])
            )
            raise InvalidValueError(
                f"{other} and --misses contradict each other: the captured misses say all keys. Leave one of them out."
            )
        if self.misses is not None and (given or self.models):
            other = "--models" if self.models else option_name(sorted(given)[0])
            raise InvalidValueError(
                f"{other} and --from contradict each other: the document of --from says all of its keys. Leave one of them out."
            )
        if self.models and (both := [name for name in DECIDED if name in given]):
            raise InvalidValueError(
                f"{option_name(both[0])} and --models contradict each other: the model decides it (`patune models`). Leave one of them out."
            )

    def keys(self, evidence: str) -> tuple[Key, ...]:
        """The keys, each once, in the order in which they are tuned.

        Raises:
            InvalidValueError: a value is not allowed, a model unknown, or the document is not one.
        """
        if self.stored is not None:
            return self.stored
        if self.misses is not None:
            return tuple(by_saving(read_misses(self.misses)))
        if self.models:
            axes = {name: _axis(self.axes, name) for name in ("block_size", "query_length")}
            models = parse_models(self.models)
            return model_keys(models, axes, self.variant, model_sizes(self.axes, evidence))
        return tuple(
            Key(problem=problem, workload=workload)
            for problem in problems_of(self.axes, self.variant)
            for workload in workloads_of(self.axes, evidence)
        )


def option_name(field: str) -> str:
    """What the command line calls a field of a key."""
    return {"windowed": "--window", "kv_layout": "--layout"}.get(
        field, "--" + field.replace("_", "-")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """How the keys of a sweep are searched; the fields are those of :class:`SweepOptions`, None where nothing was said."""

    effort: str = "standard"
    trials: int | None = None
    budget_s: float | None = None
    seed: int = 0
    sampler: str | None = None
    fresh: bool = False
    robust: str | None = None
    command: str = "patune sweep"

    def check(self, keys: Sequence[Key]) -> None:
        """Refuse options that contradict each other or the keys.

        Raises:
            InvalidValueError: says which, and what to do instead.
        """
        if not EFFORTS[self.effort].searches and self.sampler is not None:
            raise InvalidValueError(
                f"--sampler {self.sampler} and --effort {self.effort} contradict each other: that effort tries what is stored and packed, and "
                f"asks no sampler. Leave one of them out, or take --effort quick."
            )
        counts = Counter(key.problem for key in keys)
        if self.robust is not None and (alone := [p for p, n in counts.items() if n < 2]):
            raise InvalidValueError(
                f"{ROBUST_NEEDS}; {wording.problem_text(alone[0].to_dict())} has one. Add values to --batch, --context or --kv-heads."
            )

    def options(self, target: Target, keys: tuple[Key, ...]) -> SweepOptions:
        """The tuner's options."""
        from patune.tuner.sweep import SweepOptions

        return SweepOptions(
            target=target,
            keys=keys,
            effort=self.effort,
            trials=self.trials,
            budget_s=self.budget_s,
            seed=self.seed,
            sampler=self.sampler or DEFAULT_SAMPLER,
            fresh=self.fresh,
            robust=self.robust,
            command=self.command,
        )


def request_sweep(
    wanted: KeyRequest, search: SearchRequest, *, arch: str | None
) -> tuple[SweepOptions, str]:
    """The tuner's options, and one sentence about the target when nobody chose it and no GPU did (else empty).

    Raises:
        InvalidValueError: a value is not allowed, or options contradict each other.
        UnsupportedProblemError: no kernel of the target computes one of the problems.
        NoUsableGpuError: the target has to be measured and its device is not here.
    """
    wanted.check()
    keys = wanted.keys("emulated")  # refuses bad values before anything slow is imported
    search.check(keys)
    arch = arch or arch_of_environment()
    problems = tuple(dict.fromkeys(key.problem for key in keys))
    if arch is not None:
        check_supported(problems, Target.named(arch))  # before torch is imported
    target = resolve_target(arch)
    require_device(target)
    check_supported(problems, target)
    note = ""
    if arch is None and detect_target() is None:
        note = NO_GPU_NOTE.format(target=f"{target.arch} ({target.device_name})")
    if target.vendor == "nvidia":
        keys = wanted.keys(evidence_of(target))  # default sizes depend on it
    return search.options(target, keys), note


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


def read_back(report: Mapping[str, Any], path: DatabasePlace) -> str | None:
    """The shell line that reads the last winner of a sweep's report back; None when there is no winner."""
    keys = [key["key"] for key in report["keys"] if key["winner"] is not None]
    if not keys:
        return None
    arch = report["target"]["arch"]
    return wording.lookup_command(
        keys[-1],
        keys[-1]["workload"],
        target=None if resolve_target(settings.target_arch()).arch == arch else arch,
        db=None if path == settings.database_place() else path,
    )
