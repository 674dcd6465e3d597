"""Exits are counted: how many tokens left at which layer, and how many layers they executed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.execution import run
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.readers import Scores


def layers_executed(exit_layers, n_layers: int):
    """Return min(exit + 1, n_layers) of exit layers in a tensor, an array or a column."""
    return (exit_layers + 1).clip(None, n_layers)


def exit_statistics(counts: Tensor) -> dict:
    """Return statistics of exit-layer counts ``(L + 1,)``, the last for tokens that did not exit.

    Returns:
        ``avg_exit_layer`` (mean index, n_layers counting for "no exit"), ``exit_distribution``
        (L + 1 percentages), ``speedup_estimate`` (L / mean layers executed; a count of layers, not of
        time), ``total_tokens_processed``.
    """
    counts = counts.double()
    n_layers, total = len(counts) - 1, counts.sum().item()
    share = counts / max(total, 1)
    layer = torch.arange(n_layers + 1, dtype=torch.float64, device=counts.device)
    executed = (share * layers_executed(layer, n_layers)).sum().item()
    return {
        "avg_exit_layer": (share * layer).sum().item(),
        "exit_distribution": (100 * share).tolist(),
        "speedup_estimate": n_layers / executed if total else 1.0,
        "total_tokens_processed": int(total),
    }


@torch.no_grad()
def exit_shares(model: ExitModel, x: Tensor, y: Tensor, policy: ExitPolicy) -> np.ndarray:
    """Return the share of a batch's scored tokens per exit layer ``(L + 1,)``."""
    exits = run(model, x, policy, Scores(y.flatten(), model.vocab_size)).exit_layers
    counts = exits[y.flatten() != IGNORE].bincount(minlength=model.n_layers + 1)
    return (counts.double() / counts.sum().clamp_min(1)).cpu().numpy()
