"""What depth and mixing are worth: models trained alone, without exits, and n-grams beside them.

``CONTROLS`` is the one list of controls, as changes to a profile's model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

import pandas as pd

from earlyexit.corpus.splits import Split
from earlyexit.cost.parts import exit_costs
from earlyexit.evaluation.compare import evaluator_of
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


def system_row(
    model: EarlyExitModel, loaders: Mapping[str, Iterable], seconds: float = math.nan
) -> pd.DataFrame:
    """Return one row about a model at full depth.

    Args:
        loaders: name of a split → its batches.
        seconds: how long the training took.

    Returns:
        Columns perplexity_<split>, parameters (without those of exits that are not used), seconds, and
        flops_per_token (of scoring a word).
    """
    evaluator = evaluator_of(model)
    row = {
        f"perplexity_{name}": evaluator.evaluate_policy(batches)["perplexity"]
        for name, batches in loaders.items()
    }
    return pd.DataFrame([row | size(model) | {"seconds": seconds}])


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
