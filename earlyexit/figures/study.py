"""Figures of notebook 08 show the loss over three speedups, and which words exit early."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from earlyexit.figures import style
from earlyexit.figures.style import COLUMN, PAGE, REFERENCE, SMALL, Panels

SPEEDUPS = {
    "speedup_layers": "speedup (layers)",
    "speedup_flops": "speedup (FLOPs)",
    "speedup_time": "speedup (wall-clock)",
}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8)
COMPARED = {  # criterion beside the fitted ones → how it is drawn
    "static": {"color": "black", "marker": "s", "linestyle": "none"},
    "static, by coin": {"color": "0.4", "marker": "s", "markersize": 3, "linestyle": "-"},
    "trained alone": {"color": "black", "marker": "^", "linestyle": "--"},
    "random exits": {"color": "0.55", "marker": "x", "linestyle": "none"},
    "original's threshold": {"color": "C3", "marker": "X", "linestyle": "none"},
    "oracle (kl)": {"color": "black", "marker": "d", "linestyle": ":"},
    "oracle (nll)": {"color": "0.55", "marker": "d", "linestyle": ":"},
}
BY_POSITION = {"layers": "mean layers executed", "nll": "NLL at full depth (nats)"}


def front(table: pd.DataFrame, claims: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw quality loss over speedup in layers, FLOPs and time of real runs, in three panels.

    Args:
        table: columns seed, criterion, quality_loss, speedup_layers, speedup_flops, speedup_time,
            and those of :func:`~earlyexit.figures.style.setting_of`.
        claims: columns speedup, quality_loss of the original, which names no kind of speedup.
    """
    panels = [partial(loss_against, table, claims, x) for x in SPEEDUPS]
    key = {"loc": "lower center", "ncols": 3}
    return style.compose(ax, PAGE, 3.0, panels, key=key, sharey=True)


@style.panel(COLUMN, 2.9)
def loss_against(table: pd.DataFrame, claims: pd.DataFrame, x: str, *, ax: Axes) -> None:
    """Draw a panel of :func:`front` over the speedup ``x``: mean and range over the seeds."""
    fitted = [name for name in dict.fromkeys(table["criterion"]) if name not in COMPARED]
    for name, rows in table.groupby("criterion", sort=False):
        options = COMPARED[name] if name in COMPARED else style.look(fitted.index(name))
        options = options | {"linewidth": 1, "label": style.label_of(name)}
        style.setting_points(ax, rows, x, np.inf, **options)
    claimed = {"color": "C3", "markerfacecolor": "none", "label": "original, claimed"}
    ax.plot(claims["speedup"], claims["quality_loss"], "P", **claimed)
    ax.axhline(0, **REFERENCE)
    ax.axvline(1, **REFERENCE)
    ax.set(xlabel=SPEEDUPS[x], xscale="log", ylabel="quality loss, test split")
    style.plain_ticks(ax.xaxis, TICKS)
    style.percent(ax.yaxis)


def rivals(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw perplexity over the speedup with exits and of models trained alone, a panel per cost.

    A line joins each policy with its rival of equal cost: exits are better where it points down.

    Columns: seed, epsilon, cost, speedup, perplexity, rival_perplexity.
    """
    panels = [
        partial(rivals_at, rows, f"speedup ({cost})")
        for cost, rows in table.groupby("cost", sort=False)
    ]
    return style.compose(ax, PAGE, 2.4, panels, key={"loc": "lower center", "ncols": 2})


@style.panel(COLUMN, 2.4)
def rivals_at(table: pd.DataFrame, x_label: str, *, ax: Axes) -> None:
    """Draw a panel of :func:`rivals`."""
    table = table.sort_values("speedup")
    for k, (column, label) in enumerate(
        {"perplexity": "early exit", "rival_perplexity": "models trained alone, equal cost"}.items()
    ):
        points = style.look(k) | {"linestyle": "none", "label": label}
        ax.plot(table["speedup"], table[column], **points)
    ends = table["perplexity"], table["rival_perplexity"]
    ax.vlines(table["speedup"], *ends, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel=x_label, ylabel="perplexity, test split")


@style.panel(COLUMN, 2.4)
def depth_by_class(table: pd.DataFrame, *, ax: Axes) -> None:
    """Draw mean layers executed per class of the predicted word, and the class's share of tokens.

    Columns: seed, word_class, share, layers.
    """
    classes = table.groupby("word_class")
    rows = classes["layers"].agg(["mean", "min", "max"]).assign(share=classes["share"].mean())
    rows = rows.sort_values("mean")
    error = style.whiskers(rows["mean"], rows["min"], rows["max"])
    bars = ax.barh(rows.index, rows["mean"], xerr=error, capsize=2)
    texts = [f"{100 * share:.1f} % of tokens" for share in rows["share"]]
    ax.bar_label(bars, texts, fontsize=SMALL, padding=3)
    ax.set(xlabel="mean layers executed")
    ax.margins(x=0.35)
    ax.grid(axis="y", visible=False)


def depth_by_position(table: pd.DataFrame, *, ax: Panels = None) -> np.ndarray:
    """Draw mean layers executed and NLL over the position in the window, in two panels.

    Columns: seed, position, layers, nll.
    """
    panels = [
        partial(style.lines, table, "position", y, None, "position in the window", label, log=False)
        for y, label in BY_POSITION.items()
    ]
    return style.compose(ax, PAGE, 2.1, panels)


def coloured_text(
    words: list[str], layers: np.ndarray, n_layers: int, width: int = 122, *, ax: Axes | None = None
) -> Axes:
    """Draw running text, each word on the colour of the layers that its prediction executed.

    Args:
        words: words in order.
        layers: layers executed ``(T,)``, 1 … n_layers.
        width: characters per line: 122 fill a page, 59 a column.
    """
    colours, shown = style.layer_colours(n_layers), ["¶" if w == "<eos>" else w for w in words]
    places = list(_running_text(shown, width))
    bottom = places[-1][0] + 2 if places else 1
    ax, own = style.new_axes(ax, PAGE, 0.19 * (bottom + 1))
    ax.set(xlim=(0, width), ylim=(bottom, -1))
    ax.axis("off")
    options = {"family": "monospace", "fontsize": 6.6, "va": "center", "ha": "center"}
    for (line, column), word, depth in zip(places, shown, layers.tolist(), strict=True):
        box = {"facecolor": colours[depth - 1], "linewidth": 0}
        ax.add_patch(Rectangle((column - 0.2, line - 0.42), len(word) + 0.4, 0.84, **box))
        ax.text(column + len(word) / 2, line, word, **options)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    labels = [style.layers_text(k + 1) for k in range(n_layers)]
    style.legend(ax, own, "lower center", ncols=n_layers, handles=handles, labels=labels)
    return ax


def _running_text(words: list[str], width: int) -> Iterator[tuple[int, int]]:
    """Yield line and column at which each word begins, in lines of ``width`` characters."""
    line = column = 0
    for word in words:
        if column + len(word) > width:
            line, column = line + 1, 0
        yield line, column
        column += len(word) + 1


def coloured_html(words: list[str], layers: np.ndarray, n_layers: int, title: str) -> str:
    """Return a page of :func:`coloured_words`, which says what is raised."""
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:16px/1.7 serif;max-width:44em;margin:2em auto}</style>"
        f"<h1>{html.escape(title)}</h1>" + coloured_words(words, layers, n_layers) + "\n"
    )


def coloured_words(
    words: list[str], layers: np.ndarray, n_layers: int, struck: np.ndarray | None = None
) -> str:
    """Return HTML of a text, each word on the colour of the layers that its prediction executed.

    Args:
        words: words in order; ``<eos>`` ends a line.
        layers: layers executed ``(T,)``, 1 … n_layers.
        struck: which words are struck out ``(T,)``; None: none.

    Raises:
        ValueError: there is not one number of layers for each word, or one is out of range.
    """
    layers = np.asarray(layers)
    if layers.shape != (len(words),) or (layers < 1).any() or (layers > n_layers).any():
        raise ValueError(
            f"{len(words)} words, layers {layers.shape} from {layers.min(initial=1)} to"
            f" {layers.max(initial=1)}: give 1 … {n_layers} for each word"
        )
    struck = np.zeros(len(words), dtype=bool) if struck is None else struck
    styles = [f"background:{colour}" for colour in style.layer_colours(n_layers)]
    body = []
    for word, depth, out in zip(words, layers.tolist(), struck, strict=True):
        text = "¶" if word == "<eos>" else html.escape(word)
        text = f"<s>{text}</s>" if out else text
        told = style.layers_text(depth)
        body.append(f'<span style="{styles[depth - 1]}" title="{told}">{text}</span>')
        if word == "<eos>":
            body.append("<br>")
    key = " ".join(f'<span style="{look}">{k}</span>' for k, look in enumerate(styles, start=1))
    return (
        "<style>.layers span{padding:1px 3px;border-radius:3px;color:black}</style>"
        f'<div class="layers"><p>Layers executed before a word was predicted: {key}</p>'
        f"<p>{' '.join(body)}</p></div>"
    )
