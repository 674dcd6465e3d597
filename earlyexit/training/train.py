"""A backbone is trained jointly with its exits, or exits alone are trained on a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.devices import resolve_device
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn.borrowed import borrowed
from earlyexit.training.config import TrainingConfig
from earlyexit.training.losses import exit_features, training_loss
from earlyexit.training.optimizer import Optimizer
from earlyexit.training.resume import TrainingState

REPORT_EVERY = 50  # steps averaged in one row of the history
VALIDATION_TOKENS = 50_000  # of the fit part, read after every epoch


def train(
    model: ExitModel,
    corpus: Corpus,
    config: TrainingConfig,
    device: str | torch.device = "auto",
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 500,
    max_tokens: int = 0,
) -> list[dict]:
    """Train ``model`` in place on ``corpus.splits["train"]``.

    Args:
        checkpoint_dir: where to keep a resumable state, written every ``checkpoint_every`` steps. If it
            holds one of the same configuration, training goes on from it, to the same result.
        max_tokens: limits the training split to about this many tokens; 0 uses all.

    Returns:
        One row per evaluation: step, tokens, train_nll, and the fit part's perplexity per exit.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
        ValueError: the frozen backbone has one layer, the model is of half precision or refuses this
            way of training, or the training split holds no token.
        CheckpointError: the resumable state is damaged.
    """
    check_trainable(model, corpus.splits["train"])
    if config.freeze_backbone:
        model.check_text(corpus.splits["train"])
    model.check_training(config.exit_sampling, config.layer_dropout)
    if config.freeze_backbone and model.n_layers < 2:
        raise ValueError("a model of one layer has no exit to train on a frozen backbone")
    model.to(device := resolve_device(device))
    with borrowed(model):
        # A frozen backbone gives its exits the states they will see: no dropout.
        model.train(not config.freeze_backbone)
        history = _train(
            model, corpus, config, device, checkpoint_dir, checkpoint_every, max_tokens
        )
    model.eval().trained_on = corpus.data_hash
    return history


def check_trainable(model: ExitModel, split: Split) -> None:
    """Raise ValueError unless the model has weights that can learn, and the split tokens."""
    half = {p.dtype for p in model.parameters() if p.itemsize < 4}
    if half:
        raise ValueError(
            f"weights in {half.pop()} are too coarse to learn: train model.float(), with bf16=True for"
            " products in bfloat16"
        )
    if not split.n_tokens:
        raise ValueError(f"the split {split.name!r} holds no token to learn from")


def _train(
    model: ExitModel,
    corpus: Corpus,
    config: TrainingConfig,
    device: torch.device,
    checkpoint_dir: Path | None,
    checkpoint_every: int,
    max_tokens: int,
) -> list[dict]:
    torch.manual_seed(config.seed)
    if model.gates is not None:
        model.gates.trained.fill_(False)  # of other weights
    split = corpus.splits["train"].limit(max_tokens)
    per_epoch = len(loader(split, model.n_seq, config.batch_size, corpus.eos_id))
    total = max(1, round(config.epochs * per_epoch))
    named = _trainable(model, config)
    parameters = [p for _, p in named]
    optimizer = Optimizer(named, config, total)

    key = {
        **asdict(config), "total": total, "model": asdict(model.config), "text": corpus.data_hash
    }  # fmt: skip
    resume = TrainingState(checkpoint_dir, key)
    log = resume.restore(model, optimizer)
    step, history, recent, tokens = log["step"], log["history"], log["recent"], log["tokens"]
    bar = tqdm(total=total, initial=step, desc="training", unit="step", mininterval=2)
    for x, y in _batches(split, model.n_seq, config, corpus.eos_id, start=step, stop=total):
        x, y = x.to(device), y.to(device)
        # Inside another context, as here, autocast would keep casts of weights that have changed since.
        with torch.autocast(device.type, torch.bfloat16, config.bf16, cache_enabled=False):
            objective, nll = training_loss(model, x, y, config, step, progress=step / total)
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
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
            resume.save(model, optimizer, log)
    bar.close()
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
    model: ExitModel, split: Split, eos_id: int, batch_size: int = 32
) -> list[float]:
    """Return the perplexity of each exit over a split, with full-depth states before it.

    Raises:
        FloatingPointError: the model's NLL is not finite.
        ValueError: the split is empty, or of another text than the model was trained on.
    """
    model.check_text(split)
    device = next(model.parameters()).device
    total, count = torch.zeros(model.n_layers, dtype=torch.float64), 0
    with borrowed(model):
        for x, y in loader(split, model.n_seq, batch_size, eos_id):
            states, target = model.hidden_states(x.to(device)), y.flatten().to(device)
            for layer in range(model.n_layers):
                unembedding = model.head(layer).unembedding
                nll = unembedding.nll(exit_features(model, states, layer), target)
                total[layer] += nll.double().sum().cpu()
            count += int((y != IGNORE).sum())
    if not count:
        raise ValueError(f"the split {split.name!r} holds no token to score")
    if not torch.isfinite(total).all():
        raise FloatingPointError("the model's NLL is not finite: its weights hold NaN or infinity")
    return (total / count).exp().tolist()


def _validate(model: ExitModel, corpus: Corpus) -> dict[str, float]:
    split = corpus.splits["fit"].limit(VALIDATION_TOKENS)
    perplexities = perplexity_per_exit(model, split, corpus.eos_id)
    return {f"perplexity_{layer}": p for layer, p in enumerate(perplexities)}


def _trainable(model: ExitModel, config: TrainingConfig) -> list[tuple[str, nn.Parameter]]:
    named = list(model.named_parameters())
    if not config.freeze_backbone:
        return [(name, p) for name, p in named if not name.startswith("gates.")]
    heads = [model.head(layer) for layer in range(model.n_layers - 1)]
    trained = {id(p) for head in heads for p in head.parameters()}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in trained)
    return [(name, p) for name, p in named if id(p) in trained]


def _batches(
    split: Split, n_seq: int, config: TrainingConfig, eos_id: int, start: int, stop: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of steps ``start`` … ``stop``, in an order that depends on the seed alone."""
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
