"""Figures of notebook 07 show ACT, several scales and a sparse BK-Core, alone and with exits."""

from __future__ import annotations

import textwrap
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import BACKGROUND, COLUMN, PAGE, REFERENCE, Panels

SAVED = {
    "speedup_layers": "positions of the reference / positions",
    "speedup_flops": "FLOPs of its layers / FLOPs of the layers",
}
TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
UNUSABLE = 0.5  # quality loss beyond which a model is of no use


@style.panel(PAGE, 2.6)
def sparse_limits(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the largest possible and the measured speedup of a layer by a sparse BK-Core, per size.

    The table is that of :func:`earlyexit.cost.system_times.sparse_times`.
    """
    sizes = table[["heads", "batch", "positions", "d_model"]].itertuples(index=False)
    names = [f"{r.heads} heads\n{r.batch} × N = {r.positions}\nd = {r.d_model}" for r in sizes]
    labels = {"at_most": "if skipping cost nothing", "measured": "measured"}
    values = table[list(labels)].rename(columns=labels).set_axis(names)
    style.grouped_bars(ax, values, "{:.2f}×", padding=2, bbox=BACKGROUND)
    ax.axhline(1, **REFERENCE)
    ax.set(ylabel="speedup of one layer")
    ax.margins(y=0.15)


def combinations(
    curves: pd.DataFrame, alone: pd.DataFrame, epsilon: float, *, ax: Panels = None
) -> np.ndarray:
    """Draw quality loss against the reference over speedup in positions and FLOPs, in two panels.

    Args:
        curves: columns system, quality_loss, speedup_layers, speedup_flops (over thresholds).
        alone: the same, one row per system at full depth.
        epsilon: tolerated quality loss, drawn as a dashed line.
    """
    panels = [partial(combination_curves, curves, alone, epsilon, x) for x in SAVED]
    key = {"loc": "lower center", "ncols": 5}
    return style.compose(ax, PAGE, 3.3, panels, key=key, sharey=True)


@style.panel(PAGE, 3.1)
def combination_curves(
    curves: pd.DataFrame, alone: pd.DataFrame, epsilon: float, x: str, *, ax: Axes
) -> None:
    """Draw a panel of :func:`combinations`; ``x`` is "speedup_layers" or "speedup_flops"."""
    colors = [f"C{k}" for k in range(7)] + ["0.5", "0.2"]
    names = dict.fromkeys([*curves["system"], *alone["system"]])
    for k, name in enumerate(names):
        full = alone[alone["system"] == name]
        rows = pd.concat([full, curves[curves["system"] == name]]).sort_values(x)
        marked = np.flatnonzero(rows[x] == full[x].iloc[0])[:1].tolist()
        options = style.look(k) | {"color": colors[k], "linestyle": "-" if k < 7 else ":"}
        ax.plot(rows[x], rows["quality_loss"], markevery=marked, label=name, **options)
    ax.axhline(epsilon, **REFERENCE, label="tolerated loss")
    ax.axhline(0, **REFERENCE | {"linestyle": ":"})
    ax.set(xlabel=SAVED[x], xscale="log", ylabel="quality loss against the plain model")
    style.plain_ticks(ax.xaxis, TICKS)
    ax.set_ylim(top=min(ax.get_ylim()[1], UNUSABLE))
    style.percent(ax.yaxis)


@style.panel(PAGE, 2.7, loc="upper center", ncols=4)
def claimed_measured(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw claimed factors and products beside measured ones, on a log scale.

    Columns: claim, claimed, then one column per measure (NaN: not reached).
    """
    wrap = partial(textwrap.fill, width=13, break_on_hyphens=False)
    values = table.set_index("claim").rename(index=wrap)
    colors = ["0.6"] + [f"C{k}" for k in range(values.shape[1] - 1)]
    options = {"fontsize": 5.5, "rotation": 90, "padding": 2}
    style.grouped_bars(ax, values, "{:.2f}", missing="–", bottom=1, colors=colors, **options)
    ax.axhline(1, color="0.35", linewidth=0.8)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.set_ylabel("speedup")
    ax.margins(y=0.15)


@style.panel(COLUMN, 2.5)
def act_conversion(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw perplexity over mean layers of a converted ACT model, with exits calibrated or not.

    Columns: exits ("as converted", "calibrated", "ACT itself"), layers, perplexity.
    """
    itself = {"marker": "*", "markersize": 7, "color": "black", "linestyle": "none"}
    for k, (name, rows) in enumerate(table.groupby("exits", sort=False)):
        rows = rows.sort_values("layers")
        options = itself if name == "ACT itself" else style.look(k)
        ax.plot(rows["layers"], rows["perplexity"], label=name, **options)
    ax.set(xlabel="mean layers executed", ylabel="perplexity, test split")
