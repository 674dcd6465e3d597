"""Measure three speedups on one batch: end to end, by threshold, by depth and by output head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost import time_model
from earlyexit.cost.breakdown import ORIGINAL, compaction_speedups, run_times
from earlyexit.cost.parts import FULL_DEPTH, batch_speedups, policy_flops
from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
    rule_threshold,
)
from earlyexit.cost.timing import INTERVAL, interleaved_times, time_columns
from earlyexit.evaluation.compare import run_rows
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares
from earlyexit.nn.config import ModelConfig

# Part of a run → its name in :func:`earlyexit.cost.parts.policy_flops`; None: it has no FLOPs.
PARTS_OF_FLOPS = {
    "blocks": "blocks",
    "check": "checks",
    "propagation": "propagation",
    "gather/scatter": None,
    "head": "head",
    "rest": None,
}


def end_to_end(
    model: EarlyExitModel,
    policy: ExitPolicy,
    batch: tuple[Tensor, Tensor],
    pieces: pd.DataFrame,
    loader: Iterable,
) -> pd.DataFrame:
    """Measure the loss of one policy over a split, and its savings on the timed batch.

    Args:
        batch: token ids and targets ``(B, N)``.
        pieces: :func:`earlyexit.cost.breakdown.run_times` of its ``execution_runs``.
        loader: batches on which the quality is measured.

    Returns:
        One row: quality_loss, speedup_layers, speedup_flops, speedup_time, time_of_flops (the speedup
        in time over that in FLOPs), original_time (time of the original's procedure over that of
        compacted execution).
    """
    totals = pieces.groupby("run")["total_ms"].first()
    table = run_rows(model, [policy], loader)[["quality_loss"]].assign(
        **batch_speedups(model, *batch, policy),
        speedup_time=totals[FULL_DEPTH] / totals["compacted"],
    )
    return table.assign(
        time_of_flops=table["speedup_time"] / table["speedup_flops"],
        original_time=totals[ORIGINAL] / totals["compacted"],
    )


def policies_of_quantiles(
    trace: ExitTrace, criterion: str, quantiles: Sequence[float]
) -> list[ExitPolicy]:
    """Return, per quantile, a policy whose one threshold (not at the last exit) that share fails."""
    rule, early = CRITERIA[criterion], trace.n_layers - 1
    scores = trace.score(criterion)[:, :early]
    cuts = [rule_threshold(rule, scores, 1 - q) for q in quantiles]
    return [ExitPolicy(criterion, (cut,) * early + (rule.never,)) for cut in cuts]


def execution_speedups(
    model: EarlyExitModel,
    original: EarlyExitModel,
    batch: tuple[Tensor, Tensor],
    policies: Sequence[ExitPolicy],
    repeats: int,
) -> pd.DataFrame:
    """Measure layers, FLOPs and time of policies in each execution.

    Each policy runs compacted, and also dense, or by the original's procedure if its criterion is
    maximum probability. The latter is compared with the full depth of ``original``.

    Args:
        original: the model that the original's procedure runs, with a plain matrix as its head.
        batch: token ids and targets ``(B, N)``.

    Returns:
        Columns execution, layers (mean executed), speedup_layers, speedup_flops (compacted only),
        speedup_time with its 90 % interval low to high, milliseconds, efficiency (time / layers).
    """
    (x, y), original_full_depth = batch, f"{FULL_DEPTH}, {ORIGINAL}"
    runs = {FULL_DEPTH: lambda: model.nll(x, y), original_full_depth: lambda: original.nll(x, y)}
    for p in policies:
        runs[p, "compacted"] = lambda p=p: model.nll(x, y, p)
        if p.criterion == "max_probability":
            runs[p, ORIGINAL] = lambda p=p: original_early_exit(original, x, p.thresholds[0])
        else:
            runs[p, "dense"] = lambda p=p: model.nll(x, y, p, "dense")
    seconds, rows = interleaved_times(runs, x.device, repeats), []
    for policy, execution in list(runs)[2:]:
        full, taken = FULL_DEPTH, seconds[policy, execution]
        row = {"execution": f"{execution}, {policy.rule.label}"} | batch_speedups(
            model, x, y, policy
        )
        if execution == ORIGINAL:
            row["execution"], full = ORIGINAL, original_full_depth
        if execution != "compacted":
            row["speedup_flops"] = np.nan
        row |= time_columns(seconds[full], taken, *INTERVAL)
        rows.append(row | {"milliseconds": 1e3 * np.median(taken)})
    table = pd.DataFrame(rows)
    table.insert(1, "layers", model.n_layers / table["speedup_layers"])
    return table.assign(efficiency=table["speedup_time"] / table["speedup_layers"])


def compaction(
    config: ModelConfig,
    windows: int,
    length: int,
    depths: Sequence[float],
    repeats: int,
    device: torch.device,
) -> pd.DataFrame:
    """Measure compacted execution of a model with random weights and constructed exits.

    Args:
        windows, length: numbers of windows and of tokens of each in the batch.
        depths: mean layers executed, one per row.

    Returns:
        Columns depth, speedup_layers, speedup_flops, speedup_time with its 90 % interval low to high,
        and per part beyond_…_ms: its time minus that of its FLOPs at the speed of full depth.
    """
    model = random_model(config).to(device)
    x = random_tokens(config, windows, length).to(device)
    policies = {
        depth: policy_for_shares(model, x, geometric_shares(config.n_layers, depth))
        for depth in depths
    }
    table = compaction_speedups(model, x, policies, repeats)
    runs = {FULL_DEPTH: partial(model.nll, x, x)}
    runs |= {str(depth): partial(model.nll, x, x, p) for depth, p in policies.items()}
    clocked = run_times(runs, device, repeats)
    milliseconds = clocked.pivot(index="run", columns="part", values="milliseconds")
    beyond = []
    for depth, policy in policies.items():
        allowed = policy_flops(model, exit_shares(model, x, x, policy), policy)
        price = milliseconds.loc[FULL_DEPTH].sum() / allowed["full_depth"]
        fair = {part: price * allowed.get(name, 0.0) for part, name in PARTS_OF_FLOPS.items()}
        taken = milliseconds.loc[str(depth)]
        beyond.append({f"beyond_{part}_ms": taken[part] - fair[part] for part in fair})
    return table.join(pd.DataFrame(beyond))


def output_heads(
    models: Mapping[str, tuple[EarlyExitModel, ExitPolicy]],
    batch: tuple[Tensor, Tensor],
    loader: Iterable,
    repeats: int,
) -> pd.DataFrame:
    """Compare output heads by quality and by the time of scoring and of greedy prediction.

    Args:
        models: name of the head → model, and the policy it is run with.
        batch: token ids and targets ``(B, N)`` on which the runs are timed.
        loader: batches on which the quality is measured.

    Returns:
        Columns head, parameters, perplexity (full depth), quality_loss, speedup_layers; and scoring
        and prediction, each with _ms (full depth), _exits_ms and _speedup_time.
    """
    (x, y), runs, rows = batch, {}, []
    for name, (model, policy) in models.items():
        for depth, p in (("", None), ("exits_", policy)):
            runs[name, f"scoring_{depth}ms"] = partial(model.nll, x, y, p)
            runs[name, f"prediction_{depth}ms"] = partial(model.predict, x, p)
    seconds = interleaved_times(runs, x.device, repeats)
    for name, (model, policy) in models.items():
        full, real = run_rows(model, [None, policy], loader).to_dict("records")
        row = {
            "head": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": full["perplexity"],
            "quality_loss": real["quality_loss"],
            "speedup_layers": real["speedup_layers"],
        }
        for task in ("scoring", "prediction"):
            times = (f"{task}_ms", f"{task}_exits_ms")
            row |= {column: 1e3 * np.median(seconds[name, column]) for column in times}
            row[f"{task}_speedup_time"] = row[times[0]] / row[times[1]]
        rows.append(row)
    return pd.DataFrame(rows)


def price_grids(which: Literal["all", "few"]) -> dict[str, Sequence[tuple]]:
    """Return the configurations that prices are fitted and checked on, as arguments of ``calibrate``.

    Args:
        which: "all", or "few": two to fit and one to check, those with the least work in the layers.
    """
    fitted, checked = time_model.FITTED, time_model.CHECKED[:4] + time_model.MAPPED
    if which == "few":
        fitted, checked = (
            sorted(grid, key=lambda row: row[0] * row[1] * row[3] * row[4])[:count]
            for grid, count in ((fitted, 2), (checked, 1))
        )
    return {"fitted": fitted, "checked": checked}


def price_table(prices: time_model.TimeModel) -> pd.DataFrame:
    """Tabulate the prices of a machine: columns part, work (its kind), seconds_per_unit."""
    rows = [
        (part, kind, price)
        for part, kinds in prices.prices.items()
        for kind, price in kinds.items()
    ]
    return pd.DataFrame(rows, columns=["part", "work", "seconds_per_unit"])


def read_prices(
    table: pd.DataFrame, checked: pd.DataFrame | None = None, **machine
) -> time_model.TimeModel:
    """Return the prices that :func:`price_table` tabulated, of the first seed.

    Args:
        checked: table of :func:`earlyexit.cost.time_model.calibrate`, which says how far off they are.
        machine: description of the machine that they were measured on.
    """
    first = table[table["seed"] == table["seed"].iloc[0]]
    prices = {
        part: dict(zip(rows["work"], rows["seconds_per_unit"].tolist(), strict=True))
        for part, rows in first.groupby("part", sort=False)
    }
    summary = {}
    if checked is not None:
        off = checked.loc[checked["used"] == "checked", "error"].abs()
        summary = {"median_error": float(off.median()), "largest_error": float(off.max())}
    return time_model.TimeModel(prices, summary, machine)
