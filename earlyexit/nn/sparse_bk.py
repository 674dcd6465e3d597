"""Sparse mixing visits important positions only; :mod:`earlyexit.models.sparse_bk` derives it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import Contribution, ResolventMixing
from earlyexit.nn.record import listening

TEMPERATURE = 1.0  # of the sigmoid that the mask is differentiated as


class SparseContribution(nn.Module):
    """This product makes potentials, values and the mask that says which positions are kept.

    Args:
        product: makes the potentials and values ``(…, K)`` of u ``(…, D)``.
        keep: share of positions that training aims to keep.

    Attributes:
        noise: scale of the noise in training, which the model lets fall to 0.
    """

    def __init__(self, product: Contribution, keep: float):
        super().__init__()
        self.product = product
        self.importance = nn.Linear(product.in_features, 1)
        # An untrained LN(h) has unit components: scores start spread over ±1, about keep above 0.
        nn.init.normal_(self.importance.weight, std=product.in_features**-0.5)
        nn.init.constant_(
            self.importance.bias, torch.tensor(keep, device="cpu").logit().item() / 1.7
        )
        self.noise = 1.0

    def forward(self, u: Tensor) -> Tensor:
        """Return potentials, values and mask ``(…, K + 1)`` of u ``(…, D)``.

        Skipped positions hand on zeros; in training, where the mask's derivative needs them, theirs.
        It notes ``kept``, how many positions are kept, without noise, differentiable, and of how many.
        """
        score = self.importance(u)  # (…, 1)
        hard = (score > 0).to(u.dtype)
        if (record := listening()) is not None:
            soft = score.sigmoid()
            kept = record.counted((hard + (soft - soft.detach())).flatten())
            record.notes["kept"].append(torch.stack([kept.sum(), kept.new_tensor(len(kept))]))
        if self.training and torch.is_grad_enabled():
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


class SparseMixing(ResolventMixing):
    """In this mixing layer BK-Core and the product before it skip unimportant positions.

    A token hands on potentials, values and a mask ``(…, H + H·P + 1)``. BK-Core runs over the kept
    positions of each sequence; a skipped one reads the (g, y) of the last kept position before it, and
    zeros if there is none. What is read are the normalised values ``(…, M)``, M = H·P, or without values
    Re g and Im g, M = 2H.

    Args:
        config: see :class:`earlyexit.nn.mixing.ResolventMixing`.
        keep: share of positions that training aims to keep.
    """

    def __init__(self, config: ModelConfig, keep: float = 0.5):
        super().__init__(config)
        self.contribution = SparseContribution(self.contribution, keep)

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return what the rows of contributions and mask ``(B, N, ·)`` read ``(A, M)``.

        Where the mask carries a gradient, it gets one back.
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
        features = self.bk_core(compact.view(B, R, K))
        source = (rank + (R + 1) * sequence).flatten()
        mixed = _fill(self.readable(features), source)
        if mask.requires_grad:
            filled = _fill(features.detach(), source).view(*mask.shape, -1)
            mixed = mixed + self._through_mask(given, mask, filled).flatten(0, 1)
        return mixed if rows is None else mixed.index_select(0, rows)

    @torch.no_grad()
    def _changes(self, given: Tensor, features: Tensor) -> Tensor:
        """Return what keeping each position changes in what it reads ``(B, N, M)``.

        It takes one step from the state that the position before has, of features ``(B, N, ·)``.
        """
        before = F.pad(features, (0, 0, 1, 0))[:, :-1]
        _, after = self.bk_core.step(self._state(before.flatten(0, 1)), given.flatten(0, 1))
        return self.readable(after.view_as(before)) - self.readable(before)

    def _through_mask(self, given: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """Return zeros ``(B, N, M)`` that carry the derivative by the mask ``(B, N)``.

        What keeping a position changes counts up to the next kept one. It is a difference of normalised
        values, and bounded: the derivative of a norm at the zeros before the first kept position, or
        where a value grows by much, is no guide to it.
        """
        position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        start = torch.where(mask > 0.5, position, 0).cummax(dim=1).values  # of the run it lies in
        zeros = (mask - mask.detach())[..., None] * self._changes(given, features)
        run = zeros.cumsum(dim=1)
        return run - (run - zeros).gather(1, start[..., None].expand_as(run))

    def _state(self, features: Tensor) -> Tensor:
        """Return BK-Core's state ``(T, H + H·P)`` of its features ``(T, 2H + 2H·P)``."""
        heads, values = self.bk_core.n_heads, self.bk_core.n_heads * self.bk_core.n_values
        g_r, g_i, y_r, y_i = features.double().split([heads, heads, values, values], dim=-1)
        return torch.complex(torch.cat([g_r, y_r], dim=-1), torch.cat([g_i, y_i], dim=-1))

    def step(self, u: Tensor, given: Tensor, memory) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return what one position reads ``(B, M)``, and BK-Core's state with it."""
        given, kept = given[:, :-1], given[:, -1:] > 0.5
        state, features = self.bk_core.step(memory and memory[0], given)
        new = state, self.readable(features)
        before = memory or tuple(torch.zeros_like(part) for part in new)
        state, mixed = (torch.where(kept, a, b) for a, b in zip(new, before, strict=True))
        return mixed, (state, mixed)

    def read(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Return what :meth:`mix` gave as an update of the stream ``(…, D)``."""
        return self.project(u, mixed)


def _fill(compact: Tensor, source: Tensor) -> Tensor:
    """Return rows ``(B·N, M)`` of kept positions ``(B, R, M)``, to each of which zeros are prepended."""
    return F.pad(compact, (0, 0, 1, 0)).flatten(0, 1).index_select(0, source)
