"""figures/speedup."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from earlyexit.figures.style import MARKERS
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from earlyexit.figures.style import _percent
from earlyexit.figures.style import _plain_ticks
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


def part_times(table: pd.DataFrame) -> Figure:
    """Time of every part, and of a check by each criterion, as a share of one block.

    Args:
        table: columns part, group ("block", "check", "head"), share_of_block.
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.25, 3.0))
    parts = table[table["group"] != "whole"]
    rows = parts.groupby(["part", "group"], sort=False)["share_of_block"].median().reset_index()
    rows = rows.iloc[::-1]
    colors = rows["group"].map({"block": "C0", "head": "C1", "check": "C2"})
    bars = ax.barh(rows["part"], rows["share_of_block"], color=colors)
    texts = [f"{100 * v:.2g} %" if v < 0.1 else f"{100 * v:,.0f} %" for v in rows["share_of_block"]]
    back = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    ax.bar_label(bars, texts, fontsize=7, padding=3, bbox=back)
    ax.axvline(1, **REFERENCE)
    ax.set(xscale="log", xlabel="time / time of one block")
    ax.margins(x=0.25)
    ax.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("C0", "C2", "C1")]
    fig.legend(
        handles, ["of a block", "an exit check", "a head"], loc="outside upper right", ncols=3
    )
    return fig


def speedups(table: pd.DataFrame) -> Figure:
    """Wall-clock against layers with intervals, identity as the ideal, one colour per execution.

    Args:
        table: columns execution, speedup_layers, speedup_time, low, high.
    """
    fig, ax = plt.subplots(figsize=(PAGE * 0.75, 2.8))
    for k, (name, rows) in enumerate(table.groupby("execution", sort=False)):
        rows = rows.sort_values("speedup_layers")
        error = [
            rows["speedup_time"] - rows["low"], rows["high"] - rows["speedup_time"]
        ]  # fmt: skip
        ax.errorbar(
            rows["speedup_layers"], rows["speedup_time"], yerr=np.clip(error, 0, None),
            fmt=f"{MARKERS[k]}-", capsize=2, label=name,
        )  # fmt: skip
    ideal = np.linspace(1, table["speedup_layers"].max())
    ax.plot(ideal, ideal, **REFERENCE, label="as much as layers")
    ax.axhline(1, **(REFERENCE | {"linestyle": ":"}))
    ax.set(
        xlabel="theoretical speedup (layers)", ylabel="wall-clock speedup\n(90 % interval)",
        yscale="log",
    )  # fmt: skip
    ticks = [0.1, 0.2, 0.5, 1, 2, 4]
    low, top = ax.get_ylim()
    ax.set_yticks([t for t in ticks if low <= t <= top], minor=False)
    ax.set_yticks([], minor=True)
    ax.yaxis.set_major_formatter("{x:g}×")
    fig.legend(loc="outside right upper")
    return fig


def layer_equivalents(table: pd.DataFrame) -> Figure:
    """Where the layers go: share of tokens × layers executed, stacked per threshold.

    Args:
        table: columns threshold, exit_layer, layer_equivalents; n_layers is "no early exit".
    """
    fig, ax = plt.subplots(figsize=(COLUMN, 2.4))
    grid = table.pivot_table(index="threshold", columns="exit_layer", values="layer_equivalents")
    none, left = int(grid.columns.max()), np.zeros(len(grid))
    names = [f"{t:g}" for t in grid.index]
    colors = [*plt.get_cmap("viridis")(np.linspace(0.15, 0.85, none)).tolist(), "0.7"]
    for layer, color in zip(grid.columns, colors, strict=True):
        label = "none" if layer == none else str(layer)
        ax.barh(names, grid[layer], left=left, color=color, label=label)
        left = left + grid[layer].fillna(0).to_numpy()
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f}", va="center", fontsize=7)
    ax.set(xlabel="layer-equivalents per token", ylabel="threshold", xlim=(0, none * 1.12))
    ax.grid(axis="y", visible=False)
    fig.legend(title="exit layer", loc="outside right upper")
    return fig


def run_parts(table: pd.DataFrame, apart: str) -> Figure:
    """Where the time of whole runs goes, stacked; a line marks the total measured with no clock running.

    Args:
        table: columns run, part, milliseconds, total_ms.
        apart: the run that is drawn below, on a scale of its own.
    """
    parts = list(dict.fromkeys(table["part"]))
    ours = [name for name in dict.fromkeys(table["run"]) if name != apart]
    grid = table.pivot_table(index="run", columns="part", values="milliseconds")[parts]
    totals = table.groupby("run")["total_ms"].mean()
    fig, axes = plt.subplots(2, 1, figsize=(PAGE * 0.8, 2.8), height_ratios=[len(ours), 1.2])
    for ax, runs in zip(axes, (ours, [apart]), strict=True):
        left = np.zeros(len(runs))
        for k, part in enumerate(parts):
            width = grid.loc[runs, part].to_numpy()
            ax.barh(runs, width, left=left, color=f"C{k}", label=part, height=0.6)
            left = left + width
        ax.plot(totals[runs], runs, "|", color="black", markersize=14, label="measured total")
        for y, (total, end) in enumerate(zip(totals[runs], left, strict=True)):
            ax.text(max(total, end), y, f"  {total:.0f} ms", va="center", fontsize=7)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * max(left.max(), totals[runs].max()))
        ax.grid(axis="y", visible=False)
    axes[1].set_ylim(0.6, -0.6)
    axes[1].set_title("on a scale of its own", fontsize=7, loc="left")
    axes[1].set_xlabel("milliseconds per batch, scored (median)")
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside right upper", markerscale=0.5)
    return fig


def compaction(table: pd.DataFrame) -> Figure:
    """Three speedups over the mean depth: what layers and FLOPs allow, and what the clock shows.

    Args:
        table: columns depth, speedup_layers, speedup_flops, speedup_time, low, high.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.4))
    rows = table.sort_values("depth")
    left.plot(rows["depth"], rows["speedup_layers"], "--", color="0.35", label="layers")
    left.plot(rows["depth"], rows["speedup_flops"], "s-", color="C1", label="FLOPs")
    error = [rows["speedup_time"] - rows["low"], rows["high"] - rows["speedup_time"]]
    left.errorbar(
        rows["depth"], rows["speedup_time"], yerr=np.clip(error, 0, None), fmt="o-", capsize=2,
        color="C0", label="wall-clock",
    )  # fmt: skip
    left.set(xlabel="mean layers executed", ylabel="speedup against full depth")
    left.yaxis.set_major_formatter("{x:g}×")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    ratio = rows["speedup_time"] / rows["speedup_flops"]
    bars = right.bar([f"{d:g}" for d in rows["depth"]], ratio, color="C0", width=0.6)
    texts = [f"{100 * v:.0f} %" for v in ratio]
    right.bar_label(bars, texts, fontsize=7, label_type="center", color="white")
    right.axhline(1, **REFERENCE)
    right.set(xlabel="mean layers executed", ylabel="wall-clock / FLOP speedup")
    right.set_ylim(0, max(1.15, 1.1 * ratio.max()))
    _percent(right.yaxis)
    right.grid(axis="x", visible=False)
    return fig


def throughput(table: pd.DataFrame) -> Figure:
    """Tokens per second over the batch size, one line per execution and grouping.

    Args:
        table: columns batch, execution, grouping, tokens_per_second, layers_run.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.5))
    styles = {"random": "-", "first exit": "--", "hindsight": ":", "": "-"}
    colors = {"compacted": "C0", "dense": "C1", "full depth": "0.35"}
    for (execution, grouping), rows in table.groupby(["execution", "grouping"], sort=False):
        look = {"color": colors[execution], "linestyle": styles[grouping], "marker": "o"}
        label = f"{execution}, {grouping}" if grouping else execution
        left.plot(rows["batch"], rows["tokens_per_second"] / 1e3, label=label, **look)
        if execution == "dense":
            right.plot(rows["batch"], rows["layers_run"], **look)
    sizes = sorted(table["batch"].unique())
    for ax in (left, right):
        ax.set(xscale="log", xlabel="batch size (windows)")
        _plain_ticks(ax, sizes)
    left.set(ylabel="thousand tokens per second", ylim=(0, None))
    right.set(ylabel="layers until the slowest has left", ylim=(0, None))
    fig.legend(loc="outside right upper")
    return fig


def propagation(table: pd.DataFrame) -> Figure:
    """What left states cost in perplexity, by layers executed and by position in the window.

    Args:
        table: columns by, value, cost; see :func:`earlyexit.evaluation.propagation_error.propagation_cost`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(PAGE * 0.85, 2.2), sharey=True)
    labels = {"layers executed": "layers executed", "position": "position in the window"}
    for ax, (by, label) in zip(axes, labels.items(), strict=True):
        rows = table[table["by"] == by].groupby("value")["cost"]
        mean = rows.mean()
        ax.plot(mean.index, mean, "o-")
        ax.fill_between(mean.index, rows.min(), rows.max(), alpha=0.2)
        ax.axhline(0, **REFERENCE)
        overall = table[table["by"] == "all"]["cost"].mean()
        ax.axhline(overall, color="C1", linewidth=0.9, label="all tokens")
        ax.set(xlabel=label)
    axes[0].set_xticks(sorted(table[table["by"] == "layers executed"]["value"].unique()))
    axes[0].set_ylabel("perplexity, real / traced − 1")
    _percent(axes[0].yaxis)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return fig


def output_heads(table: pd.DataFrame) -> Figure:
    """Milliseconds per batch of each output head, scoring and predicting, full depth and with exits.

    Args:
        table: columns head, scoring_ms, scoring_exits_ms, prediction_ms, prediction_exits_ms.
    """
    fig, axes = plt.subplots(1, 2, figsize=(PAGE * 0.8, 2.3), sharey=True)
    heads, width = list(dict.fromkeys(table["head"])), 0.38
    mean = table.groupby("head").mean(numeric_only=True).loc[heads]
    for ax, task in zip(axes, ("scoring", "prediction"), strict=True):
        for k, (column, label) in enumerate((("_ms", "full depth"), ("_exits_ms", "with exits"))):
            x = np.arange(len(heads)) + (k - 0.5) * width
            bars = ax.bar(x, mean[task + column], width, label=label)
            ax.bar_label(bars, fmt="%.0f", fontsize=7)
        ax.set_xticks(np.arange(len(heads)), heads)
        ax.set(title={"scoring": "scoring", "prediction": "greedy prediction"}[task])
        ax.margins(y=0.12)
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("milliseconds per batch")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return fig
