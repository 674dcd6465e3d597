"""Predict time from work by a machine's prices, fitted on some configurations and checked on others.

The time of a part is a sum of few terms, each an amount of work times a price (seconds per launch, per
FLOP, per byte, …). Prices are non-negative and minimise the error relative to the whole run's time, so
that short and long runs count alike, and a part that takes hardly any time has hardly any weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls
from tqdm.auto import tqdm

from earlyexit.atomic import atomic_path
from earlyexit.checked import Checked, Weight, exact_fields, read_document
from earlyexit.cost.breakdown import run_times
from earlyexit.cost.parts import FULL_DEPTH, Load, work
from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
)
from earlyexit.exits.clock import PARTS
from earlyexit.nn.config import ModelConfig

# (d_model, n_layers, vocabulary, batch, length, mean depth, output head): they cover the range of every
# size that prices depend on. No configuration is both fitted and checked.
FITTED = (
    (32, 3, 1000, 4, 64, 1.5),
    (64, 4, 2000, 32, 128, 2.0),
    (64, 2, 10000, 8, 128, 1.4),
    (64, 6, 3000, 1, 128, 3.0),
    (128, 4, 5000, 8, 128, 2.5),
    (128, 8, 1000, 16, 64, 4.0),
    (256, 2, 2000, 16, 128, 1.5),
    (256, 4, 500, 8, 128, 2.0),
    (64, 4, 10000, 32, 128, 2.0, "adaptive"),
    (128, 3, 4000, 8, 128, 1.5, "adaptive"),
    (256, 4, 10000, 8, 128, 2.5, "adaptive"),
)

CHECKED = (
    (64, 4, 10000, 16, 128, 2.0),
    (96, 6, 6000, 16, 128, 3.0, "adaptive"),
    (192, 4, 4000, 8, 128, 1.5),
    (192, 6, 10000, 8, 128, 2.0, "adaptive"),
    (48, 3, 1500, 32, 64, 2.0),
    (256, 6, 1000, 4, 128, 2.5),
    (128, 3, 8000, 2, 128, 2.0),
)

# Further configurations that are measured as points of the break-even map.
MAPPED = (
    (64, 4, 500, 32, 128, 1.5),
    (64, 4, 1500, 32, 128, 2.5),
    (64, 4, 8000, 32, 128, 1.5),
    (64, 4, 500, 1, 128, 1.5),
    (64, 4, 4000, 1, 128, 2.5),
    (64, 8, 500, 32, 128, 3.0),
    (64, 8, 4000, 32, 128, 6.0),
)

UNDISTURBED = 0.25  # quantile of the repeats: other processes can only add time
OUTLIER, REWEIGHTINGS = 0.03, 10  # of a run's time: larger errors are taken to be disturbances
FITTED_CRITERIA = ("gate", "max_probability")


def loads(grid: Sequence[tuple], criteria: Sequence[str] = FITTED_CRITERIA) -> list[Load]:
    """Return the loads of a grid: each configuration at full depth and with exits of each criterion."""
    out = []
    for d, layers, vocabulary, batch, length, depth, *head in grid:
        (head,) = head or ("linear",)
        config = ModelConfig(
            vocabulary, d, layers, n_seq=length, dropout_p=0.0, gate_hidden=0, output_head=head
        )
        shares = tuple(geometric_shares(layers, depth))
        out.append(Load(config, batch, length))
        out += [Load(config, batch, length, criterion, shares) for criterion in criteria]
    return out


def measure(wanted: Sequence[Load], device: torch.device, repeats: int = 5) -> pd.DataFrame:
    """Measure every load, interleaved, with random weights and constructed exits.

    Returns:
        The table of :func:`run_times`, with ``load``, the index in ``wanted``, instead of run.
    """

    @cache
    def made(config: ModelConfig, batch: int, length: int):
        """Return one model and batch for all loads that differ in exits only."""
        return random_model(config).to(device), random_tokens(config, batch, length).to(device)

    runs = {}
    for index, load in enumerate(tqdm(wanted, desc="prepare", leave=False)):
        (model, x), policy = made(load.config, load.batch, load.length), None
        if load.criterion != FULL_DEPTH:
            policy = policy_for_shares(model, x, load.shares, load.criterion)
        runs[index] = partial(model.nll, x, x, policy)
    with tqdm(total=4 * len(runs) * repeats, desc="time runs", leave=False) as bar:

        def counted(index: int) -> None:
            runs[index]()
            bar.update()

        calls = {index: partial(counted, index) for index in runs}
        return run_times(calls, device, repeats, UNDISTURBED).rename(columns={"run": "load"})


@dataclass(frozen=True)
class TimeModel(Checked):
    """A time model holds the prices of a machine and predicts the time of loads from them.

    Attributes:
        prices: part → kind of work → seconds per unit.
        check: median and largest relative error on configurations that were not fitted, if checked.
        machine: description of the machine that they were measured on.

    Raises:
        ValueError: a price is negative, or a field is of another type.
    """

    prices: dict[str, dict[str, Weight]]
    check: dict[str, float]
    machine: dict[str, Any] = field(default_factory=dict)

    def predict(self, load: Load) -> dict[str, float]:
        """Predict the milliseconds of each part of a run; their sum is the time of the run."""
        out = dict.fromkeys(PARTS, 0.0)
        for part, amounts in work(load).items():
            prices = self.prices.get(part, {})
            out[_measured_as(part)] += 1e3 * sum(
                prices.get(kind, 0.0) * n for kind, n in amounts.items()
            )
        return out

    def milliseconds(self, load: Load) -> float:
        """Predict the milliseconds of a run."""
        return sum(self.predict(load).values())

    def speedup(self, load: Load) -> float:
        """Predict the wall-clock speedup against the same model at full depth."""
        return self.milliseconds(load.at_full_depth) / self.milliseconds(load)

    def save(self, path: Path) -> None:
        """Write JSON, with a digest of it."""
        text = json.dumps(self.__dict__ | {"digest": self._digest()}, indent=2) + "\n"
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TimeModel:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds no time model, or was changed; the message names it.
        """
        return read_document(path, cls._from_dict)

    @classmethod
    def _from_dict(cls, data: object) -> TimeModel:
        digest = data.pop("digest", "") if isinstance(data, dict) else ""
        model = cls(**exact_fields(data, cls))
        if model._digest() != digest:
            raise ValueError("no time model as it was written")
        return model

    def _digest(self) -> str:
        content = json.dumps(self.__dict__, sort_keys=True, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def fit(measured: pd.DataFrame, wanted: Sequence[Load]) -> TimeModel:
    """Fit prices to loads, by non-negative least squares of the error relative to the run's time.

    Args:
        measured: the table that :func:`measure` returns for ``wanted``.
    """
    works = [work(load) for load in wanted]
    seconds = measured.set_index(["load", "part"])["milliseconds"] / 1e3
    totals = measured.groupby("load")["total_ms"].first() / 1e3
    prices: dict[str, dict[str, float]] = {}
    for part in sorted({part for amounts in works for part in amounts}):
        users = [i for i, amounts in enumerate(works) if part in amounts]
        kinds = sorted({kind for i in users for kind in works[i][part]})
        amounts = np.array([[works[i][part].get(kind, 0.0) for kind in kinds] for i in users])
        target = np.array([seconds[i, _measured_as(part)] for i in users])
        weight = 1 / totals[users].to_numpy()
        solution = _robust_nnls(amounts * weight[:, None], target * weight)
        prices[part] = dict(zip(kinds, solution.tolist(), strict=True))
    return TimeModel(prices, {})


def _measured_as(part: str) -> str:
    """Return the measured part that a part of the work belongs to; a projected check is a check."""
    return "check" if part.endswith(" check") else part


def _robust_nnls(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimise Huber's loss of a x − b over x ≥ 0, so that outliers have little influence."""
    scale = np.maximum(a.max(axis=0), 1e-300)  # columns of equal size condition the problem well
    a, trust = a / scale, np.ones(len(b))
    for _ in range(REWEIGHTINGS):
        x, _ = nnls(a * trust[:, None], b * trust)
        trust = np.sqrt(np.minimum(1, OUTLIER / np.maximum(np.abs(a @ x - b), 1e-12)))
    return x / scale


def check(model: TimeModel, measured: pd.DataFrame, wanted: Sequence[Load]) -> pd.DataFrame:
    """Compare the predicted with the measured time of loads.

    Returns:
        One row per load: d_model, n_layers, vocab_size, output_head, batch, n_seq, criterion,
        mean_depth, measured_ms, predicted_ms, error (relative).
    """
    table = pd.DataFrame([load.describe() for load in wanted])
    table["measured_ms"] = measured.groupby("load")["total_ms"].first()
    table["predicted_ms"] = [model.milliseconds(load) for load in wanted]
    return table.assign(error=table["predicted_ms"] / table["measured_ms"] - 1)


def calibrate(
    device: torch.device,
    repeats: int = 7,
    fitted: Sequence[tuple] = FITTED,
    checked: Sequence[tuple] = CHECKED,
) -> tuple[TimeModel, pd.DataFrame]:
    """Fit this machine's prices and check them on other configurations.

    Args:
        fitted, checked: grids for :func:`loads`, timed interleaved, so that drift affects both alike.

    Returns:
        The time model, and the table of :func:`check` with a column ``used`` ("fitted", "checked").
    """
    to_fit, to_check = loads(fitted), loads(checked)
    times = measure(to_fit + to_check, device, repeats)
    model = fit(times[times["load"] < len(to_fit)], to_fit)
    used = ["fitted"] * len(to_fit) + ["checked"] * len(to_check)
    table = check(model, times, to_fit + to_check).assign(used=used)
    errors = table.loc[table["used"] == "checked", "error"].abs()
    summary = {"median_error": float(errors.median()), "largest_error": float(errors.max())}
    return TimeModel(model.prices, summary), table


def unpriced(model: TimeModel, load: Load) -> list[str]:
    """Return the parts of a load for which the model has no price, so that it cannot predict it."""
    return [part for part in work(load) if part not in model.prices]


def beyond(load: Load) -> list[str]:
    """Return a phrase for each size in which a load is outside the range that prices are fitted on."""
    config = load.config
    sizes = (config.d_model, config.n_layers, config.vocab_size, load.batch, load.length)
    names = ("d_model", "n_layers", "vocabulary", "batch", "n_seq")
    measured = zip(*(row[:5] for row in FITTED), strict=True)
    return [
        f"{name}={size} (measured: {min(seen)} to {max(seen)})"
        for name, size, seen in zip(names, sizes, measured, strict=True)
        if not min(seen) <= size <= max(seen)
    ]
