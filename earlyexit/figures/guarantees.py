"""figures/guarantees."""

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


def target_achieved(table: pd.DataFrame) -> Figure:
    """Tolerated against achieved quality loss on the test split, with the diagonal.

    Args:
        table: columns policy ("fitted", "certified …"), epsilon, test_quality_loss.
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.35, 2.8))
    for k, (name, rows) in enumerate(table.groupby("policy", sort=False)):
        rows = rows.dropna(subset="test_quality_loss").sort_values("epsilon")
        ax.plot(rows["epsilon"], rows["test_quality_loss"], f"{MARKERS[k]}-", label=name)
    top = table["epsilon"].max() * 1.1
    ax.plot([0, top], [0, top], **REFERENCE)
    ax.text(top, top, "target", ha="right", va="bottom", fontsize=7, color="0.35")
    ax.set(xlabel="tolerated quality loss ε", ylabel="quality loss on the test split")
    _percent(ax.xaxis)
    _percent(ax.yaxis)
    fig.legend(loc="outside right upper")
    return fig


def violation_rates(table: pd.DataFrame, delta: float) -> Figure:
    """Violation rate over n with exact binomial intervals; δ marked.

    Args:
        table: columns units, procedure, n, rate, low, high.
    """
    groups = list(table.groupby("units", sort=False))
    fig, axes = plt.subplots(1, len(groups), figsize=(PAGE, 2.5), sharey=True, squeeze=False)
    for ax, (units, part) in zip(axes[0], groups, strict=True):
        for k, (name, rows) in enumerate(part.groupby("procedure", sort=False)):
            error = [rows["rate"] - rows["low"], rows["high"] - rows["rate"]]
            ax.errorbar(
                rows["n"], rows["rate"], yerr=error, fmt=f"{MARKERS[k]}-", capsize=2, label=name
            )
        ax.axhline(delta, **REFERENCE)
        ax.text(rows["n"].min(), delta, " δ", va="bottom", fontsize=8, color="0.35")
        ax.set(xscale="log", xlabel="units n", title=units)
        _plain_ticks(ax, sorted(part["n"].unique()))
    axes[0, 0].set_ylabel("violation rate")
    _percent(axes[0, 0].yaxis)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def bound_widths(table: pd.DataFrame, level: float, least: pd.DataFrame) -> Figure:
    """Upper bound of each method over n, with the loss itself and what ε allows.

    Args:
        table: columns method, n, mean, bound; least: columns n, level (no valid test can do better).
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.6, 2.7))
    for k, (name, rows) in enumerate(table.groupby("method", sort=False)):
        rows = rows.groupby("n")["bound"].mean()
        ax.plot(rows.index, rows, f"{MARKERS[k]}-", label=name)
    ax.plot(
        least["n"],
        least["level"],
        ":",
        color="0.35",
        label="least any valid test\ncould certify if no\nloss were negative",
    )
    ax.axhline(level, **REFERENCE)
    ax.text(
        table["n"].max(), level, "log(1 + ε)", ha="right", va="bottom", fontsize=7, color="0.35"
    )
    ax.axhline(table["mean"].mean(), color="0.35", linewidth=0.8, label="mean loss")
    ax.set(
        xscale="log", xlabel="units n", ylabel="upper bound on the mean loss (nats)", ylim=(0, None)
    )
    _plain_ticks(ax, sorted(table["n"].unique()))
    fig.legend(loc="outside right upper")
    return fig


def price_of_certainty(table: pd.DataFrame) -> Figure:
    """Speedup in layers of fitted and certified policies, per ε.

    Args:
        table: columns policy, epsilon, test_speedup_layers (NaN: refused).
    """
    fig, ax = plt.subplots(figsize=(PAGE * 0.75, 2.4))
    names, levels = list(dict.fromkeys(table["policy"])), sorted(table["epsilon"].unique())
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        rows = table[table["policy"] == name].groupby("epsilon")["test_speedup_layers"].mean()
        x = np.arange(len(levels)) + (k - (len(names) - 1) / 2) * width
        values = rows.reindex(levels).to_numpy()
        bars = ax.bar(x, np.nan_to_num(values), width, label=name)
        labels = ["refused" if np.isnan(v) else f"{v:.2f}" for v in values]
        ax.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
    ax.set_xticks(range(len(levels)), [f"{100 * v:g} %" for v in levels])
    ax.axhline(1, **REFERENCE)
    ax.set(xlabel="tolerated quality loss ε", ylabel="speedup (layers), test split")
    ax.margins(y=0.25)
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside right upper")
    return fig
