"""figures/sweep."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from earlyexit.figures.style import FEW
from earlyexit.figures.style import MARKERS
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from earlyexit.figures.style import _percent
from earlyexit.figures.style import label_of
from earlyexit.figures.style import setting_of
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import textwrap


def pareto(
    curves: pd.DataFrame,
    x: str,
    x_label: str,
    limit: float = 0.3,
    points: pd.DataFrame | None = None,
) -> Figure:
    """Quality loss against a speedup, one curve per criterion, static exits and oracles beside.

    Args:
        curves: columns seed, criterion, quality_loss, ``x`` and settings (threshold, exit_layer, price); static exits, and criteria of
            few thresholds, are drawn as points, oracles dashed. Several seeds are drawn as their mean
            and range.
        limit: largest quality loss shown.
        points: extra labelled points: columns label, quality_loss, ``x``.
    """
    fig, ax = plt.subplots(figsize=(PAGE * 0.62, 3.0))
    for k, (criterion, rows) in enumerate(curves.groupby("criterion", sort=False)):
        style = {"color": f"C{k}", "label": label_of(criterion)}
        if rows.groupby("seed").size().max() <= FEW:
            settings = rows.groupby(setting_of(rows))
            mean = settings[[x, "quality_loss"]].mean()
            shown = mean["quality_loss"] <= limit
            style |= {"fmt": MARKERS[k % len(MARKERS)], "markersize": 4}
            if criterion == "static":
                style |= {"color": "black", "fmt": "s"}
            loss = mean["quality_loss"][shown]
            ends = settings["quality_loss"].agg(["min", "max"])[shown]
            spread = [loss - ends["min"], ends["max"] - loss]
            ax.errorbar(mean[x][shown], loss, yerr=spread, **style)
            continue
        if criterion.startswith("oracle"):
            style |= {"color": "0.35" if "nll" in criterion else "0.6", "linestyle": "--"}
        if criterion.endswith(", before"):  # what comes after lies on it
            style |= {"linewidth": 3, "alpha": 0.4}
        speedup, mean, low, high = _over_seeds(rows, x, limit)
        ax.plot(speedup, mean, **style)
        ax.fill_between(speedup, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if points is not None:
        ax.plot(
            points[x],
            points["quality_loss"],
            "X",
            color="C1",
            markersize=6,
            label="original, claimed",
        )
    ax.axhline(0, **REFERENCE)
    top = min(limit, curves["quality_loss"].max()) * 1.05
    ax.set_ylim(
        max(-0.6 * top, ax.get_ylim()[0]), top
    )  # hindsight about the target falls far below
    ax.set(xlabel=x_label, ylabel="quality loss (perplexity / full depth − 1)")
    _percent(ax.yaxis)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return fig


def _over_seeds(rows: pd.DataFrame, x: str, limit: float) -> tuple[np.ndarray, ...]:
    """A common grid of ``x``, and the quality loss there: mean, least, largest over the seeds."""
    grid, losses = np.linspace(rows[x].min(), rows[x].max(), 400), []
    for _, one in rows.groupby("seed"):
        one = one.sort_values(x)
        losses.append(np.interp(grid, one[x], one["quality_loss"], left=np.nan, right=np.nan))
    losses = np.stack(losses)
    shown = np.isfinite(losses).all(axis=0) & (losses.mean(axis=0) <= limit)
    losses = losses[:, shown]
    return grid[shown], losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)


def exit_distributions(table: pd.DataFrame, criterion: str) -> Figure:
    """Bars: share of tokens per exit layer, one panel per threshold, the average marked.

    Args:
        table: columns threshold, exit_layer, share (n_layers: no early exit), average.
    """
    thresholds = sorted(table["threshold"].unique())
    fig, axes = plt.subplots(1, len(thresholds), figsize=(PAGE, 2.1), sharey=True, squeeze=False)
    none = int(table["exit_layer"].max())
    for ax, threshold in zip(axes[0], thresholds, strict=True):
        rows = table[table["threshold"] == threshold].groupby("exit_layer").mean(numeric_only=True)
        ax.bar(rows.index, rows["share"], color=["C0"] * none + ["0.6"])
        average = rows["average"].iloc[0]
        ax.axvline(average, color="C1", linewidth=1)
        ax.set_title(f"threshold {threshold:g}\naverage {average:.2f}")
        ax.set_xticks(range(none + 1), [*map(str, range(none)), "none"])
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("share of tokens")
    _percent(axes[0, 0].yaxis)
    fig.supxlabel(f"exit layer ({label_of(criterion)})", fontsize=8)
    return fig


def threshold_sweep(sweeps: pd.DataFrame) -> Figure:
    """Quality loss and mean layers executed against the threshold, one column per criterion.

    Args:
        sweeps: columns seed, criterion, threshold, quality_loss, layers.
    """
    names = list(dict.fromkeys(sweeps["criterion"]))
    fig, axes = plt.subplots(
        2, len(names), figsize=(PAGE, 3.2), sharex="col", sharey="row", squeeze=False
    )
    for column, (name, rows) in zip(axes.T, sweeps.groupby("criterion", sort=False), strict=True):
        rows = rows[np.isfinite(rows["threshold"])].sort_values("threshold")
        for _, one in rows.groupby("seed"):
            column[0].plot(one["threshold"], one["layers"], color="C0")
            column[1].plot(one["threshold"], one["quality_loss"], color="C1")
        column[1].axhline(0, **REFERENCE)
        column[1].set_xlabel("threshold\n" + textwrap.fill(label_of(name), 14), fontsize=7)
        column[1].xaxis.set_major_locator(MaxNLocator(3))
    axes[0, 0].set_ylabel("mean layers\nexecuted")
    axes[1, 0].set_ylabel("quality loss")
    _percent(axes[1, 0].yaxis)
    return fig


def exit_quality(table: pd.DataFrame) -> Figure:
    """Perplexity, agreement and KL with the last layer, per exit.

    Args:
        table: columns seed, exit, perplexity, agreement, kl.
    """
    fig, axes = plt.subplots(1, 3, figsize=(PAGE, 2.1))
    labels = {
        "perplexity": "perplexity",
        "agreement": "agreement with last layer",
        "kl": "KL to last layer (nats)",
    }
    for ax, (column, text) in zip(axes, labels.items(), strict=True):
        groups = table.groupby("exit")[column]
        mean = groups.mean()
        ax.plot(mean.index, mean, "o-")
        ax.fill_between(mean.index, groups.min(), groups.max(), alpha=0.2)
        ax.set(xlabel="exit (layer index)", ylabel=text)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes[1].yaxis)
    return fig


def recipes(table: pd.DataFrame) -> Figure:
    """Perplexity per exit of models trained in different ways.

    Args:
        table: columns recipe, exit, perplexity.
    """
    fig, ax = plt.subplots(figsize=(PAGE * 0.75, 2.6))
    last = int(table["exit"].max())
    for k, (name, rows) in enumerate(table.groupby("recipe", sort=False)):
        mean = rows.groupby("exit")["perplexity"].mean()
        ax.plot(mean.index, mean, f"{MARKERS[k % len(MARKERS)]}-", label=name)
    ax.set(xlabel="exit (layer index)", ylabel="perplexity, test split", xticks=range(last + 1))
    fig.legend(loc="outside right upper")
    return fig


def equal_cost(table: pd.DataFrame) -> Figure:
    """Perplexity of an adaptive against a shallow model of the same cost, with paired intervals.

    Args:
        table: columns seed, depth, difference, low, high.
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.2, 2.2))
    depths = sorted(table["depth"].unique())
    for k, (seed, rows) in enumerate(table.groupby("seed")):
        x = np.array([depths.index(d) for d in rows["depth"]]) + 0.12 * k
        error = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
        ax.errorbar(
            x, rows["difference"], yerr=error, fmt=MARKERS[k % 8], capsize=2, label=f"seed {seed}"
        )
    ax.axhline(0, **REFERENCE)
    names = [f"{d} layer" if d == 1 else f"{d} layers" for d in depths]
    ax.set_xticks(np.arange(len(depths)) + 0.06 * (table["seed"].nunique() - 1), names)
    ax.set(
        xlabel="shallow model of equal FLOPs",
        ylabel="adaptive / shallow − 1\n(perplexity, 95 %\nover documents)",
    )
    ax.margins(x=0.4)
    _percent(ax.yaxis, 1)
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside right upper")
    return fig
