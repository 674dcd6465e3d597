"""Predict where early exit loses, over head/block ratio, depth, exit rate and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

from earlyexit.cost.parts import FULL_DEPTH, Load, head_ratio
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.cost.time_model import FITTED_CRITERIA, TimeModel
from earlyexit.models.operations import operations
from earlyexit.nn.config import ModelConfig

VOCABULARIES = np.geomspace(100, 50_000, 14).astype(int)
# Share of the layers after the first. It is never 0: a run that stops after one is a special case.
SHARES_EXECUTED = np.linspace(0.05, 1, 9)


def break_even_map(
    model: TimeModel,
    panels: Sequence[tuple[int, int]] = ((4, 1), (4, 32), (8, 32)),
    criteria: Sequence[str] = FITTED_CRITERIA,
    d_model: int = 64,
    length: int = 128,
) -> pd.DataFrame:
    """Predict the wall-clock speedup of scoring, head included, against full depth.

    Args:
        model: the prices of a machine.
        panels: pairs of (layers, batch).

    Returns:
        Columns criterion, n_layers, batch, vocab_size, head_ratio, mean_depth, executed (share of the
        layers), speedup_time.
    """
    rows = []
    base = ModelConfig(1000, d_model, n_seq=length, dropout_p=0.0, gate_hidden=0)
    for (layers, batch), vocabulary in product(panels, VOCABULARIES.tolist()):
        config = replace(base, vocab_size=vocabulary, n_layers=layers)
        ratio = head_ratio(operations(config))
        for criterion, depth in product(criteria, 1 + (layers - 1) * SHARES_EXECUTED):
            load = Load(config, batch, length, criterion, tuple(geometric_shares(layers, depth)))
            key = (criterion, layers, batch, vocabulary, ratio, depth, depth / layers)
            rows.append((*key, model.speedup(load)))
    columns = ("criterion", "n_layers", "batch", "vocab_size", "head_ratio", "mean_depth")
    return pd.DataFrame(rows, columns=[*columns, "executed", "speedup_time"])


def measured_points(checked: pd.DataFrame) -> pd.DataFrame:
    """Return measured and predicted speedups of the runs that prices were not fitted on.

    Args:
        checked: the table of :func:`earlyexit.cost.time_model.calibrate`.

    Returns:
        The columns of :func:`break_even_map` and d_model, n_seq, output_head; ``speedup_time`` is
        measured, ``speedup_predicted`` is predicted.
    """
    held_out = checked[checked["used"] == "checked"]
    keys = ["d_model", "n_layers", "vocab_size", "output_head", "batch", "n_seq"]
    plain = held_out[held_out["criterion"] == FULL_DEPTH].set_index(keys)
    runs = held_out[held_out["criterion"] != FULL_DEPTH]
    full = plain.loc[pd.MultiIndex.from_frame(runs[keys])]
    ratios = [
        head_ratio(
            operations(ModelConfig(row.vocab_size, row.d_model, output_head=row.output_head))
        )
        for row in runs.itertuples()
    ]
    return runs[[*keys, "criterion", "mean_depth"]].assign(
        head_ratio=ratios,
        executed=runs["mean_depth"] / runs["n_layers"],
        speedup_time=full["measured_ms"].to_numpy() / runs["measured_ms"].to_numpy(),
        speedup_predicted=full["predicted_ms"].to_numpy() / runs["predicted_ms"].to_numpy(),
    )


def errors_by_check(points: pd.DataFrame) -> pd.DataFrame:
    """Score predicted speedups by kind of check: one column of errors hides that a kind is biased.

    Args:
        points: the table of :func:`measured_points`.

    Returns:
        One row per criterion and output head: criterion, output_head, runs, bias (median of the
        relative errors; above 0: predicted too fast), median_error and largest_error (absolute), and
        right, the share of runs of which it is predicted whether exits win.
    """
    error = points["speedup_predicted"] / points["speedup_time"] - 1
    right = (points["speedup_time"] > 1) == (points["speedup_predicted"] > 1)
    table = points.assign(error=error, size=error.abs(), right=right)
    kinds = table.groupby(["criterion", "output_head"], as_index=False)
    return kinds.agg(
        runs=("error", "size"),
        bias=("error", "median"),
        median_error=("size", "median"),
        largest_error=("size", "max"),
        right=("right", "mean"),
    )
