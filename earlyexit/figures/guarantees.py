"""Figures of notebook 06 show what certificates guarantee, achieve and cost."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, SMALL, Panels


@style.panel(COLUMN, 2.8)
def target_achieved(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw achieved over tolerated quality loss on the test split, with the diagonal.

    Columns: policy ("fitted", "certified …"), epsilon, test_quality_loss.
    """
    style.mean_lines(ax, table, "epsilon", "test_quality_loss", "policy")
    top = table["epsilon"].max() * 1.1
    ax.plot([0, top], [0, top], **REFERENCE)
    ax.text(top, top, "target", ha="right", va="bottom", fontsize=SMALL, color="0.35")
    ax.set(xlabel="tolerated quality loss ε", ylabel="quality loss on the test split")
    style.percent(ax.xaxis)
    style.percent(ax.yaxis)


def violation_rates(table: pd.DataFrame, delta: float, *, ax: Panels = None) -> np.ndarray:
    """Draw violation rates over n with exact binomial intervals and δ, a panel per kind of unit.

    Columns: units, procedure, n, rate, low, high.
    """
    kinds = [rows for _, rows in table.groupby("units", sort=False)]
    panels = [partial(violation_rate, rows, delta) for rows in kinds]
    key = {"loc": "lower center", "ncols": 2}
    return style.compose(ax, PAGE, 2.5, panels, key=key, sharey=True)


@style.panel(COLUMN, 2.5)
def violation_rate(table: pd.DataFrame, delta: float, *, ax: Axes) -> None:
    """Draw a panel of :func:`violation_rates` from a table of one kind of unit."""
    for k, (name, rows) in enumerate(table.groupby("procedure", sort=False)):
        style.interval_line(ax, rows, "n", "rate", label=name, **style.look(k))
    ax.axhline(delta, **REFERENCE)
    ax.text(table["n"].min(), delta, " δ", va="bottom", fontsize=8, color="0.35")
    ax.set_yscale("symlog", linthresh=2 * delta)  # a control breaks its word in nearly all samples
    ax.set_yticks([0, delta, 2 * delta, 4 * delta, 10 * delta, 1])
    ax.set(xscale="log", xlabel="units n", ylabel="violation rate", title=table["units"].iloc[0])
    style.plain_ticks(ax.xaxis, sorted(table["n"].unique()))
    style.percent(ax.yaxis)


@style.panel(PAGE, 3.1)
def bound_widths(table: pd.DataFrame, level: float, least: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the upper bound of each method over n, with the mean loss and the level that ε allows.

    Args:
        table: columns method, n, mean, bound.
        level: log(1 + ε), in nats.
        least: columns n, level: the lowest bound of any valid test if no loss is negative.
    """
    style.mean_lines(ax, table, "n", "bound", "method")
    label = "least any valid test\ncould certify if no\nloss were negative"
    ax.plot(least["n"], least["level"], ":", color="0.35", label=label)
    ax.axhline(level, **REFERENCE)
    beside = {"ha": "right", "va": "bottom", "fontsize": SMALL, "color": "0.35"}
    ax.text(table["n"].max(), level, "log(1 + ε)", **beside)
    ax.axhline(table["mean"].mean(), color="0.35", linewidth=0.8, label="mean loss")
    ax.set(xscale="log", xlabel="units n", ylabel="upper bound on the mean loss (nats)")
    ax.set_ylim(0, None)
    sizes = sorted(table["n"].unique())
    apart = [n for n, after in zip(sizes, [*sizes[1:], np.inf], strict=True) if after > 1.5 * n]
    style.plain_ticks(ax.xaxis, apart)  # so that their numbers do not touch


@style.panel(PAGE, 2.4)
def price_of_certainty(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the speedup in layers of fitted and certified policies, per ε.

    Columns: policy, epsilon, test_speedup_layers (NaN: refused).
    """
    means = table.groupby(["epsilon", "policy"])["test_speedup_layers"].mean().unstack()
    means = means[list(dict.fromkeys(table["policy"]))].rename(index=lambda e: f"{100 * e:g} %")
    style.grouped_bars(ax, means, "{:.2f}", missing="refused", fontsize=6, rotation=90, padding=2)
    ax.axhline(1, **REFERENCE)
    ax.set(xlabel="tolerated quality loss ε", ylabel="speedup (layers), test split")
    ax.margins(y=0.25)
