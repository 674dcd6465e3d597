"""Compare ways of training exits, on validation, with models trained alone on the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from earlyexit.calibration.thresholds import Unreachable
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.cost.memory import MIB, peak_tensor_bytes
from earlyexit.evaluation.ablation import Change
from earlyexit.evaluation.compare import run_row, stopping_policy
from earlyexit.evaluation.exit_heads import (
    ExitBlockModel,
    HiddenTranslatorModel,
    ReservedChannelsModel,
)
from earlyexit.evaluation.rivals import Alone, exit_gaps, perplexities
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train

WITHOUT_EXITS = {"exit_loss_weight": 0.0, "exit_sampling": "one"}  # the training of a twin


@dataclass(frozen=True)
class Recipe(Change):
    """A recipe is a way of training exits: what it changes in a profile's training and in its model.

    Attributes:
        first: changed fields of the training of an earlier stage, whose weights this one goes on from;
            None: there is one stage.
        passes: passes over the data of either stage, over those of the profile.
    """

    first: dict | None = None
    passes: float = 1.0


ONE, TOKENS = {"exit_sampling": "one"}, {"exit_sampling": "tokens"}
RECIPES: dict[str, Recipe] = {
    "joint": Recipe(),
    "frozen": Recipe(
        {"exit_head": "translator"},
        {"exit_loss_weight": 1.0, "freeze_backbone": True},
        first=WITHOUT_EXITS,
    ),
    # Without a loss, exits learn nothing in the second half, while layers and last head go on.
    "exits first": Recipe(training=WITHOUT_EXITS, first={}, passes=0.5),
    "weight 0.5": Recipe(training={"exit_loss_weight": 0.5}),
    "weight 3": Recipe(training={"exit_loss_weight": 3.0}),
    "weight ramped up": Recipe(training={"exit_ramp": 0.5}),
    "one exit a step": Recipe(training=ONE),
    "half of the gradient": Recipe(training={"exit_gradient": 0.5}),
    "self-distilled": Recipe(training={"distillation": 0.3}),
    "layer dropout": Recipe(training={"layer_dropout": 0.2}),
    "one unembedding": Recipe({"exit_head": "translator"}),
    "hidden layer": Recipe(kind=HiddenTranslatorModel),
    "exit blocks": Recipe(kind=ExitBlockModel),
    "reserved channels": Recipe(kind=ReservedChannelsModel),
    # Only where tokens exit in training do deeper layers learn from what is left behind.
    "tokens": Recipe(training=TOKENS),
    "tokens, values kept": Recipe({"left_behind": "kept"}, TOKENS),
    "tokens, potentials only": Recipe({"left_behind": "potentials"}, TOKENS),
}


def against_alone(
    model: EarlyExitModel, fit: ExitTrace, alone: Alone, loader: Iterable, epsilon: float
) -> pd.DataFrame:
    """Compare every exit of a model with gates, and what its gates save, with models trained alone.

    All is read on the fit part, so that recipes can be chosen by it.

    Args:
        fit: trace of the model.
        alone: depth → losses by document of a model of that depth, over the same tokens.
        loader: batches of the same tokens, for the real run.

    Returns:
        Columns of :func:`~earlyexit.evaluation.rivals.exit_gaps`; and the same in all rows:
        gate_speedup_layers of the gates fitted to ``epsilon``, gate_loss_twin (against the model of
        full depth trained alone), left_behind: the relative increase of perplexity that the states of
        exited tokens cause in a real run, and real_loss_twin, the loss of that run.
    """
    try:
        policy = stopping_policy(model, fit, "gate", epsilon)
    except Unreachable:
        policy = ExitPolicy.static(model.n_layers, model.n_layers)
    traced, twin = fit.evaluate(policy), perplexities(alone)[model.n_layers]
    real = run_row(model, policy, loader)["perplexity"]
    return exit_gaps(fit, alone).assign(
        gate_speedup_layers=traced["speedup_layers"],
        gate_loss_twin=traced["perplexity"] / twin - 1,
        left_behind=real / traced["perplexity"] - 1,
        real_loss_twin=real / twin - 1,
    )


def alone_rows(alone: Alone) -> pd.DataFrame:
    """Tabulate models trained alone beside exits: columns exit (depth − 1), perplexity."""
    values = perplexities(alone)
    return pd.DataFrame({"exit": np.array(list(values)) - 1, "perplexity": list(values.values())})


def training_memory(model: EarlyExitModel, corpus: Corpus, config: TrainingConfig) -> float:
    """Measure the peak MiB of tensors of one step of a training, beyond the weights.

    Activations, gradients and the optimiser's state count. The model is left as it is.
    """
    trained, fit = copy.deepcopy(model), corpus.splits["fit"].limit(config.batch_size)
    short = replace(corpus, splits=corpus.splits | {"fit": fit})  # validation is no part of a step
    one = replace(config, epochs=np.finfo(float).tiny)
    device = next(model.parameters()).device
    return peak_tensor_bytes(lambda: train(trained, short, one, device), device) / MIB
