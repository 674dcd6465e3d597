"""Each notebook has a dataclass of parameters, with their names, types, bounds and defaults.

Defaults are those of the profile ``cpu``. A parameters cell shows them, but ``run`` takes them from
this module: a cell that is saved with other values changes nothing that is published.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from earlyexit.checked import Checked, Count, Limit, Positive, Probability, Share, Weight
from earlyexit.evaluation.ablation import CHANGES
from earlyexit.evaluation.depth import CONTROLS
from earlyexit.evaluation.recipes import RECIPES
from earlyexit.exits.criteria import CRITERIA
from earlyexit.runs import digests


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("names a seed twice")
    return seeds


def _one_of(known: Mapping[str, Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return name

    return AfterValidator(check)


_list = Field(strict=False)  # JSON and notebooks have lists where a frozen dataclass has a tuple
_some = Field(strict=False, min_length=1)
Pair = Annotated[tuple[Count, Count], _list]
Sizes = Annotated[tuple[Count, Count, Count, Count], _list]
Depths = Annotated[tuple[Annotated[float, Field(ge=1, le=8)], ...], _some]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator of random numbers takes
Seeds = Annotated[tuple[Seed, ...], _list, AfterValidator(_distinct)]
Counts = Annotated[tuple[Count, ...], _some]
Positives = Annotated[tuple[Positive, ...], _some]
Shares = Annotated[tuple[Share, ...], _some]
Criterion = Annotated[str, _one_of(CRITERIA)]
Control = Annotated[str, _one_of(CONTROLS)]
Changed = Annotated[str, _one_of(CHANGES)]
Recipe = Annotated[str, _one_of(RECIPES)]


@dataclass(frozen=True)
class Common(Checked):
    """The parameters that every notebook takes; each has its own option instead of ``--set``.

    Attributes:
        profile: a name in :data:`earlyexit.runs.profiles.PROFILES`.
        seeds: seeds to run; empty: the profile's.
        data_dir: folder with local text; empty: the embedded text, or that of the hub.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overrides: fields of the profile to replace, by key.
    """

    profile: str = "cpu"
    seeds: Seeds = ()
    data_dir: str = ""
    device: str = "auto"
    overrides: dict[str, Any] = field(default_factory=dict)


# Name → annotation of the common parameters in a parameters cell.
COMMON = {
    field.name: {"seeds": "list", "overrides": "dict"}.get(field.name, "str")
    for field in fields(Common)
}


@dataclass(frozen=True)
class Build(Common):
    leak_tokens: Count = 120_000
    leak_epochs: Positive = 3.0
    memory_tokens: Limit = 20_000
    depths: Counts = (1, 2, 3, 4)
    controls: Annotated[tuple[Control, ...], _list] = tuple(CONTROLS)
    depth_tokens: Limit = 0
    depth_seeds: Count = 1
    changes: Annotated[tuple[Changed, ...], _some] = (
        "as it is", "heads start in the band", "values not gated", "AdamW"
    )  # fmt: skip
    ablation_tokens: Limit = 120_000
    ablation_epochs: Weight = 0.0
    ablation_seeds: Count = 1


@dataclass(frozen=True)
class Calibration(Common):
    fit_tokens: Count = 12_000
    threshold: Share = 0.7
    epsilon: Positive = 0.05


@dataclass(frozen=True)
class ThresholdSweep(Common):
    thresholds: Shares = (0.1, 0.2, 0.4, 0.7, 0.9)
    epsilons: Positives = (0.01, 0.02, 0.05, 0.08)
    epsilon: Positive = 0.05
    target_tokens: Limit = 30_000
    recipes: Annotated[tuple[Recipe, ...], _some] = (
        "joint", "frozen", "weight 0.5", "one unembedding"
    )  # fmt: skip
    recipe_tokens: Limit = 100_000
    recipe_seeds: Count = 1
    logits_tokens: Limit = 0


@dataclass(frozen=True)
class SpeedupBreakdown(Common):
    batch_size: Count = 32
    part_windows: Count = 8
    epsilon: Positive = 0.05
    repeats: Count = 5
    quantiles: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], _some] = (0.0, 0.3, 0.6)
    thresholds: Shares = (0.1, 0.2, 0.4, 0.7, 0.9)
    wide_windows: Count = 32
    mean_depths: Depths = (2.0, 3.0, 4.0, 5.0, 6.0)
    output_head_tokens: Limit = 100_000
    head_tokens: Count = 20_000
    prices: Literal["all", "few"] = "all"
    panels: Annotated[tuple[Pair, ...], _some] = ((4, 1), (4, 32), (8, 32))
    batch_sizes: Counts = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class MemoryProfiling(Common):
    batch_size: Count = 32
    batch_sizes: Counts = (1, 4, 16, 64)
    lengths: Counts = (128, 512, 2048)
    resident_runs: Limit = 0
    epsilon: Positive = 0.05


@dataclass(frozen=True)
class Guarantees(Common):
    criterion: Criterion = "gate"
    epsilons: Positives = (0.003, 0.01, 0.025, 0.05, 0.072, 0.1)
    epsilon: Positive = 0.05
    delta: Probability = 0.05
    n_candidates: Count = 30
    trials: Count = 1000


@dataclass(frozen=True)
class Combinations(Common):
    combination_tokens: Limit = 50_000
    combination_eval: Limit = 4_000
    windows_per_step: Count = 8
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    ponder_weight: Weight = 0.02
    epsilon: Positive = 0.05
    exit_shares: Shares = (0.15, 0.35, 0.6, 0.85, 0.95)
    sparse_sizes: Annotated[tuple[Sizes, ...], _some] = (
        (32, 128, 64, 16), (4, 512, 64, 64), (2, 1024, 64, 256)
    )  # fmt: skip
    timed_windows: Count = 16


@dataclass(frozen=True)
class Answer(Common):
    epsilons: Positives = (0.01, 0.02, 0.05, 0.1)
    epsilon: Positive = 0.05
    criteria: Annotated[tuple[Criterion, ...], _some] = ("gate", "max_probability")
    original_threshold: Share = 0.7
    repeats: Count = 7
    batch_size: Count = 32
    logits_tokens: Limit = 0
    shown_words: Count = 420


@dataclass(frozen=True)
class ExistingModels(Common):
    decoder: str = ""
    small_tokens: Count = 200_000
    small_epochs: Positive = 2.0
    window: Count = 256
    exits: Limit = 0
    tokens: Count = 40_000
    document_tokens: Count = 256
    epsilons: Positives = (0.01, 0.02, 0.05, 0.1)
    epsilon: Positive = 0.05
    delta: Probability = 0.05
    n_candidates: Count = 10
    timed_windows: Count = 4
    repeats: Count = 5
    assisted_tokens: Limit = 32


@dataclass(frozen=True)
class Generation(Common):
    epsilon: Positive = 0.05
    delta: Probability = 0.05
    prompts: Count = 32
    prompt_words: Count = 16
    new_words: Count = 96
    batch_sizes: Counts = (1, 8, 32)
    drafts: Counts = (1, 2, 3, 4, 6, 8)
    draft_thresholds: Shares = (0.8, 0.9, 0.95, 0.99)
    temperatures: Annotated[tuple[Weight, ...], _some] = (0.0, 1.0)
    repeats: Count = 5
    stepped_words: Count = 8
    shown_words: Count = 90


NOTEBOOKS: dict[str, type[Common]] = {
    "01_build": Build,
    "02_calibration": Calibration,
    "03_threshold_sweep": ThresholdSweep,
    "04_speedup_breakdown": SpeedupBreakdown,
    "05_memory_profiling": MemoryProfiling,
    "06_guarantees": Guarantees,
    "07_combinations": Combinations,
    "08_study": Answer,
    "09_existing_models": ExistingModels,
    "10_generation": Generation,
}
INJECTED = "# Parameters\n"  # how papermill begins the cell that it adds
KINDS = {"str": str, "bool": bool, "int": int, "float": float, "list": list, "dict": dict}


def names(kind: type[Common]) -> list[str]:
    """Return the names of a notebook's parameters without the common ones."""
    return [field.name for field in fields(kind) if field.name not in COMMON]


def declared(path: Path) -> type[Common]:
    """Return the parameters of a notebook: those in ``NOTEBOOKS``, or its cell's if they differ.

    Raises:
        ValueError: the parameters cell is missing, or holds more than annotated literals.
    """
    cell = digests.notebook_parameters(path)
    kind = NOTEBOOKS.get(path.stem)
    if kind and set(names(kind)) == set(cell) - set(COMMON):
        return kind
    added = [
        (name, KINDS.get(kind, Any), field(default_factory=lambda value=value: value))
        for name, (kind, value) in cell.items()
        if name not in COMMON
    ]
    return make_dataclass(path.stem, added, bases=(Common,), frozen=True)


def read_parameters(path: Path, namespace: Mapping[str, Any]) -> Common:
    """Return the parameters of a notebook from its variables, or else their defaults.

    Raises:
        ValueError: a value has another type than its parameter, or lies outside its bounds, or papermill
            injected a parameter that the notebook does not have.
    """
    kind = declared(path) if path.is_file() else NOTEBOOKS.get(path.stem, Common)
    known = [field.name for field in fields(kind)]
    for name in _injected(namespace.get("In", ())):
        if name not in known:
            raise ValueError(f"{path.stem} has no parameter {name!r}; it has {', '.join(known)}")
    return kind(**{name: namespace[name] for name in known if name in namespace})


def _injected(cells: Sequence[str]) -> list[str]:
    """Return the names that papermill's cell sets among the cells that IPython ran last.

    Args:
        cells: sources in the order in which they ran, IPython's ``In``.
    """
    source = next((source for source in reversed(cells) if source.startswith(INJECTED)), "")
    targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def plain(value: Any) -> Any:
    """Return a value with lists instead of tuples, as JSON and a parameters cell have it."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def as_dict(parameters: Common) -> dict[str, Any]:
    """Return name → value, as JSON has it."""
    return {field.name: plain(getattr(parameters, field.name)) for field in fields(parameters)}


def saved_otherwise(path: Path) -> dict[str, Any]:
    """Return name → value of the parameters whose value in the cell is not their default."""
    kind = declared(path)
    defaults, cell = as_dict(kind()), digests.notebook_parameters(path)
    return {name: cell[name][1] for name in names(kind) if cell[name][1] != defaults[name]}
