"""Sparse mixing visits important positions only; :mod:`earlyexit.models.sparse_bk` derives it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import ResolventMixing

TEMPERATURE = 1.0  # of the sigmoid that the mask is differentiated as


class SparseContribution(nn.Module):
    """This product makes potentials, values and the mask that says which positions are kept.

    Args:
        product: makes the potentials and values ``(…, K)`` of u ``(…, D)``.
        keep: share of positions that training aims to keep.

    Attributes:
        noise: scale of the noise in training, which the model lets fall to 0.
        kept_share: share kept in the last batch, without noise, differentiable; None outside training.
    """

    def __init__(self, product: nn.Linear, keep: float):
        super().__init__()
        self.product = product
        self.importance = nn.Linear(product.in_features, 1)
        # An untrained LN(h) has unit components: scores start spread over ±1, about keep above 0.
        nn.init.normal_(self.importance.weight, std=product.in_features**-0.5)
        nn.init.constant_(self.importance.bias, torch.tensor(keep).logit().item() / 1.7)
        self.noise = 1.0
        self.kept_share: Tensor | None = None
        self.register_buffer("_counts", torch.zeros(2), persistent=False)  # kept, all

    def forward(self, u: Tensor) -> Tensor:
        """Return potentials, values and mask ``(…, K + 1)`` of u ``(…, D)``.

        Skipped positions hand on zeros; in training, where the mask's derivative needs them, theirs.
        """
        score = self.importance(u)  # (…, 1)
        hard = (score > 0).to(u.dtype)
        self._counts += torch.stack([hard.detach().sum(), hard.new_tensor(hard.numel())])
        self.kept_share = None
        if self.training and torch.is_grad_enabled():
            soft = score.sigmoid()
            self.kept_share = (hard + soft - soft.detach()).mean()
            return torch.cat([self.product(u), self._sample(score)], dim=-1)
        out = u.new_zeros(hard.numel(), self.product.out_features + 1)
        rows = hard.flatten().nonzero().squeeze(1)
        out[:, -1] = hard.flatten()
        out[rows, :-1] = self.product(u.reshape(-1, u.shape[-1])[rows])
        return out.view(*u.shape[:-1], -1)

    def _sample(self, score: Tensor) -> Tensor:
        """Return a mask of noisy scores, 0 or 1, which is differentiated as their sigmoid."""
        uniform = torch.rand_like(score).clamp(1e-6, 1 - 1e-6)
        soft = ((score + self.noise * uniform.logit()) / TEMPERATURE).sigmoid()
        return (soft > 0.5).to(score.dtype) + soft - soft.detach()

    def kept(self) -> float:
        """Return the share of positions kept since the last reset."""
        return float(self._counts[0] / self._counts[1].clamp_min(1))

    def reset_kept(self) -> None:
        """Forget the positions counted so far."""
        self._counts.zero_()


class SparseMixing(ResolventMixing):
    """In this mixing layer BK-Core and the product before it skip unimportant positions.

    A token hands on potentials, values and a mask ``(…, H + H·P + 1)``. BK-Core runs over the kept
    positions of each sequence; a skipped one reads the (g, y) of the last kept position before it, and
    zeros if there is none.

    Args:
        config: see :class:`earlyexit.nn.mixing.ResolventMixing`.
        keep: share of positions that training aims to keep.
    """

    def __init__(self, config: ModelConfig, keep: float = 0.5):
        super().__init__(config)
        self.contribution = SparseContribution(self.contribution, keep)

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return BK features ``(A, 2H + 2H·P)`` of the rows of contributions and mask ``(B, N, ·)``.

        Where the mask carries a gradient, the features pass one back to it.
        """
        given, mask = given[..., :-1], given[..., -1]
        (B, _, K), kept = given.shape, mask > 0.5
        rank = kept.cumsum(dim=1)  # (B, N): kept positions up to here, 0 … R
        R = int(rank[:, -1].max().clamp_min(1))
        sequence = torch.arange(B, device=given.device)[:, None]
        visited = kept.flatten().nonzero().squeeze(1)
        target = (rank - 1 + R * sequence).flatten()[visited]
        compact = given.new_zeros(B * R, K)
        compact = compact.index_copy(0, target, given.flatten(0, 1)[visited])
        states = F.pad(self.bk_core(compact.view(B, R, K)), (0, 0, 1, 0))  # zeros before the first
        filled = states.flatten(0, 1).index_select(0, (rank + (R + 1) * sequence).flatten())
        if mask.requires_grad:
            features = filled.view(*mask.shape, -1)
            filled = filled + self._through_mask(given, mask, features).flatten(0, 1)
        return filled if rows is None else filled.index_select(0, rows)

    def _through_mask(self, given: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """Return zeros ``(B, N, ·)`` that carry the features' derivative by the mask ``(B, N)``.

        At every position, that is what one step would change of the state before it. It counts up to
        the next kept position.
        """
        with torch.no_grad():
            before = F.pad(features, (0, 0, 1, 0))[:, :-1]
            _, after = self.bk_core.step(self._state(before.flatten(0, 1)), given.flatten(0, 1))
            change = after.view_as(before) - before
            position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            start = torch.where(mask > 0.5, position, 0).cummax(dim=1).values  # of its run
        zeros = (mask - mask.detach())[..., None] * change
        run = zeros.cumsum(dim=1)
        return run - (run - zeros).gather(1, start[..., None].expand_as(run))

    def _state(self, features: Tensor) -> Tensor:
        """Return BK-Core's state ``(T, H + H·P)`` of its features ``(T, 2H + 2H·P)``."""
        heads, values = self.bk_core.n_heads, self.bk_core.n_heads * self.bk_core.n_values
        g_r, g_i, y_r, y_i = features.double().split([heads, heads, values, values], dim=-1)
        return torch.complex(torch.cat([g_r, y_r], dim=-1), torch.cat([g_i, y_i], dim=-1))

    def step(self, u: Tensor, given: Tensor, memory) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the features ``(B, 2H + 2H·P)`` of one position, and BK-Core's state with them."""
        given, kept = given[:, :-1], given[:, -1:] > 0.5
        state, features = self.bk_core.step(memory and memory[0], given)
        before = memory or (torch.zeros_like(state), torch.zeros_like(features))
        pairs = zip((state, features), before, strict=True)
        state, features = (torch.where(kept, new, old) for new, old in pairs)
        return features, (state, features)
