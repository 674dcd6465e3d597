"""State propagation: what exited tokens still hand to deeper layers.

Of a frozen state h, layer l reads only v_l = W_l LN_l(h) + b_l. The layers' norms differ by their affine
maps alone, LN_l(h) = γ_l ⊙ z + β_l, so h is standardised to z once, and one product with the joined
matrices W_l diag(γ_l) gives the potentials of all deeper layers.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.nn.block import MoEResNetBKLayer

if TYPE_CHECKING:
    from earlyexit.models.resnet_bk import EarlyExitLanguageModel


class ExitedPotentials:
    """Potentials that exited tokens hand to the layers after their exit.

    Args:
        model: whose layers read them.
        everyone: tokens T of the batch.
    """

    def __init__(self, model: EarlyExitLanguageModel, everyone: int):
        self.blocks, self.everyone = model.blocks, everyone
        self.potentials: Tensor | None = None  # (T, L, H), rows of exited tokens

    def add(self, layer: int, tokens: Tensor, hidden: Tensor) -> None:
        """``tokens`` ``(E,)`` left at ``layer``; later layers read their states ``(E, D)``."""
        later = self._of(hidden, layer + 1)  # (E, L', H)
        if self.potentials is None:
            self.potentials = later.new_empty(self.everyone, len(self.blocks), later.shape[-1])
        self.potentials[:, layer + 1 :].index_copy_(0, tokens, later)

    def join(self, layer: int, alive: Tensor, v: Tensor) -> Tensor:
        """Potentials of all tokens ``(T, H)`` from those of the alive ``(A, H)``."""
        if len(alive) == self.everyone:
            return v
        return self.potentials[:, layer].index_copy(0, alive, v)

    def _of(self, hidden: Tensor, first: int) -> Tensor:
        if not self._foldable:
            blocks = self.blocks[first:]
            return torch.stack([b.bk_layer.potentials(b.layer_norm(hidden)) for b in blocks], dim=1)
        weight, bias = (part[first:] for part in self._folded)
        standard = F.layer_norm(hidden, hidden.shape[-1:], eps=self.blocks[0].layer_norm.eps)
        v = standard @ weight.flatten(0, 1).T + bias.flatten()
        return v.view(len(hidden), len(bias), -1)

    @cached_property
    def _foldable(self) -> bool:
        """Whether a layer's potentials are the plain affine map; a variant may have its own."""
        return all(
            type(b.bk_layer).potentials is MoEResNetBKLayer.potentials
            and b.layer_norm.eps == self.blocks[0].layer_norm.eps
            for b in self.blocks
        )

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor]:
        """Matrices ``(L, H, D)`` and offsets ``(L, H)`` that act on standardised states."""
        weight = torch.stack([b.bk_layer.v_proj.weight for b in self.blocks])
        bias = torch.stack([b.bk_layer.v_proj.bias for b in self.blocks])
        scale = torch.stack([b.layer_norm.weight for b in self.blocks])
        shift = torch.stack([b.layer_norm.bias for b in self.blocks])
        return weight * scale[:, None], bias + (weight * shift[:, None]).sum(dim=-1)
