"""Mixing layers carry the past to a token; all have one interface, that of a model's contract.

``contribution`` makes what every token hands to those after it ``(…, K)``, ``mix`` what tokens take from
the contributions of all ``(A, M)``, and ``read`` what that adds to the stream ``(A, D)``. ``step`` does
``mix`` for one position, from contributions ``(B, K)`` and a memory of those before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.config import ModelConfig

HEAD_WIDTH = 16  # of an attention head
QUIET = 0.3  # initial scale of the potentials' weights; of 0.1, 0.3, 1 and 2 it trained best


class ResolventMixing(nn.Module):
    """This layer mixes positions by BK-Core.

    From normed states u ``(…, D)`` it makes potentials v and values b, all of what a token hands on
    ``(…, H + H·P)``. What BK-Core makes of them is read as

        m = s · (W_y (RMS(w_r ⊙ Re y + w_i ⊙ Im y) ⊙ SiLU(W_g u)) + W_d [Re g, Im g] + c),

    with a learned scale s, and RMS dividing each head's values by their root mean square. Without values
    (P = 0) the first term is missing.

    Args:
        config: its ``d_model``, ``bk_heads``, ``bk_values`` and ``causal`` are used.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, heads, values = config.d_model, config.bk_heads, config.bk_values
        self.bk_core = BKCore(heads, config.causal, n_values=values)
        self.contribution = nn.Linear(d, heads + heads * values)
        self.output_proj = nn.Linear(2 * heads, d)
        self.bk_scale = nn.Parameter(torch.ones(()))
        if values:
            self.combine = nn.Parameter(torch.randn(2, heads * values) * 2**-0.5)
            self.gate_proj = nn.Linear(d, heads * values, bias=False)
            self.values_proj = nn.Linear(heads * values, d, bias=False)
        # The band |α| < 2|t| is where the past matters: spread the heads over it. In one dimension
        # disorder localises (Anderson 1958): noisy potentials forget, so they start quiet.
        with torch.no_grad():
            self.contribution.weight[:heads].mul_(QUIET)
            band = 2 * self.bk_core.t + torch.linspace(-1.5, 1.5, heads)
            self.contribution.bias[:heads].copy_(band)

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return BK features ``(A, 2H + 2H·P)`` of the rows of contributions ``(B, N, ·)``."""
        features = self.bk_core(given).flatten(0, 1)
        return features if rows is None else features.index_select(0, rows)

    def step(self, u: Tensor, given: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the features ``(B, 2H + 2H·P)`` of one position, and BK-Core's state."""
        memory, features = self.bk_core.step(memory, given)
        return features, memory

    def read(self, u: Tensor, features: Tensor) -> Tensor:
        """Return what the features ``(…, 2H + 2H·P)`` add to the stream ``(…, D)``."""
        diagonal, y = features.tensor_split([2 * self.bk_core.n_heads], dim=-1)
        return self.project(u, diagonal, self.normalise(y))

    def normalise(self, y: Tensor) -> Tensor:
        """Return each head's values ``(…, H·P)``, of Re y and Im y ``(…, 2H·P)``, over their RMS."""
        heads, values = self.bk_core.n_heads, self.bk_core.n_values
        if not values:
            return y
        re, im = y.chunk(2, dim=-1)
        z = (self.combine[0] * re + self.combine[1] * im).unflatten(-1, (heads, values))
        return F.rms_norm(z, (values,), eps=1e-6).flatten(-2)

    def project(self, u: Tensor, diagonal: Tensor, z: Tensor) -> Tensor:
        """Return the update of the stream from Re g and Im g, and from values that u gates."""
        project, scale = self.output_proj, self.bk_scale  # scaling weights is cheaper than states
        m = F.linear(diagonal, scale * project.weight, scale * project.bias)
        if not self.bk_core.n_values:
            return m
        return m + F.linear(z * F.silu(self.gate_proj(u)), scale * self.values_proj.weight)


class AttentionMixing(nn.Module):
    """Causal attention is the control that remembers everything, at O(N²) and a state that grows.

    A token hands on a key and a value. Heads are ``HEAD_WIDTH`` wide (Vaswani et al. 2017).

    Raises:
        ValueError: the width is no multiple of ``HEAD_WIDTH``, or the model is two-sided.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        if d % HEAD_WIDTH or not config.causal:
            raise ValueError(
                f"mixing='attention' is causal and needs d_model={d} to be a multiple of {HEAD_WIDTH}"
            )
        self.query = nn.Linear(d, d, bias=False)
        self.contribution = nn.Linear(d, 2 * d)
        self.output_proj = nn.Linear(d, d)

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return the attended values ``(A, D)`` of running rows, given keys and values of all."""
        query, tokens = self.query(u), given.shape[:2]
        if rows is not None:  # the rows of others are computed in vain: this is a control
            query = query.new_zeros(tokens.numel(), query.shape[1]).index_copy(0, rows, query)
        out = self._attend(query.unflatten(0, tokens), given, causal=True).flatten(0, 1)
        return out if rows is None else out.index_select(0, rows)

    def step(self, u: Tensor, given: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the attended values ``(B, D)`` of one position, and all keys and values so far."""
        given = given[:, None]
        memory = given if memory is None else torch.cat([memory, given], dim=1)
        return self._attend(self.query(u)[:, None], memory, causal=False).squeeze(1), memory

    def _attend(self, query: Tensor, given: Tensor, causal: bool) -> Tensor:
        parts = (query, *given.chunk(2, dim=-1))
        heads = (part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(*heads, is_causal=causal)
        return out.transpose(1, 2).flatten(-2)

    def read(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Return what the attended values add to the stream ``(…, D)``."""
        return self.output_proj(mixed)


class NoMixing(nn.Module):
    """Without mixing a token sees nothing but itself and its position: the other control."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def contribution(self, u: Tensor) -> Tensor:
        """Return nothing, of shape ``(…, 0)``."""
        return u[..., :0]

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return nothing, of shape ``(A, 0)``."""
        return u[..., :0]

    def step(self, u: Tensor, given: Tensor, memory: None) -> tuple[Tensor, None]:
        """Return nothing, of shape ``(B, 0)``, and no memory."""
        return u[..., :0], None

    def read(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Return zeros ``(…, D)``."""
        return torch.zeros_like(u)


MIXINGS = {"resolvent": ResolventMixing, "attention": AttentionMixing, "none": NoMixing}
