"""A stage is work that one job of a grid does for one seed of a study: trainings, or its traces.

The notebooks find in the cache what the stages made, and put the seeds together; what no stage has made,
they make themselves. So stages change when and where something is computed, and no number.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlyexit.evaluation.ablation import CHANGES, Change
from earlyexit.evaluation.causality import leak_trainings
from earlyexit.evaluation.depth import ALONE, systems
from earlyexit.runs import cache, digests, freshness
from earlyexit.runs.cache import Trained
from earlyexit.runs.parameters import NOTEBOOKS, Common, declared
from earlyexit.runs.paths import project
from earlyexit.runs.settings import Resolved, Settings, UsageError, resolve
from earlyexit.runs.system_cache import train_system, with_exits
from earlyexit.runs.workers import JOBS
from earlyexit.study import Study
from earlyexit.training import parallel
from earlyexit.training.systems import CONTROLS, SYSTEMS, Budget, System

log = logging.getLogger(__name__)
Calls = Mapping[Hashable, tuple]  # what → a function and its arguments
CLOCK = "earlyexit/cost/timing.py:interleaved_times"  # what every reading of the clock uses


@dataclass(frozen=True)
class Stage:
    """A stage names what is computed for one seed.

    Attributes:
        notebook: the first notebook that reads what is made, and whose parameters decide it.
        calls: function from a study, these parameters and a seed to the calls, which do not need each
            other.
        seeds: function from the parameters to how many of a study's seeds the stage has; None: all.
    """

    notebook: str
    calls: Callable[[Study, Any, int], Calls]
    seeds: Callable[[Any], int | None] = lambda parameters: None


def _exits(study: Study, parameters: Common, seed: int) -> Calls:
    return {"exits": (study.build, seed)}


def _traces(study: Study, parameters: Common, seed: int) -> Calls:
    return {split: (_trace, study, seed, split) for split in ("fit", "test")}


def _trace(study: Study, seed: int, split: str) -> int:
    return len(study.trace(seed, split, trained=study.build(seed)).target)


def _alone(study: Study, p: Any, seed: int) -> Calls:
    n_layers = study.profile.model.n_layers
    compared = systems(p.depths, p.controls, n_layers)
    rivals = [(ALONE, depth) for depth in p.depths if depth <= n_layers]  # the others have one seed
    return {
        system: (study.alone, "depth_losses", seed, Change(changes), p.depth_tokens)
        for system, changes in compared.items()
        if system in rivals or seed == study.seeds[0]
    }


def _changes(study: Study, p: Any, seed: int) -> Calls:
    about = p.ablation_tokens, p.ablation_epochs, ["fit"]
    calls = {
        name: (study.alone, "ablation_losses", seed, CHANGES[name], *about) for name in p.changes
    }
    if seed == study.seeds[0]:
        leaks = leak_trainings(p.leak_epochs)
        calls |= {n: (study.train, seed, *changes, p.leak_tokens) for n, changes in leaks.items()}
    return calls


def _recipes(study: Study, p: Any, seed: int) -> Calls:
    about = p.recipe_tokens, 0.0, ["fit"]
    calls = {name: (study.recipe, seed, name, p.recipe_tokens) for name in p.recipes}
    return calls | {
        (ALONE, depth): (study.alone, "recipe_losses", seed, Change({"n_layers": depth}), *about)
        for depth in range(1, study.profile.model.n_layers + 1)
    }


def _heads(study: Study, p: Any, seed: int) -> Calls:
    heads = [("linear", True), ("linear", False), ("adaptive", False)]
    changes = [{"output_head": head, "tie_embeddings": tied} for head, tied in heads]
    return {
        index: (_head, study, seed, change, p.output_head_tokens)
        for index, change in enumerate(changes)
    }


def _head(study: Study, seed: int, change: Mapping[str, Any], max_tokens: int) -> Trained:
    return study.with_gates(seed, study.train(seed, change, {}, max_tokens))


def _systems(study: Study, p: Any, seed: int) -> Calls:
    profile = study.profile
    gate_tokens = min(profile.gates.max_tokens, p.combination_tokens or profile.gates.max_tokens)
    budget = Budget(
        tokens=p.combination_tokens or profile.max_train_tokens,
        epochs=profile.training.epochs,
        batch_size=p.windows_per_step,
        gate_tokens=gate_tokens // 4,
        calibration_tokens=gate_tokens // 3,
        validation_tokens=p.combination_eval or 10_000,
        keep=p.keep,
        ponder_weight=p.ponder_weight,
    )
    return {s.name: (_system, study, s, seed, budget) for s in (*SYSTEMS, *CONTROLS)}


def _system(study: Study, system: System, seed: int, budget: Budget) -> Trained:
    return with_exits(study, system, seed, train_system(study, system, seed, budget), budget)


STAGES = {
    "exits": Stage("01_build", _exits),
    "traces": Stage("01_build", _traces),
    "alone": Stage("01_build", _alone, lambda p: p.depth_seeds),
    "changes": Stage("01_build", _changes, lambda p: p.ablation_seeds),
    "recipes": Stage("03_threshold_sweep", _recipes, lambda p: p.recipe_seeds),
    "heads": Stage("04_speedup_breakdown", _heads, lambda p: 1),
    "systems": Stage("07_combinations", _systems),
}


@dataclass(frozen=True)
class Grid:
    """A grid is the work of one study, as an engine that knows many machines may divide it.

    Attributes:
        label: folder of the results.
        cells: stage → its seeds.
        needs: notebook → notebooks whose tables it reads.
        timed: notebooks that read the clock, and want a machine for themselves.
        code: digest of the definitions behind the stages.
    """

    label: str
    cells: dict[str, list[int]]
    needs: dict[str, list[str]]
    timed: set[str]
    code: str

    def before(self, notebook: str) -> list[tuple[str, int]]:
        """Return the cells (stage, seed) whose work the notebook is the first to read."""
        stages = (stage for stage in self.cells if STAGES[stage].notebook == notebook)
        return [(stage, seed) for stage in stages for seed in self.cells[stage]]


def grid(settings: Settings, root: str | Path | None = None) -> Grid:
    """Return the cells and notebooks of a study.

    A stage has cells if the project has its notebook, with the parameters that the package knows.

    Raises:
        UsageError: a setting is wrong, or a file is no notebook.
    """
    place = project(root)
    paths = freshness.discover(place)
    resolved = resolve(settings, paths)
    cells = {n: _seeds(s, resolved) for n, s in STAGES.items() if _is_usual(s.notebook, paths)}
    closures = {path.stem: digests.of_notebook(path) for path in paths}
    return Grid(
        resolved.label,
        cells,
        {path.stem: freshness.needs(path, paths) for path in paths},
        {name for name, closure in closures.items() if CLOCK in closure},
        digests.of_object([digests.of_code(run), closures]),
    )


def run(settings: Settings, name: str, seeds: Sequence[int] = ()) -> None:
    """Compute a stage into the cache, and tell how long its trainings took.

    Args:
        seeds: some of the study's; empty: all that the stage has.

    Raises:
        UsageError: the stage is unknown, its notebook is missing or has other parameters, or a seed is
            none of the study's; nothing has been run then.
    """
    if name not in STAGES:
        raise UsageError(f"--stage {name}: choose one of {', '.join(STAGES)}")
    stage, paths = STAGES[name], freshness.discover(project())
    if not _is_usual(stage.notebook, paths):
        raise UsageError(f"--stage {name}: there is no {stage.notebook} with its usual parameters")
    resolved = resolve(settings, paths)
    if foreign := set(seeds) - set(resolved.seeds):
        raise UsageError(
            f"--stage {name} {foreign.pop()}: the study has the seeds"
            f" {', '.join(map(str, resolved.seeds))}; others are given with --seeds"
        )
    parameters = resolved.parameters[stage.notebook]
    study, typed = Study(stage.notebook, parameters), NOTEBOOKS[stage.notebook](**parameters)
    calls = {
        (seed, what): call
        for seed in seeds or _seeds(stage, resolved)
        for what, call in stage.calls(study, typed, seed).items()
    }
    with parallel.joined(settings.device) as leads:
        if not leads:
            parallel.follow(study.corpus, study.device)
            return
        if parallel.started() == 1:
            done = study.side_by_side(calls)
        else:
            os.environ[JOBS] = "1"  # all processes share one training
            with parallel.replaced(cache, "train", parallel.train):
                done = study.side_by_side(calls)
    for (seed, what), made in done.items():
        if isinstance(made, Trained):
            log.info("%s, seed %s, %s: %s", resolved.label, seed, what, throughput(made))


def throughput(trained: Trained) -> str:
    """Say how many tokens per second a training read, its validations included."""
    last = trained.history.iloc[-1]
    tokens, processes = int(last["tokens"]), int(last.get("processes", 1))
    if math.isnan(trained.seconds):
        return f"{tokens:,} tokens; the training was interrupted, so that its time is not known"
    return (
        f"{tokens:,} tokens in {trained.seconds:.1f} s, {tokens / trained.seconds:,.0f} tokens/s on"
        f" {processes} process(es)"
    )


def _is_usual(notebook: str, paths: Sequence[Path]) -> bool:
    return any(declared(path) is NOTEBOOKS[notebook] for path in paths if path.stem == notebook)


def _seeds(stage: Stage, resolved: Resolved) -> list[int]:
    parameters = NOTEBOOKS[stage.notebook](**resolved.parameters[stage.notebook])
    return list(resolved.seeds_of(stage.notebook)[: stage.seeds(parameters)])
