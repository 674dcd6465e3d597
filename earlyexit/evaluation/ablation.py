"""Choices of the mixing layer and of the training, each changed alone and compared on validation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.evaluation.depth import CONTROLS
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.mixing import ResolventMixing


class WithoutGate(ResolventMixing):
    """This mixing layer reads values as they are."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_proj = None

    def project(self, u: Tensor, z: Tensor) -> Tensor:
        """Return the update of the stream from values ``(…, H·P)``."""
        return self.bk_scale * self.output_proj(z)


class WithoutNorm(ResolventMixing):
    """This mixing layer scales each head's values by √η instead of their root mean square."""

    def readable(self, features: Tensor) -> Tensor:
        """Return the values ``(…, H·P)`` of BK features."""
        heads, values = self.bk_core.n_heads, self.bk_core.n_values
        _, re, im = features.split([2 * heads, heads * values, heads * values], dim=-1)
        scale = self.bk_core.eta.sqrt().repeat_interleave(values)
        return scale * (self.real * re + self.imag * im)


class WithDiagonal(ResolventMixing):
    """This mixing layer also reads the diagonal of the resolvent, Re g and Im g."""

    def __init__(self, config):
        super().__init__(config)
        self.diagonal_proj = nn.Linear(2 * config.bk_heads, config.d_model, bias=False)

    def read(self, u: Tensor, features: Tensor) -> Tensor:
        """Return what the features ``(…, 2H + 2H·P)`` add to the stream ``(…, D)``."""
        diagonal = features[..., : 2 * self.bk_core.n_heads]
        return super().read(u, features) + self.diagonal_proj(F.normalize(diagonal, dim=-1))


class OtherMixingModel(EarlyExitLanguageModel):
    """This model has another mixing in every layer, named by its subclasses."""

    mixing: type[ResolventMixing]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.bk_layer.mixing = self.mixing(self.config)


class UngatedModel(OtherMixingModel):
    """This model has :class:`WithoutGate` in every layer."""

    mixing = WithoutGate


class UnnormedModel(OtherMixingModel):
    """This model has :class:`WithoutNorm` in every layer."""

    mixing = WithoutNorm


class DiagonalModel(OtherMixingModel):
    """This model has :class:`WithDiagonal` in every layer."""

    mixing = WithDiagonal


@dataclass(frozen=True)
class Change:
    """What differs from the profile's model trained alone, without exits.

    Attributes:
        model, training: changed fields of the two configurations.
        kind: class of the model.
    """

    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel


UNCHANGED = "as it is"

LAYER: dict[str, Change] = {
    UNCHANGED: Change(),
    "heads start in the band": Change({"bk_starts": "band"}),
    "heads start on both sides": Change({"bk_starts": "both"}),
    "8 heads of 8 values": Change({"bk_heads": 8, "bk_values": 8}),
    "32 heads of 2 values": Change({"bk_heads": 32, "bk_values": 2}),
    "2 values a head": Change({"bk_values": 2}),
    "values not gated": Change(kind=UngatedModel),
    "values not normalised": Change(kind=UnnormedModel),
    "diagonal read as well": Change(kind=DiagonalModel),
} | {name: Change(model) for name, model in CONTROLS.items()}

TRAINING: dict[str, Change] = {
    "AdamW": Change(training={"optimizer": "adamw"}),
    "half the learning rate": Change(training={"learning_rate": 1e-2}),
    "twice the learning rate": Change(training={"learning_rate": 4e-2}),
    "batches of 8": Change(training={"batch_size": 8}),
    "batches of 32": Change(training={"batch_size": 32}),
    "no dropout": Change({"dropout_p": 0.0}),
    "dropout 0.2": Change({"dropout_p": 0.2}),
    "no weight decay": Change(training={"weight_decay": 0.0}),
    "weight decay 0.2": Change(training={"weight_decay": 0.2}),
    "experts half as wide": Change({"expert_hidden": 64}),
    "experts twice as wide": Change({"expert_hidden": 256}),
    "8 experts": Change({"num_experts": 8}),
    "exits, weight 0.3": Change(training={"exit_loss_weight": 0.3, "exit_sampling": "all"}),
    "exits, weight 1.5": Change(training={"exit_loss_weight": 1.5, "exit_sampling": "all"}),
    "exits, weight 3": Change(training={"exit_loss_weight": 3.0, "exit_sampling": "all"}),
}

CHANGES = LAYER | TRAINING
