"""What should a gate predict? Targets of the same regression are compared at equal mean depth.

A gate in use predicts the KL from the last layer's prediction to its exit's. That is the loss which a
calibrated last layer expects from leaving now. The NLL still to be gained is that loss as it turned out
for one word: it needs no calibrated last layer, but it is noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from earlyexit.calibration.bounds import paired_interval
from earlyexit.calibration.thresholds import fit_policy_to_cost
from earlyexit.calibration.trace import ExitTrace, by_document
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import windows
from earlyexit.exits.execution import scored_states
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn.borrowed import borrowed

IN_USE = "KL"  # the target of the gates in use, which the others are compared with


def targets(trace: ExitTrace) -> dict[str, np.ndarray]:
    """Return what a regression may predict of every token at every exit ``(T, L)``."""
    gain = trace.nll - trace.nll[:, -1:]
    left = np.arange(trace.n_layers)[::-1].clip(1)  # layers still to be executed
    return {IN_USE: trace.kl, "NLL to gain": gain, "NLL to gain per layer": gain / left}


@torch.no_grad()
def gate_inputs(model: ExitModel, split: Split, eos_id: int, batch_size: int = 32) -> np.ndarray:
    """Return what gates read of the tokens of a trace over ``split``: ``(L − 1, T, D)``."""
    w, device, parts = windows(split, model.n_seq, eos_id), next(model.parameters()).device, []
    with borrowed(model):
        for start in range(0, len(w.inputs), batch_size):
            rows = slice(start, start + batch_size)
            x, y = (torch.from_numpy(ids[rows]).to(device) for ids in (w.inputs, w.targets))
            (_, *states), _ = scored_states(model, x, y)
            normal = [model.normed(layer + 1, h) for layer, h in enumerate(states[:-1])]
            parts.append(torch.stack(normal).cpu())
    return torch.cat(parts, dim=1).numpy()


def cross_fitted(inputs: np.ndarray, target: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Return exp of a target ``(T, L)`` as least squares predict it from ``(L − 1, T, D)``.

    Every document is predicted by the regression on the other half of the documents. The exponential
    keeps the order, which is all that a threshold knows, and makes the score one that gates can give.

    Raises:
        ValueError: there is one document only.
    """
    names = np.unique(document)
    if len(names) < 2:
        raise ValueError("one document cannot be predicted from others: give two or more")
    half, scores = np.isin(document, names[::2]), np.full(target.shape, np.inf, np.float32)
    for layer, normal in enumerate(inputs):
        columns = np.column_stack([normal, np.ones(len(normal))])
        for part in (half, ~half):
            weights, *_ = np.linalg.lstsq(columns[part], target[part, layer])
            scores[~part, layer] = np.exp(columns[~part] @ weights)
    return scores


def gate_targets(inputs: np.ndarray, trace: ExitTrace, layers: Sequence[float]) -> pd.DataFrame:
    """Compare linear gates of each target, and the criteria of the trace, at equal mean layers.

    Thresholds are chosen with hindsight, in the same way for all.

    Args:
        inputs: :func:`gate_inputs` of the tokens of ``trace``.
        trace: trace of the fit part, of a model with gates or without.
        layers: mean layers executed.

    Returns:
        Columns signal, layers, quality_loss (thresholds per layer), one_threshold (the loss of the same
        threshold at every layer), and for targets difference: the perplexity over that of the target
        in use, minus 1 (document mean), with its 95 % interval low to high.
    """
    learned = {
        name: replace(trace, scores={"gate": cross_fitted(inputs, target, trace.document)})
        for name, target in targets(trace).items()
    }
    signals = {f"linear gate: {name}": (traced, "gate") for name, traced in learned.items()}
    signals |= {name: (trace, name) for name in trace.criteria}
    rows = []
    for depth in layers:
        used = _chosen_nll(*signals[f"linear gate: {IN_USE}"], depth)
        for name, (traced, criterion) in signals.items():
            nll = _chosen_nll(traced, criterion, depth)
            curve = traced.sweep(criterion).sort_values("layers")
            row = {"signal": name, "layers": depth}
            row["quality_loss"] = np.expm1(nll.mean() - trace.full_nll)
            row["one_threshold"] = np.interp(depth, curve["layers"], curve["quality_loss"])
            if traced is not trace:
                mean, half, _ = paired_interval(by_document(nll - used, trace.document))
                ends = {"difference": mean, "low": mean - half, "high": mean + half}
                row |= {key: np.expm1(value) for key, value in ends.items()}
            rows.append(row)
    return pd.DataFrame(rows)


def _chosen_nll(trace: ExitTrace, criterion: str, depth: float) -> np.ndarray:
    """Return each token's NLL under the best thresholds per layer of at most a mean depth ``(T,)``."""
    policy = fit_policy_to_cost(trace, criterion, depth, np.arange(1.0, trace.n_layers + 1))
    executed = np.minimum(trace.exit_layers(policy), trace.n_layers - 1)
    return trace.nll[np.arange(trace.n_tokens), executed].astype(np.float64)
