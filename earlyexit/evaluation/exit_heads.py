"""Other heads for early exits, as kinds of model: larger ones, and one that reads part of the width."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from earlyexit.exits.operations import FLOAT, LAYER_NORM, Operations
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.heads import ExitHead

WIDENING = 4  # hidden units of a larger head, over the width of the model
READ = 0.75  # share of the channels that early exits read where the rest is reserved


class LargerHeadModel(EarlyExitLanguageModel):
    """The translators of this model are networks of one hidden layer, made by its subclasses.

    Like affine ones, they start as the identity: what they add to a state starts at 0.
    """

    own_norm: bool  # whether a head normalises what its network reads, as a block does

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.blocks[:-1]:
            block.exit_classifier.translator = self.network()

    def network(self) -> nn.Sequential:
        """Return what an early exit adds to the states that it reads, ``(…, D)`` → ``(…, D)``."""
        d, hidden = self.d_model, WIDENING * self.d_model
        norm = [nn.LayerNorm(d)] if self.own_norm else []
        network = nn.Sequential(*norm, nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))
        nn.init.zeros_(network[-1].weight)
        nn.init.zeros_(network[-1].bias)
        return network

    def operations(self, **changes) -> Operations:
        d, stated = self.d_model, super().operations(**changes)
        amounts = {"flops": 4 * WIDENING * d * d, "bytes": FLOAT * (4 + 4 * WIDENING) * d}
        if self.own_norm:
            amounts["elementwise_flops"] = LAYER_NORM * d
        weights = sum(p.numel() for p in self.head(0).translator.parameters())
        parameters = {**stated.parameters, "translator": weights}
        return replace(stated, translator=amounts, parameters=parameters)


class HiddenTranslatorModel(LargerHeadModel):
    """The translators of this model have one hidden layer."""

    own_norm = False


class ExitBlockModel(LargerHeadModel):
    """Each early exit of this model has a small block of its own: a norm and a feed-forward network.

    It mixes no positions, since an exit runs on the tokens that leave there alone.
    """

    own_norm = True


class PartialHead(ExitHead):
    """This exit head reads the first channels of a state; the others are kept for deeper layers."""

    def features(self, h: Tensor) -> Tensor:
        """Return what the unembedding reads of states: ``(…, D)`` → ``(…, D)``."""
        read = torch.arange(h.shape[-1], device=h.device) < READ * h.shape[-1]
        return super().features(h * read)


class ReservedChannelsModel(EarlyExitLanguageModel):
    """The early exits of this model read ``READ`` of its channels, and the last layer all of them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.blocks[:-1]:
            head = block.exit_classifier
            parts = {"borrowed": head.linear is None, "translate": head.translator is not None}
            block.exit_classifier = PartialHead(self.d_model, head.unembedding, **parts)
