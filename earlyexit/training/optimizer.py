"""Weights are optimised by AdamW, or the matrices of the layers by Muon and the rest by AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from earlyexit.training.config import TrainingConfig
from earlyexit.training.muon import Muon

END = 0.05  # of the peak learning rate, at the last step


class Optimizer:
    """An optimizer steps all weights of a model, each kind by its own rule, under one schedule.

    :class:`Muon` makes the update of a matrix orthogonal; embeddings, routers, vectors and numbers are
    left to AdamW.

    Args:
        parameters: names and weights to train.
        total: steps of the whole training.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig, total: int
    ):
        parameters = list(parameters)
        use_muon = config.optimizer == "muon"
        muon = [p for name, p in parameters if use_muon and is_layer_matrix(name, p)]
        others = [p for name, p in parameters if not (use_muon and is_layer_matrix(name, p))]
        rate, decay = config.learning_rate, config.weight_decay
        groups = [
            {"params": [p for p in others if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        ]
        if muon:
            self.parts.append(Muon(muon, rate, decay))
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(part, lambda step: factor(step, total, config.warmup))
            for part in self.parts
        ]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change the weights, and then the learning rate."""
        for part in (*self.parts, *self.schedules):
            part.step()

    def state_dict(self) -> list[dict]:
        """Return everything that decides the coming steps."""
        return [part.state_dict() for part in (*self.parts, *self.schedules)]

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        for part, state in zip((*self.parts, *self.schedules), states, strict=True):
            part.load_state_dict(state)


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a weight is a matrix between states, and neither a table of words nor a router."""
    words = ("embedding", "unembedding", "exit_classifier.linear", "gating_network")
    return parameter.dim() == 2 and name.startswith("blocks") and not any(w in name for w in words)


def factor(step: int, total: int, warmup: float) -> float:
    """Return the learning rate over its peak: a linear warm-up, then a cosine decay to ``END``."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return END + (1 - END) * (1 + math.cos(math.pi * progress)) / 2
