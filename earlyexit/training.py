"""Training: the backbone with its exits jointly, or exits alone on a frozen backbone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from earlyexit import checkpoints
from earlyexit.corpus import Corpus, Split, loader
from earlyexit.devices import resolve_device
from earlyexit.model import EarlyExitLanguageModel
from earlyexit.vocabulary import IGNORE, Teacher

REPORT_EVERY = 50  # steps averaged in one row of the history
VALIDATION_TOKENS = 50_000  # of the fit part, read after every epoch

LossFunction = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training split; fractions are allowed.
        batch_size: windows per step.
        learning_rate: peak of AdamW's, after a linear warm-up and before a cosine decay to 5 %.
        weight_decay: on matrices only.
        warmup: share of all steps.
        clip: largest gradient norm.
        exit_loss_weight: of the exit losses beside the last layer's; 0 trains no exit.
        exit_sampling: ``"one"`` random exit per step, or ``"all"``, averaged: the same expectation.
            ``"tokens"``: a random share w / (1 + w) of the tokens leaves, each at a random exit, and
            its state stays frozen as in a real run: deeper layers learn from what exits leave behind,
            and each token is projected once.
        exit_ramp: share of the steps over which the exit losses' weight rises from 0.
        distillation: share of the exit's target that is the last layer's prediction, not the word.
        layer_dropout: probability of skipping the last layer in a step; earlier layers are skipped
            less, the first never (Elhoushi et al. 2024, LayerSkip, eq. 1).
        balance_weight: of the experts' load-balancing loss.
        freeze_backbone: train exit heads only, on the detached states of a given model.
        bf16: bfloat16 matrix products, where autocast knows them.
        seed: of initialisation, order and dropout.
    """

    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    exit_loss_weight: float = 0.3
    exit_sampling: str = "one"
    exit_ramp: float = 0.0
    distillation: float = 0.0
    layer_dropout: float = 0.0
    balance_weight: float = 0.01
    freeze_backbone: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("exit_loss_weight", "exit_ramp", "distillation", "layer_dropout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ 0")
        if self.distillation > 1 or self.layer_dropout >= 1:
            raise ValueError("distillation must lie in [0, 1], layer_dropout in [0, 1)")
        if self.exit_sampling not in ("one", "all", "tokens"):
            raise ValueError(
                f"exit_sampling={self.exit_sampling!r} must be 'one', 'all' or 'tokens'"
            )
        if self.exit_sampling == "tokens" and (
            self.freeze_backbone or self.distillation or self.layer_dropout
        ):
            raise ValueError(
                "exit_sampling='tokens' trains every layer on the word itself: no frozen backbone,"
                " distillation or layer dropout"
            )
        if self.freeze_backbone and not self.exit_loss_weight:
            raise ValueError("freeze_backbone trains exits only: exit_loss_weight must be > 0")


def exit_features(model: EarlyExitLanguageModel, states: list[Tensor], layer: int) -> Tensor:
    """What the unembedding of exit ``layer`` reads, ``(T, D)``; states as ``hidden_states`` gives."""
    return model.blocks[layer].exit_classifier.features(states[layer + 1]).flatten(0, 1)


def training_loss(
    model: EarlyExitLanguageModel,
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
        return nll + config.balance_weight * _imbalance(model), nll.detach()
    with torch.set_grad_enabled(not config.freeze_backbone):
        states = _states(model, x, config, draw)

    def nll(layer: int, teacher: Teacher | None = None) -> Tensor:
        features = exit_features(model, states, layer).float()
        unembedding = model.blocks[layer].exit_classifier.unembedding
        return unembedding.loss(features, y.flatten(), config.bf16, teacher)

    exits = list(range(last)) if config.exit_loss_weight else []
    if exits and config.exit_sampling == "one":
        exits = [draw.choice(exits)]
    teacher = None
    if exits and config.distillation:
        head = model.blocks[last].exit_classifier.unembedding
        teacher = Teacher(exit_features(model, states, last).detach(), head, config.distillation)
    exit_nll = sum((nll(layer, teacher) for layer in exits), torch.zeros((), device=x.device))
    exit_nll = exit_nll / max(1, len(exits))
    if config.freeze_backbone:
        return exit_nll, exit_nll.detach()
    final = nll(last)
    loss = final + weight * exit_nll + config.balance_weight * _imbalance(model)
    return loss, final.detach()


def _imbalance(model: EarlyExitLanguageModel) -> Tensor | float:
    losses = [block.bk_layer.moe.load_balancing_loss for block in model.blocks]
    return sum(loss for loss in losses if loss is not None) / model.n_layers


def _sampled_exits_nll(
    model: EarlyExitLanguageModel,
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
    for layer, block in enumerate(model.blocks):
        h = torch.where((layer_of < layer)[..., None], h, block.hidden(h))
        head, here = block.exit_classifier, layer_of == layer
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
    for layer, block in enumerate(model.blocks):
        block.bk_layer.moe.load_balancing_loss = None
        skip = draw.random() < config.layer_dropout * (2 ** (layer / last) - 1)
        states.append(states[-1] if skip else block.hidden(states[-1]))
    return states


def train(
    model: EarlyExitLanguageModel,
    corpus: Corpus,
    config: TrainingConfig,
    device: str | torch.device = "auto",
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 500,
    max_tokens: int = 0,
    loss: LossFunction | None = None,
) -> list[dict]:
    """Train ``model`` in place on ``corpus.splits["train"]``.

    Args:
        checkpoint_dir: where to keep a resumable state, written every ``checkpoint_every`` steps. If it
            holds one of the same configuration, training goes on from it, to the same result.
        max_tokens: use only documents up to about this many training tokens; 0 uses all.
        loss: what a step minimises, by default :func:`training_loss`, with its signature.

    Returns:
        One row per evaluation: step, tokens, train_nll, and the fit part's perplexity per exit.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
        ValueError: a frozen backbone of one layer.
        CheckpointError: the resumable state is damaged.
    """
    device = resolve_device(device)
    torch.manual_seed(config.seed)
    # A frozen backbone gives its exits the states they will see: no dropout.
    model.to(device).train(not config.freeze_backbone)
    if model.gates is not None:
        model.gates.trained.fill_(False)  # of other weights
    split = corpus.splits["train"]
    split = split.limit(max_tokens) if max_tokens else split
    per_epoch = len(loader(split, model.n_seq, config.batch_size, corpus.eos_id))
    total = max(1, round(config.epochs * per_epoch))
    parameters = _trainable(model, config)
    optimizer = _adamw(parameters, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(total, config.warmup))

    key = {
        **asdict(config), "total": total, "model": asdict(model.config), "text": corpus.data_hash
    }  # fmt: skip
    resume = checkpoints.TrainingState(checkpoint_dir, key)
    log = resume.restore(model, optimizer, schedule)
    step, history, recent, tokens = log["step"], log["history"], log["recent"], log["tokens"]
    bar = tqdm(total=total, initial=step, desc="training", unit="step", mininterval=2)
    for x, y in _batches(split, model.n_seq, config, corpus.eos_id, start=step, stop=total):
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            objective, nll = (loss or training_loss)(
                model, x, y, config, step, progress=step / total
            )
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        schedule.step()
        step += 1
        recent.append(nll)
        tokens += int((y != IGNORE).sum())
        bar.update()
        evaluate = step % per_epoch == 0 or step == total
        if step % REPORT_EVERY == 0 or evaluate:
            mean = _finite_mean(recent, step, config)
            recent.clear()
            bar.set_postfix(nll=f"{mean:.3f}")
            row = {"step": step, "tokens": tokens, "train_nll": mean}
            history.append(row | (_validate(model, corpus) if evaluate else {}))
        if checkpoint_dir and step % checkpoint_every == 0 and step < total:
            _finite_mean(recent, step, config)
            log = {"step": step, "history": history, "recent": recent, "tokens": tokens}
            resume.save(model, optimizer, schedule, log)
    bar.close()
    model.eval().requires_grad_(True)
    return history


def _finite_mean(losses: list[Tensor], step: int, config: TrainingConfig) -> float:
    mean = torch.stack(losses).mean().item() if losses else 0.0
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"loss is {mean} at step {step}: lower the learning rate ({config.learning_rate})"
        )
    return mean


@torch.no_grad()
def perplexity_per_exit(
    model: EarlyExitLanguageModel, split: Split, eos_id: int, batch_size: int = 32
) -> list[float]:
    """Perplexity of each exit over a whole split, every token at full depth before it.

    Raises:
        FloatingPointError: the model's NLL is not finite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = torch.zeros(model.n_layers, dtype=torch.float64), 0
    for x, y in loader(split, model.n_seq, batch_size, eos_id):
        states, target = model.hidden_states(x.to(device)), y.flatten().to(device)
        for layer in range(model.n_layers):
            unembedding = model.blocks[layer].exit_classifier.unembedding
            nll = unembedding.nll(exit_features(model, states, layer), target)
            total[layer] += nll.double().sum().cpu()
        count += int((y != IGNORE).sum())
    model.train(was_training)
    if not torch.isfinite(total).all():
        raise FloatingPointError("the model's NLL is not finite: its weights hold NaN or infinity")
    return (total / count).exp().tolist()


def _validate(model: EarlyExitLanguageModel, corpus: Corpus) -> dict[str, float]:
    split = corpus.splits["fit"].limit(VALIDATION_TOKENS)
    perplexities = perplexity_per_exit(model, split, corpus.eos_id)
    return {f"perplexity_{layer}": p for layer, p in enumerate(perplexities)}


def _trainable(model: EarlyExitLanguageModel, config: TrainingConfig) -> list[nn.Parameter]:
    if not config.freeze_backbone:
        return [p for name, p in model.named_parameters() if not name.startswith("gates.")]
    if model.n_layers < 2:
        raise ValueError("a model of one layer has no exit to train on a frozen backbone")
    heads = [block.exit_classifier for block in model.blocks[:-1]]
    parameters = [p for head in heads for p in head.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _adamw(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _schedule(total: int, warmup: float) -> Callable[[int], float]:
    rise = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, total - rise)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2

    return factor


def _batches(
    split: Split, n_seq: int, config: TrainingConfig, eos_id: int, start: int, stop: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps ``start`` … ``stop`` of an order that depends on the seed alone."""
    step, epoch = 0, 0
    while step < stop:
        seed = config.seed * 1_000_003 + epoch
        data = loader(split, n_seq, config.batch_size, eos_id, shuffle=True, seed=seed)
        if step + len(data) <= start:
            step += len(data)
        else:
            for batch in data:
                if start <= step < stop:
                    yield batch
                step += 1
        epoch += 1
