"""Measure generation: how fast words come by each way of decoding, and how good they are.

Every speedup is against the best plain decoder there is: the same compiled loops at full depth, without
any exit head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.cost.timing import interleaved_times, time_columns
from earlyexit.evaluation.compare import of_depth
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.generation import Generated, decode
from earlyexit.exits.policy import ExitPolicy

PLAIN, STEPPED = "full depth", "full depth, not compiled"
Methods = Mapping[str, dict[str, Any]]  # name → options of ``decode``; ``model`` is another one


def generate_all(
    model: EarlyExitModel, prompts: Tensor, n_new: int, batch_size: int, options: Mapping[str, Any]
) -> list[Generated]:
    """Continue prompts ``(B, N)`` by ``n_new`` words, ``batch_size`` at a time.

    Weights are packed once, and a policy's origin is not checked for every prompt.
    """
    used = options.get("model", model)
    how = {"weights": used.packed_weights()} | {k: v for k, v in options.items() if k != "model"}
    return [decode(used, part, n_new, **how) for part in prompts.split(batch_size)]


@torch.no_grad()
def shortened(model: EarlyExitModel, depth: int) -> EarlyExitModel:
    """Return a model of the first ``depth`` layers that ends with their exit's head.

    It takes as long for a word as a model of that depth that was trained alone, but for the head's d×d
    map, which such a model does not need.
    """
    short, weights = of_depth(model, depth), model.state_dict()
    short.blocks[-1].exit_classifier = model.blocks[depth - 1].exit_classifier
    short.load_state_dict({name: weights[name] for name in short.state_dict()})
    return short


def smaller_models(model: EarlyExitModel, depths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return methods that decode with models of fewer layers, whose words are not told."""
    return {
        f"trained alone, {k} layer{'s' if k > 1 else ''}": {"model": shortened(model, k)}
        for k in depths
        if k < model.n_layers
    }


def speeds(
    model: EarlyExitModel,
    methods: Methods,
    prompts: Tensor,
    n_new: int,
    batch_sizes: Sequence[int],
    repeats: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Time all methods on the same prompts ``(B, N)``, which are part of the time.

    Args:
        methods: one of them is ``PLAIN``; those of :func:`smaller_models` name no words of their own.
        temperature: 0 takes the most probable words; otherwise they are drawn, in every run the same.

    Returns:
        One row per method and batch size: temperature, words_per_second, speedup_time with its 90 %
        interval, layers (per word; what a draft ran in vain counts), acceptance (share of the drafted
        words upon which was decided; NaN without drafts), and same_words, the share that is that of full
        depth (NaN where words are drawn: drafts use random numbers in another order; and of smaller
        models).
    """
    rows, device = [], next(model.parameters()).device
    for size in batch_sizes:
        runs: dict[str, Callable] = {
            name: lambda o=options, b=size: generate_all(
                model, prompts, n_new, b, o | drawn(temperature, seed)
            )
            for name, options in methods.items()
        }
        seconds = interleaved_times(runs, device, repeats)
        made = {name: run() for name, run in runs.items()}
        words = {k: torch.cat([g.ids for g in found]) for k, found in made.items()}
        for name, found in made.items():
            same = np.nan
            if temperature == 0 and "model" not in methods[name]:
                same = _same(words[name], words[PLAIN], prompts.shape[1])
            rows.append(
                {
                    "method": name,
                    "batch": size,
                    "temperature": temperature,
                    "words_per_second": len(prompts) * n_new / np.median(seconds[name]),
                    **time_columns(seconds[PLAIN], seconds[name]),
                    "layers": np.mean([g.layers for g in found]),
                    "acceptance": accepted_share(found),
                    "same_words": same,
                }
            )
    return pd.DataFrame(rows)


def drawn(temperature: float, seed: int) -> dict[str, Any]:
    """Return the options with which words are drawn, from random numbers that begin anew."""
    return {"temperature": temperature, "generator": torch.Generator().manual_seed(seed)}


def stepped(model: EarlyExitModel, prompts: Tensor, n_new: int, repeats: int) -> pd.DataFrame:
    """Time decoding at full depth through the contract, a row as those of :func:`speeds`."""
    full = ExitPolicy.static(model.n_layers, model.n_layers)
    runs = {
        PLAIN: lambda: generate_all(model, prompts, n_new, 1, {}),
        STEPPED: lambda: generate_all(model, prompts, n_new, 1, {"policy": full, "weights": None}),
    }
    seconds = interleaved_times(runs, next(model.parameters()).device, repeats)
    words = len(prompts) * n_new / np.median(seconds[STEPPED])
    speed = time_columns(seconds[PLAIN], seconds[STEPPED])
    about = {"method": STEPPED, "batch": 1, "temperature": 0.0, "words_per_second": words}
    (plain,), (found,) = (run() for run in runs.values())
    same = _same(found.ids, plain.ids, prompts.shape[1])
    rest = {"layers": model.n_layers, "acceptance": np.nan, "same_words": same}
    return pd.DataFrame([about | speed | rest])


def accepted_share(found: Sequence[Generated]) -> float:
    """Return the share that stood of the drafted words upon which was decided; NaN: there was none."""
    if found[0].drafts is None:
        return np.nan
    _, decided, stood, _ = sum(g.drafts for g in found)
    return float(stood.sum() / decided.sum()) if decided.sum() else np.nan


def _same(ids: Tensor, others: Tensor, known: int) -> float:
    return (ids == others)[:, known:].double().mean().item()


@torch.no_grad()
def quality(
    model: EarlyExitModel,
    methods: Methods,
    prompts: Tensor,
    n_new: int,
    temperatures: Sequence[float],
    seed: int = 0,
) -> pd.DataFrame:
    """Score generated words by the last layer, which draws among other words each time.

    Returns:
        Columns method, temperature, words, nll (nats), standard_error (over the prompts).
    """
    rows = []
    for temperature in temperatures:
        for name, options in methods.items():
            ids = model.decode(prompts, n_new, **options | drawn(temperature, seed)).ids
            nll = model.nll(ids[:, :-1], ids[:, 1:])[:, prompts.shape[1] - 1 :]
            about = {"method": name, "temperature": temperature, "words": nll.numel()}
            means = nll.double().mean(dim=1).numpy()
            error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.nan
            rows.append(about | {"nll": means.mean(), "standard_error": error})
    return pd.DataFrame(rows)


def alone(speed: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the most probable words, one sequence at a time."""
    return speed[(speed["batch"] == 1) & (speed["temperature"] == 0)]


def fixed_drafts(n_layers: int, lengths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return methods that draft with every exit but the last, as many words each time."""
    return {
        f"lossless, exit {k + 1}, {m} drafted": {
            "policy": ExitPolicy.static(k, n_layers), "max_draft": m,
        }
        for k in range(n_layers - 1)
        for m in lengths
    }  # fmt: skip


def gated_drafts(
    n_layers: int, thresholds: Sequence[float], max_draft: int
) -> dict[str, dict[str, Any]]:
    """Return methods that draft while a gate sees the last layer agree with such a probability."""
    return {
        f"lossless, gate {threshold:g}": {
            "policy": ExitPolicy("agreement", (threshold,) * (n_layers - 1) + (np.inf,)),
            "max_draft": max_draft,
        }
        for threshold in thresholds
    }


def fastest(speed: pd.DataFrame, methods: Methods) -> dict[str, dict[str, Any]]:
    """Return the method of a table of :func:`speeds` with most words per second at batch 1."""
    at_one = alone(speed[speed["method"].isin(list(methods))])
    name = at_one.loc[at_one["words_per_second"].idxmax(), "method"]
    return {name: methods[name]}


def verdict(
    speed: pd.DataFrame,
    plain: pd.DataFrame,
    accepted: pd.DataFrame,
    lossy: str,
    lossless: Sequence[str],
) -> str:
    """Say what exits save at batch 1, and why drafts pay or not.

    Args:
        speed: :func:`speeds` of the methods, for the most probable words, and for drawn ones or not.
        plain: :func:`plain_parts`; accepted: :func:`acceptance`.
        lossy, lossless: methods, of which the fastest lossless one is told.
    """
    at_one = alone(speed).set_index("method")
    best = at_one.loc[list(lossless), "speedup_time"].idxmax()
    part = plain.set_index("part")["microseconds"]
    accepted = accepted[accepted["temperature"] == 0]
    margin = (accepted["acceptance"] - accepted["needed"]).dropna()
    row = accepted.loc[margin.idxmax()] if len(margin) else None
    why = "not even drafts that always stand would pay, at any length"
    if row is not None:
        why = (
            f"of drafts of one length those of {row['draft']:.0f} words by exit"
            f" {row['exit_layer'] + 1:.0f} come nearest to paying, or pay best:"
            f" {row['acceptance']:.0%} stand, where {row['needed']:.0%} would break even"
        )
    said = (
        f"At batch 1, {at_one.loc[PLAIN, 'words_per_second']:,.0f} words per second at full depth,"
        f" {part['head'] / (part['head'] + part['layers']):.0%} of the time for the head. {lossy}:"
        f" **{_ratio(at_one.loc[lossy])}** at {at_one.loc[lossy, 'layers']:.2f} layers a word. {best}:"
        f" **{_ratio(at_one.loc[best])}**, {at_one.loc[best, 'same_words']:.0%} the same words; {why}."
    )
    for temperature, rows in speed[speed["temperature"] > 0].groupby("temperature"):
        by = rows[rows["batch"] == 1].set_index("method")
        fastest = by.loc[list(lossless), "speedup_time"].idxmax()
        said += (
            f" Of words drawn at temperature {temperature:g}: {lossy} **{_ratio(by.loc[lossy])}** at"
            f" {by.loc[lossy, 'layers']:.2f} layers, {fastest} **{_ratio(by.loc[fastest])}**."
        )
    return said


def _ratio(row: pd.Series) -> str:
    low, high = row["speedup_time_low"], row["speedup_time_high"]
    return f"{row['speedup_time']:.2f} [{low:.2f}, {high:.2f}]×"
