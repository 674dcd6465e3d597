"""Temperatures calibrate exits: a token with confidence 0.7 should be right seven times in ten."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.calibration.trace import ExitTrace
from earlyexit.checked import real, whole
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import loader
from earlyexit.exits.execution import scored_states
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.heads import ExitHead

N_BINS = 15  # as in Guo et al. 2017


@torch.no_grad()
def fit_temperatures(
    model: ExitModel,
    split: Split,
    eos_id: int,
    max_tokens: int = 20_000,
    precision: float = 1e-3,
) -> list[float]:
    """Return the temperature of each exit that minimises its NLL on ``split`` (Guo et al. 2017, §4.2).

    The NLL is convex in β = 1/T; Newton's method needs the mean and the variance of the logits under
    the prediction, one pass over the tokens per step.

    Args:
        max_tokens: number of tokens used, in random windows.
        precision: the method stops at a step below this share of β.

    Raises:
        TypeError: a number is not whole, or no number.
        ValueError: the split is the test split, which nothing may be fitted on, empty or of another text
            than the model was trained on, or a number is out of range.
        FloatingPointError: logits are not finite.
    """
    refuse_test(split.name)
    model.check_text(split)
    max_tokens, precision = (
        whole("max_tokens", max_tokens, 1),
        real("precision", precision, above=0),
    )
    if not split.n_tokens:
        raise ValueError(f"the split {split.name!r} holds no token")
    with borrowed(model):
        return _fit(model, split, eos_id, max_tokens, precision)


def _fit(
    model: ExitModel, split: Split, eos_id: int, max_tokens: int, precision: float
) -> list[float]:
    device = next(model.parameters()).device
    features: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    targets, count = [], 0
    for x, y in loader(split, model.n_seq, 32, eos_id, shuffle=True):
        (_, *states), target = scored_states(model, x.to(device), y.to(device))
        for layer, h in enumerate(states):
            features[layer].append(model.head(layer).features(h))
        targets.append(target)
        count += len(target)
        if count >= max_tokens:
            break
    target = torch.cat(targets)[:max_tokens]
    return [
        _newton(model.head(layer), torch.cat(parts)[:max_tokens], target, precision)
        for layer, parts in enumerate(features)
    ]


def _newton(head: ExitHead, features: Tensor, target: Tensor, precision: float) -> float:
    unembedding, beta = head.unembedding, 1.0
    for _ in range(10):
        slope = curvature = 0.0
        for part, logits in unembedding.chunks(features):
            p = (beta * logits).softmax(dim=-1)
            mean = (p * logits).sum(dim=-1)
            slope += (mean - logits.gather(1, target[part, None]).squeeze(1)).double().sum().item()
            curvature += ((p * logits.square()).sum(-1) - mean**2).double().sum().item()
        if not math.isfinite(slope + curvature):
            raise FloatingPointError("logits are not finite: the weights hold NaN or infinity")
        step = slope / max(curvature, 1e-12)
        beta = min(max(beta - step, beta / 2), beta * 2)  # stays positive far from the optimum
        if abs(step) < precision * beta:
            break
    return 1 / beta


def reliability(trace: ExitTrace, n_bins: int = N_BINS) -> pd.DataFrame:
    """Compare confidence and accuracy in equal-width bins, per exit.

    Returns:
        Columns ``exit``, ``bin`` (centre), ``confidence``, ``accuracy``, ``share`` of tokens; bins
        without tokens are left out.
    """
    rows = []
    for layer in range(trace.n_layers):
        confidence, correct = _confidence(trace, layer)
        index = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
        count = np.bincount(index, minlength=n_bins)
        for b in np.flatnonzero(count):
            inside = index == b
            rows.append(
                {
                    "exit": layer,
                    "bin": (b + 0.5) / n_bins,
                    "confidence": confidence[inside].mean(dtype=float),
                    "accuracy": correct[inside].mean(dtype=float),
                    "share": count[b] / len(index),
                }
            )
    return pd.DataFrame(rows)


def calibration_errors(trace: ExitTrace, n_bins: int = N_BINS) -> pd.DataFrame:
    """Return ``accuracy``, mean ``confidence``, ``ece`` and ``nll`` in nats of every ``exit``.

    The expected calibration error is the mean distance of the reliability diagram from its diagonal.
    """
    bins = reliability(trace, n_bins)
    gap = (bins["confidence"] - bins["accuracy"]).abs() * bins["share"]
    rows = []
    for layer in range(trace.n_layers):
        confidence, correct = _confidence(trace, layer)
        rows.append(
            {
                "exit": layer,
                "accuracy": correct.mean(),
                "confidence": confidence.mean(dtype=float),
                "ece": gap[bins["exit"] == layer].sum(),
                "nll": trace.nll[:, layer].mean(dtype=float),
            }
        )
    return pd.DataFrame(rows)


def refuse_test(split: str) -> None:
    """Raise ValueError for the test split, on which nothing may be fitted."""
    if split == "test":
        raise ValueError("the test split reports; fit on the validation split's fit part instead")


def _confidence(trace: ExitTrace, layer: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = np.clip(trace.score("max_probability")[:, layer], 0, 1)
    return confidence, trace.prediction[:, layer] == trace.target
