"""A study gives a notebook the text, models and traces of its profile, and writes its results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.load import load_corpus
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import loader
from earlyexit.devices import resolve_device
from earlyexit.evaluation.ablation import Change
from earlyexit.evaluation.depth import losses_by_document, size
from earlyexit.evaluation.recipes import RECIPES, WITHOUT_EXITS
from earlyexit.exits.criteria import CRITERIA
from earlyexit.figures.style import use_style
from earlyexit.models.checkpoints import CheckpointError, checkpoint_about
from earlyexit.models.operations import operations
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import cache, workers
from earlyexit.runs.artifacts import MissingResult, Outputs, read_table, remedy, run_label
from earlyexit.runs.cache import NotTrained, Trained
from earlyexit.runs.parameters import as_dict, read_parameters
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import get_profile
from earlyexit.runs.publish import model_card
from earlyexit.runs.published import check_bytes, model_path
from earlyexit.training.config import TrainingConfig

log = logging.getLogger(__name__)
LOSSES = [  # columns of a table of models trained alone, without those that name them
    *("split", "document", "tokens", "nll", "model", "parameters", "flops_per_token", "seconds")
]
ROWS, COLUMNS = 15, 9  # that a table has on screen, at most
LARGEST_PUBLISHED = 9_000_000  # bytes of one model's weights among the results


class Study:
    """The text, models, traces and results of one notebook under a profile.

    Args:
        notebook: its name, such as ``"02_calibration"``.
        parameters: its variables, ``globals()``; those that are parameters (see
            :mod:`earlyexit.runs.parameters`) are validated and recorded with every result, and
            missing ones have their defaults.

    Attributes:
        profile: profile with its overrides applied.
        seeds: seeds asked for, or else those that the profile has for this notebook.
        label: folder of the results.

    Raises:
        ValueError: a parameter has another type or lies outside its bounds, or the profile is unknown.
    """

    def __init__(self, notebook: str, parameters: Mapping[str, Any]):
        given = read_parameters(project().notebooks / f"{notebook}.ipynb", parameters)
        self.profile = get_profile(given.profile, given.overrides, given.data_dir or None)
        torch.set_num_threads(self.profile.threads)
        self.seeds = list(self.profile.seeds_of(notebook, given.seeds))
        self.device = resolve_device(given.device)
        self.label = run_label(given.profile, given.overrides, given.seeds)
        self.cache = project().cache
        used = {"seeds": self.seeds, "device": str(self.device)}
        self.outputs = Outputs(self.label, notebook, as_dict(given) | used)
        use_style()
        pd.set_option("display.max_rows", ROWS, "display.max_columns", COLUMNS)

    # ------------------------------------------------------------------ text

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.profile.corpus, self.cache / "corpus")

    def split(self, name: str) -> Split:
        """Return a split, limited to the profile's ``max_eval_tokens``."""
        return self.corpus.splits[name].limit(self.profile.max_eval_tokens)

    def training_split(self, max_tokens: int = 0) -> Split:
        """Return the training split, limited to ``max_tokens`` and to the profile's."""
        return self.corpus.splits["train"].limit(self._most_tokens(max_tokens))

    def _most_tokens(self, max_tokens: int) -> int:
        limits = [n for n in (max_tokens, self.profile.max_train_tokens) if n]
        return min(limits, default=0)

    def loader(self, split: str, batch_size: int | None = None, max_tokens: int = 0) -> DataLoader:
        """Return the batches of :meth:`split`, or of about ``max_tokens`` of it, in order."""
        size = batch_size or self.profile.training.batch_size
        part = self.split(split).limit(max_tokens)
        return loader(part, self.profile.model.n_seq, size, self.corpus.eos_id)

    def batch(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets ``(size, N)`` of windows evenly spread over :meth:`split`."""
        inputs, targets = self.loader(split).dataset.tensors
        rows = torch.linspace(0, len(inputs) - 1, min(size, len(inputs))).long()
        return inputs[rows].to(self.device), targets[rows].to(self.device)

    def run_tokens(self, criterion: str, logits_tokens: int) -> int:
        """Return how many tokens of the test split real runs by a criterion score; 0: all.

        A criterion whose checks need all logits takes several times as long, and scores only
        ``logits_tokens``.
        """
        part = CRITERIA[criterion].read_by_check(operations(self.model_config()))
        return logits_tokens if part else 0

    # ------------------------------------------------------------------ models and traces

    def model_config(
        self, kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel, **changes
    ) -> ModelConfig:
        """Return the configuration of the profile's model, with changes, for ``kind``."""
        config = replace(self.profile.model, vocab_size=self.corpus.vocab_size)
        return kind.config_type(**config.base() | changes)

    def training_config(self, seed: int, **changes) -> TrainingConfig:
        """Return the configuration of the profile's training, with changes."""
        return replace(self.profile.training, seed=seed, **changes)

    def train(
        self,
        seed: int,
        model: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        max_tokens: int = 0,
        *,
        fit_tokens: int = 0,
        backbone: Trained | None = None,
        may_train: bool = True,
        kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel,
    ) -> Trained:
        """Return the profile's model with changes, trained now unless it is in the cache.

        Args:
            max_tokens: largest number of training tokens, beside the profile's; 0: only the profile's.
            fit_tokens: tokens of the fit part that are scored for the history; 0: all, or in
                proportion to ``max_tokens``.
        """
        fit_tokens = fit_tokens or (max_tokens and max(1000, max_tokens // 50))
        return cache.trained_model(
            cache.with_short_fit(self.corpus, fit_tokens),
            self.model_config(kind, **(model or {})),
            self.training_config(seed, **(training or {})),
            self.cache,
            self.device,
            max_tokens=self._most_tokens(max_tokens),
            backbone=backbone,
            may_train=may_train,
            kind=kind,
        )

    def side_by_side(self, calls: Mapping[Hashable, tuple[Callable, ...]]) -> dict[Hashable, Any]:
        """Return key → what its call returns: a function that trains, and its arguments.

        On a CPU the trainings run side by side, as many as there are usable cores or as
        ``EARLYEXIT_JOBS`` says; the models travel through the cache.
        """
        threads = self.profile.threads
        jobs = 1 if self.device.type == "cuda" else workers.usual_jobs(threads)
        done = workers.side_by_side(
            {key: (_without_model, *call) for key, call in calls.items()}, jobs, threads
        )
        return {
            key: call[0](*call[1:]) if done[key] is None else done[key]
            for key, call in calls.items()
        }

    def recipe(self, seed: int, name: str, max_tokens: int) -> Trained:
        """Return a model with gates whose exits were trained by one of the ``RECIPES``.

        Its ``seconds`` are those of all stages.

        Raises:
            ValueError: the recipe is unknown.
        """
        if name not in RECIPES:
            raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
        recipe, first = RECIPES[name], None
        passes = {"epochs": recipe.passes * self.profile.training.epochs}
        made = {"max_tokens": max_tokens, "kind": recipe.kind}
        if recipe.first is not None:
            first = self.train(seed, recipe.model, recipe.first | passes, **made)
        trained = self.train(seed, recipe.model, recipe.training | passes, backbone=first, **made)
        if first:
            trained = replace(trained, seconds=first.seconds + trained.seconds)
        return self.with_gates(seed, trained)

    def alone(
        self,
        table: str,
        seed: int,
        change: Change,
        max_tokens: int = 0,
        epochs: float = 0.0,
        splits: Sequence[str] = ("fit", "test"),
    ) -> pd.DataFrame:
        """Return the losses by document of a model trained alone, without exits.

        They are read from ``table``, as the last run of this notebook published it, if its rows are
        about the same model: then nothing is trained again.

        Args:
            change: what differs from the profile's model.
            epochs: passes over the data; 0: the profile's.

        Returns:
            Those of :func:`~earlyexit.evaluation.depth.losses_by_document` on ``splits``, with columns
            model (its digest), parameters, flops_per_token and seconds (of the training).
        """
        changes = WITHOUT_EXITS | ({"epochs": epochs} if epochs else {}) | change.training
        name = cache.model_name(
            self.corpus,
            self.model_config(change.kind, **change.model),
            self.training_config(seed, **changes),
            max_tokens=self._most_tokens(max_tokens),
            made=change.kind,
        )
        scored = [self.split(split) for split in splits]
        try:
            rows = read_table(self.label, table).query("model == @name")
        except MissingResult:
            rows = pd.DataFrame({"tokens": []})
        if rows["tokens"].sum() == sum(split.n_tokens for split in scored):
            return rows[LOSSES]
        trained = self.train(seed, change.model, changes, max_tokens, kind=change.kind)
        losses = pd.concat(
            losses_by_document(trained.model, split, self.corpus.eos_id) for split in scored
        )
        about = {"model": name, "seconds": trained.seconds} | size(trained.model)
        return losses.assign(**about)[LOSSES]

    def build(self, seed: int) -> Trained:
        """Return the profile's model with gates, trained now unless it is in the cache."""
        return self.with_gates(seed, self.train(seed))

    def model(self, seed: int) -> Trained:
        """Return the profile's model with gates from the cache, or else the published one.

        Raises:
            NotTrained: ``01_build`` has not trained it for this profile and seed, and none is published.
        """
        try:
            return self.with_gates(seed, self.train(seed, may_train=False), may_train=False)
        except NotTrained:
            if published := self._published(seed):
                return published
            raise NotTrained(
                f"no model of profile {self.label!r}, seed {seed}: run 01_build first, here, or"
                f" {remedy(self.label, '01_build')}"
            ) from None

    def publish(self, seed: int, trained: Trained) -> Path | None:
        """Write weights among the results, so that other notebooks need not train them.

        Returns:
            The path; None if the weights are too large to be committed.
        """
        size = sum(p.numel() * p.element_size() for p in trained.model.parameters())
        if size > LARGEST_PUBLISHED:
            return None
        about = self._recipe_of(seed) | {"model_hash": trained.model_hash} | trained.reports()
        caption = f"Trained model with gates, seed {seed}."
        return self.outputs.weights(
            trained.model, f"model_seed{seed}", caption, about, self.corpus.data_hash
        )

    def _published(self, seed: int) -> Trained | None:
        """Return the published model, if this profile's training on this text made it, or None.

        One that is not as its record says, or cannot be read, is named in the log.
        """
        path = model_path(self.label, seed)
        if not path.is_file():
            return None
        config = replace(self.model_config(), gate_hidden=self.profile.gates.hidden)
        try:
            check_bytes(path)
            trained, about = cache.load_trained(path, config, self.device), checkpoint_about(path)
        except CheckpointError as error:
            log.warning("the published model cannot be used: %s", error)
            return None
        if any(about.get(key) != value for key, value in self._recipe_of(seed).items()):
            return None
        return replace(trained, model_hash=about["model_hash"])

    def _recipe_of(self, seed: int) -> dict:
        return {"training": asdict(self.training_config(seed)), "text": self.corpus.data_hash}

    def with_gates(self, seed: int, trained: Trained, may_train: bool = True) -> Trained:
        """Return a model of this profile with gates trained on its frozen weights."""
        return cache.gated_model(
            trained,
            self.corpus,
            self.cache,
            self.device,
            self.profile.gates,
            seed=seed,
            may_train=may_train,
        )

    def trace(
        self,
        seed: int,
        split: str,
        temperatures: Sequence[float] | None = None,
        trained: Trained | None = None,
        max_tokens: int = 0,
    ) -> ExitTrace:
        """Return the trace of a model, by default :meth:`model`, over a split or part of it."""
        trained, part = trained or self.model(seed), self.split(split).limit(max_tokens)
        return cache.exit_trace(trained, part, self.corpus, self.cache, temperatures)

    # ------------------------------------------------------------------ results

    def table(self, df: pd.DataFrame, name: str, caption: str, **matters) -> pd.DataFrame:
        """Write a result table; see :meth:`earlyexit.runs.artifacts.Outputs.table`.

        Args:
            matters: ``by`` and ``of``, the columns that :meth:`brief` and LaTeX show.
        """
        return self.outputs.table(df, name, caption, self.corpus.data_hash, **matters)

    def brief(self, name: str) -> pd.DataFrame:
        """Return what matters of a table that this notebook wrote, as texts."""
        return self.outputs.brief(name)

    def figure(self, drawn: Any, name: str, caption: str) -> Any:
        """Write a figure, given itself or its axes; see ``artifacts.Outputs.figure``.

        A cell shows it as its last value or with ``display``.
        """
        return self.outputs.figure(drawn, name, caption, self.corpus.data_hash)

    def document(self, text: str, name: str, caption: str, suffix: str = "json") -> Path:
        """Write a JSON file or one of another kind; see ``artifacts.Outputs.document``."""
        return self.outputs.document(text, name, caption, self.corpus.data_hash, suffix)

    def page(self, text: str, name: str, caption: str) -> Path:
        """Write an HTML page beside the figures."""
        return self.document(text, name, caption, suffix="html")

    def card(self, trained: dict[int, Trained], files: dict[int, Path]) -> Path:
        """Write the card of published weights, seed → model and file, beside them."""
        names = {seed: path.name for seed, path in files.items()}
        text = model_card(self.profile, self.label, trained, self.corpus.data_hash, names)
        return self.document(text, "model_card", "What the published weights are.", suffix="md")

    def read_table(self, name: str) -> pd.DataFrame:
        """Read a table that another notebook of this profile wrote."""
        return read_table(self.label, name, by_hand=True)


def _without_model(method: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a method returns, or None for a model, which is in the cache then."""
    result = method(*arguments)
    return None if isinstance(result, Trained) else result
