"""The systems that are compared are trained once, and then come from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from earlyexit.corpus.corpus import Corpus
from earlyexit.evaluation.recipes import WITHOUT_EXITS
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs import cache
from earlyexit.runs.cache import Trained
from earlyexit.runs.profiles import Profile
from earlyexit.training.config import GatesConfig, TrainingConfig
from earlyexit.training.systems import CALIBRATION_RATE, Budget, System


class Source(Protocol):
    """The part of a :class:`earlyexit.study.Study` that trains a system."""

    profile: Profile
    corpus: Corpus
    cache: Path
    device: torch.device

    def training_config(self, seed: int, **changes) -> TrainingConfig: ...

    def train(
        self, seed: int, model: dict, training: dict, max_tokens: int, *,
        fit_tokens: int, kind: type[EarlyExitLanguageModel],
    ) -> Trained: ...  # fmt: skip


def train_system(study: Source, system: System, seed: int, budget: Budget) -> Trained:
    """Return the trained system, from the cache if it is there; with ACT it is the ACT model."""
    options = {
        "sparse": {"keep": budget.keep},
        "multi-scale": {"n_layers": budget.scales},
        "ACT": {"ponder_weight": budget.ponder_weight},
    }
    changes = {key: value for part in system.parts for key, value in options[part].items()}
    changes |= system.changes
    training = {"epochs": budget.epochs, "batch_size": budget.batch_size}
    if not system.exits or "ACT" in system.parts:  # ACT's head reads averages: exits come later
        training |= WITHOUT_EXITS
    return study.train(
        seed, changes, training, budget.tokens,
        fit_tokens=budget.validation_tokens, kind=system.kind,
    )  # fmt: skip


def with_exits(
    study: Source, system: System, seed: int, trained: Trained, budget: Budget
) -> Trained:
    """Return the system with exits: with learned gates, or converted from ACT and calibrated.

    A system without exits is returned unchanged.
    """
    if not system.exits:
        return trained
    if system.convert is None:
        steps = min(GatesConfig().steps, max(50, budget.gate_tokens // 10))
        gates = GatesConfig(study.profile.gates.hidden, budget.gate_tokens, steps)
        return cache.gated_model(trained, study.corpus, study.cache, study.device, gates, seed=seed)
    training = study.training_config(
        seed,
        epochs=1.0,
        batch_size=budget.batch_size,
        learning_rate=CALIBRATION_RATE,
        exit_sampling="all",
        freeze_backbone=True,
    )
    return cache.trained_model(
        cache.with_short_fit(study.corpus, budget.validation_tokens),
        trained.config,
        training,
        study.cache,
        study.device,
        max_tokens=budget.calibration_tokens,
        backbone=trained,
        convert=system.convert,
    )
