"""Measure generation: how fast words come by each way of decoding, why, and how good they are.

Every speedup is against the best plain decoder there is: the same compiled loops at full depth, without
any exit head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from torch import Tensor

from earlyexit.cost.timing import interleaved_times, time_columns
from earlyexit.evaluation.compare import of_depth
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.fused import FusedDecoder, Texts
from earlyexit.exits.generation import Generated, decode
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn import decode_loops as loops
from earlyexit.nn.decode_loops import Choice, Rule

PLAIN, STEPPED = "full depth", "full depth, not compiled"
Methods = Mapping[str, dict[str, Any]]  # name → options of ``decode``; ``model`` is another one
PRICED = 64  # passes of a part that is timed


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
                    "acceptance": _acceptance(found),
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


def _acceptance(found: Sequence[Generated]) -> float:
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


def prices(model: EarlyExitModel, prompts: Tensor, max_draft: int, repeats: int) -> pd.DataFrame:
    """Time what decoding is made of, in passes of 1 … ``max_draft`` + 1 rows that read prompts.

    A head is what it adds to the layers before it, whose states decide which words it looks at.

    Returns:
        Columns part ("layer", "head"), exit_layer (whose head; −1 for a layer, which is their mean),
        joined (rows of a pass), microseconds (of one row: the median).
    """
    weights, n_layers, runs = model.packed_weights(), model.n_layers, {}
    room, words = loops.rows(weights, max_draft + 1), prompts.flatten().numpy()
    core = model.blocks[0].bk_layer.mixing.bk_core
    state = np.zeros((n_layers, max_draft + 2, 2, core.n_heads * (1 + core.n_values)))

    def run(layers: int, head: bool, joined: int) -> Callable:
        how = layers, head, joined, PRICED, words, state, room
        return lambda: loops.price(weights, *how)

    for joined in range(1, max_draft + 2):
        for k in range(n_layers) if joined in (1, max_draft + 1) else [n_layers - 1]:
            runs |= {(k, head, joined): run(k + 1, head, joined) for head in (False, True)}
    seconds = interleaved_times(runs, next(model.parameters()).device, repeats)
    row = {key: 1e6 * np.median(taken) / (PRICED * key[2]) for key, taken in seconds.items()}
    rows = [
        ("head", k, joined, row[k, True, joined] - row[k, False, joined])
        for k, head, joined in row
        if head
    ]
    rows += [
        ("layer", -1, joined, row[n_layers - 1, False, joined] / n_layers)
        for joined in range(1, max_draft + 2)
    ]
    return pd.DataFrame(rows, columns=["part", "exit_layer", "joined", "microseconds"])


def plain_parts(model: EarlyExitModel, prompts: Tensor, n_new: int, repeats: int) -> pd.DataFrame:
    """Time plain decoding at batch 1 whole and with parts left out: columns part, microseconds a word.

    The layers are run over words that stand there already; the head is what choosing the most probable
    word adds, and drawing what choosing at random adds to that.
    """
    weights, (count, known) = model.packed_weights(), prompts.shape
    full = Rule(loops.DEPTH, np.full(model.n_layers, np.inf), 0.0)

    def run(temperature: float, read: bool) -> None:
        for prompt in prompts.numpy():
            ids = np.zeros((1, known + n_new), dtype=np.int64)
            ids[0, :known] = prompt
            length, end = np.array([known]), np.array([known + n_new])
            texts = Texts(
                ids, np.zeros_like(ids), length.copy(), length, end, Choice(temperature, 1.0),
                np.random.default_rng(0).random, np.zeros(0, dtype=np.int64),
            )  # fmt: skip
            FusedDecoder(weights, texts, full).advance(n_new, read)

    runs = {"layers": (0.0, False), "head": (0.0, True), "drawing": (1.0, True)}
    calls = {name: lambda how=how: run(*how) for name, how in runs.items()}
    seconds = interleaved_times(calls, torch.device("cpu"), repeats)
    total = np.array([np.median(seconds[name]) for name in runs]) / (count * n_new)
    return pd.DataFrame({"part": list(runs), "microseconds": 1e6 * np.diff(total, prepend=0)})


def acceptance(
    model: EarlyExitModel,
    prompts: Tensor,
    n_new: int,
    lengths: Sequence[int],
    cost: pd.DataFrame,
    temperatures: Sequence[float] = (0.0,),
    seed: int = 0,
) -> pd.DataFrame:
    """Draft with every exit and every length, beside the acceptance with which that would pay.

    Args:
        cost: prices of parts, those of :func:`prices`, with drafts at least as long.
        temperatures: 0 verifies the most probable words; others draw words, by the rejection rule.

    Returns:
        Columns temperature, exit_layer, draft (its length), acceptance (share of the drafted words upon
        which was decided), words_per_pass, needed (of words that are not drawn; NaN: not even drafts
        that always stand would pay).
    """
    rows, n_layers = [], model.n_layers
    for temperature, exit_layer, length in product(temperatures, range(n_layers - 1), lengths):
        draft = {"policy": ExitPolicy.static(exit_layer, n_layers), "max_draft": length}
        made = generate_all(model, prompts, n_new, 1, draft | drawn(temperature, seed))
        passes = sum(_passes(g).sum() for g in made)
        rows.append(
            {
                "temperature": temperature,
                "exit_layer": exit_layer,
                "draft": length,
                "acceptance": _acceptance(made),
                "words_per_pass": len(prompts) * n_new / passes,
                "needed": needed_acceptance(cost, n_layers, exit_layer, length),
            }
        )
    return pd.DataFrame(rows)


def _passes(made: Generated) -> np.ndarray:
    """Return how many passes of 1, 2, … rows the last layer ran."""
    rows = made.drafts[3, -1].numpy()
    return rows // np.arange(1, len(rows) + 1)


def needed_acceptance(cost: pd.DataFrame, n_layers: int, exit_layer: int, draft: int) -> float:
    """Return the acceptance a at which a draft of m words takes as long as plain decoding.

    If each word stands with probability a, given that those before it do, a round gives
    1 + a + … + a^m words. It takes m + 1 rows of the first layers and m of the exit's head one by one,
    and m + 1 rows of the other layers and of the last head in one pass. NaN if a > 1 would be needed.
    """
    of = cost.set_index(["part", "exit_layer", "joined"])["microseconds"]
    early, rows = exit_layer + 1, draft + 1
    plain = n_layers * of["layer", -1, 1] + of["head", n_layers - 1, 1]
    drafted = rows * early * of["layer", -1, 1] + draft * of["head", exit_layer, 1]
    verified = rows * ((n_layers - early) * of["layer", -1, rows] + of["head", n_layers - 1, rows])
    words = (drafted + verified) / plain

    def missing(a: float) -> float:
        return sum(a**k for k in range(rows)) - words

    return float("nan") if missing(1.0) < 0 else brentq(missing, 0.0, 1.0) if words > 1 else 0.0


def breakdown(
    model: EarlyExitModel, methods: Methods, prompts: Tensor, n_new: int, cost: pd.DataFrame,
    speed: pd.DataFrame,
) -> pd.DataFrame:  # fmt: skip
    """Say where the time of a word goes at batch 1: counts of rows and heads, times their prices.

    Args:
        speed: :func:`speeds` of the methods, for the most probable words.

    Returns:
        Columns method, part, microseconds (of a word). "rest" is what was measured beyond the parts:
        checks, what exited words hand on, the prompt, and the rounding of prices.
    """
    of = cost.set_index(["part", "exit_layer", "joined"])["microseconds"]
    at_one, rows, last = _alone(speed).set_index("method"), [], model.n_layers - 1
    for name, options in methods.items():
        made = generate_all(model, prompts, n_new, 1, options)
        words = len(prompts) * n_new
        if made[0].drafts is None:
            exits = torch.cat([g.exits[:, prompts.shape[1] - 1 :] for g in made]).clamp_max(last)
            heads = np.bincount(exits.flatten().numpy(), minlength=last + 1)
            parts = {
                "layers": (exits + 1).sum().item() * of["layer", -1, 1],
                "heads": sum(n * of["head", k, 1] for k, n in enumerate(heads)),
            }
        else:
            drafted, _, _, ran = sum(g.drafts for g in made).numpy()
            joined = np.arange(1, ran.shape[1] + 1)
            layer = np.array([of["layer", -1, n] for n in joined])
            head = np.array([of["head", last, n] for n in joined])
            parts = {
                "layers": ran[:, 0].sum() * layer[0],
                "heads": sum(n * of["head", k, 1] for k, n in enumerate(drafted.sum(1)))
                + ran[-1, 0] * head[0],
                "layers, joined": (ran[:, 1:].sum(0) * layer[1:]).sum(),
                "heads, joined": (ran[-1, 1:] * head[1:]).sum(),
            }
        told = 1e6 / at_one.loc[name, "words_per_second"]
        parts = {part: total / words for part, total in parts.items()}
        parts["rest"] = told - sum(parts.values())
        rows += [{"method": name, "part": part, "microseconds": x} for part, x in parts.items()]
    return pd.DataFrame(rows)


def _alone(speed: pd.DataFrame) -> pd.DataFrame:
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
    at_one = _alone(speed[speed["method"].isin(list(methods))])
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
    at_one = _alone(speed).set_index("method")
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
