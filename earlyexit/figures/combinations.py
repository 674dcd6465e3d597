"""figures/combinations."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from earlyexit.figures.style import MARKERS
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from earlyexit.figures.style import _percent
from earlyexit.figures.style import _plain_ticks
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


def sparse_limits(table: pd.DataFrame) -> Figure:
    """Speedup of a layer by a sparse BK-Core: at most, and measured, per size.

    Args:
        table: as :func:`earlyexit.cost.system_times.sparse_times` returns.
    """
    fig, ax = plt.subplots(figsize=(PAGE * 0.75, 2.6))
    names = [
        f"{r.heads} heads\n{r.batch} × N = {r.positions}\nd = {r.d_model}"
        for r in table.itertuples()
    ]  # fmt: skip
    x, width = np.arange(len(table)), 0.38
    labels = {"at_most": "if skipping cost nothing", "measured": "measured"}
    for k, (column, label) in enumerate(labels.items()):
        bars = ax.bar(x + (k - 0.5) * width, table[column], width, label=label)
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        ax.bar_label(bars, fmt="%.2f×", fontsize=7, padding=2, bbox=back)
    ax.axhline(1, **REFERENCE)
    ax.set_xticks(x, names)
    ax.set(ylabel="speedup of one layer")
    ax.margins(y=0.15)
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside right upper")
    return fig


def combinations(curves: pd.DataFrame, alone: pd.DataFrame, tolerance: float) -> Figure:
    """Perplexity against the reference's over the speedup of the layers, one curve per system.

    Args:
        curves: columns system, quality_loss, speedup_layers, speedup_flops (over thresholds).
        alone: the same, one row per system at full depth.
        tolerance: quality loss called matched; a dashed line.
    """
    fig, axes = plt.subplots(1, 2, figsize=(PAGE, 3.1), sharey=True)
    labels = {
        "speedup_layers": "positions of the reference / positions",
        "speedup_flops": "FLOPs of its layers / FLOPs of the layers",
    }
    names = list(dict.fromkeys([*curves["system"], *alone["system"]]))
    colors = [f"C{k}" for k in range(7)] + ["0.5", "0.2"]
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for k, name in enumerate(names):
            full = alone[alone["system"] == name]
            rows = pd.concat([full, curves[curves["system"] == name]]).sort_values(column)
            many = "-" if k < 7 else ":"
            at = [int(i) for i in np.flatnonzero(rows[column] == full[column].iloc[0])[:1]]
            ax.plot(
                rows[column], rows["quality_loss"], color=colors[k], linestyle=many,
                marker=MARKERS[k % 8], markevery=at, label=name,
            )  # fmt: skip
        ax.axhline(tolerance, **REFERENCE, label="tolerated loss")
        ax.axhline(0, **(REFERENCE | {"linestyle": ":"}))
        ax.set(xlabel=label, xscale="log")
        low, high = ax.get_xlim()
        ticks = (0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        _plain_ticks(ax, [t for t in ticks if low <= t <= high])
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, min(high, 0.5))  # beyond, nobody wants the model
    axes[0].set_ylabel("quality loss against the plain model")
    _percent(axes[0].yaxis)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def claimed_measured(table: pd.DataFrame) -> Figure:
    """Claimed factors and products beside measured ones, log scale.

    Args:
        table: columns claim, claimed, then one column per measure (NaN: not reached).
    """
    measures = [c for c in table if c not in ("claim", "claimed")]
    fig, ax = plt.subplots(figsize=(PAGE, 2.7))
    x, width = np.arange(len(table)), 0.84 / (1 + len(measures))
    for k, column in enumerate(["claimed", *measures]):
        at = x + (k - len(measures) / 2) * width
        color = "0.6" if column == "claimed" else f"C{k - 1}"
        bars = ax.bar(at, table[column].fillna(1) - 1, width, bottom=1, color=color, label=column)
        texts = ["–" if np.isnan(v) else f"{v:.2f}" for v in table[column]]
        for bar, text, value in zip(bars, texts, table[column].fillna(1), strict=True):
            up = value >= 1
            ax.annotate(
                text, (bar.get_x() + width / 2, value), (0, 2 if up else -2),
                textcoords="offset points", ha="center", va="bottom" if up else "top", fontsize=5.5,
                rotation=90,
            )  # fmt: skip
    ax.axhline(1, color="0.35", linewidth=0.8)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.set_xticks(x, [name.replace(" (", "\n(") for name in table["claim"]])
    ax.set_ylabel("speedup")
    ax.margins(y=0.15)
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside upper center", ncols=1 + len(measures))
    return fig


def act_conversion(table: pd.DataFrame) -> Figure:
    """Perplexity over mean layers of a converted ACT model, exits calibrated or not.

    Args:
        table: columns exits ("as converted", "calibrated", "ACT itself"), layers, perplexity.
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.4, 2.5))
    for k, (name, rows) in enumerate(table.groupby("exits", sort=False)):
        rows = rows.sort_values("layers")
        style = {"linestyle": "none", "markersize": 7, "color": "black"}
        line = {"color": f"C{k}"}
        ax.plot(
            rows["layers"], rows["perplexity"], "*" if name == "ACT itself" else MARKERS[k],
            label=name, **style if name == "ACT itself" else line | {"linestyle": "-"},
        )  # fmt: skip
    ax.set(xlabel="mean layers executed", ylabel="perplexity, test split")
    fig.legend(loc="outside right upper")
    return fig
