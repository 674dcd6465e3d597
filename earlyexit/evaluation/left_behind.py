"""Compare what exited tokens may hand to deeper layers, by loss and time, for weights that are given.

Which way a model uses is a choice, so it is read on validation: the test split reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import pandas as pd
from torch import Tensor

from earlyexit.calibration.temperature import refuse_test
from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost.parts import FULL_DEPTH, run_flops
from earlyexit.cost.timing import INTERVAL, interleaved_times, median_ms, time_columns
from earlyexit.evaluation.compare import run_row
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.resnet_bk import EarlyExitLanguageModel

WAYS = ("recomputed", "kept", "potentials")  # the values of ``ModelConfig.left_behind``


def with_left_behind(model: EarlyExitLanguageModel, way: str) -> EarlyExitLanguageModel:
    """Return a model of the same weights whose exited tokens hand on what ``way`` says.

    Raises:
        ValueError: the configuration of the model refuses the way.
    """
    other = type(model).from_config(replace(model.config, left_behind=way))
    other.to(next(model.parameters())).load_state_dict(model.state_dict())
    other.trained_on = model.trained_on
    return other.eval()


def compare_ways(
    model: EarlyExitLanguageModel,
    policies: Mapping[float, ExitPolicy],
    trace: ExitTrace,
    batches: Iterable,
    batch: tuple[Tensor, Tensor],
    repeats: int,
) -> pd.DataFrame:
    """Run each policy with every way that the model's mixing has, compacted, beside full depth.

    Args:
        policies: share of the tokens that are meant to stay at each exit → policy.
        trace: trace of the fit part.
        batches: pairs of token ids and targets ``(B, N)`` of the text of the trace.
        batch: token ids and targets on which all runs are timed, interleaved.
        repeats: number of timed runs of each.

    Returns:
        One row for full depth (stay is NaN), then one per policy and way: stay, way, in_use (whether the
        model has it), perplexity, quality_loss (against full depth), left_behind (against the trace,
        where all tokens have full-depth states), layers (mean executed), flops_per_token, speedup_flops,
        milliseconds, speedup_time with its 90 % interval low to high, and against_in_use, with _low and
        _high: the time of the way in use over its own.

    Raises:
        ValueError: the trace is of the test split.
    """
    refuse_test(trace.split)
    (x, y), batches, in_use = batch, list(batches), model.config.left_behind
    runs = {(math.nan, FULL_DEPTH): (model, None)} | {
        (stay, way): (with_left_behind(model, way), replace(policy, model_hash=""))
        for stay, policy in policies.items()
        for way in WAYS
        if way != "potentials" or model.config.mixing == "resolvent"
    }
    timed = {key: partial(other.nll, x, y, policy) for key, (other, policy) in runs.items()}
    seconds, rows = interleaved_times(timed, x.device, repeats), []
    milliseconds, full_seconds = median_ms(seconds), next(iter(seconds.values()))
    full = run_row(model, None, batches)["perplexity"]
    whole = run_flops(model, model.operations().positions, None)["total"]
    for key, (other, policy) in runs.items():
        used = seconds[(key[0], in_use) if policy else key]
        real = run_row(other, policy, batches, full)
        promised = trace.evaluate(policy)["perplexity"] if policy else full
        rows.append(
            {
                "stay": key[0],
                "way": key[1],
                "in_use": key[1] == in_use,
                "perplexity": real["perplexity"],
                "quality_loss": real["quality_loss"],
                "left_behind": real["perplexity"] / promised - 1,
                "layers": model.n_layers / real["speedup_layers"],
                "flops_per_token": whole / real["speedup_flops"],
                "speedup_flops": real["speedup_flops"],
                "milliseconds": milliseconds[key],
            }
            | time_columns(full_seconds, seconds[key], *INTERVAL)
            | time_columns(used, seconds[key], "against_in_use")
        )
    return pd.DataFrame(rows)


def ways_in_words(table: pd.DataFrame) -> str:
    """Write a Markdown list: what each way loses and saves by a policy, and which beat the one in use.

    Args:
        table: the table that :func:`compare_ways` returns.
    """
    lines = []
    for stay, rows in table.groupby("stay"):
        told = [
            f"{row.way}{' (in use)' if row.in_use else ''} loses {row.quality_loss:+.1%}"
            f" ({row.left_behind:+.1%} against the trace) at {row.layers:.2f} layers and saves"
            f" {row.speedup_flops:.2f}× in FLOPs, {row.speedup_time:.2f}×"
            f" [{row.low:.2f}, {row.high:.2f}] in wall-clock"
            for row in rows.itertuples()
        ]
        used = rows[rows["in_use"]].iloc[0]
        better = rows.loc[rows["perplexity"] < used["perplexity"], "way"]
        faster = rows.loc[rows["against_in_use_low"] > 1, "way"]
        lines.append(
            f"- Meant to stay: {stay:.0%}: {'; '.join(told)}. Better than **{used['way']}** by loss:"
            f" {', '.join(better) or 'none'}; by time, beyond its interval:"
            f" {', '.join(faster) or 'none'}."
        )
    return "\n".join(lines)
