"""Price what generation is made of, and say from which acceptance on drafts would pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from torch import Tensor

from earlyexit.cost.timing import interleaved_times
from earlyexit.evaluation.decoding import Methods, accepted_share, alone, drawn, generate_all
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.fused import FusedDecoder, Texts
from earlyexit.exits.generation import Generated
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn import decode_loops as loops
from earlyexit.nn.decode_loops import Choice, Rule

PRICED, ROUNDS = 64, 3  # passes of a part that is timed, and how often, over the repeats of a run


def prices(model: EarlyExitModel, prompts: Tensor, max_draft: int, repeats: int) -> pd.DataFrame:
    """Time what decoding is made of, in passes of 1 … ``max_draft`` + 1 rows that read prompts.

    A head is what it adds to the layers before it, whose states decide which words it looks at, in the
    median over rounds: both are timed in each.

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
    seconds = interleaved_times(runs, next(model.parameters()).device, ROUNDS * repeats)

    def of_row(seconds: np.ndarray, joined: int) -> float:
        return 1e6 * np.median(seconds) / (PRICED * joined)

    rows = [
        ("head", k, joined, of_row(with_head - seconds[k, False, joined], joined))
        for (k, head, joined), with_head in seconds.items()
        if head
    ]
    rows += [
        ("layer", -1, joined, of_row(seconds[n_layers - 1, False, joined], joined) / n_layers)
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
                "acceptance": accepted_share(made),
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
    at_one, rows, last = alone(speed).set_index("method"), [], model.n_layers - 1
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
