"""training/config."""

from __future__ import annotations

from dataclasses import dataclass

# Ways of training exits, as changes to a profile's training.
RECIPES: dict[str, dict] = {
    "joint": {},
    "frozen": {"exit_sampling": "one", "exit_loss_weight": 1.0, "freeze_backbone": True},
    "joint, one exit a step": {"exit_sampling": "one"},
    "joint, weight 1.5": {"exit_loss_weight": 1.5},
    "joint, weight ramped up": {"exit_ramp": 0.5},
    "joint, self-distilled": {
        "exit_sampling": "one", "exit_loss_weight": 1.5, "distillation": 0.5
    },
    "joint, layer dropout": {"exit_sampling": "one", "layer_dropout": 0.2},
}  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training split; fractions are allowed.
        batch_size: windows per step.
        learning_rate: peak of AdamW's, after a linear warm-up and before a cosine decay to 5 %.
        weight_decay: on matrices only.
        warmup: share of all steps.
        clip: largest gradient norm.
        exit_loss_weight: of the exit losses beside the last layer's; 0 trains no exit.
        exit_sampling: ``"one"`` random exit per step, or ``"all"``, averaged: the same expectation.
            ``"tokens"``: a random share w / (1 + w) of the tokens leaves, each at a random exit, and
            its state stays frozen as in a real run: deeper layers learn from what exits leave behind,
            and each token is projected once.
        exit_ramp: share of the steps over which the exit losses' weight rises from 0.
        distillation: share of the exit's target that is the last layer's prediction, not the word.
        layer_dropout: probability of skipping the last layer in a step; earlier layers are skipped
            less, the first never (Elhoushi et al. 2024, LayerSkip, eq. 1).
        balance_weight: of the experts' load-balancing loss.
        freeze_backbone: train exit heads only, on the detached states of a given model.
        bf16: bfloat16 matrix products, where autocast knows them.
        seed: of initialisation, order and dropout.
    """

    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    exit_loss_weight: float = 0.3
    exit_sampling: str = "one"
    exit_ramp: float = 0.0
    distillation: float = 0.0
    layer_dropout: float = 0.0
    balance_weight: float = 0.01
    freeze_backbone: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("exit_loss_weight", "exit_ramp", "distillation", "layer_dropout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ 0")
        if self.distillation > 1 or self.layer_dropout >= 1:
            raise ValueError("distillation must lie in [0, 1], layer_dropout in [0, 1)")
        if self.exit_sampling not in ("one", "all", "tokens"):
            raise ValueError(
                f"exit_sampling={self.exit_sampling!r} must be 'one', 'all' or 'tokens'"
            )
        if self.exit_sampling == "tokens" and (
            self.freeze_backbone or self.distillation or self.layer_dropout
        ):
            raise ValueError(
                "exit_sampling='tokens' trains every layer on the word itself: no frozen backbone,"
                " distillation or layer dropout"
            )
        if self.freeze_backbone and not self.exit_loss_weight:
            raise ValueError("freeze_backbone trains exits only: exit_loss_weight must be > 0")
