"""Three speedups of runs on one batch: end to end, over thresholds, over depths, and by output head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost import time_model
from earlyexit.cost.breakdown import ORIGINAL, run_times
from earlyexit.cost.parts import FULL_DEPTH, policy_flops
from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
)
from earlyexit.cost.timing import interleaved_times, median_ratio
from earlyexit.evaluation.compare import evaluator_of
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares, layers_executed
from earlyexit.nn.config import ModelConfig

# Part of a run → what :func:`earlyexit.cost.parts.policy_flops` calls it; None: no FLOPs.
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
    """One policy: its loss over a split, and what it saves on the timed batch.

    Args:
        batch: token ids and targets ``(B, N)``.
        pieces: :func:`earlyexit.cost.breakdown.run_times` of its ``execution_runs``.
        loader: batches that the quality is read on.

    Returns:
        One row: quality_loss, speedup_layers, speedup_flops, speedup_time, time_of_flops (the share of
        the FLOPs' speedup that the clock shows), original_time (of the original's procedure over that
        of compacted execution).
    """
    totals = pieces.groupby("run")["total_ms"].first()
    full, real = (evaluator_of(model).evaluate_policy(loader, p) for p in (None, policy))
    allowed = batch_speedups(model, policy, batch)
    ratio = totals[FULL_DEPTH] / totals["compacted"]
    row = {
        "quality_loss": real["perplexity"] / full["perplexity"] - 1,
        **allowed,
        "speedup_time": ratio,
        "time_of_flops": ratio / allowed["speedup_flops"],
        "original_time": totals[ORIGINAL] / totals["compacted"],
    }
    return pd.DataFrame([row])


def batch_speedups(
    model: EarlyExitModel, policy: ExitPolicy, batch: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """``speedup_layers`` and ``speedup_flops`` of a compacted run over one batch ``(B, N)``."""
    shares = exit_shares(model, *batch, policy)
    return {
        "speedup_layers": model.n_layers / _mean_layers(shares),
        "speedup_flops": policy_flops(model, shares, policy)["speedup_flops"],
    }


def _mean_layers(shares: np.ndarray) -> float:
    n_layers = len(shares) - 1
    return float(shares @ layers_executed(np.arange(n_layers + 1), n_layers))


def policies_of_quantiles(
    trace: ExitTrace, criterion: str, quantiles: Sequence[float]
) -> list[ExitPolicy]:
    """One threshold for all exits but the last, per share of the scores that is meant not to pass."""
    rule, early = CRITERIA[criterion], trace.n_layers - 1
    scores = trace.score(criterion)[:, :early]
    cuts = [np.quantile(scores, q if rule.exit_above else 1 - q) for q in quantiles]
    return [
        ExitPolicy(criterion, (float(np.clip(cut, *rule.bounds)),) * early + (rule.never,))
        for cut in cuts
    ]


def execution_speedups(
    model: EarlyExitModel,
    original: EarlyExitModel,
    batch: tuple[Tensor, Tensor],
    policies: Sequence[ExitPolicy],
    repeats: int,
) -> pd.DataFrame:
    """Layers, FLOPs and time of every way of running policies of different depths.

    Each runs compacted, and beside that dense; or, by maximum probability, in the original's procedure,
    which is set against the full depth of its own model.

    Args:
        original: the model that the original's procedure runs, with a plain matrix as its head.
        batch: token ids and targets ``(B, N)``.

    Returns:
        Columns execution, layers (mean executed), speedup_layers, speedup_flops (compacted only),
        speedup_time with its 90 % interval low to high, milliseconds, efficiency (time over layers).
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
        shares = exit_shares(model, x, y, policy)
        allowed = policy_flops(model, shares, policy)["speedup_flops"]
        full = seconds[original_full_depth if execution == ORIGINAL else FULL_DEPTH]
        ratio, low, high = median_ratio(full, seconds[policy, execution])
        label = f"{execution}, {policy.rule.label}"
        rows.append(
            {
                "execution": ORIGINAL if execution == ORIGINAL else label,
                "layers": _mean_layers(shares),
                "speedup_layers": model.n_layers / _mean_layers(shares),
                "speedup_flops": allowed if execution == "compacted" else np.nan,
                "speedup_time": ratio,
                "low": low,
                "high": high,
                "milliseconds": 1e3 * np.median(seconds[policy, execution]),
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(efficiency=table["speedup_time"] / table["speedup_layers"])


def compaction(
    config: ModelConfig,
    windows: int,
    length: int,
    depths: Sequence[float],
    repeats: int,
    device: torch.device,
) -> pd.DataFrame:
    """Compacted execution of a model with random weights and constructed exits.

    Args:
        windows, length: of the batch.
        depths: mean layers executed of each row.

    Returns:
        Columns depth, speedup_layers, speedup_flops, speedup_time with its 90 % interval low to high,
        and per part beyond_…_ms: what it takes beyond its FLOPs at the speed of full depth.
    """
    model = random_model(config).to(device)
    x = random_tokens(config, windows, length).to(device)
    policies = {
        depth: policy_for_shares(model, x, geometric_shares(config.n_layers, depth))
        for depth in depths
    }
    runs = {FULL_DEPTH: lambda: model.nll(x, x)}
    runs |= {str(depth): lambda p=p: model.nll(x, x, p) for depth, p in policies.items()}
    seconds = interleaved_times(runs, device, repeats)
    clocked = run_times(runs, device, repeats)
    milliseconds = clocked.pivot(index="run", columns="part", values="milliseconds")
    rows = []
    for depth, policy in policies.items():
        allowed = policy_flops(model, exit_shares(model, x, x, policy), policy)
        price = milliseconds.loc[FULL_DEPTH].sum() / allowed["full_depth"]
        ratio, low, high = median_ratio(seconds[FULL_DEPTH], seconds[str(depth)])
        row = {
            "depth": depth,
            "speedup_layers": config.n_layers / depth,
            "speedup_flops": allowed["speedup_flops"],
            "speedup_time": ratio,
            "low": low,
            "high": high,
        }
        for part, flops in PARTS_OF_FLOPS.items():
            fair = price * allowed[flops] if flops else 0.0
            row[f"beyond_{part}_ms"] = milliseconds.loc[str(depth), part] - fair
        rows.append(row)
    return pd.DataFrame(rows)


def output_heads(
    models: Mapping[str, tuple[EarlyExitModel, ExitPolicy]],
    batch: tuple[Tensor, Tensor],
    loader: Iterable,
    repeats: int,
) -> pd.DataFrame:
    """Models that differ in their output head: quality, and time of scoring and of greedy prediction.

    Args:
        models: name of the head → model, and the policy it is run with.
        batch: token ids and targets ``(B, N)`` that are timed; loader: that the quality is read on.

    Returns:
        Columns head, parameters, perplexity (full depth), quality_loss, speedup_layers; and for
        scoring and prediction each _ms (full depth), _exits_ms, _speedup_time.
    """
    (x, y), runs, rows = batch, {}, []
    for name, (model, policy) in models.items():
        for way, p in (("full depth", None), ("with exits", policy)):
            runs[name, "scoring", way] = lambda m=model, p=p: m.nll(x, y, p)
            runs[name, "prediction", way] = lambda m=model, p=p: m.predict(x, p)
    seconds = interleaved_times(runs, x.device, repeats)
    for name, (model, policy) in models.items():
        full, real = (evaluator_of(model).evaluate_policy(loader, p) for p in (None, policy))
        row = {
            "head": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": full["perplexity"],
            "quality_loss": real["perplexity"] / full["perplexity"] - 1,
            "speedup_layers": real["speedup_estimate"],
        }
        for task in ("scoring", "prediction"):
            full_ms, exits_ms = (
                1e3 * np.median(seconds[name, task, way]) for way in ("full depth", "with exits")
            )
            row |= {f"{task}_ms": full_ms, f"{task}_exits_ms": exits_ms}
            row[f"{task}_speedup_time"] = full_ms / exits_ms
        rows.append(row)
    return pd.DataFrame(rows)


def price_grids(which: Literal["all", "few"]) -> dict[str, Sequence[tuple]]:
    """The configurations that prices are fitted on and checked on, arguments of ``calibrate``.

    Args:
        which: all of them; or few, two and one of those with the least work in their layers.
    """
    fitted, checked = time_model.FITTED, time_model.CHECKED[:4] + time_model.MAPPED
    if which == "few":
        fitted, checked = (
            sorted(grid, key=lambda row: row[0] * row[1] * row[3] * row[4])[:count]
            for grid, count in ((fitted, 2), (checked, 1))
        )
    return {"fitted": fitted, "checked": checked}


def price_table(prices: time_model.TimeModel) -> pd.DataFrame:
    """A machine's prices: columns part, work (its kind), seconds_per_unit."""
    return pd.DataFrame(
        [
            {"part": part, "work": kind, "seconds_per_unit": price}
            for part, kinds in prices.prices.items()
            for kind, price in kinds.items()
        ]
    )
