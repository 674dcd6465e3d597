r"""Sparse BK-Core: a learned importance decides which positions the recursion visits.

A position with score s_i > 0 is kept. The recursion runs over kept positions alone, as if the others
were not there; a skipped position hands on the state before it:

    g_i = 1 / (α_i − t² g_{i−1})  if kept,        g_i = g_{i−1}  if not,        g_{−1} = 0.

Potentials are made for kept positions only, and a state that several positions share is projected once,
before it is filled in.
Kept positions are gathered per sequence, so the recursion is shorter; its results are filled forward by
index: what a position reads comes from no later one.

Training samples the mask, m_i = [s_i + logistic noise > 0], and differentiates it as a sigmoid (the
binary concrete distribution of Maddison et al. 2017 and Jang et al. 2017, straight-through). The noise
fades over the training, so that it ends with the mask that will be used. The
derivative with respect to m_i is exact in the features up to the next kept position, where keeping i
would have changed g by 1/(α_i − t² g_{i−1}) − g_{i−1}; what it changes in the recursion beyond that is
left out. A loss (kept share − target)² on the mask without noise holds the share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.bk_core import BKCore, causal_resolvent
from earlyexit.layers import MoEResNetBKLayer
from earlyexit.model import EarlyExitLanguageModel, ModelConfig
from earlyexit.training import TrainingConfig, training_loss

TEMPERATURE = 1.0  # of the sigmoid that the mask is differentiated as


@dataclass(frozen=True)
class SparseConfig(ModelConfig):
    """Constructor arguments of :class:`SparseBKLanguageModel`.

    Attributes:
        keep: target share of positions that BK-Core visits; 1 builds dense layers.
        sparsity_weight: of the mean squared distance to it in the loss.
    """

    keep: float = 0.5
    sparsity_weight: float = 1.0


class SparseBKCore(BKCore):
    """BK-Core over the positions whose mask is set, its features already projected.

    Args:
        n_heads: potentials per position H.
        project: features ``(…, 2H)`` → ``(…, D)``.
    """

    def __init__(self, n_heads: int, project: Callable[[Tensor], Tensor]):
        super().__init__(n_heads, causal=True)
        self.project = project

    def forward(self, v: Tensor, backend: str = "auto") -> Tensor:
        """Potentials and mask ``(B, N, H + 1)`` → projected features ``(B, N, D)``.

        The mask is 0 or 1; where it carries a gradient, the features pass one back to it.
        """
        rows, mask, v = v.flatten(0, 1), v[..., -1], v[..., :-1]
        (B, _, H), kept = v.shape, mask > 0.5
        rank = kept.cumsum(dim=1)  # (B, N): kept positions up to here, 0 … K
        K = int(rank[:, -1].max())
        sequence = torch.arange(B, device=v.device)[:, None]
        visited = kept.flatten().nonzero().squeeze(1)
        place = (rank - 1 + K * sequence).flatten()[visited]
        compact = v.new_zeros(B * K, H).index_copy_(0, place, rows[visited, :H])
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
        """Zeros ``(B, N, 2H)`` that carry the features' derivative with respect to the mask."""
        with torch.no_grad():
            before = F.pad(filled, (0, 0, 1, 0))[:, :-1].double()
            before = torch.complex(*before.chunk(2, dim=-1))
            alpha = torch.complex(v.double() - 2 * self.t, (-self.eta.double()).expand_as(v))
            change = 1 / (alpha - self.t.double() ** 2 * before) - before
            change = torch.cat([change.real, change.imag], dim=-1).to(v.dtype)
            position = torch.arange(v.shape[1], device=v.device).expand_as(kept)
            start = torch.where(kept, position, 0).cummax(dim=1).values  # of the run it lies in
        own = (mask - mask.detach())[..., None] * change
        run = own.cumsum(dim=1)
        return run - (run - own).gather(1, start[..., None].expand_as(run))

    def step(self, state: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """One position: ``(B, H)`` and ``(B, H + 1)`` → the state, and projected features ``(B, D)``."""
        mask, v = v[..., -1:], v[..., :-1]
        new, _ = super().step(state, v)
        g = torch.where(mask > 0.5, new, torch.zeros_like(new) if state is None else state)
        return g, self.project(torch.cat([g.real, g.imag], dim=-1).to(v.dtype))


class SparseBKLayer(MoEResNetBKLayer):
    """A layer whose BK-Core, with its projections, skips unimportant positions.

    Args:
        d_model, n_seq, others: see :class:`earlyexit.layers.MoEResNetBKLayer`.
        keep: target share of positions.
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
        self.noise = 1.0  # scale of the noise in training; see sparse_loss
        self.kept_share: Tensor | None = None  # of the last batch, without noise
        self.register_buffer("_kept_counts", torch.zeros(2), persistent=False)  # kept, all

    def potentials(self, u: Tensor) -> Tensor:
        """``(…, D)`` → potentials and mask ``(…, H + 1)``; potentials of skipped positions are 0.

        In training all are computed, because the derivative of the mask needs them.
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
        """BK features ``(…, 2H)`` → what they add to the stream ``(…, D)``."""
        return self.bk_scale * self.output_proj(features)

    def transform(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Update of the stream from u and the core's projected features, both ``(…, D)``."""
        return mixed + self.moe(u + mixed)

    def kept(self) -> float:
        """Share of positions kept since the last reset."""
        return float(self._kept_counts[0] / self._kept_counts[1].clamp_min(1))

    def reset_kept(self) -> None:
        self._kept_counts.zero_()


class SparseBKLanguageModel(EarlyExitLanguageModel):
    """A language model with sparse BK-Cores; train it with ``loss=sparse_loss``.

    Args:
        keep, sparsity_weight: see :class:`SparseConfig`.
        others: see :class:`earlyexit.model.EarlyExitLanguageModel`.

    Raises:
        ValueError: keep not in (0, 1], a negative weight, a two-sided core, or see above.
    """

    config_type = SparseConfig

    def __init__(self, *args, keep: float = 0.5, sparsity_weight: float = 1.0, **others):
        super().__init__(*args, **others)
        if not 0 < keep <= 1 or not sparsity_weight >= 0:
            raise ValueError(f"keep={keep} must lie in (0, 1], sparsity_weight be ≥ 0")
        c = self.config
        if keep < 1 and not c.causal:
            raise ValueError("a two-sided BK-Core cannot be sparse: a gap has no causal filling")
        self.config = SparseConfig(**asdict(c), keep=keep, sparsity_weight=sparsity_weight)
        if keep == 1:
            return
        for block in self.blocks:
            block.bk_layer = SparseBKLayer(
                c.d_model, c.n_seq, c.num_experts, c.top_k, c.dropout_p,
                bk_heads=c.bk_heads, expert_hidden=c.expert_hidden, keep=keep,
            )  # fmt: skip


def sparse_layers(model: nn.Module) -> Iterator[SparseBKLayer]:
    """The sparse layers of a model, first to last."""
    return (module for module in model.modules() if isinstance(module, SparseBKLayer))


def sparse_loss(
    model: SparseBKLanguageModel,
    x: Tensor,
    y: Tensor,
    config: TrainingConfig,
    step: int,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`earlyexit.training.training_loss` plus w · mean over layers of (kept − keep)².

    Args:
        progress: share of the training that is done; the noise of the masks falls to 0 with it.
    """
    for layer in sparse_layers(model):
        layer.noise = 1 - progress
    objective, nll = training_loss(model, x, y, config, step, progress)
    shares = [s.kept_share for s in sparse_layers(model) if s.kept_share is not None]
    if shares:
        distance = torch.stack(shares) - model.config.keep
        objective = objective + model.config.sparsity_weight * distance.square().mean()
    return objective, nll


@torch.no_grad()
def kept_shares(model: EarlyExitLanguageModel, batches: Iterable) -> list[float]:
    """Share of positions that each sparse layer's BK-Core visits at full depth."""
    device = next(model.parameters()).device
    for layer in sparse_layers(model):
        layer.reset_kept()
    for x, _ in batches:
        model.hidden_states(x.to(device))
    return [layer.kept() for layer in sparse_layers(model)]
