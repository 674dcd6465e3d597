"""Figures: each function takes tidy tables and returns the figure it drew.

Sizes are inches of a paper's column (3.4) or page (7.0); colours and fonts come from the project's
style. Seeds, where there are several, are drawn as a mean with its range.
"""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from earlyexit.exits import CRITERIA
from earlyexit.reading import layer_colours

COLUMN, PAGE = 3.4, 7.0  # inches
REFERENCE = {"color": "0.35", "linewidth": 0.8, "linestyle": "--", "zorder": 1}
MARKERS = "osD^vP*X"
FEW = 12  # thresholds, up to which a curve is drawn as points


def label_of(criterion: str) -> str:
    """How a criterion is called in a legend."""
    return CRITERIA[criterion].label if criterion in CRITERIA else criterion


def _exit_name(layer: int, n_layers: int) -> str:
    return f"exit {layer}" if layer < n_layers - 1 else f"exit {layer} (last)"


def _percent(axis, decimals: int | None = None) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals))


# ---------------------------------------------------------------- 01 build


def training_curves(history: pd.DataFrame) -> Figure:
    """Training NLL against tokens, and the fit part's perplexity of every exit.

    Numbers at the exits are means over seeds.

    Args:
        history: columns seed, tokens, train_nll, perplexity_0 … (NaN between evaluations).
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.4))
    for seed, rows in history.groupby("seed"):
        left.plot(rows["tokens"] / 1e6, rows["train_nll"], label=f"seed {seed}")
    left.set(xlabel="training tokens (millions)", ylabel="training NLL (nats per token)")
    left.legend()
    columns = [c for c in history if c.startswith("perplexity_")]
    measured = history.dropna(subset=columns)
    final = measured.groupby("seed")[columns].last()
    for _, values in final.iterrows():
        right.plot(range(len(columns)), values, "o-", markersize=4)
    for i, (mean, top) in enumerate(zip(final.mean(), final.max(), strict=True)):
        right.annotate(
            f"{mean:.0f}", (i, top), (0, 6), textcoords="offset points", ha="center", fontsize=7
        )
    right.set(xlabel="exit (layer index)", ylabel="perplexity, validation (fit part)")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.margins(y=0.2)
    return fig


def leak(table: pd.DataFrame) -> Figure:
    """Perplexity on the true text and with the future of each scored token replaced.

    Args:
        table: columns model, future ("true" or "replaced"), perplexity.
    """
    fig, ax = plt.subplots(figsize=(COLUMN, 2.2))
    models, width = list(dict.fromkeys(table["model"])), 0.38
    for k, future in enumerate(("true", "replaced")):
        rows = table[table["future"] == future].groupby("model")["perplexity"].mean()[models]
        bars = ax.bar(np.arange(len(models)) + (k - 0.5) * width, rows, width, label=future)
        ax.bar_label(bars, fmt="%.0f", fontsize=7)
    ax.set_xticks(np.arange(len(models)), models)
    ax.set(yscale="log", ylabel="perplexity of the same tokens")
    ax.set_ylim(1, 3 * table["perplexity"].max())
    ax.grid(axis="x", visible=False)
    ax.legend(title="tokens after them", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def cost_shares(costs: pd.DataFrame) -> Figure:
    """FLOPs per token of every part, as a multiple of one whole block.

    Args:
        costs: as :func:`earlyexit.cost.cost_table` returns.
    """
    fig, ax = plt.subplots(figsize=(COLUMN, 2.6))
    order = costs.iloc[::-1]
    colors = order["group"].map({"block": "C0", "head": "C1"})
    bars = ax.barh(order["part"], order["share_of_block"], color=colors)
    ax.bar_label(bars, [f" {v:.2g}×" for v in order["share_of_block"]], fontsize=7)
    ax.set(xscale="log", xlabel="FLOPs per token / FLOPs of one block")
    ax.axvline(1, **REFERENCE)
    ax.margins(x=0.2)
    ax.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("C0", "C1")]
    ax.legend(handles, ["every layer", "a head"], loc="upper right")
    return fig


# ---------------------------------------------------------------- 02 calibration


def reliability(table: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """Confidence against accuracy, one panel per exit, before and after temperature scaling.

    Args:
        table: columns seed, exit, calibration ("before"/"after"), confidence, accuracy, share.
        errors: columns seed, exit, calibration, ece.
    """
    exits = sorted(table["exit"].unique())
    fig, axes = plt.subplots(
        2, len(exits), figsize=(PAGE, 2.9), sharex=True, sharey="row", height_ratios=[3, 1],
        squeeze=False,
    )  # fmt: skip
    for top, low, layer in zip(*axes, exits, strict=True):
        top.plot([0, 1], [0, 1], **REFERENCE)
        notes = []
        for k, when in enumerate(("before", "after")):
            rows = table[(table["exit"] == layer) & (table["calibration"] == when)]
            rows = rows[rows["seed"] == rows["seed"].min()]
            enough = rows[rows["share"] >= 5e-4]
            top.plot(enough["confidence"], enough["accuracy"], f"{MARKERS[k]}-", label=when)
            low.step(rows["bin"], rows["share"], where="mid", color=f"C{k}", linewidth=0.9)
            ece = errors[(errors["exit"] == layer) & (errors["calibration"] == when)]["ece"].mean()
            notes.append(f"ECE {when} {100 * ece:.1f} %")
        top.text(0.97, 0.04, "\n".join(notes), transform=top.transAxes, ha="right", fontsize=6.5)
        top.set(title=_exit_name(layer, len(exits)), xlim=(0, 1), ylim=(0, 1))
        low.set(yscale="log", ylim=(1e-4, 1))
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(loc="upper left")
    axes[1, 0].set_ylabel("share of\ntokens")
    fig.supxlabel("maximum probability", fontsize=8)
    return fig


# ---------------------------------------------------------------- 03 threshold sweep


def pareto(
    curves: pd.DataFrame,
    x: str,
    x_label: str,
    limit: float = 0.3,
    points: pd.DataFrame | None = None,
) -> Figure:
    """Quality loss against a speedup, one curve per criterion, static exits and oracles beside.

    Args:
        curves: columns seed, criterion, threshold, quality_loss and ``x``; static exits, and criteria of
            few thresholds, are drawn as points, oracles dashed. Several seeds are drawn as their mean
            and range.
        limit: largest quality loss shown.
        points: extra labelled points: columns label, quality_loss, ``x``.
    """
    fig, ax = plt.subplots(figsize=(PAGE * 0.62, 3.0))
    for k, (criterion, rows) in enumerate(curves.groupby("criterion", sort=False)):
        style = {"color": f"C{k}", "label": label_of(criterion)}
        if rows.groupby("seed").size().max() <= FEW:
            settings = rows.groupby("threshold")
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


# ---------------------------------------------------------------- 04 speedup


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


def predicted_measured(table: pd.DataFrame) -> Figure:
    """Predicted against measured time of runs, with the identity and ±10 %.

    Args:
        table: columns measured_ms, predicted_ms, used ("fitted" or "checked"), criterion.
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.45, 2.7))
    low, high = table["measured_ms"].min() * 0.7, table["measured_ms"].max() * 1.4
    line = np.array([low, high])
    ax.fill_between(line, 0.9 * line, 1.1 * line, color="0.9", zorder=0, label="±10 %")
    ax.plot(line, line, **REFERENCE)
    for k, (criterion, rows) in enumerate(table.groupby("criterion", sort=False)):
        for used, face in (("fitted", "none"), ("checked", f"C{k}")):
            part = rows[rows["used"] == used]
            ax.plot(
                part["measured_ms"], part["predicted_ms"], MARKERS[k], color=f"C{k}",
                markerfacecolor=face, label=f"{label_of(criterion)}, {used}",
            )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted (ms)")
    ax.set(xlim=(low, high), ylim=(low, high))
    fig.legend(loc="outside right upper")
    return fig


def break_even(grid: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Predicted wall-clock speedup over head/block ratio and exit rate; where it is 1, exits lose.

    Args:
        grid: columns criterion, n_layers, batch, head_ratio, executed (share of layers), speedup_time.
        points: measured: the same columns; drawn as circles where exits won, crosses where they lost.
    """
    rows = list(dict.fromkeys(grid["criterion"]))
    columns = sorted(set(zip(grid["n_layers"], grid["batch"], strict=True)))
    fig, axes = plt.subplots(
        len(rows), len(columns), figsize=(PAGE, 1.75 * len(rows) + 0.4), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    norm = plt.matplotlib.colors.TwoSlopeNorm(0, -1, 1)  # log2: white is break-even
    for line, criterion in zip(axes, rows, strict=True):
        for ax, (layers, batch) in zip(line, columns, strict=True):
            part = grid.query("criterion == @criterion and n_layers == @layers and batch == @batch")
            table = part.pivot(index="executed", columns="head_ratio", values="speedup_time")
            image = ax.pcolormesh(
                table.columns,
                table.index,
                np.log2(table),
                norm=norm,
                cmap="RdBu",
                shading="gouraud",
            )
            log = np.log2(table)
            if log.min().min() < 0 < log.max().max():
                ax.contour(
                    table.columns, table.index, log, levels=[0], colors="black", linewidths=1
                )
            mine = points.query(
                "criterion == @criterion and n_layers == @layers and batch == @batch"
            )
            for won, marker in ((True, "o"), (False, "X")):
                dots = mine[(mine["speedup_time"] >= 1) == won]
                ax.scatter(
                    dots["head_ratio"], dots["executed"], c=np.log2(dots["speedup_time"]), norm=norm,
                    cmap="RdBu", marker=marker, s=30, edgecolor="black", linewidth=0.6, zorder=3,
                )  # fmt: skip
            ax.set(xscale="log", xlim=(table.columns.min(), table.columns.max()))
            ax.set_title(f"{label_of(criterion)}\n{layers} layers, batch {batch}", fontsize=7)
            ax.grid(visible=False)
    fig.supxlabel("FLOPs of the head / FLOPs of a block", fontsize=8)
    fig.supylabel("share of layers executed", fontsize=8)
    bar = fig.colorbar(image, ax=axes, ticks=[-1, 0, 1], extend="both")
    bar.ax.set_yticklabels(["½×", "1×", "2×"])
    bar.set_label("wall-clock speedup")
    look = {"color": "white", "markeredgecolor": "black", "linestyle": "none"}
    handles = [
        plt.Line2D([], [], color="black", linewidth=1, label="break-even, predicted"),
        plt.Line2D([], [], marker="o", label="measured, exits win", **look),
        plt.Line2D([], [], marker="X", label="measured, exits lose", **look),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
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
        table: columns by, value, cost; see :func:`earlyexit.left_states.propagation_cost`.
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


# ---------------------------------------------------------------- 05 memory


def memory(table: pd.DataFrame) -> Figure:
    """Peak tensor memory of each way of running, logits and the rest apart.

    Args:
        table: columns execution, logits_mib, rest_mib.
    """
    fig, ax = plt.subplots(figsize=(COLUMN * 1.3, 2.4))
    rows = table.groupby("execution", sort=False)[["logits_mib", "rest_mib"]].mean().iloc[::-1]
    ax.barh(rows.index, rows["rest_mib"], color="C0", label="everything else")
    ax.barh(rows.index, rows["logits_mib"], left=rows["rest_mib"], color="C1", label="logits")
    for y, total in enumerate(rows.sum(axis=1)):
        ax.text(total, y, f" {total:.0f}", va="center", fontsize=7)
    ax.set(xlabel="peak tensor memory (MiB)")
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper right", ncols=2)
    return fig


def lines(
    table: pd.DataFrame, x: str, y: str, hue: str, x_label: str, y_label: str, log: bool = True
) -> Figure:
    """One line per value of ``hue``, mean and range over repeated rows, log–log by default."""
    fig, ax = plt.subplots(figsize=(PAGE * 0.75, 2.6))
    sns.lineplot(
        table, x=x, y=y, hue=hue, style=hue, markers=True, dashes=False, errorbar=("pi", 100), ax=ax
    )
    if log:
        ax.set(xscale="log", yscale="log")
        _plain_ticks(ax, sorted(table[x].unique()))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return fig


def _plain_ticks(ax: Axes, values: list) -> None:
    ax.set_xticks(values, [f"{v:g}" for v in values], minor=False)
    ax.set_xticks([], minor=True)


# ---------------------------------------------------------------- 06 guarantees


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


# ---------------------------------------------------------------- 07 combinations


def sparse_limits(table: pd.DataFrame) -> Figure:
    """Speedup of a layer by a sparse BK-Core: at most, and measured, per size.

    Args:
        table: as :func:`earlyexit.variants.measuring.sparse_times` returns.
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


# ---------------------------------------------------------------- 08 study


def front(table: pd.DataFrame, claims: pd.DataFrame) -> Figure:
    """Quality loss against layers, FLOPs and time, policies run for real, claims marked.

    Args:
        table: columns seed, criterion, threshold, quality_loss, speedup_layers, speedup_flops,
            speedup_time.
        claims: columns speedup, quality_loss of the original; it does not say which speedup.
    """
    kinds = {
        "speedup_layers": "speedup (layers)",
        "speedup_flops": "speedup (FLOPs)",
        "speedup_time": "speedup (wall-clock)",
    }
    fig, axes = plt.subplots(1, 3, figsize=(PAGE, 2.9), sharey=True)
    points = {
        "static": "ks", "shallow twin": "k^", "original's threshold": "rX", "oracle (kl)": "kd:"
    }  # fmt: skip
    markers = "ov<>"
    for ax, (x, label) in zip(axes, kinds.items(), strict=True):
        groups = table.groupby("criterion", sort=False)
        lines = [name for name in groups.groups if name not in points]
        for name, rows in groups:
            settings = rows.groupby("threshold")[[x, "quality_loss"]]
            mean, low, high = settings.mean(), settings.min(), settings.max()
            style = {"fmt": points.get(name), "markersize": 4}
            if name in lines:
                style |= {"fmt": f"C{lines.index(name)}{markers[lines.index(name)]}-"}
            ax.errorbar(
                mean[x], mean["quality_loss"], label=label_of(name), linewidth=1, **style,
                xerr=[mean[x] - low[x], high[x] - mean[x]],
                yerr=[
                    mean["quality_loss"] - low["quality_loss"],
                    high["quality_loss"] - mean["quality_loss"],
                ],
            )  # fmt: skip
        ax.plot(
            claims["speedup"], claims["quality_loss"], "P", color="C3", label="original, claimed"
        )
        ax.axhline(0, **REFERENCE)
        ax.axvline(1, **REFERENCE)
        ax.set(xlabel=label, xscale="log")
        _plain_ticks(ax, [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8) if _inside(ax, t)])
    axes[0].set_ylabel("quality loss, test split")
    _percent(axes[0].yaxis)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def _inside(ax: Axes, x: float) -> bool:
    low, high = ax.get_xlim()
    return low <= x <= high


def depth_by_class(table: pd.DataFrame) -> Figure:
    """Mean layers executed by class of the predicted word, with the class's share of the tokens.

    Args:
        table: columns seed, word_class, share, layers.
    """
    mean = table.groupby("word_class")[["layers", "share"]].mean().sort_values("layers")
    spread = table.groupby("word_class")["layers"]
    error = [mean["layers"] - spread.min()[mean.index], spread.max()[mean.index] - mean["layers"]]
    fig, ax = plt.subplots(figsize=(COLUMN * 1.3, 2.4))
    bars = ax.barh(mean.index, mean["layers"], xerr=np.clip(error, 0, None), capsize=2)
    ax.bar_label(bars, [f" {100 * s:.1f} % of tokens" for s in mean["share"]], fontsize=7)
    ax.set(xlabel="mean layers executed")
    ax.margins(x=0.35)
    ax.grid(axis="y", visible=False)
    return fig


def depth_by_position(table: pd.DataFrame) -> Figure:
    """Mean layers executed and NLL over the position in the window.

    Args:
        table: columns seed, position, layers, nll.
    """
    fig, axes = plt.subplots(1, 2, figsize=(PAGE * 0.8, 2.1))
    for ax, column, label in zip(
        axes, ("layers", "nll"), ("mean layers executed", "NLL at full depth (nats)"), strict=True
    ):
        groups = table.groupby("position")[column]
        ax.plot(groups.mean().index, groups.mean())
        ax.fill_between(groups.mean().index, groups.min(), groups.max(), alpha=0.2)
        ax.set(xlabel="position in the window", ylabel=label)
    return fig


def coloured_text(words: list[str], layers: np.ndarray, n_layers: int, width: int = 122) -> Figure:
    """Words on the colour of the layers their prediction took, as running text.

    Args:
        words: in order; layers: executed for each ``(T,)``; width: characters per line.
    """
    colours, lines, column = layer_colours(n_layers), [[]], 0
    for word, depth in zip(words, layers.tolist(), strict=True):
        shown = "¶" if word == "<eos>" else word
        if column + len(shown) > width:
            lines.append([])
            column = 0
        lines[-1].append((column, shown, depth))
        column += len(shown) + 1
    fig, ax = plt.subplots(figsize=(PAGE, 0.19 * (len(lines) + 2)))
    ax.set(xlim=(0, width), ylim=(len(lines) + 1, -1))
    ax.axis("off")
    style = {"family": "monospace", "fontsize": 6.6, "va": "center"}
    for y, line in enumerate(lines):
        for x, text, depth in line:
            box = plt.Rectangle((x - 0.2, y - 0.42), len(text) + 0.4, 0.84)
            box.set(facecolor=colours[depth - 1], linewidth=0)
            ax.add_patch(box)
            ax.text(x + len(text) / 2, y, text, ha="center", **style)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours]
    names = [f"{k + 1} layer" + "s" * (k > 0) for k in range(n_layers)]
    fig.legend(handles, names, loc="outside lower center", ncols=n_layers)
    return fig
