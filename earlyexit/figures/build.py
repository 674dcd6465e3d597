"""Figures of notebook 01 show costs, training, what depth and a longer past are worth, and the leak."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import BACKGROUND, COLUMN, PAGE, REFERENCE, SMALL, Panels

ALONE = "trained alone"  # the system whose depth varies
LABEL_GAP = 0.075  # least distance of two labels, as a share of an axis
NEAR_ZERO = 0.01  # nats; below it the scale of the memory curve is linear


def training_curves(history: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw training NLL against tokens, and each exit's perplexity after training, in two panels.

    Columns: seed, tokens, train_nll, perplexity_0 … (NaN between evaluations).
    """
    panels = [partial(draw, history) for draw in (training_nll, trained_exits)]
    return style.compose(ax, PAGE, 2.6, panels)


@style.panel(COLUMN, 2.6, loc=None)
def training_nll(history: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the first panel of :func:`training_curves`, one curve per seed."""
    for seed, rows in history.groupby("seed"):
        ax.plot(rows["tokens"] / 1e6, rows["train_nll"], label=f"seed {seed}")
    ax.set(xlabel="training tokens (millions)", ylabel="training NLL (nats per token)")


@style.panel(COLUMN, 2.6)
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


@style.panel(COLUMN, 2.5, title="tokens after them")
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


def depth_and_memory(depth: pd.DataFrame, memory: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw :func:`depth_curve` and :func:`memory_curve`, in two panels."""
    panels = [partial(depth_curve, depth), partial(memory_curve, memory)]
    return style.compose(ax, PAGE, 2.6, panels)


@style.panel(COLUMN, 2.6, loc=None)
def depth_curve(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw test perplexity against layers of models trained alone, and other systems as lines.

    A point is a seed; lines are means over the seeds.

    Args:
        table: columns system (``ALONE`` or another), layers, perplexity_test; a row per seed.
    """
    alone = table[table["system"] == ALONE]
    ax.plot(alone["layers"], alone["perplexity_test"], "o", color="C0", alpha=0.6, markersize=4)
    means = alone.groupby("layers")["perplexity_test"].mean()
    ax.plot(means, color="C0")
    for layers, mean in means.items():
        where = {"xytext": (0, -5), "textcoords": "offset points", "ha": "center", "va": "top"}
        ax.annotate(f"{mean:.1f}", (layers, mean), fontsize=SMALL, bbox=BACKGROUND, **where)
    others = table[table["system"] != ALONE].groupby("system", sort=False)
    levels = others["perplexity_test"].mean()
    for k, level in enumerate(levels, start=1):
        ax.axhline(level, **REFERENCE | {"color": f"C{k}", "linewidth": 1.0})
    ax.set(xlabel="layers of a model trained alone", ylabel="perplexity, test", yscale="log")
    ax.margins(x=0.08, y=0.12)
    style.integers(ax.xaxis)
    style.plain_log_ticks(ax.yaxis)
    _label_lines(ax, levels)


def _label_lines(ax: Axes, levels: pd.Series) -> None:
    """Write names and numbers at the right ends of horizontal lines, on a logarithmic axis.

    Labels are pushed up where they would overlap; each is joined with its line.
    """
    low, high = np.log(ax.get_ylim())
    ax.set_ylim(ax.get_ylim())
    at, place = (np.log(levels) - low) / (high - low), -np.inf
    for name in at.sort_values().index:
        place = max(at[name], place + LABEL_GAP)
        look = {"color": f"C{1 + levels.index.get_loc(name)}", "clip_on": False}
        inside = {"transform": ax.transAxes}
        ax.plot([1, 1.04], [at[name], place], linewidth=0.6, **look, **inside)
        text = f"{name} {levels[name]:.1f}"
        ax.text(1.05, place, text, va="center", fontsize=SMALL, **look, **inside)


@style.panel(COLUMN, 2.6, title="exit")
def memory_curve(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the rise of the NLL when all tokens more than c positions back are replaced.

    Mean over the seeds; the band is two standard errors wide on both sides.

    Args:
        table: columns exit_layer, context, rise_nats, standard_error, of one or several seeds.
    """
    _per_exit(ax, table, "context", "rise_nats")
    ax.axhline(0, **REFERENCE)
    ax.set_xscale("symlog", linthresh=1, linscale=0.5)
    ax.set_yscale("symlog", linthresh=NEAR_ZERO, linscale=0.5)
    ax.margins(x=0.04, y=0.04)
    style.plain_ticks(ax.xaxis, sorted(table["context"].unique()))
    style.plain_ticks(ax.yaxis, [-1, -0.1, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3])
    ax.set(xlabel="tokens kept before the last one", ylabel="rise of its NLL (nats)")


@style.panel(COLUMN, 2.4, title="exit")
def position_curve(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw NLL over the position in the window, with a band of two standard errors.

    Args:
        table: columns exit_layer, position, nll, standard_error, of one or several seeds.
    """
    _per_exit(ax, table, "position", "nll")
    ax.set_xscale("symlog", linthresh=1, linscale=0.5)
    style.plain_ticks(ax.xaxis, sorted(table["position"].unique()))
    ax.set(xlabel="position in the window, from", ylabel="NLL (nats per token)")


def _per_exit(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw a curve per exit: the mean over the seeds, and two of their mean standard errors."""
    for k, (exit_layer, rows) in enumerate(table.groupby("exit_layer")):
        means, look = rows.groupby(x)[[y, "standard_error"]].mean(), style.look(k)
        ax.plot(means[y], label=exit_layer, **look)
        low, high = (means[y] + sign * 2 * means["standard_error"] for sign in (-1, 1))
        ax.fill_between(means.index, low, high, color=look["color"], alpha=0.15, linewidth=0)


def ablation(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the validation perplexity of every change to the mixing layer, with numbers.

    A point is a seed, and a dash their mean; the dashed line is the first change, which is none.

    Args:
        table: columns change, perplexity_fit; a row per seed.
    """
    changes = table.groupby("change", sort=False)["perplexity_fit"]
    means, most = changes.mean(), changes.max()
    ax, _ = style.new_axes(ax, COLUMN, 0.8 + 0.16 * len(means))
    at = dict(zip(means.index, range(len(means)), strict=True))
    ax.axvline(means.iloc[0], **REFERENCE)
    ax.plot(table["perplexity_fit"], table["change"].map(at), "o", color="C0", alpha=0.6)
    ax.plot(means, range(len(means)), "|", color="C0", markersize=9)
    where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "bbox": BACKGROUND}
    for change, k in at.items():
        ax.annotate(f"{means[change]:.1f}", (most[change], k), fontsize=SMALL, **where)
    ax.set_yticks(list(at.values()), list(at))
    ax.set(xlabel="perplexity, validation (fit part)", ylim=(len(at) - 0.5, -0.5))
    ax.margins(x=0.15)
    ax.grid(axis="y", visible=False)
    return ax
