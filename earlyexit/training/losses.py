"""A training step minimises the same loss for every kind of model."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE, checked_targets
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn.cross_entropy import Teacher, precise
from earlyexit.nn.record import BatchRecord, recorded
from earlyexit.training.config import TrainingConfig


def exit_features(model: ExitModel, states: list[Tensor], layer: int) -> Tensor:
    """Return what the unembedding of exit ``layer`` reads ``(T, D)``, given all ``hidden_states``."""
    return model.head(layer).features(states[layer + 1]).flatten(0, 1)


def training_loss(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    config: TrainingConfig,
    step: int,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one batch, and the last layer's mean NLL in nats (detached).

    Joint training minimises NLL_L + w · NLL_exit + b · balance, and what the kind of model adds; on a
    frozen backbone NLL_exit alone. With exits sampled by token, each token counts
    once, at its exit, and the mean NLL of these is returned.

    Args:
        step: seeds the draw of the exit and of dropped layers.
        progress: share of the training that is done; ``exit_ramp`` and the kind of model use it.

    Raises:
        TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
    """
    model.prepare_step(progress)
    y = checked_targets(y, model.vocab_size)
    last, draw = model.n_layers - 1, random.Random(config.seed * 1_000_003 + step)
    weight = config.exit_loss_weight * min(1.0, progress / max(config.exit_ramp, 1e-9))
    if config.exit_sampling == "tokens":
        with recorded(y != IGNORE) as record:
            nll = _sampled_exits_nll(model, x, y, weight, config, draw)
        return nll + _beside(model, record, config), nll.detach()
    with torch.set_grad_enabled(not config.freeze_backbone), recorded(y != IGNORE) as record:
        states = _states(model, x, config, draw)

    def nll(layer: int, teacher: Teacher | None = None) -> Tensor:
        below = states
        if layer < last and config.exit_gradient < 1:  # the same states, part of their gradient
            below = [h.detach().lerp(h, config.exit_gradient) for h in states]
        features = precise(exit_features(model, below, layer))
        unembedding = model.head(layer).unembedding
        return unembedding.loss(features, y.flatten(), config.bf16, teacher)

    exits = list(range(last)) if config.exit_loss_weight else []
    if exits and config.exit_sampling == "one":
        exits = [draw.choice(exits)]
    teacher = None
    if exits and config.distillation:
        head = model.head(last).unembedding
        teacher = Teacher(exit_features(model, states, last).detach(), head, config.distillation)
    exit_nll = sum((nll(layer, teacher) for layer in exits), torch.zeros((), device=x.device))
    exit_nll = exit_nll / max(1, len(exits))
    if config.freeze_backbone:
        return exit_nll, exit_nll.detach()
    final = nll(last)
    return final + weight * exit_nll + _beside(model, record, config), final.detach()


def _beside(model: ExitModel, record: BatchRecord, config: TrainingConfig) -> Tensor | float:
    """Return what a recorded batch adds to its NLL: the imbalance of experts, and the kind's own."""
    return config.balance_weight * model.auxiliary_loss(record) + model.own_loss(record)


def _sampled_exits_nll(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    weight: float,
    config: TrainingConfig,
    draw: random.Random,
) -> Tensor:
    """Return the mean NLL of tokens that each leave at a random exit; exited states are frozen."""
    last, generator = model.n_layers - 1, torch.Generator().manual_seed(draw.getrandbits(60))
    early = torch.rand(x.shape, generator=generator) < weight / (1 + weight)
    layer_of = torch.randint(max(1, last), x.shape, generator=generator)
    layer_of = torch.where(early, layer_of, last).clamp_max(last).to(x.device)  # (B, N)
    h, given, by_head = model.embed(x), None, {}
    for layer in range(model.n_layers):
        h, given = model.layer_around(layer, h, layer_of < layer, given)
        head, leaving = model.head(layer), layer_of == layer
        part = precise(head.features(h[leaving])), y[leaving]
        by_head.setdefault(id(head.unembedding), (head.unembedding, []))[1].append(part)
    total, count = torch.zeros((), device=x.device), (y != IGNORE).sum().clamp_min(1)
    for unembedding, parts in by_head.values():
        features, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        share = (targets != IGNORE).sum() / count
        total = total + share * unembedding.loss(features, targets, config.bf16)
    return total


def _states(model, x: Tensor, config: TrainingConfig, draw: random.Random) -> list[Tensor]:
    """Return the states that ``model.hidden_states`` gives, but skip some layers."""
    if not config.layer_dropout:
        return model.hidden_states(x)
    states, last = [model.embed(x)], max(1, model.n_layers - 1)
    for layer in range(model.n_layers):
        skip = draw.random() < config.layer_dropout * (2 ** (layer / last) - 1)
        states.append(states[-1] if skip else model.layer(layer, states[-1]))
    return states
