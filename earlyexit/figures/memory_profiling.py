"""Figure of notebook 05: memory at its peak; :func:`earlyexit.figures.style.lines` draws the rest."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN


def memory(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Peak tensor memory of each way of running, logits and the rest apart.

    Args:
        table: columns execution, logits_mib, rest_mib.
    """
    ax, own = style.new_axes(ax, COLUMN * 1.3, 2.4)
    labels = {"rest_mib": "everything else", "logits_mib": "logits"}
    means = table.groupby("execution", sort=False)[list(labels)].mean().rename(columns=labels)
    style.stacked_bars(ax, means, " {:.0f}")
    ax.set(xlabel="peak tensor memory (MiB)")
    style.legend(ax, own, "upper right", ncols=2)
    return ax
