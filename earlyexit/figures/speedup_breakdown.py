"""Figures of notebook 04: where the time goes, and what is left of the layers saved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, SMALL


def part_times(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Time of every part, and of a check by each criterion, as a share of one block.

    Args:
        table: columns part, group ("block", "check", "head", or "whole", not drawn), share_of_block.
    """
    ax, own = style.new_axes(ax, COLUMN * 1.25, 3.0)
    parts = table[table["group"] != "whole"].groupby(["part", "group"], sort=False)
    median = parts["share_of_block"].median().reset_index()
    style.part_bars(ax, median, lambda v: f"{100 * v:.2g} %" if v < 0.1 else f"{100 * v:,.0f} %")
    ax.set(xlabel="time / time of one block")
    style.legend(ax, own, "upper right", ncols=3)
    return ax


def speedups(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Wall-clock against layers with intervals, identity as the ideal, one colour per execution.

    Args:
        table: columns execution, speedup_layers, speedup_time, low, high.
    """
    ax, own = style.new_axes(ax, PAGE * 0.75, 2.8)
    for k, (name, rows) in enumerate(table.groupby("execution", sort=False)):
        curve = style.look(k) | {"label": name}
        style.interval_line(ax, rows, "speedup_layers", "speedup_time", **curve)
    ideal = np.linspace(1, table["speedup_layers"].max())
    ax.plot(ideal, ideal, **REFERENCE, label="as much as layers")
    ax.axhline(1, **REFERENCE | {"linestyle": ":"})
    ax.set(xlabel="theoretical speedup (layers)", yscale="log")
    ax.set_ylabel("wall-clock speedup\n(90 % interval)")
    style.plain_ticks(ax.yaxis, (0.1, 0.2, 0.5, 1, 2, 4, 8), "{:g}×")
    style.legend(ax, own)
    return ax


def layer_equivalents(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Where the layers go: share of tokens × layers executed, stacked per threshold.

    Args:
        table: columns threshold, exit_layer, layer_equivalents; n_layers is "no early exit".
    """
    ax, own = style.new_axes(ax, COLUMN, 2.4)
    grid = table.pivot_table(index="threshold", columns="exit_layer", values="layer_equivalents")
    none = int(grid.columns.max())
    colors = [*colormaps["viridis"](np.linspace(0.15, 0.85, none)), "0.7"]
    grid = grid.rename(columns={none: "none"}, index="{:g}".format)
    style.stacked_bars(ax, grid.iloc[::-1], " {:.2f}", colors=colors)
    ax.set(xlabel="layer-equivalents per token", ylabel="threshold", xlim=(0, none * 1.12))
    style.legend(ax, own, title="exit layer")
    return ax


def run_parts(table: pd.DataFrame, apart: str, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Where the time of whole runs goes, a panel for most and one below for the run ``apart``.

    A line marks the total measured with no clock running.

    Args:
        table: columns run, part, milliseconds, total_ms.
        apart: the run that is drawn below, on a scale of its own.
    """
    below = table["run"] == apart
    rows = [[partial(time_by_part, table[~below])], [partial(time_by_part, table[below])]]
    heights, key = [table["run"].nunique() - 1, 1.2], {"markerscale": 0.5}
    panels = style.compose(ax, PAGE * 0.8, 2.8, rows, key=key, height_ratios=heights)
    panels[1, 0].set_title("on a scale of its own", fontsize=SMALL, loc="left")
    return panels


def time_by_part(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Where the time of whole runs goes, stacked; the table is that of :func:`run_parts`."""
    runs, parts = (list(dict.fromkeys(table[column])) for column in ("run", "part"))
    ax, own = style.new_axes(ax, PAGE * 0.8, 0.7 + 0.5 * len(runs))
    grid = table.pivot_table(index="run", columns="part", values="milliseconds").loc[runs, parts]
    totals = table.groupby("run")["total_ms"].mean()[runs]
    style.stacked_bars(ax, grid, "  {:.0f} ms", totals=totals, height=0.6)
    ax.plot(totals, range(len(runs)), "|", color="black", markersize=14, label="measured total")
    ax.set(xlabel="milliseconds per batch, scored (median)")
    style.legend(ax, own, markerscale=0.5)
    return ax


def compaction(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """What layers and FLOPs allow, what the clock shows, and how much of it: two panels.

    Args:
        table: columns depth, speedup_layers, speedup_flops, speedup_time, low, high.
    """
    row = [partial(compaction_speedups, table), partial(compaction_efficiency, table)]
    return style.compose(ax, PAGE, 2.4, [row])


def compaction_speedups(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The first panel of :func:`compaction`: speedup by layers, by FLOPs and by the clock."""
    ax, _ = style.new_axes(ax, COLUMN, 2.4)
    rows = table.sort_values("depth")
    ax.plot(rows["depth"], rows["speedup_layers"], "--", color="0.35", label="layers")
    ax.plot(rows["depth"], rows["speedup_flops"], label="FLOPs", **style.look(1))
    style.interval_line(ax, rows, "depth", "speedup_time", label="wall-clock", **style.look(0))
    ax.set(xlabel="mean layers executed", ylabel="speedup against full depth")
    ax.yaxis.set_major_formatter("{x:g}×")
    style.integers(ax.xaxis)
    ax.legend()
    return ax


def compaction_efficiency(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The second panel of :func:`compaction`: the share of the FLOPs' speedup that the clock shows."""
    ax, _ = style.new_axes(ax, COLUMN, 2.4)
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
    return ax


def throughput(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Tokens per second, and layers until the slowest token has left, over the batch size.

    Args:
        table: columns batch, execution, grouping, tokens_per_second, layers_run.
    """
    row = [partial(tokens_per_second, table), partial(layers_run, table)]
    return style.compose(ax, PAGE, 2.5, [row], key={})


def tokens_per_second(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The first panel of :func:`throughput`: one line per execution and grouping."""
    ax, own = style.new_axes(ax, COLUMN * 1.5, 2.5)
    _over_batch_sizes(ax, table, table["tokens_per_second"] / 1e3)
    ax.set(ylabel="thousand tokens per second")
    style.legend(ax, own)
    return ax


def layers_run(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The second panel of :func:`throughput`: dense execution, one line per grouping."""
    ax, own = style.new_axes(ax, COLUMN * 1.5, 2.5)
    dense = table[table["execution"] == "dense"]
    _over_batch_sizes(ax, dense, dense["layers_run"])
    ax.set(ylabel="layers until the slowest has left")
    style.legend(ax, own)
    return ax


def _over_batch_sizes(ax: Axes, table: pd.DataFrame, values: pd.Series) -> None:
    """One line per execution (colour) and grouping (dashes)."""
    colors = {"compacted": "C0", "dense": "C1", "full depth": "0.35"}
    dashes = {"random": "-", "first exit": "--", "hindsight": ":", "": "-"}
    for (execution, grouping), rows in table.groupby(["execution", "grouping"], sort=False):
        options = {"color": colors[execution], "linestyle": dashes[grouping], "marker": "o"}
        label = f"{execution}, {grouping}" if grouping else execution
        ax.plot(rows["batch"], values[rows.index], label=label, **options)
    ax.set(xscale="log", xlabel="batch size (windows)", ylim=(0, None))
    style.plain_ticks(ax.xaxis, sorted(table["batch"].unique()))


def propagation(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """What states left behind cost in perplexity, by layers executed and by position: two panels.

    Args:
        table: columns by, value, cost; see
            :func:`earlyexit.evaluation.propagation_error.propagation_cost`.
    """
    row = [partial(propagation_by, table, by) for by in ("layers executed", "position")]
    return style.compose(ax, PAGE * 0.85, 2.2, [row], key={}, sharey=True)


def propagation_by(table: pd.DataFrame, by: str, *, ax: Axes | None = None) -> Axes:
    """One panel of :func:`propagation`: ``by`` is "layers executed" or "position"."""
    ax, own = style.new_axes(ax, COLUMN * 1.3, 2.2)
    rows = table[table["by"] == by]
    style.mean_line(ax, rows, "value", "cost", marker="o")
    ax.axhline(0, **REFERENCE)
    overall = table[table["by"] == "all"]["cost"].mean()
    ax.axhline(overall, color="C1", linewidth=0.9, label="all tokens")
    ax.set(xlabel="position in the window", ylabel="perplexity, real / traced − 1")
    if by == "layers executed":
        ax.set(xlabel=by, xticks=sorted(rows["value"].unique()))
    style.percent(ax.yaxis)
    style.legend(ax, own)
    return ax


def output_heads(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Milliseconds per batch of each output head, scoring and predicting: two panels.

    Args:
        table: columns head, scoring_ms, scoring_exits_ms, prediction_ms, prediction_exits_ms.
    """
    row = [partial(output_head_times, table, task) for task in ("scoring", "prediction")]
    return style.compose(ax, PAGE * 0.8, 2.3, [row], key={}, sharey=True)


def output_head_times(table: pd.DataFrame, task: str, *, ax: Axes | None = None) -> Axes:
    """One panel of :func:`output_heads`: ``task`` is "scoring" or "prediction"."""
    ax, own = style.new_axes(ax, COLUMN * 1.2, 2.3)
    columns = {f"{task}_ms": "full depth", f"{task}_exits_ms": "with exits"}
    means = table.groupby("head", sort=False)[list(columns)].mean().rename(columns=columns)
    style.grouped_bars(ax, means, "{:.0f}")
    title = {"scoring": "scoring", "prediction": "greedy prediction"}[task]
    ax.set(title=title, ylabel="milliseconds per batch")
    ax.margins(y=0.12)
    style.legend(ax, own)
    return ax
