"""figures/build."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


def training_curves(history: pd.DataFrame) -> Figure:
    """Training NLL against tokens, and the fit part's perplexity of every exit.

    Numbers at the exits are means over seeds.

    Args:
        history: columns seed, tokens, train_nll, perplexity_0 … (NaN between evaluations).
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.4))
    for seed, rows in history.groupby("seed"):
        left.plot(rows["tokens"] / 1e6, rows["train_nll"], label=f"seed {seed}")
    left.set(xlabel="training tokens (millions)", ylabel="training NLL (nats per token)")
    left.legend()
    columns = [c for c in history if c.startswith("perplexity_")]
    measured = history.dropna(subset=columns)
    final = measured.groupby("seed")[columns].last()
    for _, values in final.iterrows():
        right.plot(range(len(columns)), values, "o-", markersize=4)
    for i, (mean, top) in enumerate(zip(final.mean(), final.max(), strict=True)):
        right.annotate(
            f"{mean:.0f}", (i, top), (0, 6), textcoords="offset points", ha="center", fontsize=7
        )
    right.set(xlabel="exit (layer index)", ylabel="perplexity, validation (fit part)")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.margins(y=0.2)
    return fig


def leak(table: pd.DataFrame) -> Figure:
    """Perplexity on the true text and with the future of each scored token replaced.

    Args:
        table: columns model, future ("true" or "replaced"), perplexity.
    """
    fig, ax = plt.subplots(figsize=(COLUMN, 2.2))
    models, width = list(dict.fromkeys(table["model"])), 0.38
    for k, future in enumerate(("true", "replaced")):
        rows = table[table["future"] == future].groupby("model")["perplexity"].mean()[models]
        bars = ax.bar(np.arange(len(models)) + (k - 0.5) * width, rows, width, label=future)
        ax.bar_label(bars, fmt="%.0f", fontsize=7)
    ax.set_xticks(np.arange(len(models)), models)
    ax.set(yscale="log", ylabel="perplexity of the same tokens")
    ax.set_ylim(1, 3 * table["perplexity"].max())
    ax.grid(axis="x", visible=False)
    ax.legend(title="tokens after them", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def cost_shares(costs: pd.DataFrame) -> Figure:
    """FLOPs per token of every part, as a multiple of one whole block.

    Args:
        costs: as :func:`earlyexit.cost.parts.cost_table` returns.
    """
    fig, ax = plt.subplots(figsize=(COLUMN, 2.6))
    order = costs.iloc[::-1]
    colors = order["group"].map({"block": "C0", "head": "C1"})
    bars = ax.barh(order["part"], order["share_of_block"], color=colors)
    ax.bar_label(bars, [f" {v:.2g}×" for v in order["share_of_block"]], fontsize=7)
    ax.set(xscale="log", xlabel="FLOPs per token / FLOPs of one block")
    ax.axvline(1, **REFERENCE)
    ax.margins(x=0.2)
    ax.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("C0", "C1")]
    ax.legend(handles, ["every layer", "a head"], loc="upper right")
    return fig
