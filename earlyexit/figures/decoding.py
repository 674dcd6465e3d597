"""Figures of notebook 10 show words per second, and where they come from."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, Panels

PARTS = {
    "layers": "C0",
    "heads": "C1",
    "layers, joined": "C5",
    "heads, joined": "C4",
    "rest": "0.75",
}

SHORT = {
    "lossless, ": "", "trained alone": "alone", ", ": "\n", "% ": "%\n", "gate ": "gate\n",
    " layer": "\nlayer",
}  # fmt: skip


@style.panel(COLUMN, 2.4, loc="upper center", ncols=3, fontsize=5.5)
def decoding_speeds(speeds: pd.DataFrame, *, ax: Axes) -> None:
    """Draw words per second over full depth at the same batch, a group of bars per method.

    Of batches, the smallest and the largest are shown.
    """
    speeds = speeds[speeds["batch"].isin([speeds["batch"].min(), speeds["batch"].max()])]
    drawn = np.where(speeds["temperature"] > 0, ", drawn", "")
    speeds = speeds.assign(bar="batch " + speeds["batch"].astype(str) + drawn)
    values = speeds.pivot(index="method", columns="bar", values="speedup_time")
    names = [name for name in speeds["method"].unique() if (values.loc[name] != 1).any()]
    values = values.reindex(index=names, columns=speeds["bar"].unique())  # full depth is 1
    values.index = [_short(name) for name in values.index]
    style.grouped_bars(ax, values, "{:.2f}", fontsize=5.5, rotation=90, padding=2)
    ax.axhline(1, **REFERENCE)
    ax.set(ylabel="words per second\nover full depth")
    ax.tick_params(axis="x", labelsize=5)
    ax.margins(y=0.3)


def _short(name: str) -> str:
    """Return a method's name in short lines: only lossless methods draft."""
    for long, brief in SHORT.items():
        name = name.replace(long, brief)
    return name


@style.panel(COLUMN, 2.4, loc="upper center", ncols=4, fontsize=5.5)
def draft_break_even(acceptance: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the acceptance that drafts have, and that they would need to pay, over their length.

    Points are of the most probable words, a dotted line of drawn ones.
    """
    drawn = acceptance["temperature"] > 0
    for k, (exit_layer, rows) in enumerate(acceptance[~drawn].groupby("exit_layer")):
        look = style.look(k)
        ax.plot(rows["draft"], rows["acceptance"], label=f"exit {exit_layer + 1}", **look)
        ax.plot(rows["draft"], rows["needed"], color=look["color"], linestyle="--")
        others = acceptance[drawn & (acceptance["exit_layer"] == exit_layer)]
        ax.plot(others["draft"], others["acceptance"], color=look["color"], linestyle=":")
    if acceptance["needed"].notna().any():
        ax.plot([], [], color="0.3", linestyle="--", label="needed to pay")
    if drawn.any():
        ax.plot([], [], color="0.3", linestyle=":", label="words drawn")
    ax.set(xlabel="words of a draft", ylabel="acceptance", ylim=(0, 1.03))
    style.integers(ax.xaxis)
    style.percent(ax.yaxis, 0)


@style.panel(COLUMN, 2.4, loc="upper center", ncols=3, fontsize=5.5)
def decoding_parts(parts: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the microseconds of a word by part, a bar per method; joined rows share a pass."""
    values = parts.pivot(index="method", columns="part", values="microseconds")
    values = values.reindex(index=parts["method"].unique(), columns=list(PARTS))
    totals = values.sum(axis=1)
    values.index = [_short(name) for name in values.index]
    style.stacked_bars(
        ax, values.clip(lower=0), "{:.0f}", colors=list(PARTS.values()), totals=totals
    )
    ax.set(xlabel="µs per word, batch 1", xlim=(0, 2.4 * totals.max()))  # and room for a legend
    ax.tick_params(axis="y", labelsize=6)


def decoding(
    speeds: pd.DataFrame, acceptance: pd.DataFrame, parts: pd.DataFrame, *, ax: Panels = None
) -> np.ndarray:
    """Draw speeds, the drafts' break-even, and the time of a word, in three panels."""
    panels = [
        partial(decoding_speeds, speeds),
        partial(draft_break_even, acceptance),
        partial(decoding_parts, parts),
    ]
    return style.compose(ax, PAGE, 2.7, panels)
