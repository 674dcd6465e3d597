"""Figures of notebook 02 compare confidence with accuracy, before and after scaling."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, Panels

ENOUGH = 5e-4  # share of the tokens below which a bin's accuracy is noise


def reliability(table: pd.DataFrame, errors: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw accuracy over confidence, and below it the tokens of each bin, a column per exit.

    Args:
        table: columns seed, exit, bin, calibration ("before"/"after"), confidence, accuracy, share.
        errors: columns seed, exit, calibration, ece.
        ax: axes of the upper row, exit by exit, then of the lower row.
    """
    exits = sorted(table["exit"].unique())
    panels = [partial(reliability_diagram, table, errors, layer) for layer in exits]
    panels += [partial(confidence_shares, table, layer) for layer in exits]
    look = {"sharex": True, "sharey": "row", "height_ratios": [3, 1], "one_label": "x"}
    return style.compose(ax, PAGE, 2.9, panels, 2, key={"loc": None}, **look)


@style.panel(COLUMN, 2.5, loc=None)
def reliability_diagram(table: pd.DataFrame, errors: pd.DataFrame, layer: int, *, ax: Axes) -> None:
    """Draw accuracy over confidence at one exit, first seed, with the mean ECE over the seeds."""
    ax.plot([0, 1], [0, 1], **REFERENCE)
    found = []
    shown = table[(table["exit"] == layer) & (table["seed"] == table["seed"].min())]
    for k, when in enumerate(("before", "after")):
        rows = shown[(shown["calibration"] == when) & (shown["share"] >= ENOUGH)]
        ax.plot(rows["confidence"], rows["accuracy"], label=when, **style.look(k))
        same = (errors["exit"] == layer) & (errors["calibration"] == when)
        found.append(f"{100 * errors[same]['ece'].mean():.1f}")
    last = " (last)" if layer == table["exit"].max() else ""
    ax.set_title(f"exit {layer}{last}\nECE {' → '.join(found)} %", fontsize=7)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set(xlabel="maximum probability", ylabel="accuracy")


@style.panel(COLUMN, 1.5)
def confidence_shares(table: pd.DataFrame, layer: int, *, ax: Axes) -> None:
    """Draw the share of tokens per bin of confidence at one exit, first seed, on a log scale."""
    shown = table[(table["exit"] == layer) & (table["seed"] == table["seed"].min())]
    for k, when in enumerate(("before", "after")):
        rows = shown[shown["calibration"] == when]
        ax.step(rows["bin"], rows["share"], where="mid", color=f"C{k}", linewidth=0.9)
    ax.set(yscale="log", xlim=(0, 1), ylim=(1e-4, 1))
    ax.set(xlabel="maximum probability", ylabel="share of\ntokens")
