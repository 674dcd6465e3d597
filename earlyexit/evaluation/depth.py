"""What depth and mixing are worth: models trained alone, without exits, and n-grams beside them.

``CONTROLS`` is the one list of controls, as changes to a profile's model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import pandas as pd

from earlyexit.calibration.unit_losses import window_losses
from earlyexit.corpus.splits import Split
from earlyexit.cost.parts import exit_costs
from earlyexit.evaluation.ngram import (
    KneserNey,
    cache_probability,
    fit_cache_weight,
    mixed,
    perplexity,
)
from earlyexit.exits.api import EarlyExitModel

ALONE = "trained alone"  # the system of models that differ from the profile's in depth only

# What the mixing of a model is measured against, at the same depth.
CONTROLS: dict[str, dict] = {
    "no mixing": {"mixing": "none"},
    "diagonal only": {"bk_values": 0},
    "attention": {"mixing": "attention"},
}


def systems(
    depths: Iterable[int], controls: Iterable[str], n_layers: int
) -> dict[tuple[str, int], dict]:
    """Return (system, layers) → changes to the model: ``ALONE`` at each depth, and the controls.

    Args:
        controls: keys of ``CONTROLS``.
        n_layers: depth of the controls.
    """
    out = {(ALONE, depth): {"n_layers": depth} for depth in sorted(set(depths))}
    return out | {(name, n_layers): {"n_layers": n_layers} | CONTROLS[name] for name in controls}


def losses_by_document(
    model: EarlyExitModel, split: Split, eos_id: int, batch_size: int = 32
) -> pd.DataFrame:
    """Score a split at full depth.

    Returns:
        One row per document: split (its name), document, tokens, nll (mean, nats).

    Raises:
        FloatingPointError, ValueError: see :func:`~earlyexit.calibration.unit_losses.window_losses`.
    """
    losses = window_losses(model, split, eos_id, batch_size=batch_size)
    columns = {"document": losses.document, "tokens": losses.tokens, "nll": losses.full}
    table = pd.DataFrame(columns).groupby("document", as_index=False).sum()
    table["nll"] /= table["tokens"]
    return table.assign(split=split.name)


def summary(losses: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return one row per system: ``names``, its perplexity on each split, and its other columns.

    Args:
        losses: :func:`losses_by_document` of several systems, with columns that identify them and say
            more of each.
        names: the columns that identify a system.

    Returns:
        Also perplexity_<split> for each split.
    """
    sums = losses.assign(total=losses["nll"] * losses["tokens"])
    sums = sums.groupby([*names, "split"], sort=False)[["total", "tokens"]].sum()
    mean = np.exp(sums["total"] / sums["tokens"]).unstack().add_prefix("perplexity_")
    more = losses.groupby(list(names), sort=False).first()
    more = more.drop(columns=["split", "document", "tokens", "nll"])
    return mean.loc[more.index].join(more).rename_axis(columns=None).reset_index()


def size(model: EarlyExitModel) -> dict[str, float]:
    """Return ``parameters`` and ``flops_per_token`` of a model whose exits are not used."""
    exits = [model.head(layer) for layer in range(model.n_layers - 1)]
    unused = {id(p) for head in exits for p in head.parameters()}
    used = sum(p.numel() for p in model.parameters() if id(p) not in unused)
    return {"parameters": used, "flops_per_token": exit_costs(model, "depth")[-1]}


def ngram_rows(train: Split, fit: Split, test: Split, vocab_size: int, eos_id: int) -> pd.DataFrame:
    """Return a row for a Kneser–Ney 5-gram, and one for its mixture with a unigram cache.

    Args:
        train: what is counted.
        fit: what the weight of the cache is fitted on.

    Returns:
        Columns system, layers (0), perplexity_fit, perplexity_test, parameters (numbers kept), seconds.
    """
    started = time.perf_counter()
    model = KneserNey(train, vocab_size, eos_id=eos_id)
    fitted = fit_cache_weight(model, fit)
    seconds, name = time.perf_counter() - started, f"{model.order}-gram"
    scores = {
        f"perplexity_{name}": (model.score(split), cache_probability(split))
        for name, split in (("fit", fit), ("test", test))
    }
    rows = [
        {"system": system, "layers": 0}
        | {column: perplexity(mixed(*score, weight)) for column, score in scores.items()}
        for system, weight in ((name, 0.0), (f"{name} with cache", fitted))
    ]
    return pd.DataFrame(rows).assign(parameters=model.n_parameters, seconds=seconds)
