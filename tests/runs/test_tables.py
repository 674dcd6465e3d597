"""What a screen and a page show of a table: one row for all seeds, digits that mean something."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from paper import width

from earlyexit.runs.tables import ROWS, TEXT_WIDTH, brief, latex


def table(seeds: int = 3) -> pd.DataFrame:
    rows = [
        {"seed": seed, "criterion": name, "epsilon": e, "loss": 0.05 + 0.001 * seed, "n": 12_345}
        for seed in range(seeds)
        for name in ("gate", "maximum_probability")
        for e in (0.01, 0.05)
    ]
    return pd.DataFrame(rows)


def test_seeds_become_a_mean_and_a_range():
    shown = brief(table(), ["criterion", "epsilon"], ["loss", "n"])
    assert list(shown.index) == [
        (name, e) for name in ("gate", "maximum_probability") for e in ("0.01", "0.05")
    ]
    assert set(shown["loss"]) == {"0.0510 [0.0500, 0.0520]"} and set(shown["n"]) == {"12,345"}
    plain = brief(table(), ["criterion", "epsilon"], ["loss"], ranges=False)
    assert set(plain["loss"]) == {"0.0510"} == set(brief(table(1).assign(loss=0.051))["loss"])


def test_a_seed_counts_once_and_what_is_missing_is_a_dash():
    uneven = pd.DataFrame({"seed": [0, 0, 0, 1], "x": "a", "y": [1.0, 1.0, 1.0, 3.0]})
    assert brief(uneven)["y"].item() == "2.00 [1.00, 3.00]"
    names = pd.DataFrame({"seed": 0, "x": ["b", "a"]})  # nothing but what tells rows apart
    assert list(brief(names).index) == ["b", "a"] and latex(names, "t", "T").count(r"\\") == 3
    gone = pd.DataFrame({"seed": 0, "x": ["a", None], "e": [0.1, np.nan], "y": [np.nan, 2.5]})
    shown = brief(gone, ["x", "e"], ["y"])
    assert dict(shown["y"]) == {("a", "0.1"): "–", ("–", "–"): "2.50"}


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([2.8734, 1.0], ["2.87", "1.00"]),
        ([114.31, 98.0], ["114.3", "98.0"]),
        ([0.0512, -0.001], ["0.0512", "-0.0010"]),
        ([123456.7, 9.0], ["123,457", "9"]),
        ([1234567, 89], ["1,234,567", "89"]),
        ([3.2e-11, 4e-5], ["3.2e-11", "4e-05"]),
        ([23.4567, 0.012345], ["23.5", "0.0123"]),
        ([0.0, 0.0], ["0", "0"]),
        ([True, False], ["yes", "no"]),
        (["held", "not held"], ["held", "not held"]),
    ],
)
def test_numbers_have_the_digits_that_a_reader_needs(values, texts):
    rows = pd.DataFrame({"seed": 0, "x": ["a", "b"], "y": values})
    assert list(brief(rows, ["x"], ["y"])["y"]) == texts


def test_a_page_is_wide_enough_whatever_the_table():
    wide = table().assign(
        **{f"a_rather_long_name_{k}": np.arange(12) * 0.123 + k for k in range(9)}
    )
    tex = latex(wide, "wide", "A table", ["criterion", "epsilon"])
    assert 0.6 * TEXT_WIDTH < width(tex) <= TEXT_WIDTH
    assert r"\small" in tex and "[" not in tex  # the ranges are in the CSV
    assert width(wide.to_latex()) > TEXT_WIDTH  # the control: all of it
    with_ranges = latex(table(), "t", "A table", ["criterion", "epsilon"])
    assert "0.0510 [0.0500, 0.0520]" in with_ranges and width(with_ranges) <= TEXT_WIDTH


def test_points_of_a_curve_are_no_table():
    curve = pd.DataFrame({"seed": 0, "x": "a", "threshold": np.linspace(0, 1, 20)})
    assert latex(curve, "curve", "A curve") is None
    long = pd.DataFrame({"seed": 0, "x": range(ROWS + 1), "y": 0.5})
    assert latex(long, "long", "Too long", ["x"]) is None
    assert latex(long.iloc[1:], "long", "Just fits", ["x"]).count(r"\\") == ROWS + 1


def test_signs_are_those_of_latex():
    rows = pd.DataFrame({"seed": 0, "by_x": ["a & b ×", "ε ≤ 1"], "y": [1.0, np.nan]})
    tex = latex(rows, "t", "5 % of x_y, δ", ["by_x"], ["y"])
    for part in (r"a \& b $\times$", r"$\varepsilon$ $\le$ 1", r"5 \% of x\_y, $\delta$", "by x"):
        assert part in tex
    assert re.search(r"& -- \\\\", tex) and r"\label{tab:t}" in tex
    assert tex.isascii()
