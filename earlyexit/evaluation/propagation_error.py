"""The propagation error: what the states that exited tokens leave behind cost in quality.

The trace reads every exit of full-depth states, which is optimistic. A real run freezes a token at its
exit, and deeper layers of later tokens read what it hands on. The difference is measured per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed

POSITIONS = 8  # equal parts of a window


def propagation_error(
    model: EarlyExitModel, trace: ExitTrace, batches: Iterable, policy: ExitPolicy
) -> pd.DataFrame:
    """Real against traced NLL of every scored token.

    Args:
        trace: of the same text, in order.
        batches: pairs of token ids and targets ``(B, N)``, in order.

    Returns:
        One row per token: position, exit_layer and nll of the compacted run, nll_trace, and
        exit_layer_trace.

    Raises:
        ValueError: the batches are not the text of the trace.
    """
    device = next(model.parameters()).device
    nll, exits, targets = [], [], []
    for x, y in batches:
        values, layers = model.nll(x.to(device), y.to(device), policy)
        scored = y != IGNORE
        nll.append(values.cpu()[scored])
        exits.append(layers.cpu()[scored])
        targets.append(y[scored])
    target = torch.cat(targets).numpy()
    if not np.array_equal(target, trace.target):
        raise ValueError("the batches are not the text of the trace, token by token")
    traced = trace.exit_layers(policy)
    rows = np.arange(trace.n_tokens)
    return pd.DataFrame(
        {
            "position": trace.position,
            "exit_layer": torch.cat(exits).numpy(),
            "nll": torch.cat(nll).double().numpy(),
            "exit_layer_trace": traced,
            "nll_trace": trace.nll[rows, np.minimum(traced, trace.n_layers - 1)].astype(float),
        }
    )


def propagation_cost(tokens: pd.DataFrame, n_layers: int, n_seq: int) -> pd.DataFrame:
    """Perplexity of the real run against the trace's, by depth and by position.

    Args:
        tokens: as :func:`propagation_error` returns.

    Returns:
        Columns by ("all", "layers executed", "position"), value (layers, or the first position of a
        part of the window), tokens, perplexity, perplexity_trace, cost (ratio − 1), moved (share of
        tokens that leave elsewhere than the trace says).
    """
    layers = layers_executed(tokens["exit_layer"].to_numpy(), n_layers)
    width = max(1, n_seq // POSITIONS)
    keys = {
        "all": pd.Series(0, index=tokens.index),
        "layers executed": layers,
        "position": tokens["position"] // width * width,
    }
    rows = []
    for by, key in keys.items():
        for value, part in tokens.groupby(key):
            gap = part["nll"].mean() - part["nll_trace"].mean()
            rows.append(
                {
                    "by": by,
                    "value": int(value),
                    "tokens": len(part),
                    "perplexity": np.exp(part["nll"].mean()),
                    "perplexity_trace": np.exp(part["nll_trace"].mean()),
                    "cost": np.expm1(gap),
                    "moved": (part["exit_layer"] != part["exit_layer_trace"]).mean(),
                }
            )
    return pd.DataFrame(rows)
