"""With a sparse BK-Core, a learned importance decides which positions the recursion visits.

A position with score s_i > 0 is kept. The recursion runs over kept positions alone, as if the others
were not there; a skipped position hands on the state before it:

    g_i = 1 / (α_i − t² g_{i−1}),    y_i = g_i (b_i − t y_{i−1})    if kept,        g_{−1} = 0,
    g_i = g_{i−1},                   y_i = y_{i−1}                  if not,         y_{−1} = 0.

Kept positions are gathered per sequence, so that the recursion is shorter, and its results are filled
forward by index: what a position reads comes from no later one. Potentials and values are made for kept
positions only. Every position reads what it was handed by its own gate, so nothing is saved there.

Training samples the mask, m_i = [s_i + logistic noise > 0], and differentiates it as a sigmoid (the
binary concrete distribution of Maddison et al. 2017 and Jang et al. 2017, straight-through). The noise
fades over the training, so that it ends with the mask that will be used. Were i kept, it would hold
g′_i = 1/(α_i − t² g_{i−1}) and y′_i = g′_i (b_i − t y_{i−1}) instead of g_{i−1} and y_{i−1}. The
derivative with respect to m_i is the difference that this makes in what is read, the normalised values
or without values g, exact up to the next kept position; what it changes in the recursion beyond is left
out. A loss (kept share − target)² on the mask without noise holds the share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from earlyexit.exits.operations import Operations
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.record import BatchRecord
from earlyexit.nn.sparse_bk import SparseContribution, SparseMixing


@dataclass(frozen=True)
class SparseConfig(ModelConfig):
    """Its fields are the arguments of :class:`SparseBKLanguageModel`.

    Attributes:
        keep: target share of positions that BK-Core visits; 1 builds dense layers.
        sparsity_weight: weight of the mean squared distance to that share in the loss.

    Raises:
        ValueError: keep is not in (0, 1], the weight is negative, a mixing other than by a causal
            BK-Core is to be sparse, or the base class refuses a value.
    """

    _: KW_ONLY
    keep: float = 0.5
    sparsity_weight: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1 or not self.sparsity_weight >= 0:
            raise ValueError(f"keep={self.keep} must lie in (0, 1], sparsity_weight be ≥ 0")
        if self.keep < 1 and not self.causal:
            raise ValueError("a two-sided BK-Core cannot be sparse: a gap has no causal filling")
        if self.keep < 1 and self.mixing != "resolvent":
            raise ValueError(f"mixing={self.mixing!r} cannot skip positions: set keep=1")


class SparseBKLanguageModel(EarlyExitLanguageModel):
    """This language model has sparse BK-Cores; its arguments are the fields of :class:`SparseConfig`."""

    config_type = SparseConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.keep < 1:
            for block in self.blocks:
                block.bk_layer.mixing = SparseMixing(self.config, self.config.keep)

    def operations(self, **changes) -> Operations:
        keep = self.config.keep
        kept = (keep,) * self.n_layers if keep < 1 else ()
        return super().operations(kept=kept, **changes)

    def prepare_step(self, progress: float) -> None:
        """Let the noise of the masks fall to 0: training ends with the masks that will be used."""
        for layer in sparse_layers(self):
            layer.noise = 1 - progress

    def own_loss(self, record: BatchRecord) -> Tensor | float:
        """Return ``sparsity_weight`` × mean over layers of (kept share − keep)²."""
        if not record.notes["kept"]:
            return 0.0
        kept, of = torch.stack(record.notes["kept"], dim=1)  # (layers,) each
        distance = kept / of.clamp_min(1) - self.config.keep
        return self.config.sparsity_weight * distance.square().mean()


def sparse_layers(model: nn.Module) -> Iterator[SparseContribution]:
    """Yield what chooses the positions in each sparse layer of a model, first to last."""
    return (module for module in model.modules() if isinstance(module, SparseContribution))
