"""Configuration of trainings, of a model and of its gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from earlyexit.checked import (
    LARGEST_RATE,
    Checked,
    Count,
    Dropout,
    Limit,
    Positive,
    Share,
    Weight,
    bounded,
)  # fmt: skip


@bounded(learning_rate=LARGEST_RATE)
@dataclass(frozen=True)
class TrainingConfig(Checked):
    """A training configuration says how a model is trained.

    Attributes:
        epochs: passes over the training split; fractions are allowed.
        batch_size: windows per step.
        optimizer: ``"adamw"``, or ``"muon"`` for the matrices of the layers and AdamW for the rest; see
            :class:`earlyexit.training.optimizer.Optimizer`.
        learning_rate: its peak, after a linear warm-up and before a cosine decay to 5 %.
        weight_decay: on matrices only.
        warmup: share of all steps.
        clip: largest gradient norm.
        exit_loss_weight: of the exit losses beside the last layer's; 0 trains no exit.
        exit_sampling: ``"one"`` random exit per step, or ``"all"``, averaged: the same expectation.
            ``"tokens"``: a random share w / (1 + w) of the tokens leaves, each at a random exit, and
            its state stays frozen as in a real run: deeper layers learn from what exits leave behind,
            and each token is projected once.
        exit_gradient: share of the exits' gradient that reaches the layers below; their heads get all.
        exit_ramp: share of the steps over which the exit losses' weight rises from 0.
        distillation: share of the exit's target that is the last layer's prediction, not the word.
        layer_dropout: probability of skipping the last layer in a step; earlier layers are skipped
            less, the first never (Elhoushi et al. 2024, LayerSkip, eq. 1).
        balance_weight: of the experts' load-balancing loss.
        freeze_backbone: train exit heads only, on the detached states of a given model.
        bf16: bfloat16 matrix products, where autocast knows them.
        seed: of initialisation, order and dropout.
    """

    epochs: Positive = 1.0
    batch_size: Count = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 3e-3
    weight_decay: Weight = 0.05
    warmup: Share = 0.05
    clip: Positive = 1.0
    exit_loss_weight: Weight = 0.3
    exit_sampling: Literal["one", "all", "tokens"] = "one"
    exit_gradient: Share = 1.0
    exit_ramp: Share = 0.0
    distillation: Share = 0.0
    layer_dropout: Dropout = 0.0
    balance_weight: Weight = 0.01
    freeze_backbone: bool = False
    bf16: bool = False
    seed: Limit = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit_sampling == "tokens" and (
            self.freeze_backbone
            or self.distillation
            or self.layer_dropout
            or self.exit_gradient < 1
        ):
            raise ValueError(
                "exit_sampling='tokens' trains every layer on the word itself: no frozen backbone,"
                " distillation, layer dropout or exit_gradient below 1"
            )
        if self.freeze_backbone and not self.exit_loss_weight:
            raise ValueError("freeze_backbone trains exits only: exit_loss_weight must be > 0")


@dataclass(frozen=True)
class GatesConfig(Checked):
    """How the gates of a trained model are trained; see :func:`earlyexit.training.gates.train_gates`.

    Attributes:
        hidden: units of a gate's hidden layer; 0: a linear gate.
        max_tokens: training tokens that the gates learn from.
        steps: of the optimiser, on those tokens.
    """

    hidden: Limit = 0
    max_tokens: Count = 100_000
    steps: Count = 600
