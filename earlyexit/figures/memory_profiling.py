"""The figure of notebook 05 shows peak memory; :func:`earlyexit.figures.style.lines` draws the rest."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN


@style.panel(COLUMN, 2.4, loc="upper right", ncols=2)
def memory(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw the peak tensor memory of each execution, separately for logits and the rest.

    Columns: execution, logits_mib, rest_mib.
    """
    labels = {"rest_mib": "everything else", "logits_mib": "logits"}
    means = table.groupby("execution", sort=False)[list(labels)].mean().rename(columns=labels)
    style.stacked_bars(ax, means, " {:.0f}")
    ax.set(xlabel="peak tensor memory (MiB)")
