"""Training of the systems that are compared, each once: then they come from the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from earlyexit.corpus.corpus import Corpus
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import cache
from earlyexit.runs.cache import Trained
from earlyexit.runs.profiles import Profile
from earlyexit.training.config import GatesConfig, TrainingConfig
from earlyexit.training.systems import CALIBRATION_RATE, REFERENCE, Budget, System


class Source(Protocol):
    """What a system is trained with; a :class:`earlyexit.study.Study` is one."""

    profile: Profile
    corpus: Corpus
    cache: Path
    device: torch.device

    def model_config(self, kind: type[EarlyExitLanguageModel], **changes) -> ModelConfig: ...

    def training_config(self, seed: int, **changes) -> TrainingConfig: ...


def train_system(study: Source, system: System, seed: int, budget: Budget) -> Trained:
    """The system's weights, trained now unless they are in the cache; with ACT the ACT model."""
    changes: dict = {}
    if "sparse" in system.parts:
        changes["keep"] = budget.keep
    if "multi-scale" in system.parts:
        changes["n_layers"] = budget.scales
    # One way for all: single tokens cannot leave where blocks do, nor where halting decides.
    training = {
        "epochs": budget.epochs, "batch_size": budget.batch_size, "exit_sampling": "one"
    }  # fmt: skip
    if "ACT" in system.parts:
        changes["ponder_weight"] = budget.ponder_weight
        training["exit_loss_weight"] = 0.0  # its one head reads averages; exits come afterwards
    if system is REFERENCE:
        training["exit_loss_weight"] = 0.0
    return cache.trained_model(
        _corpus(study, budget),
        study.model_config(system.kind, **changes),
        study.training_config(seed, **training),
        study.cache,
        study.device,
        max_tokens=budget.tokens,
        kind=system.kind,
    )


def _corpus(study: Source, budget: Budget) -> Corpus:
    """The text with a short fit part: reading all of it would take longer than a short training."""
    fit = study.corpus.splits["fit"].limit(budget.validation_tokens)
    return replace(study.corpus, splits=study.corpus.splits | {"fit": fit})


def with_exits(
    study: Source, system: System, seed: int, trained: Trained, budget: Budget
) -> Trained:
    """The system ready to exit: with learned gates, or converted from ACT and calibrated.

    The reference is returned as it is.
    """
    if system is REFERENCE:
        return trained
    if system.convert is None:
        steps = min(GatesConfig().steps, max(50, budget.gate_tokens // 10))
        return cache.gated_model(
            trained,
            study.corpus,
            study.cache,
            study.device,
            GatesConfig(study.profile.gates.hidden, budget.gate_tokens, steps),
            seed=seed,
        )
    training = study.training_config(
        seed,
        epochs=1.0,
        batch_size=budget.batch_size,
        learning_rate=CALIBRATION_RATE,
        exit_sampling="all",
        freeze_backbone=True,
    )
    return cache.converted_model(
        trained,
        system.convert,
        _corpus(study, budget),
        training,
        study.cache,
        study.device,
        max_tokens=budget.calibration_tokens,
    )
