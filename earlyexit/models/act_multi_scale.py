"""ACT over the layers of a model of several scales: blocks of tokens halt together.

The halting unit after a layer reads r of the first token of a block of the coarsest scale, and its
probability counts for the whole block, so that all tokens of a block have the same cumulative c and
halt together. Averages, remainders and ponder costs are those of :mod:`earlyexit.models.act`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.act import copy_final_head
from earlyexit.models.multi_scale import MultiScaleConfig, MultiScaleLanguageModel
from earlyexit.models.multi_scale_walk import first_rows
from earlyexit.nn.halting import AverageHead, HaltingGates, HaltingUnit, StreamNorm, accumulate


@dataclass(frozen=True)
class ACTMultiScaleConfig(MultiScaleConfig):
    """Constructor arguments of :class:`ACTMultiScaleLanguageModel`."""

    epsilon: float = 0.01
    ponder_weight: float = 0.01


class EitherNorm(StreamNorm):
    """LN of a state ``(…, D)``, or of a stream ``(…, 2D + 1)`` what :class:`StreamNorm` makes of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > self.normalized_shape[0] else self.plain(x)

    def plain(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, self.normalized_shape, self.weight, self.bias, self.eps)


class ACTMultiScaleExitModel(MultiScaleLanguageModel):
    """An early-exit model of several scales whose exits read the running ACT average.

    Args:
        epsilon, ponder_weight: see :class:`earlyexit.models.act.ACTConfig`.
        others: see :class:`earlyexit.models.multi_scale.MultiScaleLanguageModel`.
    """

    config_type = ACTMultiScaleConfig
    needs_all = True

    def __init__(self, *args, epsilon: float = 0.01, ponder_weight: float = 0.01, **others):
        super().__init__(*args, **others)
        if not 0 < epsilon < 1 or not ponder_weight >= 0:
            raise ValueError(f"epsilon={epsilon} must lie in (0, 1), ponder_weight be ≥ 0")
        if self.gates is not None:
            raise ValueError("the gates of this model are its halting units: leave out gate_hidden")
        self.config = ACTMultiScaleConfig(
            **asdict(self.config), epsilon=epsilon, ponder_weight=ponder_weight
        )
        units = range(self.n_layers - 1)
        self.units = nn.ModuleList(HaltingUnit(self.d_model, 1 / self.n_layers) for _ in units)
        for block in self.blocks:
            block.layer_norm = EitherNorm(self.d_model)
            block.exit_classifier = AverageHead.like(block.exit_classifier, self.d_model)
        self.gates = HaltingGates()

    def act_policy(self) -> ExitPolicy:
        """See :meth:`earlyexit.models.act.ACTEarlyExitModel.act_policy`."""
        return ExitPolicy.constant(1 - self.config.epsilon, self.n_layers, "agreement")

    def default_policy(self) -> ExitPolicy:
        return self.act_policy()

    def block_size(self, layer: int) -> int:
        """Of the coarsest scale at every exit."""
        return 2 ** max(self.levels)

    def start(self, h: Tensor) -> Tensor:
        """Streams ``(…, 2D + 1)``."""
        return F.pad(h, (0, self.d_model + 1))

    def carry(self, layer: int, before: Tensor, read: Tensor, first: Tensor) -> Tensor:
        """Streams ``(T, 2D + 1)`` after ``layer``; see the base class."""
        p = self.units[layer](read[first]) if layer < self.n_layers - 1 else None
        return accumulate(before, read, p)


class ACTMultiScaleLanguageModel(ACTMultiScaleExitModel):
    """Several scales, trained and run with ACT; train it with ``loss=act_multi_scale_loss``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gates = None
        self.ponder: Tensor | None = None  # of the last batch that was run with gradients (B, N)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Streams before the first and after every layer ``(B, N, 2D + 1)``; halted ones stay."""
        (B, N), streams, alive = x.shape, [self.start(self.embed(x))], None
        first = first_rows(torch.arange(B * N, device=x.device), N, self.block_size(0))
        walk = self.walk(x)
        for layer in range(self.n_layers):
            r = walk.send(alive)
            before = streams[-1].flatten(0, 1)
            new = self.carry(layer, before, r.flatten(0, 1), first).view(B, N, -1)
            streams.append(
                new if alive is None else torch.where(alive[..., None], new, streams[-1])
            )
            alive = streams[-1][..., -1] < 1 - self.config.epsilon
        self.ponder = self.ponder_cost(streams) if torch.is_grad_enabled() else None
        return streams

    def ponder_cost(self, streams: list[Tensor]) -> Tensor:
        """ρ = N + R of every token ``(B, N)``, N in layers whatever their scale."""
        c = torch.cat([stream[..., -1:] for stream in streams[:-1]], dim=-1)
        steps = self.steps(streams)
        return steps + 1 - c.gather(-1, steps[..., None] - 1).squeeze(-1)

    def steps(self, streams: list[Tensor]) -> Tensor:
        """Layers N that every token runs ``(B, N)`` int64."""
        halted = [stream[..., -1] >= 1 - self.config.epsilon for stream in streams[1:-1]]
        return self.n_layers - torch.stack(halted).sum(dim=0)

    def forward(
        self, x: Tensor, return_ponder_cost: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :meth:`earlyexit.models.act.ACTLanguageModel.forward`."""
        streams = self.hidden_states(x)
        logits = self.blocks[-1].exit_classifier(streams[-1])
        return (logits, self.ponder_cost(streams).mean()) if return_ponder_cost else logits


def convert_act_multi_scale(model: ACTMultiScaleLanguageModel) -> ACTMultiScaleExitModel:
    """See :func:`earlyexit.models.act.convert_act_to_early_exit`."""
    out = ACTMultiScaleExitModel.from_config(model.config).to(next(model.parameters()))
    out.load_state_dict(model.state_dict())
    copy_final_head(out)
    return out.train(model.training)
