"""The systems that are compared: each idea alone, in pairs, and all together, each with exits."""

from __future__ import annotations

from dataclasses import replace

from earlyexit.corpus.corpus import Corpus
from earlyexit.runs import cache as stages
from earlyexit.runs.cache import Trained
from earlyexit.study import Study
from earlyexit.training.systems import CALIBRATION_RATE, REFERENCE, Budget, System


def train_system(study: Study, system: System, seed: int, budget: Budget) -> Trained:
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
    return stages.trained_model(
        _corpus(study, budget),
        study.model_config(system.kind, **changes),
        study.training_config(seed, **training),
        study.cache,
        study.device,
        max_tokens=budget.tokens,
        kind=system.kind,
    )


def _corpus(study: Study, budget: Budget) -> Corpus:
    """The text with a short fit part: reading all of it would take longer than a short training."""
    fit = study.corpus.splits["fit"].limit(budget.validation_tokens)
    return replace(study.corpus, splits=study.corpus.splits | {"fit": fit})


def with_exits(
    study: Study, system: System, seed: int, trained: Trained, budget: Budget
) -> Trained:
    """The system ready to exit: with learned gates, or converted from ACT and calibrated.

    The reference is returned as it is.
    """
    if system is REFERENCE:
        return trained
    if system.convert is None:
        return stages.gated_model(
            trained,
            study.corpus,
            study.cache,
            study.device,
            hidden=study.profile.gate_hidden,
            max_tokens=budget.gate_tokens,
            seed=seed,
            steps=min(stages.GATE_STEPS, max(50, budget.gate_tokens // 10)),
        )
    training = study.training_config(
        seed,
        epochs=1.0,
        batch_size=budget.batch_size,
        learning_rate=CALIBRATION_RATE,
        exit_sampling="all",
        freeze_backbone=True,
    )
    return stages.converted_model(
        trained,
        system.convert,
        _corpus(study, budget),
        training,
        study.cache,
        study.device,
        max_tokens=budget.calibration_tokens,
    )
