"""Figures of notebook 01 show training, the leak of the two-sided form, and the cost of each part."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, SMALL, Panels


def training_curves(history: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw training NLL against tokens, and each exit's perplexity after training, in two panels.

    Columns: seed, tokens, train_nll, perplexity_0 … (NaN between evaluations).
    """
    panels = [partial(draw, history) for draw in (training_nll, trained_exits)]
    return style.compose(ax, PAGE, 2.4, panels)


@style.panel(COLUMN, 2.4, loc=None)
def training_nll(history: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the first panel of :func:`training_curves`, one curve per seed."""
    for seed, rows in history.groupby("seed"):
        ax.plot(rows["tokens"] / 1e6, rows["train_nll"], label=f"seed {seed}")
    ax.set(xlabel="training tokens (millions)", ylabel="training NLL (nats per token)")


@style.panel(COLUMN, 2.4)
def trained_exits(history: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the second panel of :func:`training_curves`, one curve per seed, with the means."""
    columns = [c for c in history if c.startswith("perplexity_")]
    final = history.dropna(subset=columns).groupby("seed")[columns].last()
    for _, values in final.iterrows():
        ax.plot(range(len(columns)), values, "o-")
    for i, (mean, top) in enumerate(zip(final.mean(), final.max(), strict=True)):
        where = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        ax.annotate(f"{mean:.0f}", (i, top), fontsize=SMALL, **where)
    ax.set(xlabel="exit (layer index)", ylabel="perplexity, validation (fit part)")
    style.integers(ax.xaxis)
    ax.margins(y=0.2)


@style.panel(COLUMN, 2.2, title="tokens after them")
def leak(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw perplexity on the true text and with the future of each scored token replaced.

    Columns: model, future ("true" or "replaced"), perplexity.
    """
    means = table.pivot_table(index="model", columns="future", values="perplexity", sort=False)
    style.grouped_bars(ax, means[["true", "replaced"]], "{:.0f}")
    ax.set(yscale="log", ylabel="perplexity of the same tokens")
    ax.set_ylim(1, 3 * table["perplexity"].max())


@style.panel(COLUMN, 2.6, loc="upper right", ncols=2)
def cost_shares(costs: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the FLOPs per token of every part, as a multiple of one whole block.

    The table is that of :func:`earlyexit.cost.parts.cost_table`.
    """
    style.part_bars(ax, costs, "{:.2g}×".format)
    ax.set(xlabel="FLOPs per token / FLOPs of one block")
