"""figures/answer."""

from __future__ import annotations

from earlyexit.figures.style import COLUMN
from earlyexit.figures.style import PAGE
from earlyexit.figures.style import REFERENCE
from earlyexit.figures.style import _percent
from earlyexit.figures.style import _plain_ticks
from earlyexit.figures.style import label_of
from earlyexit.figures.style import layer_colours
from earlyexit.figures.style import lines
from earlyexit.figures.style import setting_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import html
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


def front(table: pd.DataFrame, claims: pd.DataFrame) -> Figure:
    """Quality loss against layers, FLOPs and time, policies run for real, claims marked.

    Args:
        table: columns seed, criterion, one setting (epsilon, threshold, exit_layer or depth),
            quality_loss, speedup_layers, speedup_flops, speedup_time.
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
            settings = rows.groupby(setting_of(rows))[[x, "quality_loss"]]
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


def coloured_html(words: list[str], layers: np.ndarray, n_layers: int, title: str) -> str:
    """A page with each word on the colour of the layers its prediction took.

    Args:
        words: in order; ``<eos>`` ends a line.
        layers: layers executed ``(T,)``, 1 … n_layers.
    """
    colours = layer_colours(n_layers)
    body = []
    for word, depth in zip(words, layers.tolist(), strict=True):
        text = "¶" if word == "<eos>" else html.escape(word)
        label = f"{depth} layer" + "s" * (depth > 1)
        body.append(f'<span style="background:{colours[depth - 1]}" title="{label}">{text}</span>')
        if word == "<eos>":
            body.append("<br>")
    key = " ".join(
        f'<span style="background:{colour}">{k + 1}</span>' for k, colour in enumerate(colours)
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:16px/1.7 serif;max-width:44em;margin:2em auto}"
        "span{padding:1px 3px;border-radius:3px}</style>"
        f"<h1>{html.escape(title)}</h1><p>Layers executed before a word was predicted: {key}</p><p>"
        + " ".join(body)
        + "</p>\n"
    )
