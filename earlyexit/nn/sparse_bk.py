"""A sparse BK-Core visits important positions only; :mod:`earlyexit.models.sparse_bk` derives it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.bk_core import BKCore, causal_resolvent
from earlyexit.nn.block import MoEResNetBKLayer

TEMPERATURE = 1.0  # of the sigmoid that the mask is differentiated as


class SparseBKCore(BKCore):
    """A sparse BK-Core visits the positions whose mask is set, and projects its features.

    Args:
        n_heads: number of potentials H per position.
        project: maps features ``(…, 2H)`` to ``(…, D)``.
    """

    def __init__(self, n_heads: int, project: Callable[[Tensor], Tensor]):
        super().__init__(n_heads, causal=True)
        self.project = project

    def forward(self, v: Tensor, backend: str = "auto") -> Tensor:
        """Return projected features ``(B, N, D)`` of potentials and mask ``(B, N, H + 1)``.

        The mask is 0 or 1; where it carries a gradient, the features pass one back to it.
        """
        rows, mask, v = v.flatten(0, 1), v[..., -1], v[..., :-1]
        (B, _, H), kept = v.shape, mask > 0.5
        rank = kept.cumsum(dim=1)  # (B, N): kept positions up to here, 0 … K
        K = int(rank[:, -1].max())
        sequence = torch.arange(B, device=v.device)[:, None]
        visited = kept.flatten().nonzero().squeeze(1)
        target = (rank - 1 + K * sequence).flatten()[visited]
        compact = v.new_zeros(B * K, H).index_copy_(0, target, rows[visited, :H])
        g = causal_resolvent(compact.view(B, K, H), self.eta, self.t, backend)  # (B, K, H)
        states = v.new_zeros(B, K + 1, 2 * H)  # before the first kept position, g_{−1} = 0
        states[:, 1:, :H], states[:, 1:, H:] = g.real, g.imag
        states = states.flatten(0, 1)
        source = rank + (K + 1) * sequence
        if not mask.requires_grad:
            return self.project(states)[source]
        filled = states[source]  # (B, N, 2H)
        return self.project(filled + self._through_mask(v, mask, kept, filled))

    def _through_mask(self, v: Tensor, mask: Tensor, kept: Tensor, filled: Tensor) -> Tensor:
        """Return zeros ``(B, N, 2H)`` that carry the features' derivative by the mask."""
        with torch.no_grad():
            before = F.pad(filled, (0, 0, 1, 0))[:, :-1].double()
            before = torch.complex(*before.chunk(2, dim=-1))
            alpha = torch.complex(v.double() - 2 * self.t, (-self.eta.double()).expand_as(v))
            change = 1 / (alpha - self.t.double() ** 2 * before) - before
            change = torch.cat([change.real, change.imag], dim=-1).to(v.dtype)
            position = torch.arange(v.shape[1], device=v.device).expand_as(kept)
            start = torch.where(kept, position, 0).cummax(dim=1).values  # of the run it lies in
        zeros = (mask - mask.detach())[..., None] * change
        run = zeros.cumsum(dim=1)
        return run - (run - zeros).gather(1, start[..., None].expand_as(run))

    def step(self, state: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take one position with ``(B, H + 1)``: return state ``(B, H)`` and features ``(B, D)``."""
        mask, v = v[..., -1:], v[..., :-1]
        new, _ = super().step(state, v)
        g = torch.where(mask > 0.5, new, torch.zeros_like(new) if state is None else state)
        return g, self.project(torch.cat([g.real, g.imag], dim=-1).to(v.dtype))


class SparseBKLayer(MoEResNetBKLayer):
    """In this layer BK-Core and its projections skip unimportant positions.

    Args:
        d_model, n_seq, others: see :class:`earlyexit.nn.block.MoEResNetBKLayer`.
        keep: share of positions that training aims to keep.
    """

    def __init__(self, d_model: int, n_seq: int, *args, keep: float = 0.5, **others):
        super().__init__(d_model, n_seq, *args, **others)
        self.importance = nn.Linear(d_model, 1)
        # An untrained LN(h) has unit components: scores start spread over ±1, about keep above 0.
        nn.init.normal_(self.importance.weight, std=d_model**-0.5)
        nn.init.constant_(self.importance.bias, torch.tensor(keep).logit().item() / 1.7)
        core = SparseBKCore(self.bk_core.n_heads, self.project)
        core.load_state_dict(self.bk_core.state_dict())
        self.bk_core = core
        self.noise = 1.0  # scale of the noise in training, which the model lets fall to 0
        self.kept_share: Tensor | None = None  # of the last batch, without noise
        self.register_buffer("_kept_counts", torch.zeros(2), persistent=False)  # kept, all

    def potentials(self, u: Tensor) -> Tensor:
        """Return potentials and mask ``(…, H + 1)`` of u ``(…, D)``.

        Potentials of skipped positions are 0, but in training, where the mask's derivative needs
        them.
        """
        score = self.importance(u)  # (…, 1)
        hard = (score > 0).to(u.dtype)
        self._kept_counts += torch.stack([hard.detach().sum(), hard.new_tensor(hard.numel())])
        self.kept_share = None
        if self.training and torch.is_grad_enabled():
            soft = score.sigmoid()
            self.kept_share = (hard + soft - soft.detach()).mean()
            uniform = torch.rand_like(score).clamp(1e-6, 1 - 1e-6)
            soft = ((score + self.noise * uniform.logit()) / TEMPERATURE).sigmoid()
            mask = (soft > 0.5).to(u.dtype) + soft - soft.detach()
            return torch.cat([self.v_proj(u), mask], dim=-1)
        out = u.new_zeros(hard.numel(), self.v_proj.out_features + 1)
        rows = hard.flatten().nonzero().squeeze(1)
        out[:, -1] = hard.flatten()
        out[rows, :-1] = self.v_proj(u.reshape(-1, u.shape[-1])[rows])
        return out.view(*u.shape[:-1], -1)

    def project(self, features: Tensor) -> Tensor:
        """Return what BK features ``(…, 2H)`` add to the stream ``(…, D)``."""
        return self.bk_scale * self.output_proj(features)

    def transform(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Return the update of the stream from u and the projected features, all ``(…, D)``."""
        return mixed + self.moe(u + mixed)

    def kept(self) -> float:
        """Return the share of positions kept since the last reset."""
        return float(self._kept_counts[0] / self._kept_counts[1].clamp_min(1))

    def reset_kept(self) -> None:
        """Forget the positions counted so far."""
        self._kept_counts.zero_()
