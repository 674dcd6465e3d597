"""Gates judge an exit's prediction from the state alone, without the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KL, AGREE = 0, 1  # what the two outputs of a gate predict: log KL, and the logit of agreement


class ExitGates(nn.Module):
    """A model has one gate per exit but the last.

    Args:
        n_layers: layers L of the model.
        d_model: width D.
        hidden: units of one hidden layer; 0 makes a linear gate.
    """

    def __init__(self, n_layers: int, d_model: int, hidden: int = 0):
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, hidden), nn.ReLU(), nn.Linear(hidden, 2))
            if hidden
            else nn.Linear(d_model, 2)
            for _ in range(n_layers - 1)
        )
        self.register_buffer("trained", torch.zeros((), dtype=torch.bool))

    def forward(self, layer: int, normalised: Tensor) -> Tensor:
        """Return (log KL, logit of agreement) ``(T, 2)`` of normed states ``(T, D)`` after ``layer``."""
        return self.gates[layer](normalised)
