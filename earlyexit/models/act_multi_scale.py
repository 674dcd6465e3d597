"""ACT works over the layers of a model of several scales, where blocks of tokens halt together.

The halting unit after a layer reads r of the first token of a block of the coarsest scale, and its
probability counts for the whole block, so that all tokens of a block have the same cumulative c and
halt together. Averages, remainders and ponder costs are those of :mod:`earlyexit.models.act`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.models.act import HaltingExits, Pondering, check_halting, copy_final_head
from earlyexit.models.multi_scale import MultiScaleConfig, MultiScaleLanguageModel
from earlyexit.models.multi_scale_walk import first_rows
from earlyexit.nn.halting import AverageHead, HaltingGates, HaltingUnit, StreamNorm, accumulate


@dataclass(frozen=True)
class ACTMultiScaleConfig(MultiScaleConfig):
    """Its fields are the arguments of :class:`ACTMultiScaleLanguageModel`; see :class:`ACTConfig`."""

    _: KW_ONLY
    epsilon: float = 0.01
    ponder_weight: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        check_halting(self)


class EitherNorm(StreamNorm):
    """This norm takes states ``(…, D)`` as LayerNorm, streams ``(…, 2D + 1)`` as StreamNorm does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > self.normalized_shape[0] else self.plain(x)

    def plain(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, self.normalized_shape, self.weight, self.bias, self.eps)


class ACTMultiScaleExitModel(HaltingExits, MultiScaleLanguageModel):
    """This early-exit model of several scales has exits that read the running ACT average.

    Its arguments are the fields of :class:`ACTMultiScaleConfig`.
    """

    config_type = ACTMultiScaleConfig
    needs_all = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        units = range(self.n_layers - 1)
        self.units = nn.ModuleList(HaltingUnit(self.d_model, 1 / self.n_layers) for _ in units)
        for block in self.blocks:
            block.layer_norm = EitherNorm(self.d_model)
            block.exit_classifier = AverageHead.like(block.exit_classifier, self.d_model)
        self.gates = HaltingGates()

    def unit_size(self, layer: int) -> int:
        """Return the block size of the coarsest scale, at every exit."""
        return 2 ** max(self.levels)

    def start(self, h: Tensor) -> Tensor:
        """Return streams ``(…, 2D + 1)`` with nothing averaged and nothing halted."""
        return F.pad(h, (0, self.d_model + 1))

    def carry(self, layer: int, before: Tensor, read: Tensor, first: Tensor) -> Tensor:
        """Return streams ``(T, 2D + 1)`` after ``layer``; see the base class."""
        p = self.units[layer](read[first]) if layer < self.n_layers - 1 else None
        return accumulate(before, read, p)


class ACTMultiScaleLanguageModel(Pondering, ACTMultiScaleExitModel):
    """This language model of several scales is trained and run with ACT."""

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Return streams ``(B, N, 2D + 1)`` before the first and after every layer."""
        (B, N), streams, alive = x.shape, [self.start(self.embed(x))], None
        first = first_rows(torch.arange(B * N, device=x.device), N, self.unit_size(0))
        reads = self.pyramid(x)
        for layer in range(self.n_layers):
            r = reads.send(alive)
            before = streams[-1].flatten(0, 1)
            new = self.carry(layer, before, r.flatten(0, 1), first).view(B, N, -1)
            streams.append(
                new if alive is None else torch.where(alive[..., None], new, streams[-1])
            )
            alive = streams[-1][..., -1] < 1 - self.config.epsilon
        self.tell_ponder(streams)
        return streams


def convert_act_multi_scale(model: ACTMultiScaleLanguageModel) -> ACTMultiScaleExitModel:
    """Do as :func:`earlyexit.models.act.convert_act_to_early_exit` for several scales."""
    out = ACTMultiScaleExitModel.from_config(model.config).to(next(model.parameters()))
    out.load_state_dict(model.state_dict())
    copy_final_head(out)
    out.trained_on = model.trained_on
    return out.train(model.training)
