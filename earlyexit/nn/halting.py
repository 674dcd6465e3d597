"""Parts of Adaptive Computation Time read and write a stream [h, S, c] instead of a state.

:mod:`earlyexit.models.act` says what the stream holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.gates import AGREE
from earlyexit.nn.heads import ExitHead


def averaged(stream: Tensor) -> Tensor:
    """Return S + (1 − c) h ``(…, D)`` of a stream ``(…, 2D + 1)``: what a token that leaves reads."""
    width = stream.shape[-1] // 2
    h, total, c = stream.split((width, width, 1), dim=-1)
    return total + (1 - c) * h


def accumulate(stream_before: Tensor, h: Tensor, p: Tensor | None) -> Tensor:
    """Return the stream after a layer that turned the state into ``h``.

    Args:
        stream_before: ``(…, 2D + 1)``; h: ``(…, D)``.
        p: halting probability of this layer ``(…, 1)``; None at the last, which has none.
    """
    _, total, c = stream_before.split((h.shape[-1], h.shape[-1], 1), dim=-1)
    if p is None:
        return torch.cat([h, total, c], dim=-1)
    p = torch.minimum(p, 1 - c)
    return torch.cat([h, total + p * h, c + p], dim=-1)


class HaltingUnit(nn.Module):
    """A halting unit gives p = σ(w · LN(h) + b), where LN has no weights of its own.

    Args:
        d_model: width D.
        start: probability that a new unit gives everywhere.
    """

    def __init__(self, d_model: int, start: float):
        super().__init__()
        self.linear = nn.Linear(d_model, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, torch.tensor(start, device="cpu").logit().item())

    def forward(self, h: Tensor) -> Tensor:
        """Return p ``(…, 1)`` of states ``(…, D)``."""
        return self.linear(F.layer_norm(h, h.shape[-1:])).sigmoid()


class StreamNorm(nn.LayerNorm):
    """This norm makes [LN(h), h, c] of a stream ``(…, 2D + 1)``: all that a layer and a gate read."""

    def forward(self, stream: Tensor) -> Tensor:
        width = self.normalized_shape[0]
        h, _, c = stream.split((width, width, 1), dim=-1)
        return torch.cat([super().forward(h), h, c], dim=-1)


class HaltingLayer(nn.Module):
    """A halting layer also moves the running average: it returns the change of a stream.

    Args:
        layer: any layer with ``contribution``, ``mix``, ``step``, ``transform`` and ``moe``.
        d_model: width D.
        start: see :class:`HaltingUnit`; None for the last layer, which needs no unit.
    """

    def __init__(self, layer: MoEResNetBKLayer, d_model: int, start: float | None):
        super().__init__()
        self.layer, self.d_model = layer, d_model
        self.halting = None if start is None else HaltingUnit(d_model, start)

    @property
    def moe(self) -> nn.Module:
        return self.layer.moe

    def contribution(self, u: Tensor) -> Tensor:
        """Return the layer's contribution ``(…, K)`` of u, which :class:`StreamNorm` made."""
        return self.layer.contribution(u[..., : self.d_model])

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return what running tokens take from the contributions of all, ``(A, M)``."""
        return self.layer.mix(u[..., : self.d_model], given, rows)

    def step(self, u: Tensor, given: Tensor, memory) -> tuple[Tensor, object]:
        """Do :meth:`mix` for one position, from a memory of those before."""
        return self.layer.step(u[..., : self.d_model], given, memory)

    def transform(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Return the change of the stream ``(…, 2D + 1)``, (Δh, p h, p) with h the new state."""
        normal, h, c = u.split((self.d_model, self.d_model, 1), dim=-1)
        change = self.layer.transform(normal, mixed)
        if self.halting is None:
            return F.pad(change, (0, self.d_model + 1))
        h = h + change
        p = torch.minimum(self.halting(h), 1 - c)
        return torch.cat([change, p * h, p], dim=-1)

    def forward(self, u: Tensor) -> Tensor:
        """Return the change of the stream from u, both ``(B, N, 2D + 1)``."""
        mixed = self.mix(u.flatten(0, 1), self.contribution(u), None)
        return self.transform(u, mixed.unflatten(0, u.shape[:2]))


class AverageHead(ExitHead):
    """This exit head reads the running average of a stream."""

    def features(self, h: Tensor) -> Tensor:
        """Return what the unembedding reads ``(…, D)`` of a stream ``(…, 2D + 1)``."""
        return super().features(averaged(h))

    @classmethod
    def like(cls, head: ExitHead, d_model: int) -> AverageHead:
        """Make a head with the same parts as ``head``, and the same unembedding."""
        borrowed, translate = head.linear is None, head.translator is not None
        return cls(d_model, head.unembedding, borrowed=borrowed, translate=translate)


class HaltingGates(nn.Module):
    """The halting units serve as gates: c is their probability that the last layer agrees.

    These gates have no weights of their own, and predict no KL.
    """

    @property
    def trained(self) -> Tensor:
        """Return True: training exits on a frozen backbone leaves the units as they are."""
        return torch.ones((), dtype=torch.bool)

    def forward(self, layer: int, normalised: Tensor) -> Tensor:
        """Return (NaN, logit of c) ``(T, 2)`` of [LN(h), h, c] ``(T, 2D + 1)``."""
        out = normalised.new_full((len(normalised), 2), torch.nan)
        out[:, AGREE] = normalised[:, -1].clamp(0, 1).logit()
        return out
