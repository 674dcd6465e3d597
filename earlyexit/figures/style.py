"""All figures share sizes, colours, new axes, legends, and the kinds of bars and lines.

Sizes are in inches, for a paper's column (3.4) or page (7.0); colours and fonts come from the
project's style. Several seeds are drawn as their mean and range. A function that draws one
panel is decorated with :func:`panel`; :func:`compose` draws a picture of several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from earlyexit.exits.criteria import CRITERIA

COLUMN, PAGE = 3.4, 7.0  # inches
Panels = Sequence[Axes] | np.ndarray | None  # axes of a composed picture; None: a new figure
SMALL = 7  # font size in points of a number beside a bar or line
REFERENCE = {"color": "0.35", "linewidth": 0.8, "linestyle": "--", "zorder": 1}
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # box behind a number
MARKERS = "osD^vP*X<"  # one more than colours: a curve beyond them looks like no other
SETTINGS = ("threshold", "epsilon", "exit_layer", "depth", "price")


def use_style() -> None:
    """Make the project's figure style the default of every figure drawn from now on."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))


def label_of(criterion: str) -> str:
    """Return the name of a criterion in a legend."""
    return CRITERIA[criterion].label if criterion in CRITERIA else criterion


def layers_text(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"


def setting_of(table: pd.DataFrame) -> pd.Series:
    """Return per row the number that distinguishes the policies of one criterion.

    It is the first number among the columns threshold, epsilon, exit_layer, depth and price, of
    which a table may lack some, or NaN if a row has none.
    """
    return table.reindex(columns=SETTINGS).astype(float).bfill(axis=1).iloc[:, 0]


def layer_colours(n_layers: int) -> list[str]:
    """Return a colour per number of layers, light enough for dark text."""
    return [to_hex(colour) for colour in colormaps["YlGnBu"](np.linspace(0.05, 0.55, n_layers))]


def look(k: int) -> dict:
    """Return colour and marker of the k-th curve of a figure."""
    return {"color": f"C{k}", "marker": MARKERS[k % len(MARKERS)]}


def new_axes(ax: Axes | None, width: float, height: float) -> tuple[Axes, bool]:
    """Return the axes to draw on, and whether they are those of a new figure of that size."""
    if ax is not None:
        return ax, False
    return plt.subplots(figsize=(width, height), layout="constrained")[1], True


def panel(width: float, height: float, **key) -> Callable:
    """Decorate a function that draws on ``ax``, so that ``ax`` becomes optional.

    The decorated function draws on the axes it is given, or in a new figure of that size; it adds
    the :func:`legend`, with the arguments ``key``, and returns the axes.
    """

    def decorate(draw: Callable[..., None]) -> Callable[..., Axes]:
        @wraps(draw)
        def drawn(*tables, ax: Axes | None = None, **options) -> Axes:
            ax, own = new_axes(ax, width, height)
            draw(*tables, ax=ax, **options)
            legend(ax, own, **key)
            return ax

        optional = Parameter("ax", Parameter.KEYWORD_ONLY, default=None, annotation="Axes | None")
        parameters = signature(draw).parameters | {"ax": optional}
        drawn.__signature__ = signature(draw).replace(
            parameters=list(parameters.values()), return_annotation="Axes"
        )
        return drawn

    return decorate


def compose(
    axes: Panels,
    width: float,
    height: float,
    draw: Sequence[Callable[..., Axes]],
    n_rows: int = 1,
    *,
    key: dict | None = None,
    one_label: str = "",
    **options,
) -> np.ndarray:
    """Draw a picture of several panels, on given axes or in a new figure of that size.

    In a new figure, labels that panels of a row or column share are written once.

    Args:
        axes: one per panel, row by row, in any shape.
        draw: functions that each draw one panel on their argument ``ax``, row by row.
        key: arguments of :func:`legend` for one legend in place of those of the panels.
        one_label: the axes, "x", "y" or "xy", that get one label for the whole figure.
        options: arguments of ``plt.subplots``.

    Returns:
        Axes ``(columns,)``, or ``(rows, columns)`` if there are several rows.

    Raises:
        ValueError: there are more or fewer axes than panels.
    """
    shape, own = (n_rows, len(draw) // n_rows), axes is None
    if own:
        options |= {"figsize": (width, height), "squeeze": False, "layout": "constrained"}
        axes = plt.subplots(*shape, **options)[1]
    panels = np.ravel(np.asarray(axes, dtype=object))
    if panels.size != len(draw):
        raise ValueError(f"{panels.size} axes given: give {len(draw)}, row by row")
    for ax, draw_panel in zip(panels, draw, strict=True):
        draw_panel(ax=ax)
    panels = panels.reshape(shape)
    if own:
        _label_once(panels, one_label)
    if key is not None:
        legend(panels, own, **key)
    return panels if n_rows > 1 else panels[0]


def _label_once(panels: np.ndarray, one_label: str) -> None:
    for row in panels:
        for ax in row[1:]:
            if ax.get_ylabel() == row[0].get_ylabel():
                ax.set_ylabel("")
    for ax in panels[:-1].flat:
        ax.set_xlabel("")
    for axis in one_label:
        label = getattr(panels[-1, 0], f"get_{axis}label")()
        getattr(panels[0, 0].figure, f"sup{axis}label")(label, fontsize=8)
        plt.setp(panels.ravel().tolist(), f"{axis}label", "")


def legend(
    axes: Axes | np.ndarray,
    own: bool,
    loc: str | None = "beside",
    ncols: int | None = None,
    **options,
) -> None:
    """Draw one legend with the labels of the first of ``axes``, in place of those of the panels.

    Args:
        own: whether the figure is new: then the legend goes outside all axes, at ``loc``, in ``ncols``
            columns; otherwise, or without a ``loc``, it goes into the first of the axes.
        loc: of ``Figure.legend``; "beside" is to the right of a page's figure, and above that of a
            column, which is too narrow, in two columns if labels are short.
        options: arguments of ``Axes.legend``.
    """
    axes = np.ravel(axes)
    if loc == "beside":
        wide = axes[0].figure.get_figwidth() > COLUMN
        longest = max(map(len, axes[0].get_legend_handles_labels()[1]), default=0)
        loc, usual = ("right upper", 1) if wide else ("upper center", 2 if longest < 22 else 1)
        ncols = ncols or usual
    for old in filter(None, [ax.get_legend() for ax in axes]):
        old.remove()
    if "handles" not in options:
        options["handles"], options["labels"] = axes[0].get_legend_handles_labels()
    if not options["handles"]:
        return
    if own and loc:
        axes[0].figure.legend(loc=f"outside {loc}", ncols=ncols or 1, **options)
    else:
        axes[0].legend(frameon=True, edgecolor="none", **options)  # legible on curves


def percent(axis: Axis, decimals: int | None = None) -> None:
    """Label an axis of shares in per cent."""
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def integers(axis: Axis) -> None:
    """Put the ticks of an axis at whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True))


def plain_ticks(axis: Axis, values: Sequence[float], text: str = "{:g}") -> None:
    """Put ticks with plain numbers at those ``values`` that a logarithmic axis shows."""
    low, high = sorted(axis.get_view_interval())
    shown = [v for v in values if low <= v <= high]
    axis.set_ticks(shown, [text.format(v) for v in shown], minor=False)
    axis.set_ticks([], minor=True)


def plain_log_ticks(axis: Axis) -> None:
    """Write plain numbers at some multiples of the powers of ten of a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def whiskers(value: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Return the lengths ``(2, n)``, at least 0, of error bars from ``low`` to ``high``."""
    return np.clip([value - low, high - value], 0, None)


def interval_line(ax: Axes, table: pd.DataFrame, x: str, y: str, **style) -> None:
    """Draw a curve of ``y`` over ``x`` with error bars from column low to column high."""
    table = table.sort_values(x)
    error = whiskers(table[y], table["low"], table["high"])
    ax.errorbar(table[x], table[y], yerr=error, capsize=2, **style)


def setting_points(ax: Axes, rows: pd.DataFrame, x: str, largest: float, **style) -> None:
    """Draw a point per setting of a policy: mean and range of ``x`` and quality_loss over the seeds.

    Points whose mean loss exceeds ``largest`` are left out.
    """
    settings = rows.groupby(setting_of(rows))[[x, "quality_loss"]]
    mean, low, high = settings.mean(), settings.min(), settings.max()
    shown = mean["quality_loss"] <= largest
    xerr, yerr = (
        whiskers(mean[c][shown], low[c][shown], high[c][shown]) for c in (x, "quality_loss")
    )
    ax.errorbar(*mean[shown].to_numpy().T, xerr=xerr, yerr=yerr, **{"markersize": 4} | style)


def mean_line(ax: Axes, table: pd.DataFrame, x: str, y: str, **style) -> None:
    """Draw the mean of ``y`` over rows with the same ``x``, and their range as a shade."""
    import seaborn as sns  # here, since most notebooks draw no such line and need not wait for it

    band = {"errorbar": ("pi", 100), "err_kws": {"alpha": 0.2, "linewidth": 0}}
    style = {"markersize": 4.5, "markeredgewidth": 0} | style
    sns.lineplot(table, x=x, y=y, ax=ax, legend=False, **band, **style)


def mean_lines(ax: Axes, table: pd.DataFrame, x: str, y: str, hue: str) -> None:
    """Draw a :func:`mean_line` for each value of ``hue``, in the order of the table."""
    for k, (name, rows) in enumerate(table.groupby(hue, sort=False)):
        mean_line(ax, rows, x, y, label=name, **look(k))


@panel(PAGE, 2.6)
def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None,
    x_label: str,
    y_label: str,
    log: bool = True,
    *,
    ax: Axes,
) -> None:
    """Draw a :func:`mean_line` per value of ``hue`` (one if it is None), log–log by default."""
    if hue is None:
        mean_line(ax, table, x, y, marker="o")
    else:
        mean_lines(ax, table, x, y, hue)
    if log:
        ax.set(xscale="log", yscale="log")
        plain_ticks(ax.xaxis, sorted(table[x].unique()))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        integers(ax.xaxis)
    ax.set(xlabel=x_label, ylabel=y_label)


def grouped_bars(
    ax: Axes,
    values: pd.DataFrame,
    text: str,
    *,
    missing: str = "",
    bottom: float = 0.0,
    colors: Sequence[str] | None = None,
    **text_style,
) -> None:
    """Draw upright bars: a group for each row of ``values``, a colour for each column.

    ``text`` formats the number at a bar, ``missing`` replaces a bar without a value (NaN), bars begin
    at ``bottom``; ``text_style`` are arguments of ``Axes.bar_label``.
    """
    at, width = np.arange(len(values)), 0.8 / values.shape[1]
    for k, (name, column) in enumerate(values.items()):
        x = at + (k - (values.shape[1] - 1) / 2) * width
        heights = column.fillna(bottom) - bottom
        color = colors[k] if colors else f"C{k}"
        bars = ax.bar(x, heights, width, bottom=bottom, label=name, color=color)
        texts = [missing if np.isnan(v) else text.format(v) for v in column]
        ax.bar_label(bars, texts, **({"fontsize": SMALL, "padding": 1} | text_style))
    ax.set_xticks(at, values.index)
    ax.grid(axis="x", visible=False)


def stacked_bars(
    ax: Axes,
    values: pd.DataFrame,
    text: str,
    *,
    colors: Sequence | None = None,
    totals: pd.Series | None = None,
    height: float = 0.8,
) -> None:
    """Draw horizontal bars: one for each row of ``values``, from the top, with a piece per column.

    ``text`` formats the total behind a bar; ``totals`` are given if they are not sums of the pieces.
    """
    at, ends = np.arange(len(values)), np.zeros(len(values))
    for k, (name, column) in enumerate(values.fillna(0).items()):
        color = colors[k] if colors else f"C{k}"
        ax.barh(at, column, height, left=ends, color=color, label=name)
        ends = ends + column.to_numpy()
    totals = ends if totals is None else totals.to_numpy()
    for y, (end, total) in enumerate(zip(ends, totals, strict=True)):
        ax.text(max(end, total), y, text.format(total), va="center", fontsize=SMALL)
    ax.set_yticks(at, values.index)
    ax.set(xlim=(0, 1.15 * max(*ends, *totals)), ylim=(len(values) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)


def part_bars(ax: Axes, table: pd.DataFrame, text: Callable[[float], str]) -> None:
    """Draw horizontal bars on a logarithmic scale: the cost of each part in units of one block.

    Columns: part, group ("block", "check" or "head"), share_of_block. ``text`` formats the number
    behind a bar.
    """
    kinds = {"block": ("C0", "block"), "check": ("C2", "exit check"), "head": ("C1", "head")}
    for group, rows in table.groupby("group", sort=False):
        color, label = kinds[group]
        bars = ax.barh(rows["part"], rows["share_of_block"], color=color, label=label)
        texts = [text(share) for share in rows["share_of_block"]]
        ax.bar_label(bars, texts, fontsize=SMALL, padding=3, bbox=BACKGROUND)
    ax.invert_yaxis()
    ax.axvline(1, **REFERENCE)
    ax.set(xscale="log")
    ax.margins(x=0.25)
    ax.grid(axis="y", visible=False)
