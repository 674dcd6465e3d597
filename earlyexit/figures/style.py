"""Figures: each function takes tidy tables and returns the figure it drew.

Sizes are inches of a paper's column (3.4) or page (7.0); colours and fonts come from the project's
style. Seeds, where there are several, are drawn as a mean with its range.
"""

from __future__ import annotations

from earlyexit.exits.criteria import CRITERIA
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.ticker import PercentFormatter
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns


COLUMN, PAGE = 3.4, 7.0  # inches


REFERENCE = {"color": "0.35", "linewidth": 0.8, "linestyle": "--", "zorder": 1}


MARKERS = "osD^vP*X"


SETTINGS = ("epsilon", "threshold", "exit_layer", "depth", "price")  # what a policy is made by


FEW = 12  # thresholds, up to which a curve is drawn as points


def label_of(criterion: str) -> str:
    """How a criterion is called in a legend."""
    return CRITERIA[criterion].label if criterion in CRITERIA else criterion


def setting_of(table: pd.DataFrame) -> pd.Series:
    """The setting that each row was made by: the one of ``SETTINGS`` that is not NaN."""
    return table[[name for name in SETTINGS if name in table]].bfill(axis=1).iloc[:, 0]


def _exit_name(layer: int, n_layers: int) -> str:
    return f"exit {layer}" if layer < n_layers - 1 else f"exit {layer} (last)"


def _percent(axis, decimals: int | None = None) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals))


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


def layer_colours(n_layers: int) -> list[str]:
    """One light colour per number of layers, dark text readable on each."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["YlGnBu"](np.linspace(0.05, 0.55, n_layers))
    return [to_hex(colour) for colour in scale]
