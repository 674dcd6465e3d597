"""Figures of notebook 04 show the time of each part, wall-clock speedups, and when exits pay."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, SMALL, Panels

SCALE = {"norm": TwoSlopeNorm(0, -1, 1), "cmap": "RdBu"}  # of log2(speedup): white is break-even
OVER_BATCH = {
    "tokens_per_second": "thousand tokens per second",
    "layers_run": "layers until the slowest has left",
}


@style.panel(COLUMN, 3.0, loc="upper right", ncols=3)
def part_times(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the time of every part, and of a check by each criterion, as a share of one block.

    Columns: part, group ("block", "check", "head", or "whole", not drawn), share_of_block.
    """
    parts = table[table["group"] != "whole"].groupby(["part", "group"], sort=False)
    median = parts["share_of_block"].median().reset_index()
    style.part_bars(ax, median, lambda v: f"{100 * v:.2g} %" if v < 0.1 else f"{100 * v:,.0f} %")
    ax.set(xlabel="time / time of one block")


@style.panel(PAGE, 2.8)
def speedups(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw wall-clock over layer speedup with intervals and the identity, a colour per execution.

    Columns: execution, speedup_layers, speedup_time, low, high.
    """
    for k, (name, rows) in enumerate(table.groupby("execution", sort=False)):
        curve = style.look(k) | {"label": name}
        style.interval_line(ax, rows, "speedup_layers", "speedup_time", **curve)
    ideal = np.linspace(1, table["speedup_layers"].max())
    ax.plot(ideal, ideal, **REFERENCE, label="as much as layers")
    ax.axhline(1, **REFERENCE | {"linestyle": ":"})
    ax.set(xlabel="theoretical speedup (layers)", yscale="log")
    ax.set_ylabel("wall-clock speedup\n(90 % interval)")
    style.plain_ticks(ax.yaxis, (0.1, 0.2, 0.5, 1, 2, 4, 8), "{:g}×")


@style.panel(COLUMN, 2.4, title="exit layer")
def layer_equivalents(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw share of tokens × layers executed per exit layer, stacked for each threshold.

    Columns: threshold, exit_layer, layer_equivalents; n_layers is "no early exit".
    """
    grid = table.pivot_table(index="threshold", columns="exit_layer", values="layer_equivalents")
    none = int(grid.columns.max())
    colors = [*colormaps["viridis"](np.linspace(0.15, 0.85, none)), "0.7"]
    grid = grid.rename(columns={none: "none"}, index="{:g}".format)
    style.stacked_bars(ax, grid.iloc[::-1], " {:.2f}", colors=colors)
    ax.set(xlabel="layer-equivalents per token", ylabel="threshold", xlim=(0, none * 1.12))


def run_parts(table: pd.DataFrame, apart: str, *, ax: Panels = None) -> np.ndarray:
    """Draw the time of each part of whole runs, and in a second panel that of the run ``apart``.

    A line marks the total that was measured without timing the parts.

    Args:
        table: columns run, part, milliseconds, total_ms.
        apart: the run that is drawn below, on its own scale.
    """
    below = table["run"] == apart
    panels = [partial(time_by_part, table[~below]), partial(time_by_part, table[below])]
    heights, key = [table["run"].nunique() - 1, 1.2], {"markerscale": 0.5}
    drawn = style.compose(ax, PAGE, 2.8, panels, 2, key=key, height_ratios=heights)
    drawn[1, 0].set_title("on a scale of its own", fontsize=SMALL, loc="left")
    return drawn


@style.panel(PAGE, 2.2, markerscale=0.5)
def time_by_part(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the time of each part of whole runs, stacked; see :func:`run_parts`."""
    runs, parts = (list(dict.fromkeys(table[column])) for column in ("run", "part"))
    grid = table.pivot_table(index="run", columns="part", values="milliseconds").loc[runs, parts]
    totals = table.groupby("run")["total_ms"].mean()[runs]
    style.stacked_bars(ax, grid, "  {:.0f} ms", totals=totals, height=0.6)
    ax.plot(totals, range(len(runs)), "|", color="black", markersize=14, label="measured total")
    ax.set(xlabel="milliseconds per batch, scored (median)")


def compaction(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw the speedups in layers, FLOPs and time, and the share achieved, in two panels.

    Columns: depth, speedup_layers, speedup_flops, speedup_time, low, high.
    """
    panels = [partial(draw, table) for draw in (compaction_speedups, compaction_efficiency)]
    return style.compose(ax, PAGE, 2.4, panels)


@style.panel(COLUMN, 2.4, loc=None)
def compaction_speedups(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the first panel of :func:`compaction`: the speedups in layers, FLOPs and time."""
    rows = table.sort_values("depth")
    ax.plot(rows["depth"], rows["speedup_layers"], "--", color="0.35", label="layers")
    ax.plot(rows["depth"], rows["speedup_flops"], label="FLOPs", **style.look(1))
    style.interval_line(ax, rows, "depth", "speedup_time", label="wall-clock", **style.look(0))
    ax.set(xlabel="mean layers executed", ylabel="speedup against full depth")
    ax.yaxis.set_major_formatter("{x:g}×")
    style.integers(ax.xaxis)


@style.panel(COLUMN, 2.4)
def compaction_efficiency(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the second panel of :func:`compaction`: wall-clock over FLOP speedup."""
    rows = table.sort_values("depth")
    ratio = rows["speedup_time"] / rows["speedup_flops"]
    bars = ax.bar([f"{d:g}" for d in rows["depth"]], ratio, width=0.6)
    texts = [f"{100 * v:.0f} %" for v in ratio]
    ax.bar_label(bars, texts, fontsize=SMALL, label_type="center", color="white")
    ax.axhline(1, **REFERENCE)
    ax.set(xlabel="mean layers executed", ylabel="wall-clock / FLOP speedup")
    ax.set_ylim(0, max(1.15, 1.1 * ratio.max()))
    style.percent(ax.yaxis)
    ax.grid(axis="x", visible=False)


def throughput(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw tokens per second, and layers until all tokens have left, over the batch size.

    Columns: batch, execution, grouping, tokens_per_second, layers_run.
    """
    panels = [partial(over_batch_sizes, table, y) for y in OVER_BATCH]
    return style.compose(ax, PAGE, 2.7, panels, key={})


@style.panel(COLUMN, 2.5)
def over_batch_sizes(table: pd.DataFrame, y: str, *, ax: Axes) -> None:
    """Draw a panel of :func:`throughput`; ``y`` is "tokens_per_second" or "layers_run" (dense)."""
    if y == "layers_run":
        table = table[table["execution"] == "dense"]
    colors = {"compacted": "C0", "dense": "C1", "full depth": "0.35"}
    dashes = {"random": "-", "first exit": "--", "hindsight": ":", "": "-"}
    for (execution, grouping), rows in table.groupby(["execution", "grouping"], sort=False):
        options = {"color": colors[execution], "linestyle": dashes[grouping], "marker": "o"}
        label = f"{execution}, {grouping}" if grouping else execution
        ax.plot(rows["batch"], rows[y], label=label, **options)
    ax.set(xscale="log", xlabel="batch size (windows)", ylabel=OVER_BATCH[y], ylim=(0, None))
    style.plain_ticks(ax.xaxis, sorted(table["batch"].unique()))
    if y == "tokens_per_second":
        ax.yaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}")


def propagation(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw the propagation error's cost in perplexity by layers executed and position, in two panels.

    Columns: by, value, cost; see
    :func:`earlyexit.evaluation.propagation_error.propagation_cost`.
    """
    panels = [partial(propagation_by, table, by) for by in ("layers executed", "position")]
    return style.compose(ax, PAGE, 2.4, panels, key={}, sharey=True)


@style.panel(COLUMN, 2.2)
def propagation_by(table: pd.DataFrame, by: str, *, ax: Axes) -> None:
    """Draw a panel of :func:`propagation`; ``by`` is "layers executed" or "position"."""
    rows = table[table["by"] == by]
    style.mean_line(ax, rows, "value", "cost", marker="o")
    ax.axhline(0, **REFERENCE)
    overall = table[table["by"] == "all"]["cost"].mean()
    ax.axhline(overall, color="C1", linewidth=0.9, label="all tokens")
    ax.set(xlabel="position in the window", ylabel="perplexity, real / traced − 1")
    if by == "layers executed":
        ax.set(xlabel=by, xticks=sorted(rows["value"].unique()))
    style.percent(ax.yaxis)


@style.panel(COLUMN, 2.3)
def left_behind(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw loss over wall-clock speedup with intervals, a curve per thing that exited tokens hand on.

    The table is that of :func:`earlyexit.evaluation.left_behind.compare_ways`; a curve's points are its
    policies.
    """
    for k, (way, rows) in enumerate(table.dropna(subset="stay").groupby("way", sort=False)):
        rows = rows.sort_values("speedup_time")
        xerr = style.whiskers(rows["speedup_time"], rows["low"], rows["high"])
        label = f"{way} (in use)" if rows["in_use"].any() else way
        points = style.look(k) | {"capsize": 2, "label": label}
        ax.errorbar(rows["speedup_time"], rows["quality_loss"], xerr=xerr, **points)
    ax.axhline(0, **REFERENCE)
    ax.axvline(1, **REFERENCE)
    ax.set(xlabel="wall-clock speedup (90 % interval)", ylabel="quality loss, validation")
    ax.xaxis.set_major_formatter("{x:g}×")
    style.percent(ax.yaxis)


def output_heads(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw milliseconds per batch of each output head, scoring and predicting, in two panels.

    Columns: head, scoring_ms, scoring_exits_ms, prediction_ms, prediction_exits_ms.
    """
    panels = [partial(output_head_times, table, task) for task in ("scoring", "prediction")]
    return style.compose(ax, PAGE, 2.3, panels, key={}, sharey=True)


@style.panel(COLUMN, 2.3)
def output_head_times(table: pd.DataFrame, task: str, *, ax: Axes) -> None:
    """Draw a panel of :func:`output_heads`; ``task`` is "scoring" or "prediction"."""
    columns = {f"{task}_ms": "full depth", f"{task}_exits_ms": "with exits"}
    means = table.groupby("head", sort=False)[list(columns)].mean().rename(columns=columns)
    style.grouped_bars(ax, means, "{:.0f}")
    title = {"scoring": "scoring", "prediction": "greedy prediction"}[task]
    ax.set(title=title, ylabel="milliseconds per batch")
    ax.margins(y=0.12)


@style.panel(PAGE, 2.7)
def predicted_measured(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw predicted over measured time of runs, with the identity and ±10 %.

    Columns: measured_ms, predicted_ms, used ("fitted" or "checked"), criterion.
    """
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


def break_even(grid: pd.DataFrame, points: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw predicted wall-clock speedups over the head/block ratio and the share of layers executed.

    A line marks break-even: speedup 1. There is a row of panels per criterion, and a column per number
    of layers and batch size. Only a new figure gets a scale of colours; for given axes call
    ``figure.colorbar(ax.collections[0])``.

    Args:
        grid: columns criterion, n_layers, batch, head_ratio, executed (share of layers),
            speedup_time.
        points: measured, the same columns: circles where exits are faster, else crosses.
    """
    sizes = sorted(set(zip(grid["n_layers"], grid["batch"], strict=True)))
    names = grid["criterion"].unique()
    panels = [partial(break_even_map, grid, points, n, *size) for n in names for size in sizes]
    key = {"loc": "upper center", "ncols": 3}
    shared = {"sharex": True, "sharey": True, "one_label": "xy"}
    drawn = style.compose(ax, PAGE, 1.75 * len(names) + 0.4, panels, len(names), key=key, **shared)
    if ax is None:
        _speedup_scale(drawn)
    return drawn


def break_even_map(
    grid: pd.DataFrame,
    points: pd.DataFrame,
    criterion: str,
    n_layers: int,
    batch: int,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw the panel of :func:`break_even` of a criterion, number of layers and batch size."""
    ax, own = style.new_axes(ax, COLUMN, 2.8)
    here = pd.Series({"criterion": criterion, "n_layers": n_layers, "batch": batch})
    grid, points = (t[(t[here.index] == here).all(axis=1)] for t in (grid, points))
    table = np.log2(grid.pivot(index="executed", columns="head_ratio", values="speedup_time"))
    where = table.columns, table.index
    ax.pcolormesh(*where, table, shading="gouraud", **SCALE)
    if table.min().min() < 0 < table.max().max():
        ax.contour(*where, table, levels=[0], colors="black", linewidths=1)
    ax.plot([], [], color="black", linewidth=1, label="break-even, predicted")
    won = points["speedup_time"] >= 1
    dot = {"s": 30, "edgecolor": "black", "linewidth": 0.6, "zorder": 3} | SCALE
    for dots, marker, end in ((points[won], "o", "win"), (points[~won], "X", "lose")):
        color = np.log2(dots["speedup_time"])
        key = {"color": "white", "markeredgecolor": "black", "label": f"measured, exits {end}"}
        ax.plot([], [], marker, **key)
        ax.scatter(dots["head_ratio"], dots["executed"], c=color, marker=marker, **dot)
    title = f"{style.label_of(criterion)}\n{n_layers} layers, batch {batch}"
    ax.set_title(title, fontsize=SMALL)
    ax.set(xscale="log", xlim=(table.columns.min(), table.columns.max()))
    ax.set(xlabel="FLOPs of the head / FLOPs of a block", ylabel="share of layers executed")
    ax.grid(visible=False)
    if own:
        _speedup_scale(ax)
    style.legend(ax, own, "lower center")
    return ax


def _speedup_scale(axes: Axes | np.ndarray) -> None:
    """Draw the scale of colours beside the axes of a new figure."""
    figure = np.ravel(axes)[0].figure
    bar = figure.colorbar(ScalarMappable(**SCALE), ax=axes, ticks=[-1, 0, 1], extend="both")
    bar.ax.set_yticklabels(["½×", "1×", "2×"])
    bar.set_label("wall-clock speedup")
