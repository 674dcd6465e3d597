"""State propagation: what exited tokens still hand to deeper layers."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.exits.protocol import ExitModel


class LeftBehind:
    """What exited tokens contribute to the layers after their exit.

    Args:
        model: whose layers read it.
        n_tokens: tokens T of the batch.
    """

    def __init__(self, model: ExitModel, n_tokens: int):
        self.n_layers, self.n_tokens = model.n_layers, n_tokens
        self._of = model.propagation()
        self.contributions: Tensor | None = None  # (T, L, K), rows of exited tokens

    def add(self, layer: int, tokens: Tensor, hidden: Tensor) -> None:
        """``tokens`` ``(E,)`` left at ``layer``; later layers read their states ``(E, D)``."""
        later = self._of(hidden, layer + 1)  # (E, L′, K)
        if self.contributions is None:
            shape = self.n_tokens, self.n_layers, later.shape[-1]
            self.contributions = torch.empty(shape, dtype=later.dtype, device=later.device)
        self.contributions[:, layer + 1 :].index_copy_(0, tokens, later)

    def join(self, layer: int, alive: Tensor, given: Tensor) -> Tensor:
        """Contributions of all tokens ``(T, K)`` from those of the running ones ``(A, K)``."""
        if len(alive) == self.n_tokens:
            return given
        return self.contributions[:, layer].index_copy(0, alive, given)
