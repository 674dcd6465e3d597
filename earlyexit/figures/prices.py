"""Figures of notebook 04 about the model of time: how well it predicts, and where exits pay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.lines import Line2D

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, SMALL

SCALE = {"norm": TwoSlopeNorm(0, -1, 1), "cmap": "RdBu"}  # of log2: white is break-even


def predicted_measured(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Predicted against measured time of runs, with the identity and ±10 %.

    Args:
        table: columns measured_ms, predicted_ms, used ("fitted" or "checked"), criterion.
    """
    ax, own = style.new_axes(ax, COLUMN * 1.45, 2.7)
    ends = np.array([table["measured_ms"].min() * 0.7, table["measured_ms"].max() * 1.4])
    ax.fill_between(ends, 0.9 * ends, 1.1 * ends, color="0.9", zorder=0, label="±10 %")
    ax.plot(ends, ends, **REFERENCE)
    for k, (criterion, rows) in enumerate(table.groupby("criterion", sort=False)):
        for used, face in (("fitted", "none"), ("checked", f"C{k}")):
            part = rows[rows["used"] == used]
            options = style.look(k) | {"linestyle": "none", "markerfacecolor": face}
            label = f"{style.label_of(criterion)}, {used}"
            ax.plot(part["measured_ms"], part["predicted_ms"], label=label, **options)
    ax.set(xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted (ms)")
    ax.set(xlim=ends, ylim=ends)
    style.legend(ax, own)
    return ax


def break_even(
    grid: pd.DataFrame, points: pd.DataFrame, *, ax: Sequence[Axes] | None = None
) -> np.ndarray:
    """Predicted wall-clock speedup over head/block ratio and exit rate; where it is 1, exits lose.

    A row of panels per criterion, a column per number of layers and batch size. The scale of
    colours is drawn in a figure of its own only; otherwise ``figure.colorbar(ax.collections[0])``.

    Args:
        grid: columns criterion, n_layers, batch, head_ratio, executed (share of layers),
            speedup_time.
        points: measured: the same columns; circles where exits won, crosses where they lost.
    """
    sizes = sorted(set(zip(grid["n_layers"], grid["batch"], strict=True)))
    rows = [
        [partial(break_even_map, grid, points, name, *size) for size in sizes]
        for name in dict.fromkeys(grid["criterion"])
    ]
    key = {"loc": "upper center", "ncols": 3, "handles": _keys()}
    shared = {"sharex": True, "sharey": True, "one_label": "xy"}
    panels = style.compose(ax, PAGE, 1.75 * len(rows) + 0.4, rows, key=key, **shared)
    if ax is None:
        _speedup_scale(panels)
    return panels


def break_even_map(
    grid: pd.DataFrame,
    points: pd.DataFrame,
    criterion: str,
    n_layers: int,
    batch: int,
    *,
    ax: Axes | None = None,
) -> Axes:
    """One panel of :func:`break_even`: one criterion, number of layers and batch size."""
    ax, own = style.new_axes(ax, COLUMN * 1.2, 2.6)
    here = pd.Series({"criterion": criterion, "n_layers": n_layers, "batch": batch})
    grid, points = (t[(t[here.index] == here).all(axis=1)] for t in (grid, points))
    table = np.log2(grid.pivot(index="executed", columns="head_ratio", values="speedup_time"))
    where = table.columns, table.index
    ax.pcolormesh(*where, table, shading="gouraud", **SCALE)
    if table.min().min() < 0 < table.max().max():
        ax.contour(*where, table, levels=[0], colors="black", linewidths=1)
    won = points["speedup_time"] >= 1
    dot = {"s": 30, "edgecolor": "black", "linewidth": 0.6, "zorder": 3} | SCALE
    for dots, marker in ((points[won], "o"), (points[~won], "X")):
        color = np.log2(dots["speedup_time"])
        ax.scatter(dots["head_ratio"], dots["executed"], c=color, marker=marker, **dot)
    title = f"{style.label_of(criterion)}\n{n_layers} layers, batch {batch}"
    ax.set_title(title, fontsize=SMALL)
    ax.set(xscale="log", xlim=(table.columns.min(), table.columns.max()))
    ax.set(xlabel="FLOPs of the head / FLOPs of a block", ylabel="share of layers executed")
    ax.grid(visible=False)
    if own:
        _speedup_scale(ax)
    style.legend(ax, own, "lower center", ncols=2, handles=_keys())
    return ax


def _speedup_scale(axes: Axes | np.ndarray) -> None:
    """The scale of colours of a new figure, beside its axes."""
    figure = np.ravel(axes)[0].figure
    bar = figure.colorbar(ScalarMappable(**SCALE), ax=axes, ticks=[-1, 0, 1], extend="both")
    bar.ax.set_yticklabels(["½×", "1×", "2×"])
    bar.set_label("wall-clock speedup")


def _keys() -> list[Line2D]:
    point = {"color": "white", "markeredgecolor": "black", "linestyle": "none"}
    return [
        Line2D([], [], color="black", linewidth=1, label="break-even, predicted"),
        Line2D([], [], marker="o", label="measured, exits win", **point),
        Line2D([], [], marker="X", label="measured, exits lose", **point),
    ]
