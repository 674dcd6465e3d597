"""cost/system_times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.cost.breakdown import scaled_projection
from earlyexit.cost.timing import interleaved_times
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.sparse_bk import SparseBKLayer
from earlyexit.nn.unembedding import LinearUnembedding


@contextmanager
def few_words(model: EarlyExitLanguageModel, words: int = 32) -> Iterator[None]:
    """``model`` with an unembedding of only ``words``: what is left to time are the layers."""
    small = LinearUnembedding(model.d_model, words).to(model.token_embedding.weight.device)
    heads = [block.exit_classifier for block in model.blocks]
    kept = [(head.linear, head._borrowed) for head in heads]
    try:
        for head in heads:
            head.linear, head._borrowed = None, (small,)
        yield
    finally:
        for head, (linear, borrowed) in zip(heads, kept, strict=True):
            head.linear, head._borrowed = linear, borrowed


def system_times(
    runs: dict[str, tuple[EarlyExitLanguageModel, ExitPolicy | None]],
    x: Tensor,
    y: Tensor,
    repeats: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds per batch of every run, interleaved: of its layers, and in total.

    Returns:
        ``"layers"`` and ``"total"``, each name → seconds.
    """
    whole = {
        name: lambda m=model, p=policy: m.nll(x, y, p) for name, (model, policy) in runs.items()
    }
    short = {
        name: lambda m=model, p=policy: m.predict(x, p) for name, (model, policy) in runs.items()
    }
    out = {"total": interleaved_times(whole, x.device, repeats)}
    with ExitStack() as stack:
        for model in {id(model): model for model, _ in runs.values()}.values():
            stack.enter_context(few_words(model))
        # Short runs feel every disturbance, and cost little to repeat.
        return out | {"layers": interleaved_times(short, x.device, 2 * repeats)}


@torch.no_grad()
def sparse_times(
    sizes: Sequence[tuple[int, int, int, int]], keep: float, repeats: int, device: torch.device
) -> pd.DataFrame:
    """How much of a layer a sparse BK-Core could save, and how much it does, untrained.

    Args:
        sizes: (batch, N, d_model, heads) of each row.
        keep: share of positions kept, the same random ones in every repeat.

    Returns:
        Columns batch, positions, d_model, heads, kept, dense_ms and sparse_ms of a layer,
        core_share (BK-Core's of a dense layer's parts; with both projections: skippable_share),
        at_most (speedup if skipping cost nothing) and measured.
    """
    rows = []
    for batch, n, d, heads in sizes:
        torch.manual_seed(0)
        dense = MoEResNetBKLayer(d, n, bk_heads=heads).to(device).eval()
        sparse = SparseBKLayer(d, n, bk_heads=heads, keep=keep).to(device).eval()
        u = torch.nn.functional.layer_norm(torch.randn(batch, n, d, device=device), (d,))
        score = sparse.importance(u)
        sparse.importance.bias -= score.quantile(1 - keep)
        v = dense.potentials(u)
        features = dense.bk_core(v)
        calls = {
            "dense": lambda dense=dense, u=u: dense(u),
            "sparse": lambda sparse=sparse, u=u: sparse(u),
            "core": lambda dense=dense, v=v: dense.bk_core(v),
            "potentials": lambda dense=dense, u=u: dense.potentials(u),
            "projection": lambda dense=dense, f=features: scaled_projection(dense, f),
            "experts": lambda dense=dense, u=u: dense.moe(u),
        }
        seconds = interleaved_times(calls, device, repeats)
        ms = {name: 1e3 * float(np.median(s)) for name, s in seconds.items()}
        parts = sum(ms[name] for name in ("core", "potentials", "projection", "experts"))
        share = 1 - ms["experts"] / parts
        sparse.reset_kept()
        sparse(u)
        rows.append(
            {
                "batch": batch,
                "positions": n,
                "d_model": d,
                "heads": heads,
                "kept": sparse.kept(),
                "dense_ms": ms["dense"],
                "sparse_ms": ms["sparse"],
                "core_share": ms["core"] / parts,
                "skippable_share": share,
                "at_most": 1 / (1 - share * (1 - sparse.kept())),
                "measured": ms["dense"] / ms["sparse"],
            }
        )
    return pd.DataFrame(rows)
