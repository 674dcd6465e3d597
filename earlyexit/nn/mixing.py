"""Mixing layers carry the past to a token; all have one interface, that of a model's contract.

``contribution`` makes what every token hands to those after it ``(…, K)``, ``mix`` what tokens take from
the contributions of all ``(A, M)``, and ``read`` what that adds to the stream ``(A, D)``. ``step`` does
``mix`` for one position, from contributions ``(B, K)`` and a memory of those before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.config import ModelConfig

HEAD_WIDTH = 16  # of an attention head

# Where BK-Core starts. Above the band's lower edge (0 < v < 4t) a state oscillates as e^{ik} from token
# to token; in one dimension disorder localises it (Anderson 1958), so it forgets soon and tells nearby
# words apart. Below the edge (v < 0) it decays as e^{−κ}, 4 sinh² κ/2 = −v/t, without a phase to be
# scrambled: it sums over 1/κ tokens.
DECAYS = (3e-3, 2.0)  # κ of the heads below the edge
DAMPING = 0.3  # their η over |v|
BAND = (0.5, 3.5)  # potentials of the heads in the band, in units of t = 1
WIDTHS = (0.05, 0.5)  # their η
QUIET = 0.3  # the unit in which their potentials are learned


def starts(heads: int, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return potentials, their units and the widths η that heads start with, ``(H,)`` each.

    Below the edge a potential is learned in units of itself: a step of the optimiser then moves κ of a
    head that remembers a hundred tokens as much, relative to itself, as κ of one that remembers two.

    Args:
        where: ``"below"`` the band's edge, in the ``"band"``, or ``"both"``, half of the heads each.
    """
    below = {"below": heads, "both": heads // 2, "band": 0}[where]
    depth = 4 * torch.sinh(torch.logspace(*map(math.log10, DECAYS), below) / 2) ** 2
    inside = heads - below
    potential = torch.cat([-depth, torch.linspace(*BAND, inside)])
    unit = torch.cat([depth, torch.full((inside,), QUIET)])
    width = torch.cat([DAMPING * depth, torch.logspace(*map(math.log10, WIDTHS), inside)])
    return potential, unit, width


class Contribution(nn.Linear):
    """This product makes potentials v = v₀ + unit ⊙ (W u + c) and values b = W_b u + c_b of u.

    Args:
        d_model: width D.
        n_values: values of all heads H·P.
        start, unit: v₀ and the unit of each head's potential ``(H,)``; None for no potentials.
    """

    def __init__(
        self,
        d_model: int,
        n_values: int,
        start: Tensor | None = None,
        unit: Tensor | None = None,
    ):
        start, unit = (torch.zeros(0) if part is None else part for part in (start, unit))
        super().__init__(d_model, len(start) + n_values)
        self.register_buffer("start", F.pad(start, (0, n_values)))
        self.register_buffer("unit", F.pad(unit, (0, n_values), value=1.0))
        nn.init.zeros_(self.bias[: len(start)])

    def forward(self, u: Tensor) -> Tensor:
        """Return potentials and values ``(…, H + H·P)`` of u ``(…, D)``."""
        return F.linear(u, *self.affine())

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the matrix ``(H + H·P, D)`` and the offset ``(H + H·P,)`` of the product."""
        return self.unit[:, None] * self.weight, self.start + self.unit * self.bias


class ResolventMixing(nn.Module):
    """This layer mixes positions by BK-Core.

    From normed states u ``(…, D)`` it makes potentials v and values b, all of what a token hands on
    ``(…, H + H·P)``. Of what BK-Core makes of them the values alone are read, the diagonal g is not:

        m = s · (W (RMS(w_r ⊙ Re y + w_i ⊙ Im y) ⊙ SiLU(W_g u)) + c),

    with a learned scale s, and RMS dividing each head's values by their root mean square. Without values
    (P = 0) it is the original's m = s · (W [Re g, Im g] + c).

    Args:
        config: uses ``d_model``, ``causal``, ``bk_heads``, ``bk_values``, and ``bk_starts`` for P > 0.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, heads, values = config.d_model, config.bk_heads, config.bk_values
        start, unit, widths = starts(heads, config.bk_starts if values else "band")
        self.bk_core = BKCore(heads, config.causal, n_values=values, widths=widths)
        self.contribution = Contribution(d, heads * values, start, unit)
        self.output_proj = nn.Linear(heads * values or 2 * heads, d)
        self.bk_scale = nn.Parameter(torch.ones(()))
        if values:
            self.real = nn.Parameter(torch.randn(heads * values) * 2**-0.5)
            self.imag = nn.Parameter(torch.randn(heads * values) * 2**-0.5)
            self.gate_proj = nn.Linear(d, heads * values, bias=False)

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
        return self.project(u, self.readable(features))

    def readable(self, features: Tensor) -> Tensor:
        """Return each head's values over their RMS ``(…, H·P)``; without values Re g and Im g."""
        heads, values = self.bk_core.n_heads, self.bk_core.n_values
        if not values:
            return features
        _, re, im = features.split([2 * heads, heads * values, heads * values], dim=-1)
        z = (self.real * re + self.imag * im).unflatten(-1, (heads, values))
        return F.rms_norm(z, (values,), eps=1e-6).flatten(-2)

    def project(self, u: Tensor, z: Tensor) -> Tensor:
        """Return the update of the stream from what :meth:`readable` gave; u gates values."""
        if self.bk_core.n_values:
            z = z * F.silu(self.gate_proj(u))
        project, scale = self.output_proj, self.bk_scale  # scaling weights is cheaper than states
        return F.linear(z, scale * project.weight, scale * project.bias)


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
        self.contribution = Contribution(d, 2 * d)
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
