"""figures/calibration."""

from __future__ import annotations

from earlyexit.figures.style import MARKERS
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from earlyexit.figures.style import _exit_name
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import pandas as pd


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
