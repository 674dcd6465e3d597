"""A table is published whole as CSV; on screen and in LaTeX it has the columns that matter.

Who writes a table names them once: ``by`` tells its rows apart, ``of`` are the numbers. A row that
several seeds have is their mean, with the least and the largest in brackets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_float_dtype, is_integer_dtype, is_numeric_dtype

COLUMNS, ROWS = 7, 45  # at most, of a LaTeX table on one page
TEXT_WIDTH = 7.0 * 72.27  # TeX points of a page's text, as of the widest figures
GAP = 12.0  # points between columns: twice LaTeX's \tabcolsep
MISSING = "–"
# Points of a digit of Computer Modern at 9 points, wider than a letter on average, and of narrow signs.
DIGIT, NARROW = 4.63, dict.fromkeys(".,:'[]()il", 2.6) | {" ": 3.1}

_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"ε": r"$\varepsilon$", "δ": r"$\delta$", "η": r"$\eta$", "σ": r"$\sigma$"}
    | {"×": r"$\times$", "−": "$-$", "≤": r"$\le$", "≥": r"$\ge$", "–": "--"}
)


def brief(
    df: pd.DataFrame,
    by: Sequence[str] | None = None,
    of: Sequence[str] | None = None,
    ranges: bool = True,
) -> pd.DataFrame:
    """Return the columns of a table that matter, as texts, with one row for all seeds.

    Args:
        df: a tidy table with a column seed.
        by: columns that tell rows apart, the index of the result; None: those without fractions.
        of: columns whose values are shown, numbers as means over the seeds. None: all others, as far
            as ``COLUMNS`` goes.
        ranges: whether the least and the largest follow a mean over seeds that differ.

    Raises:
        KeyError: the table has no such column.
    """
    by = _keys(df) if by is None else list(by)
    if of is None:
        of = [c for c in df if c not in ("seed", *by)][: COLUMNS - len(by)]
    keys = [df[name].map(_plain) for name in by]
    groups, levels = df.groupby(keys, sort=False), list(range(len(keys)))
    shown = {name: groups[name].agg(_joined) for name in of if not _is_number(df[name])}
    for name in (name for name in of if _is_number(df[name])):
        each = df.groupby([*keys, df["seed"]], sort=False)[name].mean()  # a seed counts once
        seeds, write = each.groupby(level=levels, sort=False), _number_format(df[name])
        mean, low, high = (
            values.map(lambda v, write=write: MISSING if np.isnan(v) else write.format(v))
            for values in (seeds.mean(), seeds.min(), seeds.max())
        )
        ends = (" [" + low + ", " + high + "]").where(low != high, "")
        shown[name] = mean + ends if ranges else mean
    return pd.DataFrame(shown, groups.size().index, list(of))


def latex(
    df: pd.DataFrame,
    name: str,
    caption: str,
    by: Sequence[str] | None = None,
    of: Sequence[str] | None = None,
) -> str | None:
    """Return a booktabs table of what matters that fits a page, 7 inches wide at 9 points.

    Where the ranges over seeds do not fit, they are left to the CSV, and then the last columns.

    Returns:
        LaTeX; None if that would be more than ``ROWS`` rows, or if ``by`` is not given and it is not a
        few columns without fractions that tell the rows apart: then they are the points of a curve.
    """
    keys = _keys(df) if by is None else list(by)
    curve = by is None and (len(keys) > 4 or df.duplicated([*keys, "seed"]).any())
    if not keys or curve or len(df.drop_duplicates(keys)) > ROWS:
        return None
    table = brief(df, keys, of)
    if not _fits(table):
        table = brief(df, keys, of, ranges=False)
    while table.shape[1] > 1 and not _fits(table):
        table = table.iloc[:, :-1]
    table = table.reset_index()
    numbers = [table[c].str.fullmatch(r"[–\d.,+\-e \[\]]+").all() for c in table]
    table = table.map(lambda text: text.translate(_LATEX))
    table.columns = [c.replace("_", " ").translate(_LATEX) for c in table]
    text = table.style.hide(axis="index").to_latex(
        hrules=True,
        column_format="".join("r" if number else "l" for number in numbers),
        caption=caption.translate(_LATEX),
        label=f"tab:{name}",
        position_float="centering",
    )
    return text.replace("\\centering\n", "\\centering\n\\small\n")


def _keys(df: pd.DataFrame) -> list[str]:
    """Return the columns without fractions, as far as a page goes."""
    names = [c for c in df if c != "seed" and not is_float_dtype(df[c])]
    return names[: COLUMNS - 1]


def _fits(table: pd.DataFrame) -> bool:
    """Tell whether a table is no wider than the text of a page."""
    table = table.reset_index()
    widest = [max(map(_points, [c, *table[c]])) + GAP for c in table]
    return len(widest) <= COLUMNS and sum(widest) <= TEXT_WIDTH


def _points(text: str) -> float:
    return sum(NARROW.get(c, DIGIT) for c in text)


def _is_number(column: pd.Series) -> bool:
    return is_numeric_dtype(column) and not is_bool_dtype(column)


def _plain(value: object) -> str:
    """Write a value that tells rows apart."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return MISSING if np.isnan(value) else f"{value:.4g}"
    return MISSING if pd.isna(value) else str(value)


def _joined(values: pd.Series) -> str:
    return ", ".join(dict.fromkeys(map(_plain, values)))


def _number_format(column: pd.Series) -> str:
    """Choose digits: three of the largest number, or of each where they differ in size."""
    sizes = column.abs()
    largest, least = sizes.max(), sizes[sizes > 0].min()
    if is_integer_dtype(column) or not largest > 0 or largest >= 10_000:
        return "{:,.0f}"
    if largest < 1e-3 or (largest >= 10 and least < 0.1):
        return "{:.3g}"
    return "{:,.1f}" if largest >= 10 else f"{{:.{2 - int(np.floor(np.log10(largest)))}f}}"
