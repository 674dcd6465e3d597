"""Gates learn how much deeper layers would still change an exit's prediction.

A gate reads the normalised state that the next block reads anyway, and predicts two things from it: the
KL divergence from the last layer's prediction to this exit's, which is the loss a calibrated last layer
expects from leaving now, and the probability that both predict the same word (the classifier of
Schuster et al. 2022, CALM, §3.4). At inference it never touches the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from earlyexit.checked import LARGEST_RATE, bounded, real, whole
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import loader
from earlyexit.exits.execution import scored_states
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS
from earlyexit.nn.gates import AGREE, KL, ExitGates
from earlyexit.training.train import check_trainable


@torch.no_grad()
def gate_data(
    model: ExitModel, split: Split, eos_id: int, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Collect what gates learn from.

    Returns:
        Normed states ``(L − 1, T, D)``, KL ``(L − 1, T)`` in nats and agreement ``(L − 1, T)``.
    """
    device = next(model.parameters()).device
    exits = model.n_layers - 1
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    bar = tqdm(total=min(max_tokens, split.n_tokens), desc="gate data", mininterval=2)
    for x, y in loader(split, model.n_seq, 32, eos_id, shuffle=True):
        (_, *states), target = scored_states(model, x.to(device), y.to(device))
        rows = max(1, CHUNK_ELEMENTS // (2 * model.vocab_size))
        for part in torch.arange(len(target), device=device).split(rows):
            last = model.head(exits)(states[-1][part]).log_softmax(dim=-1)
            normal, kl, agree = [], [], []
            for layer in range(exits):
                h = states[layer][part]
                log_p = model.head(layer)(h).log_softmax(dim=-1)
                normal.append(model.normed(layer + 1, h))
                kl.append((last.exp() * (last - log_p)).sum(dim=-1).clamp_min(0))
                agree.append(last.argmax(dim=-1) == log_p.argmax(dim=-1))
            kept.append((torch.stack(normal), torch.stack(kl), torch.stack(agree)))
        count += len(target)
        bar.update(len(target))
        if count >= max_tokens:
            break
    bar.close()
    normal, kl, agree = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
    return normal, kl, agree.float()


@bounded(learning_rate=LARGEST_RATE)
def train_gates(
    model: ExitModel,
    split: Split,
    eos_id: int,
    max_tokens: int = 100_000,
    steps: int = 600,
    batch_size: int = 4096,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[dict]:
    """Train ``model.gates`` in place; everything else is frozen.

    The KL is fitted with a log link and the Poisson deviance, whose minimiser is the conditional mean
    whatever the noise; agreement with the binary cross-entropy.

    Args:
        split: the training split; validation and test have other uses.
        max_tokens: number of tokens used, in random windows.
        steps, batch_size, learning_rate: set AdamW, which runs on those tokens.

    Returns:
        One row per exit: the share of the KL's deviance explained, and the mean KL and agreement.

    Raises:
        ValueError: the model has no gates that learn, only one layer or half precision, ``split`` is not
            the training split, or another argument is out of range.
        FloatingPointError: the gates' weights are not finite afterwards.
    """
    if split.name != "train":
        raise ValueError(f"gates are trained on the training split, not on {split.name!r}")
    if model.gates is None or model.n_layers < 2:
        raise ValueError(
            "the model has no gates: build it with gate_hidden=0 and two layers or more"
        )
    if not isinstance(model.gates, ExitGates):
        raise ValueError("the gates of this model are its halting units, which ACT trains")
    sizes = {"max_tokens": max_tokens, "steps": steps, "batch_size": batch_size}
    max_tokens, steps, batch_size = (whole(name, size, 1) for name, size in sizes.items())
    learning_rate = real("learning_rate", learning_rate, above=0)
    check_trainable(model, split)
    model.check_text(split)
    model.gates.trained.fill_(False)  # until they are
    with borrowed(model):
        torch.manual_seed(seed)
        data = gate_data(model, split, eos_id, max_tokens)
        _fit(model.gates, *data, steps, batch_size, learning_rate)
        report = [_report(model.gates, layer, *data) for layer in range(model.n_layers - 1)]
    if not all(p.isfinite().all() for p in model.gates.parameters()):
        raise FloatingPointError(
            f"the gates' weights are not finite: lower learning_rate={learning_rate}, or look for NaN in"
            " the model's own weights"
        )
    model.gates.trained.fill_(True)
    model.trained_on = model.trained_on or split.data_hash
    return report


def _fit(
    gates: ExitGates,
    normal: Tensor,
    kl: Tensor,
    agree: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    with torch.no_grad():  # start at the means
        for layer, gate in enumerate(gates.gates):
            last = gate if isinstance(gate, nn.Linear) else gate[-1]
            last.weight.zero_()
            last.bias[KL] = kl[layer].mean().clamp_min(1e-6).log()
            last.bias[AGREE] = agree[layer].mean().clamp(1e-3, 1 - 1e-3).logit()
    optimizer = torch.optim.AdamW(gates.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(kl.shape[1], (batch_size,)).to(kl.device)
        loss = sum(_loss(gates, layer, normal, kl, agree, rows) for layer in range(len(kl)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _loss(gates: ExitGates, layer: int, normal, kl, agree, rows) -> Tensor:
    out = gates(layer, normal[layer, rows])
    poisson = out[:, KL].exp() - kl[layer, rows] * out[:, KL]
    scale = kl[layer].mean().clamp_min(1e-6)  # layers count alike
    return poisson.mean() / scale + F.binary_cross_entropy_with_logits(
        out[:, AGREE], agree[layer, rows]
    )


@torch.no_grad()
def _report(gates: ExitGates, layer: int, normal, kl, agree) -> dict:
    predicted = gates(layer, normal[layer])[:, KL].exp()
    mean = kl[layer].mean()

    def deviance(estimate: Tensor) -> float:
        return (torch.xlogy(kl[layer], kl[layer] / estimate) - kl[layer] + estimate).sum().item()

    return {
        "exit": layer,
        "explained": 1 - deviance(predicted) / deviance(mean.expand_as(predicted)),
        "mean_kl": mean.item(),
        "agreement": agree[layer].mean().item(),
    }
