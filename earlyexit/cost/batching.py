"""Batching by difficulty: windows of similar predicted depth together, against random batches.

Dense execution waits for a batch's slowest token; compacted execution does not, and what grouping does
for it is only to give its layers batches of more even size. The prediction costs one layer: the score
of the first exit, averaged over the window. For comparison, hindsight groups by the depth really run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from earlyexit.cost.parts import FULL_DEPTH
from earlyexit.cost.timing import interleaved_times, median_ms
from earlyexit.exits.execution import decide
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel, exit_state
from earlyexit.exits.statistics import layers_executed

SMALLEST_POOL = 64  # windows that batches are drawn from, at least
BATCHES = 2  # at least so many in a pool, or there would be nothing to group


@torch.no_grad()
def predicted_difficulty(
    model: ExitModel, x: Tensor, policy: ExitPolicy, batch: int = 32
) -> np.ndarray:
    """Mean score of a window's tokens at the first exit, larger where they will run deeper.

    Args:
        x: windows of token ids ``(W, N)``.
        policy: its criterion must not read logits.
        batch: windows at a time.

    Returns:
        One number per window ``(W,)``; costs the first layer only.

    Raises:
        ValueError: the criterion reads logits, or the model has one layer.
    """
    if policy.rule.reads == "logits" or model.n_layers < 2:
        raise ValueError("a cheap prediction needs a criterion of the state, and a second layer")
    means = []
    for part in x.split(batch):
        before = model.embed(part)
        after = model.layer(0, before)
        state = exit_state(model, 0, after.flatten(0, 1), before.flatten(0, 1))
        means.append(policy.rule.score(state).view_as(part).double().mean(dim=1))
    score = torch.cat(means).cpu().numpy()
    return -score if policy.rule.exit_above else score


def executed_depth(model: ExitModel, x: Tensor, policy: ExitPolicy, batch: int = 32) -> np.ndarray:
    """Layers executed of every token ``(W, N)``, run for real."""
    exits = torch.cat([decide(model, p, policy).exit_layers.view_as(p) for p in x.split(batch)])
    return layers_executed(exits, model.n_layers).cpu().numpy()


def batches(
    difficulty: np.ndarray | None, windows: int, size: int, seed: int = 0
) -> list[np.ndarray]:
    """Indices of the windows of each batch, by rising difficulty, or at random where it is None.

    Raises:
        ValueError: a size below 1, or difficulties of another number of windows.
    """
    if size < 1:
        raise ValueError(f"batch size {size} must be at least 1")
    if difficulty is None:
        order = np.random.default_rng(seed).permutation(windows)
    elif len(difficulty) != windows:
        raise ValueError(f"{len(difficulty)} difficulties for {windows} windows")
    else:
        order = np.argsort(difficulty, kind="stable")
    return np.split(order, range(size, windows, size))


@torch.no_grad()
def throughput(
    model: ExitModel,
    x: Tensor,
    policy: ExitPolicy,
    batch_sizes: Sequence[int],
    repeats: int = 3,
) -> pd.DataFrame:
    """Tokens per second of layers and checks; the output head, the same for all, is not run.

    Args:
        x: windows ``(W, N)`` to draw from; a batch size takes 64 of them at least, and two batches.

    Returns:
        One row per batch size, execution and grouping ("random", "first exit", "hindsight"; "" at
        full depth): tokens_per_second, layers_run (until a batch's slowest token has left, mean over
        batches), speedup_time (wall-clock, against full depth in the same batches' size), windows.
    """
    never, rows = ExitPolicy.static(model.n_layers, model.n_layers), []
    for size in tqdm(batch_sizes, desc="batch sizes", leave=False):
        pool = x[: max(SMALLEST_POOL, BATCHES * size)]
        depth = executed_depth(model, pool, policy)
        signals = {
            "random": None,
            "first exit": predicted_difficulty(model, pool, policy),
            "hindsight": depth.max(axis=1) + depth.mean(axis=1) / model.n_layers,
        }
        runs, slowest = {}, {"": float(model.n_layers)}
        for grouping, signal in signals.items():
            groups = batches(signal, len(pool), size)
            parts = [pool[torch.from_numpy(g).to(pool.device)] for g in groups]
            slowest[grouping] = float(np.mean([depth[g].max() for g in groups]))
            for execution in ("compacted", "dense"):
                runs[execution, grouping] = partial(_run_all, model, parts, policy, execution)
            if signal is None:
                runs[FULL_DEPTH, ""] = partial(_run_all, model, parts, never, "compacted")
        medians = median_ms(interleaved_times(runs, x.device, repeats))
        rows += [
            {
                "batch": size,
                "execution": execution,
                "grouping": grouping,
                "tokens_per_second": 1e3 * pool.numel() / median,
                "layers_run": slowest[grouping],
                "speedup_time": medians[FULL_DEPTH, ""] / median,
                "windows": len(pool),
            }
            for (execution, grouping), median in medians.items()
        ]
    return pd.DataFrame(rows)


def _run_all(model: ExitModel, parts: list[Tensor], policy: ExitPolicy, execution: str) -> None:
    for part in parts:
        decide(model, part, policy, execution)
