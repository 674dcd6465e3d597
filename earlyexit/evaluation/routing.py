"""Measure to which experts, output-head clusters and BK-Core positions tokens are routed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from earlyexit.corpus.windows import IGNORE
from earlyexit.evaluation.evaluator import on_device
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.models.sparse_bk import sparse_layers
from earlyexit.nn.record import BatchRecord, recorded


@torch.no_grad()
def expert_shares(model: EarlyExitLanguageModel, batches: Iterable) -> Tensor:
    """Return the share of scored tokens routed to each expert ``(L, E)`` at full depth.

    Raises:
        ValueError: there are no batches.
    """
    counts = sum(torch.stack(record.notes["routed"]) for record in _records(model, batches))
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1)


def expert_table(model: EarlyExitLanguageModel, batches: Iterable) -> pd.DataFrame:
    """Return :func:`expert_shares` as a tidy table: columns layer, expert, share."""
    shares = pd.DataFrame(expert_shares(model, batches).tolist())
    return (
        shares.rename_axis("layer")
        .reset_index()
        .melt("layer", None, "expert", "share")
        .sort_values(["layer", "expert"], ignore_index=True)
    )


@torch.no_grad()
def opened_shares(model: EarlyExitLanguageModel, batches: Iterable) -> pd.DataFrame:
    """Measure how often an adaptive output head opens its clusters, on full-depth states.

    Returns:
        Columns ``exit``, ``cluster`` (0 holds the most frequent words), and the shares of tokens for
        which it is opened to score the next ``word`` and to find the most probable one (``top``).

    Raises:
        ValueError: the model has no adaptive head, or there are no batches.
    """
    if model.config.output_head != "adaptive":
        raise ValueError(f"output_head={model.config.output_head!r} has no clusters to open")
    heads = [block.exit_classifier for block in model.blocks]
    cuts, tokens = heads[0].unembedding.softmax.cutoffs, 0
    counts = np.zeros((len(heads), len(cuts) - 1, 2))
    for x, y in on_device(batches, model):
        states, scored = model.hidden_states(x), y != IGNORE
        tokens += int(scored.sum())
        for layer, head in enumerate(heads):
            features = head.features(states[layer + 1][scored])
            for k, (first, end) in enumerate(pairwise(cuts)):
                counts[layer, k, 0] += int(((y >= first) & (y < end)).sum())
                with _rows_into(head.unembedding.softmax.tail[k]) as rows:
                    head.unembedding.top(features)
                counts[layer, k, 1] += sum(rows)
    if not tokens:
        raise ValueError("the loader is empty: there is nothing to count")
    index = pd.MultiIndex.from_product(map(range, counts.shape[:2]), names=["exit", "cluster"])
    shares = counts.reshape(-1, 2) / tokens
    return pd.DataFrame(shares, index, columns=["word", "top"]).reset_index()


@contextmanager
def _rows_into(module: nn.Module) -> Iterator[list[int]]:
    """Record the number of rows that each call of a module gets within the context."""
    rows: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


@torch.no_grad()
def kept_shares(model: EarlyExitLanguageModel, batches: Iterable) -> list[float]:
    """Return the share of positions that each sparse layer's BK-Core visits at full depth."""
    if not any(sparse_layers(model)):
        return []
    kept, of = sum(torch.stack(record.notes["kept"], dim=1) for record in _records(model, batches))
    return (kept / of.clamp_min(1)).tolist()


def _records(model: EarlyExitLanguageModel, batches: Iterable) -> Iterator[BatchRecord]:
    """Run the model at full depth, and yield what its layers tell of each batch's scored positions."""
    found = False
    for x, y in on_device(batches, model):
        with recorded(y != IGNORE) as record:
            model.hidden_states(x)
        found = True
        yield record
    if not found:
        raise ValueError("the loader is empty: there is nothing to count")
