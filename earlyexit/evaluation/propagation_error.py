"""Measure the propagation error: the loss of quality that the states of exited tokens cause.

The trace evaluates every exit on full-depth states, which is optimistic. In a real run the state of a
token no longer changes after its exit, and the deeper layers of later tokens read what is propagated
from it. The difference is measured per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.windows import IGNORE
from earlyexit.evaluation.evaluator import run_batches
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed

POSITIONS = 8  # number of equal parts of a window


def propagation_error(
    model: EarlyExitModel, trace: ExitTrace, batches: Iterable, policy: ExitPolicy
) -> pd.DataFrame:
    """Compare the NLL of a real run with that of the trace, for every scored token.

    Args:
        trace: trace of the same text, in the same order.
        batches: pairs of token ids and targets ``(B, N)``, in order.

    Returns:
        One row per token: position, exit_layer and nll of the compacted run, nll_trace, and
        exit_layer_trace.

    Raises:
        ValueError: the batches are not the text of the trace.
    """
    runs = [
        (nll[y != IGNORE].cpu(), exits[y != IGNORE].cpu(), y[y != IGNORE].cpu())
        for y, nll, exits in run_batches(model, batches, policy)
    ]
    nll, exits, target = (torch.cat(parts) for parts in zip(*runs, strict=True))
    if not np.array_equal(target.numpy(), trace.target):
        raise ValueError("the batches are not the text of the trace, token by token")
    traced = trace.exit_layers(policy)
    rows = np.arange(trace.n_tokens)
    return pd.DataFrame(
        {
            "position": trace.position,
            "exit_layer": exits.numpy(),
            "nll": nll.double().numpy(),
            "exit_layer_trace": traced,
            "nll_trace": trace.nll[rows, np.minimum(traced, trace.n_layers - 1)].astype(float),
        }
    )


def propagation_cost(tokens: pd.DataFrame, n_layers: int, n_seq: int) -> pd.DataFrame:
    """Compare the perplexity of the real run with the trace's, by depth and by position.

    Args:
        tokens: the table that :func:`propagation_error` returns.

    Returns:
        Columns by ("all", "layers executed", "position"), value (layers, or the first position of a
        part of the window), tokens, perplexity, perplexity_trace, cost (ratio − 1), moved (share of
        tokens that leave at another exit than in the trace).
    """
    width = max(1, n_seq // POSITIONS)
    keys = {
        "all": np.zeros(len(tokens), dtype=int),
        "layers executed": layers_executed(tokens["exit_layer"].to_numpy(), n_layers),
        "position": tokens["position"].to_numpy() // width * width,
    }
    tokens = tokens.assign(moved=tokens["exit_layer"] != tokens["exit_layer_trace"])
    parts = []
    for by, key in keys.items():
        groups = tokens.groupby(key)
        mean = groups[["nll", "nll_trace", "moved"]].mean().rename_axis("value").reset_index()
        parts.append(mean.assign(by=by, tokens=groups.size().to_numpy()))
    table = pd.concat(parts, ignore_index=True)
    table = table.assign(
        perplexity=np.exp(table["nll"]),
        perplexity_trace=np.exp(table["nll_trace"]),
        cost=np.expm1(table["nll"] - table["nll_trace"]),
    )
    return table[["by", "value", "tokens", "perplexity", "perplexity_trace", "cost", "moved"]]
