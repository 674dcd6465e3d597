"""Muon in single precision, for all matrices of one shape at once."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of Jordan et al. 2024: steepest at 0
ITERATIONS = 5
TINY = 1e-7  # of a norm that is divided by


class Muon(torch.optim.Muon):
    """Muon makes the update of a matrix nearly orthogonal (Jordan et al. 2024).

    It takes the steps of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` (Liu et al. 2025,
    arXiv:2502.16982, eq. 4), which iterates in bfloat16 and matrix by matrix. On a CPU without bfloat16
    units that takes longer than the rest of the training step; this one iterates in the precision of
    the weights, and stacks all matrices of one shape.

    Args:
        parameters: matrices.
        lr: peak learning rate; an update's RMS is 0.2 of it, as AdamW's are.
        weight_decay: decoupled decay per step over the learning rate.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float):
        super().__init__(parameters, lr, weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change all weights that have a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self._step(weights, group)

    def _step(self, weights: list[Tensor], group: dict) -> None:
        momentum, rate = group["momentum"], group["lr"]
        gradients, means = [w.grad for w in weights], [self._mean(w) for w in weights]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov's
        updates = orthogonal(torch.stack(ahead)).unbind()
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        size = 0.2 * math.sqrt(max(weights[0].shape))
        torch._foreach_add_(weights, updates, alpha=-rate * size)

    def _mean(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices ``(M, R, C)`` with their singular values brought near 1, from 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration, X ← a X + (b A + c A²) X with A = X Xᵀ.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
