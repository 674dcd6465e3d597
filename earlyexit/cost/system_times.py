"""Measure the time of systems, and how much of it a sparse BK-Core could save."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.cost.timing import interleaved_times, median_ms
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.execution import decide
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.record import recorded
from earlyexit.nn.sparse_bk import SparseMixing


def system_times(
    runs: dict[str, tuple[EarlyExitModel, ExitPolicy | None]],
    x: Tensor,
    y: Tensor,
    repeats: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Measure the seconds per batch of every run, interleaved.

    Args:
        runs: name → model, and a policy whose criterion reads no logits; None is full depth.

    Returns:
        ``"layers"`` (with checks, ``2 · repeats`` times) and ``"total"``, each name → seconds.
    """
    whole, layers = {}, {}
    for name, (model, policy) in runs.items():
        whole[name] = partial(model.nll, x, y, policy)
        never = ExitPolicy.static(model.n_layers, model.n_layers)
        layers[name] = partial(decide, model, x, policy or never)
    # A disturbance changes short runs more, and repeating them costs little.
    return {
        "total": interleaved_times(whole, x.device, repeats),
        "layers": interleaved_times(layers, x.device, 2 * repeats),
    }


@torch.no_grad()
def sparse_times(
    sizes: Sequence[tuple[int, int, int, int]], keep: float, repeats: int, device: torch.device
) -> pd.DataFrame:
    """Measure how much of a layer's time an untrained sparse BK-Core saves, and could save at most.

    Args:
        sizes: (batch, N, d_model, heads) of each row.
        keep: share of positions that are kept, the same random ones in every repeat.

    Returns:
        Columns batch, positions, d_model, heads, kept, dense_ms and sparse_ms of a layer,
        core_share (BK-Core's share of a dense layer's time), skippable_share (the same with the product
        before it and the norm after it), at_most (speedup if skipping cost nothing) and measured
        (speedup).
    """
    rows = []
    for batch, n, d, heads in sizes:
        torch.manual_seed(0)
        dense = MoEResNetBKLayer(d, n, bk_heads=heads).to(device).eval()
        sparse = copy.deepcopy(dense)
        config = ModelConfig(vocab_size=2, d_model=d, n_seq=n, bk_heads=heads)
        sparse.mixing = SparseMixing(config, keep).to(device).eval()
        u = torch.nn.functional.layer_norm(torch.randn(batch, n, d, device=device), (d,))
        chooser, flat = sparse.contribution, u.flatten(0, 1)
        chooser.importance.bias -= chooser.importance(u).quantile(1 - keep)
        given = dense.contribution(u)
        features = dense.mix(flat, given, None)
        calls = {
            "contribution": partial(dense.contribution, u),
            "core": partial(dense.mix, flat, given, None),
            "projection": partial(dense.mixing.read, flat, features),
            "experts": partial(dense.moe, u),
        }
        norm = {"norm": partial(dense.mixing.readable, features)}
        layers = {"dense": partial(dense, u), "sparse": partial(sparse, u)}
        ms = median_ms(interleaved_times(layers | calls | norm, device, repeats))
        parts = sum(ms[name] for name in calls)  # the norm is a part of the projection
        share = (ms["contribution"] + ms["core"] + ms["norm"]) / parts
        with recorded(torch.ones(batch, n, dtype=torch.bool, device=device)) as record:
            sparse(u)
        kept = (record.notes["kept"][0][0] / (batch * n)).item()
        rows.append(
            {
                "batch": batch,
                "positions": n,
                "d_model": d,
                "heads": heads,
                "kept": kept,
                "dense_ms": ms["dense"],
                "sparse_ms": ms["sparse"],
                "core_share": ms["core"] / parts,
                "skippable_share": share,
                "at_most": 1 / (1 - share * (1 - kept)),
                "measured": ms["dense"] / ms["sparse"],
            }
        )
    return pd.DataFrame(rows)
