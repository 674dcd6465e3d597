"""Figures of notebook 03 show quality over speedup, thresholds, exits and training recipes."""

from __future__ import annotations

import textwrap
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, Panels

EXIT = "exit (layer index)"
FEW = 12  # largest number of settings that are drawn as points

QUALITY = {
    "perplexity": "perplexity",
    "agreement": "agreement with last layer",
    "kl": "KL to last layer (nats)",
}
OVER_THRESHOLD = {"layers": "mean layers\nexecuted", "quality_loss": "quality loss"}


@style.panel(PAGE, 3.0)
def pareto(
    curves: pd.DataFrame,
    x: str,
    x_label: str,
    largest_loss: float = 0.3,
    points: pd.DataFrame | None = None,
    *,
    ax: Axes,
) -> None:
    """Draw quality loss over a speedup, one curve per criterion, with static exits and oracles.

    Static exits and criteria with few settings are drawn as points, oracles as dashed curves, and
    several seeds as their mean and range.

    Args:
        curves: columns seed, criterion, quality_loss, ``x``, and those of
            :func:`~earlyexit.figures.style.setting_of`.
        largest_loss: largest quality loss shown.
        points: the original's claims: columns quality_loss, ``x``.
    """
    for k, (criterion, rows) in enumerate(curves.groupby("criterion", sort=False)):
        options = {"color": f"C{k}", "label": style.label_of(criterion)}
        if criterion.startswith("oracle"):
            options |= {"color": "0.35" if "nll" in criterion else "0.6", "linestyle": "--"}
        if criterion.endswith(", before"):  # the curve after it covers it
            options |= {"linewidth": 3, "alpha": 0.4}
        if criterion == "static":
            options |= {"color": "black", "marker": "s"}
        if criterion == "static" or rows.groupby("seed").size().max() <= FEW:
            options = style.look(k) | options | {"linestyle": "none"}
            style.setting_points(ax, rows, x, largest_loss, **options)
        else:
            _pareto_curve(ax, rows, x, largest_loss, **options)
    if points is not None:
        claimed = {"color": "C1", "markersize": 6, "label": "original, claimed"}
        ax.plot(points[x], points["quality_loss"], "X", **claimed)
    ax.axhline(0, **REFERENCE)
    top = min(largest_loss, curves["quality_loss"].max()) * 1.05
    lowest = max(-0.6 * top, ax.get_ylim()[0])  # an oracle that knows the target falls far below
    ax.set(ylim=(lowest, top), xlabel=x_label)
    ax.set_ylabel("quality loss\n(perplexity / full depth − 1)")
    style.percent(ax.yaxis)


def _pareto_curve(ax: Axes, rows: pd.DataFrame, x: str, largest_loss: float, **options) -> None:
    """Draw mean and range over the seeds, on a grid of ``x`` that all of them reach."""
    grid, losses = np.linspace(rows[x].min(), rows[x].max(), 400), []
    for _, one in rows.groupby("seed"):
        one = one.sort_values(x)
        losses.append(np.interp(grid, one[x], one["quality_loss"], left=np.nan, right=np.nan))
    losses = np.stack(losses)
    shown = np.isfinite(losses).all(axis=0) & (losses.mean(axis=0) <= largest_loss)
    grid, losses = grid[shown], losses[:, shown]
    ax.plot(grid, losses.mean(axis=0), **options)
    band = {"color": options["color"], "alpha": 0.2, "linewidth": 0}
    ax.fill_between(grid, losses.min(axis=0), losses.max(axis=0), **band)


def exit_distributions(table: pd.DataFrame, criterion: str, *, ax: Panels = None) -> np.ndarray:
    """Draw the share of tokens per exit layer, a panel per threshold.

    Columns: threshold, exit_layer, share (n_layers: no early exit), layer_equivalents.
    """
    thresholds = sorted(table["threshold"].unique())
    panels = [partial(exit_distribution, table, criterion, threshold) for threshold in thresholds]
    return style.compose(ax, PAGE, 2.3, panels, one_label="x", sharey=True)


@style.panel(COLUMN, 2.3)
def exit_distribution(table: pd.DataFrame, criterion: str, threshold: float, *, ax: Axes) -> None:
    """Draw the panel of :func:`exit_distributions` of one threshold."""
    rows = table[table["threshold"] == threshold].groupby("exit_layer").mean(numeric_only=True)
    none, layers = int(table["exit_layer"].max()), rows["layer_equivalents"].sum()
    ax.bar(rows.index, rows["share"], color=["C0"] * none + ["0.6"])
    ax.set_title(f"threshold {threshold:g}\n{layers:.2f} layers")
    ticks = range(none, -1, -(1 + none // 5))  # room for the word, and as much for each number
    ax.set_xticks(ticks, ["none", *map(str, ticks[1:])])
    ax.set(xlabel=f"exit layer\n({style.label_of(criterion)})", ylabel="share of tokens")
    style.percent(ax.yaxis)
    ax.grid(axis="x", visible=False)


def threshold_sweep(sweeps: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw mean layers executed, and below it quality loss, over thresholds, a column per criterion.

    Columns: seed, criterion, threshold, quality_loss, layers.
    """
    names = sweeps["criterion"].unique()
    panels = [partial(over_threshold, sweeps, name, y) for y in OVER_THRESHOLD for name in names]
    return style.compose(ax, PAGE, 3.2, panels, 2, sharex="col", sharey="row")


@style.panel(COLUMN, 2.2)
def over_threshold(sweeps: pd.DataFrame, criterion: str, y: str, *, ax: Axes) -> None:
    """Draw a panel of :func:`threshold_sweep`; ``y`` is "layers" or "quality_loss"."""
    rows = sweeps[(sweeps["criterion"] == criterion) & np.isfinite(sweeps["threshold"])]
    for _, one in rows.sort_values("threshold").groupby("seed"):
        ax.plot(one["threshold"], one[y], color=f"C{list(OVER_THRESHOLD).index(y)}")
    if y == "quality_loss":
        ax.axhline(0, **REFERENCE)
        style.percent(ax.yaxis)
    whole = bool((rows["threshold"] % 1 == 0).all())
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=whole))
    ax.set_xlabel("threshold\n" + textwrap.fill(style.label_of(criterion), 15), fontsize=7)
    ax.set_ylabel(OVER_THRESHOLD[y])


def exit_quality(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw perplexity, and agreement and KL with the last layer, per exit, in three panels.

    Columns: seed, exit, perplexity, agreement, kl.
    """
    panels = [
        partial(style.lines, table, "exit", y, None, EXIT, label, log=False)
        for y, label in QUALITY.items()
    ]
    drawn = style.compose(ax, PAGE, 2.3, panels)
    style.percent(drawn[list(QUALITY).index("agreement")].yaxis)
    return drawn


def recipes(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw every exit's perplexity over that of a model of its depth, a row per recipe.

    At the right stands what the gates of each save in layers.

    Columns: recipe, exit, difference (NaN: no recipe), gate_speedup_layers; means over seeds are drawn.
    """
    means = table.dropna(subset="difference").groupby(["recipe", "exit"], sort=False)
    means = means[["difference", "gate_speedup_layers"]].mean().reset_index()
    names = list(means["recipe"].unique())
    ax, own = style.new_axes(ax, PAGE, 1.5 + 0.16 * len(names))
    for k, (exit_layer, rows) in enumerate(means.groupby("exit")):
        look = style.look(k) | {"linestyle": "none", "label": f"exit {exit_layer}"}
        ax.plot(rows["difference"], rows["recipe"].map(names.index), **look)
    ax.axvline(0, **REFERENCE)
    small = {"va": "center", "fontsize": 7}
    for row, speedup in enumerate(means.drop_duplicates("recipe")["gate_speedup_layers"]):
        ax.text(1.02, row, f"{speedup:.2f}×", transform=ax.get_yaxis_transform(), **small)
    ax.set_title("gate, layers", loc="right", fontsize=7)
    ax.set_xscale("symlog", linthresh=0.05)
    ax.set_xticks([-0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5])
    ax.xaxis.set_minor_locator(NullLocator())
    style.percent(ax.xaxis)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="exit / model of its depth trained alone − 1\n(perplexity, fit part)")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    style.legend(ax, own, "upper center", means["exit"].nunique())
    return ax


@style.panel(COLUMN, 2.2)
def equal_cost(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw perplexity with exits over that of a smaller model of the same cost, with paired intervals.

    Columns: seed, depth, difference, low, high.
    """
    depths = sorted(table["depth"].unique())
    for k, (seed, rows) in enumerate(table.groupby("seed")):
        rows = rows.assign(x=rows["depth"].map(depths.index) + 0.12 * k)
        points = style.look(k) | {"linestyle": "none", "label": f"seed {seed}"}
        style.interval_line(ax, rows, "x", "difference", **points)
    ax.axhline(0, **REFERENCE)
    middle = np.arange(len(depths)) + 0.06 * (table["seed"].nunique() - 1)
    ax.set_xticks(middle, [style.layers_text(d) for d in depths])
    ax.set_xlabel("model trained alone,\nof equal FLOPs")
    ax.set_ylabel("exits / trained alone − 1\n(perplexity, 95 %\nover documents)")
    ax.margins(x=0.4)
    style.percent(ax.yaxis, 1)
    ax.grid(axis="x", visible=False)
