"""What a training step minimises, for every kind of model."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.protocol import ExitModel
from earlyexit.models.sparse_bk import sparse_layers
from earlyexit.nn.cross_entropy import Teacher
from earlyexit.training.config import TrainingConfig

LossFunction = Callable[..., tuple[Tensor, Tensor]]


def exit_features(model: ExitModel, states: list[Tensor], layer: int) -> Tensor:
    """What the unembedding of exit ``layer`` reads, ``(T, D)``; states as ``hidden_states`` gives."""
    return model.head(layer).features(states[layer + 1]).flatten(0, 1)


def training_loss(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    config: TrainingConfig,
    step: int,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss of one batch, and the last layer's mean NLL in nats (detached).

    Joint training: NLL_L + w · NLL_exit + b · balance. On a frozen backbone: NLL_exit alone. With
    sampled exits each token counts once, at its own exit; then its mean NLL is what is returned.

    Args:
        step: seeds the draw of the exit and of dropped layers.
        progress: share of the training that is done, for ``exit_ramp``.
    """
    last, draw = model.n_layers - 1, random.Random(config.seed * 1_000_003 + step)
    weight = config.exit_loss_weight * min(1.0, progress / max(config.exit_ramp, 1e-9))
    if config.exit_sampling == "tokens":
        nll = _sampled_exits_nll(model, x, y, weight, config, draw)
        return nll + config.balance_weight * model.auxiliary_loss(), nll.detach()
    with torch.set_grad_enabled(not config.freeze_backbone):
        states = _states(model, x, config, draw)

    def nll(layer: int, teacher: Teacher | None = None) -> Tensor:
        features = exit_features(model, states, layer).float()
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
    loss = final + weight * exit_nll + config.balance_weight * model.auxiliary_loss()
    return loss, final.detach()


def _sampled_exits_nll(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    weight: float,
    config: TrainingConfig,
    draw: random.Random,
) -> Tensor:
    """Mean NLL of every token at its own, random exit; exited states stay as they are."""
    last, generator = model.n_layers - 1, torch.Generator().manual_seed(draw.getrandbits(60))
    early = torch.rand(x.shape, generator=generator) < weight / (1 + weight)
    layer_of = torch.randint(max(1, last), x.shape, generator=generator)
    layer_of = torch.where(early, layer_of, last).clamp_max(last).to(x.device)  # (B, N)
    h, by_head = model.embed(x), {}
    for layer in range(model.n_layers):
        h = torch.where((layer_of < layer)[..., None], h, model.layer(layer, h))
        head, here = model.head(layer), layer_of == layer
        part = head.features(h[here]).float(), y[here]
        by_head.setdefault(id(head.unembedding), (head.unembedding, []))[1].append(part)
    total, count = torch.zeros((), device=x.device), (y != IGNORE).sum().clamp_min(1)
    for unembedding, parts in by_head.values():
        features, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        share = (targets != IGNORE).sum() / count
        total = total + share * unembedding.loss(features, targets, config.bf16)
    return total


def _states(model, x: Tensor, config: TrainingConfig, draw: random.Random) -> list[Tensor]:
    """Hidden states as ``model.hidden_states`` gives, some layers skipped."""
    if not config.layer_dropout:
        return model.hidden_states(x)
    states, last = [model.embed(x)], max(1, model.n_layers - 1)
    model.reset_auxiliary_loss()  # of layers that are skipped now
    for layer in range(model.n_layers):
        skip = draw.random() < config.layer_dropout * (2 ** (layer / last) - 1)
        states.append(states[-1] if skip else model.layer(layer, states[-1]))
    return states


def act_loss(
    model: ExitModel, x: Tensor, y: Tensor, config: TrainingConfig, step: int, progress=1.0
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_loss` (of dense layers: ``training_loss``) plus ``ponder_weight`` × mean ρ.

    Raises:
        ValueError: exits sampled by token, where halting alone decides who stops.
    """
    if config.exit_sampling == "tokens":
        raise ValueError("in ACT halting decides who stops: take exit_sampling='one'")
    objective, nll = sparse_loss(model, x, y, config, step, progress)
    return objective + model.config.ponder_weight * model.ponder.mean(), nll


def act_multi_scale_loss(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    config: TrainingConfig,
    step: int,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`multi_scale_loss` plus ``ponder_weight`` × mean ponder cost."""
    objective, nll = multi_scale_loss(model, x, y, config, step, progress)
    return objective + model.config.ponder_weight * model.ponder.mean(), nll


def multi_scale_loss(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    config: TrainingConfig,
    step: int,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`earlyexit.training.losses.sparse_loss`, of dense layers ``training_loss``.

    Raises:
        ValueError: layers cannot be dropped, nor single tokens leave in training, because the next
            layer works at another scale.
    """
    if config.layer_dropout or config.exit_sampling == "tokens":
        raise ValueError(
            "layer_dropout and exit_sampling='tokens' do not fit a model of several scales:"
            " take exit_sampling='one'"
        )
    return sparse_loss(model, x, y, config, step, progress)


def sparse_loss(
    model: ExitModel,
    x: Tensor,
    y: Tensor,
    config: TrainingConfig,
    step: int,
    progress: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`earlyexit.training.losses.training_loss` plus w · mean over layers of (kept − keep)².

    Args:
        progress: share of the training that is done; the noise of the masks falls to 0 with it.
    """
    for layer in sparse_layers(model):
        layer.noise = 1 - progress
    objective, nll = training_loss(model, x, y, config, step, progress)
    shares = [s.kept_share for s in sparse_layers(model) if s.kept_share is not None]
    if shares:
        distance = torch.stack(shares) - model.config.keep
        objective = objective + model.config.sparsity_weight * distance.square().mean()
    return objective, nll
