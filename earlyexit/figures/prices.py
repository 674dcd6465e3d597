"""figures/prices."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from earlyexit.figures.style import MARKERS
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from earlyexit.figures.style import label_of
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


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
