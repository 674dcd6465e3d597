"""Test whether a prediction depends on later tokens, by replacing them and measuring the change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE
from earlyexit.evaluation.evaluator import on_device, perplexity
from earlyexit.exits.api import EarlyExitModel


def replace_future(x: Tensor, cut: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Return a copy of ``x`` ``(B, N)`` with random tokens from position ``cut`` on."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(vocab_size, x[:, cut:].shape, generator=generator)
    return torch.cat([x[:, :cut], noise.to(x.device)], dim=1)


@torch.no_grad()
def future_effect(model: EarlyExitModel, x: Tensor, cut: int) -> float:
    """Return the largest change of a logit before ``cut`` if all tokens from ``cut`` on are replaced."""
    before = model(x)[:, :cut]
    after = model(replace_future(x, cut, model.vocab_size))[:, :cut]
    return (before - after).abs().max().item()


@torch.no_grad()
def perplexity_without_future(
    model: EarlyExitModel, batches: Iterable[tuple[Tensor, Tensor]], n_cuts: int = 8
) -> tuple[float, float]:
    """Compute the perplexity of the same tokens with their true future and with a replaced one.

    One token per window and cut is scored, the last before the cut, as all later tokens are replaced
    only for it.

    Returns:
        The two perplexities; they are equal for a causal model.
    """
    totals, count = torch.zeros(2, dtype=torch.float64), 0
    for x, y in on_device(batches, model):
        true = model.nll(x, y)
        cuts = {1 + k * (x.shape[1] - 1) // n_cuts for k in range(n_cuts)} - {x.shape[1]}
        for k, cut in enumerate(sorted(cuts)):
            replaced = model.nll(replace_future(x, cut, model.vocab_size, seed=k), y)
            totals += torch.stack(
                [nll[:, cut - 1].double().sum() for nll in (true, replaced)]
            ).cpu()
            count += int((y[:, cut - 1] != IGNORE).sum())
    if not count:
        raise ValueError("the loader gave no scored token: check the split")
    return tuple(perplexity(total, count) for total in totals.tolist())


def leak_trainings(epochs: float) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return form → changes of model and training of the two small models that :func:`leak` is of."""
    recipe = {"epochs": epochs, "exit_loss_weight": 0.0, "learning_rate": 1e-2}
    small = {"d_model": 32, "n_layers": 2, "dropout_p": 0.0}
    forms = {"causal": True, "two-sided": False}
    return {name: (small | {"causal": causal}, recipe) for name, causal in forms.items()}


def leak(
    models: Mapping[str, EarlyExitModel], batches: Sequence[tuple[Tensor, Tensor]]
) -> pd.DataFrame:
    """Tabulate :func:`perplexity_without_future` of models: columns model, future, perplexity."""
    found = {name: perplexity_without_future(model, batches) for name, model in models.items()}
    table = pd.DataFrame(found, index=pd.Index(["true", "replaced"], name="future")).T
    return table.rename_axis("model").stack().rename("perplexity").reset_index()
