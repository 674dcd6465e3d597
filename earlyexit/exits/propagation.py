"""State propagation keeps what exited tokens still hand to deeper layers."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.exits.protocol import ExitModel


class LeftBehind:
    """This store holds what exited tokens contribute to the layers after their exit.

    Args:
        model: its layers read the contributions.
        n_tokens: number of tokens T in the batch.
    """

    def __init__(self, model: ExitModel, n_tokens: int):
        self.n_layers, self.n_tokens = model.n_layers, n_tokens
        self._propagate = model.propagation()
        self.contributions: Tensor | None = None  # (T, L, K); rows of exited tokens are valid

    def add(self, layer: int, tokens: Tensor, hidden: Tensor, then: Tensor) -> None:
        """Store what ``tokens`` ``(X,)`` hand on, which left ``layer``.

        Args:
            hidden: their states ``(X, D)``.
            then: what they contributed in that layer ``(X, K)``.
        """
        later = self._propagate(hidden, then, layer + 1)  # (X, L′, K)
        if self.contributions is None:
            shape = self.n_tokens, self.n_layers, later.shape[-1]
            self.contributions = torch.empty(shape, dtype=later.dtype, device=later.device)
        self.contributions[:, layer + 1 :].index_copy_(0, tokens, later)

    def join(self, layer: int, alive: Tensor, given: Tensor) -> Tensor:
        """Complete the contributions of the running tokens ``(A, K)`` to those of all ``(T, K)``."""
        if len(alive) == self.n_tokens:
            return given
        return self.contributions[:, layer].index_copy(0, alive, given)
