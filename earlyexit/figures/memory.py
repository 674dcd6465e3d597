"""figures/memory."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import pandas as pd


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
